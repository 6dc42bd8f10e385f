"""Calibration that was interrupted goes on to the same bytes, and leaves nothing behind."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forked import server
from nets import parse

from onnxprune import PruneError, prune
from onnxprune.checkpoint import Checkpoint

NET = """(float[N,4,9,9] x) => (float[N,5] y) {
    a = Conv<kernel_shape=[3,3]>(x, first, bias)
    b = BatchNormalization(a, scale, shift, mean, variance)
    c = Relu(b)
    d = Conv<kernel_shape=[3,3]>(c, second)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    q = MatMul(f, query) k = MatMul(f, key)
    g = Mul(q, k) h = Sigmoid(g)
    y = Gemm(h, last, offset)
}"""


def net() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {
        "first": (8, 4, 3, 3), "bias": (8,), "scale": (8,), "shift": (8,), "mean": (8,), "second": (12, 8, 3, 3),
        "query": (12, 16), "key": (12, 16), "last": (16, 5), "offset": (5,),
    }  # fmt: skip
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return parse(NET, **arrays, variance=rng.random(8).astype(np.float32) + 0.5)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(net(), "model.onnx")
    x = np.random.default_rng(1).standard_normal((40, 4, 9, 9)).astype(np.float32)
    np.savez("some.npz", x=x)
    return tmp_path


HOW = {
    "reconstruct": {"reconstruct": True},
    "sparsegpt": {"pruner": "sparsegpt"},
    "both": {"pruner": "sparsegpt", "reconstruct": True},
    "channels": {"reconstruct": True, "pattern": "channel"},
}


def run(how: dict[str, Any], output: str, keep: str | None, sparsity: float = 0.5) -> None:
    config = {**how, "config_list": [{"sparsity": sparsity}]}
    prune("model.onnx", config, output, calibration="some.npz", threads=1, max_memory="64MB", checkpoint=keep)


@pytest.mark.usefixtures("scene")
@pytest.mark.parametrize(
    "how", ["both", "channels", *(pytest.param(h, marks=pytest.mark.slow) for h in ("reconstruct", "sparsegpt"))]
)
def test_interrupted_after_any_layer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(HOW[how], "whole.onnx", "keep")
    assert not list(Path().glob("keep*"))
    add = Checkpoint.add
    steps = 0
    while True:
        steps += 1
        left = steps

        def interrupted(self: Checkpoint, *given: Any) -> None:
            nonlocal left
            add(self, *given)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoint, "add", interrupted)
        try:
            run(HOW[how], "out.onnx", "keep")
        except KeyboardInterrupt:
            assert len(list(Path().glob("keep*"))) == 1 + steps
            assert not Path("out.onnx").exists()
        else:
            break
        left = 0
        with pytest.raises(PruneError, match=r"'keep' is the checkpoint of an interrupted run with other options"):
            run(HOW[how], "out.onnx", "keep", 0.25)
        run(HOW[how], "out.onnx", "keep")
        assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
        assert not list(Path().glob("keep*"))
        Path("out.onnx").unlink()
    assert steps > 3


@pytest.mark.usefixtures("scene")
def test_what_was_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that begins anew would give the same bytes: the steps are counted."""
    from onnxprune.layerwise import Refit

    settle, settled = Refit._settle, []
    add = Checkpoint.add

    def counted(self: Refit, part: Any, *given: Any) -> None:
        settled.append(part.weight.name)
        settle(self, part, *given)

    def interrupted(self: Checkpoint, name: str, *given: Any) -> None:
        add(self, name, *given)
        if len(settled) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Refit, "_settle", counted)
    monkeypatch.setattr(Checkpoint, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(HOW["both"], "out.onnx", "keep")
    monkeypatch.setattr(Checkpoint, "add", add)
    run(HOW["both"], "out.onnx", "keep")
    assert sorted(settled) == sorted(["first", "second", "query", "key", "last"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments(count: int, scene: Path) -> None:
    """The command, killed again and again and then not, ends as if it never had been."""
    line = (
        "prune model.onnx -o {} --sparsity 0.5 --pruner sparsegpt --reconstruct --calibration some.npz --no-benchmark"
    )
    moments = random.Random(count)
    kept = killed = 0
    with server(ONNXPRUNE_CACHE="") as forked:
        whole = forked.run(line.format("whole.onnx").split(), scene)
        assert whole.status == 0, whole.err
        for attempt in range(count):
            moment = whole.seconds * moments.uniform(0.2, 1.0)
            done = forked.run(line.format("out.onnx").split(), scene, killed_after=moment)
            assert done.status in (0, -9), done.err
            killed += done.status == -9
            kept += Path("out.onnx.checkpoint").exists()
            if attempt + 1 == count:
                done = forked.run(line.format("out.onnx").split(), scene)
                assert done.status == 0, done.err
            if done.status == 0:
                assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
                Path("out.onnx").unlink()
        forked.run(["prune", "model.onnx", "-o", "out.onnx", "--sparsity", "0.5", "--no-benchmark"], scene)
    assert killed
    assert kept or count < 10
    assert {p.name for p in scene.iterdir()} == {"model.onnx", "some.npz", "whole.onnx", "out.onnx"}
