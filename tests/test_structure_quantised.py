"""Rules of quantised operators: groups, pins, and shrunk against masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import onnx
import pytest
from structure_oracle import Net, Stored, check, distance, found

from onnxprune.errors import PruneError
from onnxprune.graph.model import load
from onnxprune.structure import rules, shrink
from onnxprune.structure.plan import Plan
from onnxprune.structure.rules import quantised
from onnxprune.structure.rules.standin import alike
from onnxprune.structure.site import Rule, Site

MS = "com.microsoft"
OUT = {"w3": "graph output 'y'"}
RNG = np.random.default_rng(7)


def bytes_(*shape: int) -> np.ndarray:
    """Entries of 8 bits, on both sides of the zero points used below."""
    return RNG.integers(90, 170, shape).astype(np.uint8)


def signed(*shape: int) -> np.ndarray:
    return RNG.integers(20, 120, shape).astype(np.int8) * RNG.choice(np.int8([-1, 1]), shape)


def scale(value: float | int) -> np.ndarray:
    """One scale, or several that differ."""
    return (
        np.array(value, np.float32) if isinstance(value, float) else np.linspace(0.01, 0.03, value).astype(np.float32)
    )


def zero(value: int, dtype: type = np.uint8, count: int = 0) -> np.ndarray:
    return (np.arange(count) % 9 + value).astype(dtype) if count else np.array(value, dtype)


PER_TENSOR: dict[str, Stored] = {
    "s": scale(0.04),
    "z": zero(120),
    "t": scale(0.05),
    "u": zero(90),
    "sw": scale(0.02),
    "zw": zero(130),
}
"""Scales and zero points of two values (s, z and t, u) and of weights."""


def values(
    name: str,
    text: str,
    stored: Mapping[str, Stored] | None = None,
    groups: tuple[str, ...] = ("w1 8",),
    pinned: Mapping[str, str] | None = None,
    channels: int = 8,
) -> Net:
    """Two quantised convolutions, from 3 to 8 channels (`h`, of scale s) and from `channels` (`v`, of scale t) to 2."""
    return Net(
        name,
        f"(float[2,3,6,6] x) => (float[2,2,P,Q] y) {{ q = QuantizeLinear(x, s, z)"
        f" h = QLinearConv(q, s, z, w1, sw, zw, s, z, b1) {text.replace('MS.', MS + '.')}"
        " a = QLinearConv(v, t, u, w3, sw, zw, s, z) y = DequantizeLinear(a, s, z) }",
        {
            **PER_TENSOR,
            "w1": bytes_(8, 3, 1, 1),
            "b1": RNG.integers(-900, 900, 8).astype(np.int32),
            "w3": bytes_(2, channels, 1, 1),
            **(stored or {}),
        },
        groups,
        {**OUT, **(pinned or {})},
    )


PASS = "v = MS.QLinearAdd(h, s, z, c, sw, zw, t, u)"

VALUES = [
    values("add a constant", PASS, {"c": bytes_(8, 1, 1)}),
    values("multiply by a constant", "v = MS.QLinearMul(h, s, z, c, sw, zw, t, u)", {"c": bytes_(8, 1, 1)}),
    values(
        "residual",
        "k = QLinearConv(h, s, z, w2, sw, zw, t, u) v = MS.QLinearAdd(k, t, u, h, s, z, t, u)",
        {"w2": bytes_(8, 8, 1, 1)},
    ),
    values(
        "chain", "v = QLinearConv(h, s, z, w2, sw, zw, t, u)", {"w2": bytes_(5, 8, 1, 1)}, ("w1 8", "w2 5"), None, 5
    ),
    values(
        "per channel",
        "v = QLinearConv(h, s, z, w2, s2, z2, t, u)",
        {"w2": signed(5, 8, 1, 1), "s2": scale(5), "z2": zero(0, np.int8, 0)},
        ("w1 8", "w2 5"),
        None,
        5,
    ),
    values(
        "depthwise",
        "v = QLinearConv<group = 8>(h, s, z, w2, s2, z2, t, u)",
        {"w2": signed(8, 1, 1, 1), "s2": scale(8), "z2": np.zeros(8, np.int8)},
    ),
    values("concatenation", "v = MS.QLinearConcat<axis = 1>(t, u, h, s, z, h, s, z)", None, ("w1 8",), None, 16),
    values(
        "concatenation with a constant",
        "v = MS.QLinearConcat<axis = 1>(t, u, h, s, z, c, sw, zw)",
        {"c": bytes_(2, 4, 6, 6)},
        ("w1 8",),
        None,
        12,
    ),
    values("sigmoid", "v = MS.QLinearSigmoid(h, s, z, t, u)"),
    values("where", "v = MS.QLinearWhere(k, h, s, z, c, s, z, t, u)", {"k": np.arange(6) > 2, "c": bytes_(8, 1, 1)}),
    values("leaky relu", "v = MS.QLinearLeakyRelu<alpha = 0.1>(h, s, z, t, u)"),
    values(
        "softmax over channels",
        "v = MS.QLinearSoftmax<axis = 1, opset = 13>(h, s, z, t, u)",
        None,
        (),
        {"w1": "mixes axis 1"},
    ),
    values("softmax over rows", "v = MS.QLinearSoftmax<axis = 3, opset = 13>(h, s, z, t, u)"),
    values(
        "softmax 11 over all",
        "v = MS.QLinearSoftmax<axis = 1, opset = 11>(h, s, z, t, u)",
        None,
        (),
        {"w1": "mixes axis 1"},
    ),
    values("average pool", "v = MS.QLinearAveragePool<kernel_shape = [2, 2]>(h, s, z, t, u)"),
    values("global average pool", "v = MS.QLinearGlobalAveragePool<channels_last = 0>(h, s, z, t, u)"),
    values(
        "channels last",
        "v = MS.QLinearGlobalAveragePool<channels_last = 1>(h, s, z, t, u)",
        None,
        (),
        {"w1": "keeps channels last"},
    ),
    values(
        "max pool",
        "m = MaxPool<kernel_shape = [2, 2]>(h) v = QLinearConv(m, s, z, w2, sw, zw, t, u)",
        {"w2": bytes_(8, 8, 1, 1)},
        ("w1 8", "w2 8"),
    ),
]


def products(
    name: str,
    text: str,
    stored: Mapping[str, Stored] | None = None,
    groups: tuple[str, ...] = ("w1 8",),
    pinned: Mapping[str, str] | None = None,
    channels: int = 8,
    width: int = 8,
) -> Net:
    """Products of real numbers, from 6 to `width` positions (`h`) and from `channels` (`v`) to 3."""
    return Net(
        name,
        f"(float[4,6] x) => (float[4,3] y) {{ m = MatMul(x, w1) p = Add(m, b1) h = Relu(p)"
        f" {text.replace('MS.', MS + '.')} y = MatMul(v, w3) }}",
        {**PER_TENSOR, "w1": (6, width), "b1": (width,), "w3": (channels, 3), **(stored or {})},
        groups,
        {**OUT, **(pinned or {})},
    )


TWO = ("w1 8", "w2 5")
RANGED = "r, rs, rz = DynamicQuantizeLinear(h)"
CODES = RNG.integers(0, 256, (5, 3, 8)).astype(np.uint8)
BITS = "bits = 4, block_size = 16, N = 5, K = 48"

PRODUCTS = [
    products(
        "weights of columns",
        "f = DequantizeLinear<axis = 1>(w2, s2, z2) v = MatMul(h, f)",
        {"w2": bytes_(8, 5), "s2": scale(5), "z2": zero(100, np.uint8, 5)},
        TWO,
        None,
        5,
    ),
    products(
        "weights of rows",
        "f = DequantizeLinear<axis = 0>(w2, s2, z2) v = MatMul(h, f)",
        {"w2": bytes_(8, 5), "s2": scale(8), "z2": zero(100, np.uint8, 8)},
        TWO,
        None,
        5,
    ),
    products(
        "weights of 4 bits",
        "f = DequantizeLinear<axis = 1>(w2, s2) v = MatMul(h, f)",
        {"w2": RNG.integers(1, 8, (8, 6)).astype(ml_dtypes.int4), "s2": scale(6)},
        ("w1 8", "w2 6"),
        None,
        6,
    ),
    products(
        "weights in blocks",
        "f = DequantizeLinear<axis = 0, block_size = 4>(w2, s2, z2) v = MatMul(h, f)",
        {"w2": bytes_(8, 5), "s2": (2, 5), "z2": RNG.integers(90, 140, (2, 5)).astype(np.uint8)},
        ("w1 2x4", "w2 5"),
        None,
        5,
    ),
    products(
        "columns in blocks",
        "f = DequantizeLinear<axis = 1, block_size = 3>(w2, s2) v = MatMul(h, f)",
        {"w2": signed(8, 6), "s2": (8, 2)},
        ("w1 8", "w2 2x3"),
        None,
        6,
    ),
    products(
        "a last block that is not full",
        "f = DequantizeLinear<axis = 0, block_size = 3>(w2, s2) v = MatMul(h, f)",
        {"w2": signed(8, 5), "s2": (3, 5)},
        ("w2 5",),
        {"w1": "has a last block that is not full"},
        5,
    ),
    products("values by one scale", "q = QuantizeLinear(h, s, z) v = DequantizeLinear(q, s, z)"),
    products(
        "values by a scale each",
        "q = QuantizeLinear<axis = 1>(h, s8, z8) v = DequantizeLinear<axis = 1>(q, s8, z8)",
        {"s8": scale(8), "z8": zero(3, np.uint8, 8)},
    ),
    products("a constant added", "f = DequantizeLinear(c, s, z) v = Add(h, f)", {"c": bytes_(8)}),
    products(
        "a constant of many zeros added, then scores",
        "f = DequantizeLinear<axis = 0>(c, s8, z8) e = Add(h, f) t0 = Transpose(e) g = MatMul(e, t0) p0 = Relu(g)"
        " v = MatMul(p0, e)",
        {"c": bytes_(8), "s8": scale(8), "z8": zero(9, np.uint8, 8)},
    ),
    products(
        "matmul",
        "q = QuantizeLinear(h, s, z) a = QLinearMatMul(q, s, z, w2, s2, z2, t, u) v = DequantizeLinear(a, t, u)",
        {"w2": bytes_(8, 5), "s2": scale(5), "z2": zero(100, np.uint8, 5)},
        TWO,
        None,
        5,
    ),
    products(
        "gemm",
        "q = QuantizeLinear(h, s, z) v = MS.QGemm<transB = 1>(q, s, z, w2, s2, z2, c)",
        {
            "w2": bytes_(5, 8),
            "s2": scale(5),
            "z2": zero(100, np.uint8, 5),
            "c": RNG.integers(-900, 900, 5).astype(np.int32),
        },
        TWO,
        None,
        5,
    ),
    products(
        "gemm that stays quantised",
        "q = QuantizeLinear(h, s, z) a = MS.QGemm(q, s, z, w2, sw, zw, c, t, u) v = DequantizeLinear(a, t, u)",
        {"w2": bytes_(8, 5), "c": RNG.integers(-900, 900, 5).astype(np.int32)},
        TWO,
        None,
        5,
    ),
    products(
        "integers",
        f"{RANGED} a = MatMulInteger(r, w2, rz, z2) f = Cast<to = 1>(a) g = Mul(f, rs) v = Mul(g, s2)",
        {"w2": bytes_(8, 5), "s2": scale(5), "z2": zero(100, np.uint8, 5)},
        TWO,
        None,
        5,
    ),
    products(
        "integers of what is not 0",
        "e = Sigmoid(h) r, rs, rz = DynamicQuantizeLinear(e) a = MatMulInteger(r, w2, rz, z)"
        " f = Cast<to = 1>(a) v = Mul(f, rs)",
        {"w2": bytes_(8, 5)},
        ("w2 5",),
        {"w1": "takes its scale from the largest entry, and what is pruned is not 0 there"},
        5,
    ),
    products(
        "ranged",
        "v = MS.DynamicQuantizeMatMul(h, w2, s2, z2, c)",
        {"w2": bytes_(8, 5), "s2": scale(5), "z2": zero(100, np.uint8, 5), "c": (5,)},
        TWO,
        None,
        5,
    ),
    products(
        "ranged, of what is not 0",
        "e = Sigmoid(h) v = MS.DynamicQuantizeMatMul(e, w2, s)",
        {"w2": bytes_(8, 5)},
        ("w2 5",),
        {"w1": "takes its scale from the largest entry"},
        5,
    ),
    products(
        "to real numbers",
        f"{RANGED} v = MS.MatMulIntegerToFloat(r, w2, rs, s2, rz, z2, c)",
        {"w2": bytes_(8, 5), "s2": scale(5), "z2": zero(100, np.uint8, 5), "c": (5,)},
        TWO,
        None,
        5,
    ),
    products(
        "packed weights",
        f"v = MS.MatMulNBits<{BITS}>(h, w2, s2)",
        {"w2": CODES, "s2": (5, 3)},
        ("w1 3x16",),
        None,
        5,
        48,
    ),
    products(
        "packed weights and a bias",
        f"v = MS.MatMulNBits<{BITS}>(h, w2, s2, z2, , c)",
        {"w2": CODES, "s2": (5, 3), "z2": (5, 3), "c": (5,)},
        ("w1 3x16",),
        None,
        5,
        48,
    ),
    products(
        "packed zero points",
        f"v = MS.MatMulNBits<{BITS}>(h, w2, s2, z2)",
        {"w2": CODES, "s2": (5, 3), "z2": RNG.integers(0, 256, (5, 2)).astype(np.uint8)},
        (),
        {"w1": "packs several zero points in a byte"},
        5,
        48,
    ),
    products(
        "packed weights, not full",
        "v = MS.MatMulNBits<bits = 4, block_size = 16, N = 5, K = 40>(h, w2, s2)",
        {"w2": CODES, "s2": (5, 3)},
        (),
        {"w1": "has a last block that is not full"},
        5,
        40,
    ),
    products(
        "rows of packed weights",
        f"a = MS.MatMulNBits<{BITS}>(h, w2, s2) b = MatMul(h, w4) v = Add(a, b)",
        {"w2": CODES, "s2": (5, 3), "w4": (48, 5)},
        ("w1 3x16", "w4 5"),
        None,
        5,
        48,
    ),
]

LSTM = {
    "w1": (6, 8),
    "b1": (8,),
    "w2": signed(1, 8, 20),
    "r2": signed(1, 5, 20),
    "b2": (1, 40),
    "w3": (5, 3),
    "sw": np.full((1, 20), 0.004, np.float32),
    "zw": np.zeros((1, 20), np.int8),
}
RECURRENT = Net(
    "lstm",
    "(float[4,2,6] x) => (float[4,1,2,3] y) { m = MatMul(x, w1) p = Add(m, b1) h = Relu(p)"
    " v, last, cell = com.microsoft.DynamicQuantizeLSTM<hidden_size = 5>(h, w2, r2, b2, , , , , sw, zw, sw, zw)"
    " y = MatMul(v, w3) }",
    LSTM, ("w1 8", "w2 5x4"), {**OUT},
)  # fmt: skip

ATTENTION = [
    Net(
        f"attention, weights {how}",
        "(float[2,5,6] x) => (float[2,5,3] y) { m = MatMul(x, w1) p = Add(m, b1) h = Relu(p)"
        " q = QuantizeLinear(h, s, z) v = com.microsoft.QAttention<num_heads = 4>(q, w2, c, s, s2, , z, z2)"
        " y = MatMul(v, w3) }",
        {**PER_TENSOR, "w1": (6, 8), "b1": (8,), "w2": signed(8, 24), "c": (24,), "w3": (8, 3), "s2": s2, "z2": z2},
        ("w1 8", "w2 4x6 heads"),
        OUT,
    )
    for how, s2, z2 in (
        ("of one scale", scale(0.01), zero(0, np.int8)),
        ("of columns", scale(24), zero(0, np.int8, 24)),
    )
]

CONVOLUTION = Net(
    "conv integer",
    "(float[2,3,6,6] x) => (float[2,2,6,6] y) { h = Conv(x, w1, b1) e = Relu(h) r, rs, rz = DynamicQuantizeLinear(e)"
    " a = ConvInteger(r, w2, rz, zw) f = Cast<to = 1>(a) g = Mul(f, rs) k = Mul(g, s2) v = Add(k, c) y = Conv(v, w3) }",
    {
        "w1": (8, 3, 1, 1),
        "b1": (8,),
        "w2": bytes_(5, 8, 1, 1),
        "zw": zero(130),
        "s2": (5, 1, 1),
        "c": (5, 1, 1),
        "w3": (2, 5, 1, 1),
    },
    ("w1 8", "w2 5"),
    OUT,
)

NETS = [*VALUES, *PRODUCTS, RECURRENT, *ATTENTION, CONVOLUTION]


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_nets(net: Net) -> None:
    check(net)


def test_masked_constants_hold_their_zero_points() -> None:
    """What is zeroed in a quantised constant is 0 as its operator reads it, whatever the zero point."""
    for net, name, wanted in ((VALUES[0], "c", 130), (PRODUCTS[8], "c", 120), (VALUES[0], "b1", 0)):
        plan = Plan.of(load(net.model()))
        gone = np.arange(8) < 3
        plan.removed = {"w1": gone}
        plan.zero(shrink.kept(plan.coupling, plan.removed))
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in plan.coupling.model.proto.graph.initializer}
        before = np.asarray(net.stored[name])
        assert (stored[name].reshape(-1) == np.where(gone, wanted, before.reshape(-1))).all()
        assert stored[name].dtype == before.dtype


# ---------------------------------------------------------------- seeded bugs


def _caught(net: Net) -> bool:
    """Whether stated groups, or shrunk against masked, tell that something is wrong."""
    if found(Plan.of(load(net.model()))) != net.groups:
        return True
    try:
        return bool(net.groups) and distance(net.model()) > 1e-4
    except PruneError:
        return True


def _no_shift(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantised, "_shift", lambda *given: None)


def _free_scales(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantised, "beside", lambda site, axis, *operands: None)


def _reversed_scales(patch: pytest.MonkeyPatch) -> None:
    old = quantised.beside

    def beside(site: Site, axis: np.ndarray, *operands: int) -> None:
        old(site, axis[::-1], *operands)

    patch.setattr(quantised, "beside", beside)


def _any_range(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantised, "_ranged", lambda *given: None)


def _rule(
    domain: str, operator: str, tie: Callable[[Site], None] | None = None
) -> Callable[[pytest.MonkeyPatch], None]:
    def seed(patch: pytest.MonkeyPatch) -> None:
        patch.setitem(rules.RULES, (domain, operator), Rule(tie or rules.RULES[domain, operator].tie))

    return seed


def _mixed_concat(site: Site) -> None:
    operands = tuple(range(2, len(site.node.input), 3))
    alike(site, "Concat", operands[::-1])


def _gates_interleaved(site: Site) -> None:
    quantised._lstm(site)
    units = site.axes(2)[1]
    site.labels.tie(site.axes(1)[2].reshape(5, 4)[:, 1], units)


BUGS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "zero points are overlooked": ("a constant of many zeros added, then scores", _no_shift),
    "scales are not cut along": ("per channel", _free_scales),
    "scales are cut in another order": ("weights of columns", _reversed_scales),
    "a range that pruned entries make": ("integers of what is not 0", _any_range),
    "operands of a concatenation change places": (
        "concatenation with a constant",
        _rule(MS, "QLinearConcat", _mixed_concat),
    ),
    "the number of groups stands": ("depthwise", _rule("", "QLinearConv")),
    "N and K stand": ("packed weights", _rule(MS, "MatMulNBits")),
    "gates are interleaved": ("lstm", _rule(MS, "DynamicQuantizeLSTM", _gates_interleaved)),
    "the hidden size stands": ("lstm", _rule(MS, "DynamicQuantizeLSTM")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seed = BUGS[bug]
    net = next(net for net in NETS if net.name == name)
    assert not _caught(net)
    seed(monkeypatch)
    assert _caught(net)
