"""One measurement of another tool, in whatever interpreter has it.

`python _peers.py nni|tfmot SIDE` prunes one SIDE x SIDE float32 matrix to 80 % by magnitude, as its users would, a
smaller one first, and prints seconds. `python _peers.py onnxsim SOURCE TARGET` prunes a file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

SPARSITY = 0.8


def nni(side: int) -> Callable[[], object]:
    import torch
    from nni.compression.pruning import LevelPruner

    model = torch.nn.Sequential(torch.nn.Linear(side, side, bias=False))
    pruner = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": SPARSITY}])
    return lambda: pruner.compress()


def tfmot(side: int) -> Callable[[], object]:
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl, pruning_schedule

    weight = tf.Variable(tf.random.normal((side, side)))
    mask, threshold = tf.Variable(tf.ones((side, side))), tf.Variable(0.0)
    schedule = pruning_schedule.ConstantSparsity(SPARSITY, 0)
    pruning = pruning_impl.Pruning(lambda: 0, [(weight, mask, threshold)], schedule, (1, 1), "AVG")

    def run() -> None:
        pruning.conditional_mask_update()
        pruning.weight_mask_op()

    return run


def onnxsim(source: str, target: str) -> None:
    import onnx
    from onnxsim import apply_magnitude_pruning

    onnx.save(apply_magnitude_pruning(source, sparsity=SPARSITY), target)


def main() -> None:
    if sys.argv[1] == "onnxsim":
        onnxsim(*sys.argv[2:4])
        return
    make = {"nni": nni, "tfmot": tfmot}[sys.argv[1]]
    make(256)()
    run = make(int(sys.argv[2]))
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
