"""Covers: the groups that a weight's zeros allow lose nothing, planted ones are found, and unstructured zeros pay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from nets import parse
from test_lowering import Always

import onnxprune
from onnxprune.graph.model import load
from onnxprune.lowering.cover import SMALLEST, WORTH, cover
from onnxprune.lowering.lower import lowered


def check(live: np.ndarray, parts: int = 1) -> None:
    """Every entry that is not zero is in its output's group, outputs come once, and parts read inputs of their own."""
    found = cover(live, parts)
    if found is None:
        return
    outputs, inputs = live.shape
    assert sorted(found.outputs.reshape(-1).tolist()) == list(range(outputs))
    assert found.kept <= WORTH * inputs
    left = np.zeros((outputs, inputs * parts), bool)
    for rows, columns, used in zip(found.outputs, found.inputs, found.live, strict=True):
        assert np.unique(columns[used]).size == used.sum()
        left[np.ix_(rows, columns[used])] = True
        own = rows // (outputs // parts)
        assert (own == own[0]).all()
        assert (columns // inputs == own[0]).all()
    wanted = np.zeros_like(left)
    for row, reads in enumerate(live):
        wanted[row, np.flatnonzero(reads) + row // (outputs // parts) * inputs] = True
    assert not (wanted & ~left).any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("density", [0.5, 0.1, 0.03, 0.005])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_covers_of_scattered_zeros_lose_nothing(density, parts, seed):
    rng = np.random.default_rng(seed)
    outputs, inputs = int(rng.integers(2, 8)) * 16, int(rng.integers(8, 80))
    check(rng.random((outputs, inputs)) < density, parts)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("thinned", [False, True])
def test_planted_groups_are_found(seed, parts, thinned):
    """Rows of one support lie scattered; of some, single entries are zero as well, and empty rows go anywhere."""
    rng = np.random.default_rng(seed)
    size, kept, inputs = int(rng.choice([8, 16, 24])), 10, 40
    each = 4 * size
    live = np.zeros((parts * each, inputs), bool)
    for part in range(parts):
        for rows in rng.permutation(each).reshape(4, size):
            live[np.ix_(part * each + rows, rng.permutation(inputs)[:kept])] = True
            if thinned:
                live[part * each + rows[1], rng.integers(inputs, size=5)] = False
                live[part * each + rows[2]] = False
    check(live, parts)
    found = cover(live, parts)
    assert found is not None
    assert (found.size, found.kept, found.groups) == (size, kept, 4 * parts)


def test_parts_with_the_same_supports_share_no_group():
    live = np.zeros((32, 8), bool)
    live[::2, :4] = live[1::2, 4:] = True
    check(live, 2)
    found = cover(live, 2)
    assert found is not None
    assert found.outputs.tolist() == [[*range(s, s + 16, 2)] for s in (0, 1)] + [
        [*range(s, s + 16, 2)] for s in (16, 17)
    ]


def test_literal():
    live = np.zeros((16, 6), bool)
    live[::2, [0, 3]] = live[1::2, [1, 5]] = True
    live[1, 5] = False
    found = cover(live)
    assert found is not None
    assert found.outputs.tolist() == [[*range(0, 16, 2)], [*range(1, 16, 2)]]
    assert found.inputs.tolist() == [[0, 3], [1, 5]]
    assert not found.ordered
    assert SMALLEST == 8


@pytest.mark.parametrize("live", [np.ones((16, 16), bool), np.zeros((16, 16), bool), np.eye(16, dtype=bool)[:, ::-1]])
def test_what_has_no_cover_or_one_input_each(live):
    check(live)
    found = cover(live)
    assert found is None or found.kept <= 8
    assert (found is None) == bool(live.all())


NETS = {
    "mlp": (
        "(float[N, 64] x) => (float[N, 48] y) { h = Gemm <transB = 1> (x, a, b) r = Relu (h) "
        "i = Gemm <transB = 1> (r, c, d) s = Sigmoid (i) y = MatMul (s, e) }",
        {"a": (128, 64), "b": (128,), "c": (96, 128), "d": (96,), "e": (96, 48)},
    ),
    "cnn": (
        "(float[N, 16, 9, 9] x) => (float[N, 32, 7, 7] y) { h = Conv <pads = [1, 1, 1, 1]> (x, a, b) r = Relu (h) "
        "i = Conv (r, c, d) s = Relu (i) y = Conv (s, e) }",
        {"a": (64, 16, 3, 3), "b": (64,), "c": (64, 64, 3, 3), "d": (64,), "e": (32, 64, 1, 1)},
    ),
    "residual": (
        "(float[N, 32, 5, 5] x) => (float[N, 32, 5, 5] y) { h = Conv <pads = [1, 1, 1, 1]> (x, a, b) r = Relu (h) "
        "i = Conv (r, c, d) y = Add (i, x) }",
        {"a": (64, 32, 3, 3), "b": (64,), "c": (32, 64, 1, 1), "d": (32,)},
    ),
}


def net(name: str, seed: int) -> onnx.ModelProto:
    text, shapes = NETS[name]
    rng = np.random.default_rng(seed)
    return parse(text, **{key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()})


def left(proto: onnx.ModelProto) -> int:
    return sum(int(np.prod(t.dims)) for t in proto.graph.initializer if t.data_type == 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("sparsity", "most"), [(0.95, 1.0), (0.98, 0.8), (0.995, 0.5)])
@pytest.mark.parametrize("name", NETS)
def test_unstructured_masks_at_high_sparsity_are_covered_exactly(name, sparsity, most, seed):
    """Dead channels go first; what scattered zeros then allow loses nothing. At 95 %, an output of a 3x3
    kernel reads 0.37 of the inputs, eight together nearly all."""
    masked = onnxprune.prune(net(name, seed), [{"sparsity": sparsity}])
    model, report = lowered(masked.model, latencies=Always())
    assert report.difference is not None
    assert report.difference < 1e-5
    assert report.rows
    assert left(model.proto) < most * left(masked.to_proto())
    sizes = {t.name: tuple(t.dims) for t in model.proto.graph.initializer}
    assert {row.name for row in report.rows} | sizes.keys() >= {
        key for key, shape in NETS[name][1].items() if len(shape) > 1
    }


def test_dead_channels_are_cut_before_groups_are_looked_for():
    proto = net("mlp", 0)
    values = {t.name: onnx.numpy_helper.to_array(t).copy() for t in proto.graph.initializer}
    values["a"][:64] = 0  # half of the first layer is silent
    values["c"][:, 64:96] = 0  # and of the rest half is not read
    values["c"][:48, 96:112] = values["c"][48:, 112:] = 0  # what is left is read in two groups
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    model, report = lowered(load(proto), latencies=Always())
    assert [(row.name, row.groups, row.kept, row.inputs) for row in report.rows] == [("c", 2, 16, 32)]
    assert next(tuple(t.dims) for t in model.proto.graph.initializer if t.name == "a") == (32, 64)
    assert report.difference is not None
    assert report.difference < 1e-5
