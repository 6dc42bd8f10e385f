"""Gathers of lowered layers: where two become one, where one goes first, and what a mistake there looks like."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from nets import parse
from test_lowering import Always

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.lowering import hoist, merge
from onnxprune.lowering.lower import lowered

F32 = np.float32
RNG = np.random.default_rng(7)
ARRAYS = {
    name: RNG.normal(size=shape).astype(F32)
    for name, shape in {
        **{"w": (32, 16, 3, 3), "b": (32,), "v": (32, 16, 1, 1), "u": (24, 48, 1, 1), "z": (24, 32, 1, 1)},
        **{"mean": (48,), "shift": (48,), "factor": (48, 1, 1), "row": (1, 48, 1, 1), "column": (1, 1, 7, 1)},
        "slope": (48, 1, 1),
    }.items()
}
ARRAYS |= {"scale": np.abs(ARRAYS["shift"]) + F32(0.5), "axes": np.array([2, 3], np.int64), "one": np.array(1.5, F32)}
ARRAYS |= {"variance": ARRAYS["scale"][::-1].copy(), "positive": np.abs(ARRAYS["factor"]) + F32(0.5)}


def masked(text: str, weights: list[str], pattern: str = "grouped:8", sparsity: float = 0.5) -> onnxprune.PruneResult:
    proto = parse(f"(float[2, 16, 9, 9] x) => (float[] y) {{ {text} }}", **ARRAYS)
    entry = {"sparsity": sparsity, "op_names": weights, "pattern": pattern}
    return onnxprune.prune(proto, [entry], keep_shape=True)


def nodes(result: onnxprune.PruneResult) -> list[onnx.NodeProto]:
    """Those of the lowered model, which is checked against the masked one."""
    model, report = lowered(result.model, latencies=Always())
    assert report.difference is not None
    assert report.difference < 1e-5
    return list(model.proto.graph.node)


def count(found: list[onnx.NodeProto]) -> int:
    return sum(node.op_type == "Gather" for node in found)


MERGED = {  # Gathers before, Gathers after
    "r = Relu (a) p = MaxPool <kernel_shape = [2, 2]> (r) y = Conv <group = 2> (p, v)": (4, 3),
    "r = Sigmoid (a) s = Conv <group = 2> (r, v) t = Conv <group = 2> (r, v) y = Add (s, t)": (6, 5),
    "r = Relu (a) s = Conv <group = 2> (r, v) y = Add (s, r)": (4, 4),
    "r = Relu (a) c = Conv <group = 2> (r, v) s = ReduceMean <keepdims = 1> (r, axes) y = Add (c, s)": (4, 4),
}


@pytest.mark.parametrize("text", MERGED)
def test_an_order_that_only_gathers_read_is_part_of_theirs(text, monkeypatch):
    """A convolution with groups of its own cannot take another order, but its Gather can."""
    result = masked(f"a = Conv (x, w, b) {text}", ["w", "v"])
    after = count(nodes(result))
    monkeypatch.setattr("onnxprune.lowering.lower.merge", lambda nodes, tensors, outputs: (nodes, {}))
    assert (count(nodes(result)), after) == MERGED[text]


WRONG_MERGES = {
    "an operator that mixes neighbours": (
        lambda patch: patch.setattr(merge, "CHANNELWISE", merge.CHANNELWISE | {"LRN"}),
        "l = LRN <size = 3> (a) y = Conv <group = 2> (l, v)",
    ),
    "an operator with a value for each channel": (
        lambda patch: patch.setattr(merge, "ALIKE", merge.ALIKE | {"PRelu"}),
        "l = PRelu (a, slope) y = Conv <group = 2> (l, v)",
    ),
    "an order read from elsewhere": (
        lambda patch: patch.setattr(merge, "_gathers", found_anyway),
        "r = Relu (a) s = Conv <group = 2> (r, v) y = Add (s, r)",
    ),
    "indices that are not composed": (
        lambda patch: patch.setattr("onnxprune.lowering.lower.merge", uncomposed),
        "r = Relu (a) y = Conv <group = 2> (r, v)",
    ),
}
"""What is broken -> how, and a net where it shows."""


def found_anyway(first, readers, tensors, outputs):
    """The Gathers behind, whoever else reads the value."""
    behind = [first] if first.output[0] == "a" else []
    for node in behind:
        behind.extend(readers.get(node.output[0], []))
    return [node for node in behind[1:] if node.op_type == "Gather"]


def uncomposed(given, tensors, outputs):
    """The Gather goes, and those behind stay as they were."""
    kept, _ = merge.merge(given, tensors, outputs)
    return kept, {}


@pytest.mark.parametrize("name", WRONG_MERGES)
def test_a_wrong_merge_is_caught(name, monkeypatch):
    break_it, text = WRONG_MERGES[name]
    monkeypatch.setitem(ARRAYS, "slope", ARRAYS["slope"][:32])
    result = masked(f"a = Conv (x, w, b) {text}", ["w", "v"])
    assert count(nodes(result)) >= 3
    break_it(monkeypatch)
    with pytest.raises(PruneError, match="differs from the masked one"):
        lowered(result.model, latencies=Always())


NORM = "n = BatchNormalization (c, scale, shift, mean, variance)"
HOISTED = {  # behind c, with 48 channels -> how many nodes work on fewer channels
    f"{NORM} r = Relu (n) y = Conv (r, u)": 2,
    "m = Mul (c, factor) s = Add (row, m) r = HardSwish (s) y = Conv (r, u)": 3,
    "m = Div (c, positive) r = Sub (one, m) y = Conv (r, u)": 2,
    "m = PRelu (c, slope) r = Mul (column, m) y = Conv (r, u)": 2,
    "r = Relu (c) y = Conv (r, u)": 1,
    f"{NORM} r = Relu (n) s = Conv (r, u) y = Concat <axis = 1> (s, n)": 1,
    f"{NORM} r = Relu (n) s = Conv (r, u) y = Concat <axis = 1> (s, r)": 0,
    "r = Softmax <axis = 1> (c) y = Conv (r, u)": 0,
    "r = Mul (c, c) y = Conv (r, u)": 0,
    "g = GlobalAveragePool (c) r = Mul (c, g) y = Conv (r, u)": 0,
    "s = ReduceMean <keepdims = 1> (c, axes) m = Mul (row, s) r = Relu (m) y = Conv (r, u)": 2,
    "s = ReduceMax <keepdims = 1> (c, one_axis) m = Mul (row, s) r = Relu (m) y = Conv (r, u)": 1,
}


def behind(text: str) -> str:
    return f"a = Conv (x, w, b) p = Conv (x, v2) c = Concat <axis = 1> (a, p) {text}"


@pytest.fixture(autouse=True)
def more(monkeypatch):
    rng = np.random.default_rng(3)
    monkeypatch.setitem(ARRAYS, "v2", rng.normal(size=(16, 16, 3, 3)).astype(F32))
    monkeypatch.setitem(ARRAYS, "one_axis", np.array([1], np.int64))


def smaller(found: list[onnx.NodeProto]) -> int:
    """Nodes of one channel each that stand behind a Gather."""
    made = {name: node for node in found for name in node.output}
    alone = {*merge.ALIKE, *hoist.BINARY, "BatchNormalization"}

    def gathered(name: str) -> bool:
        node = made.get(name)
        return node is not None and (
            node.op_type == "Gather" or (node.op_type in alone and any(map(gathered, node.input)))
        )

    return sum(node.op_type in alone and any(map(gathered, node.input)) for node in found)


@pytest.mark.parametrize("index", range(4))
def test_each_operand_of_a_norm_has_to_follow(index, monkeypatch):
    result = masked(behind(f"{NORM} y = Conv (n, u)"), ["u"], "grouped:24")
    real = hoist.hoist

    def wrong(given, tensors, *rest):
        before = set(tensors)
        found = real(given, tensors, *rest)
        part = [name for name in tensors if name not in before][index]
        tensors[part] = np.roll(tensors[part], 1)
        return found

    monkeypatch.setattr("onnxprune.lowering.lower.hoist", wrong)
    with pytest.raises(PruneError, match="differs from the masked one"):
        lowered(result.model, latencies=Always())


def test_what_mixes_channels_cannot_follow(monkeypatch):
    result = masked(behind("r = Softmax <axis = 1> (c) y = Conv (r, u)"), ["u"], "grouped:24")
    monkeypatch.setattr(hoist, "ALIKE", hoist.ALIKE | {"Softmax"})
    with pytest.raises(PruneError, match="differs from the masked one"):
        lowered(result.model, latencies=Always())


@pytest.mark.parametrize("text", HOISTED)
def test_what_works_on_each_channel_works_on_those_that_are_read(text, monkeypatch):
    result = masked(behind(text), ["u"], "grouped:24", 0.5)
    assert smaller(nodes(result)) == HOISTED[text]
    monkeypatch.setattr("onnxprune.lowering.lower.hoist", lambda nodes, *_: list(nodes))
    assert smaller(nodes(result)) == 0
