"""Rules of the operators that onnxruntime fuses: groups, pins, and shrunk against masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from structure_oracle import Net, Stored, check, distance, found, ints

from onnxprune.errors import PruneError
from onnxprune.graph.model import load
from onnxprune.structure import explain, rules
from onnxprune.structure.labels import Axis
from onnxprune.structure.plan import Plan
from onnxprune.structure.rules.standin import alike
from onnxprune.structure.site import Cut, Rule, Site

MS = "com.microsoft"
OUT = {"w3": "graph output 'y'"}
WHOLE = "normalises over the last axis"


def images(
    name: str,
    text: str,
    stored: Mapping[str, Stored] | None = None,
    groups: tuple[str, ...] = ("w1 8",),
    pinned: Mapping[str, str] | None = None,
    channels: int = 8,
) -> Net:
    """A net of two convolutions, from 3 to 8 channels (`h`) and from `channels` (`z`) to 2."""
    return Net(
        name,
        "(float[2,3,6,6] x) => (float[2,2,6,6] y) { h = Conv(x, w1, b1)"
        f" {text.replace('MS.', MS + '.')} y = Conv(z, w3) }}",
        {"w1": (8, 3, 1, 1), "b1": (8,), "w3": (2, channels, 1, 1), **(stored or {})},
        groups,
        {**OUT, **(pinned or {})},
    )


def rows(
    name: str,
    text: str,
    stored: Mapping[str, Stored] | None = None,
    groups: tuple[str, ...] = ("w1 8",),
    pinned: Mapping[str, str] | None = None,
    channels: int = 8,
    width: int = 8,
    given: str = "",
    also: str = "",
    batch: int = 2,
) -> Net:
    """A net of two products, from 6 to `width` positions (`h`) and from `channels` (`z`) to 3, over 5 rows."""
    return Net(
        name,
        f"(float[{batch},5,6] x{given}) => (float[{batch},5,3] y{also}) {{ m = MatMul(x, w1) h = Add(m, b1)"
        f" {text.replace('MS.', MS + '.')} y = MatMul(z, w3) }}",
        {"w1": (6, width), "b1": (width,), "w3": (channels, 3), **(stored or {})},
        groups,
        {**OUT, **(pinned or {})},
    )


FUSED = [
    images(
        "conv relu",
        'z = MS.FusedConv<activation = "Relu">(h, w2, b2)',
        {"w2": (5, 8, 1, 1), "b2": (5,)},
        ("w1 8", "w2 5"),
        None,
        5,
    ),
    images(
        "conv clip",
        'z = MS.FusedConv<activation = "Clip", activation_params = [0.0, 6.0]>(h, w2)',
        {"w2": (5, 8, 1, 1)},
        ("w1 8", "w2 5"),
        None,
        5,
    ),
    images(
        "conv sum", 'z = MS.FusedConv<activation = "Relu">(h, w2, b2, h)', {"w2": (8, 8, 1, 1), "b2": (8,)}, ("w1 8",)
    ),
    images(
        "conv groups",
        'z = MS.FusedConv<activation = "Relu", group = 2>(h, w2)',
        {"w2": (8, 4, 1, 1)},
        ("w1 4x2", "w2 4x2"),
    ),
    images("depthwise", 'z = MS.FusedConv<activation = "Relu", group = 8>(h, w2)', {"w2": (8, 1, 1, 1)}),
    images("gelu", "z = MS.Gelu(h)"),
    images("quick gelu", "z = MS.QuickGelu<alpha = 1.0>(h)"),
    images(
        "quantise and back",
        "q = MS.QuantizeLinear(h, s, n) z = MS.DequantizeLinear(q, s, n)",
        {"s": np.array(1e-4, np.float32), "n": np.array(32768, np.uint16)},
    ),
    rows("bias gelu", "z = MS.BiasGelu(h, c)", {"c": (8,)}),
    rows("fast gelu", "z = MS.FastGelu(h, c)", {"c": (8,)}),
    rows("fast gelu alone", "z = MS.FastGelu(h)"),
    rows("matmul", "z = MS.FusedMatMul<alpha = 0.5>(h, w2)", {"w2": (8, 7)}, ("w1 8", "w2 7"), None, 7),
    rows("matmul transposed", "z = MS.FusedMatMul<transB = 1>(h, w2)", {"w2": (7, 8)}, ("w1 8", "w2 7"), None, 7),
    rows(
        "scores of two values",
        "s = MS.FusedMatMul<transB = 1, alpha = 0.3>(h, h) p = Softmax(s) z = MatMul(p, h)",
    ),
    rows(
        "scores of what is not 0",
        "e = Sigmoid(h) s = MS.FusedMatMul<transB = 1, alpha = 0.3>(e, e) p = Softmax(s) z = MatMul(p, h)",
        None,
        (),
        {"w1": "what is pruned is not 0 there"},
    ),
    rows(
        "left transposed",
        "t = Transpose<perm = [0, 2, 1]>(h) z = MS.FusedMatMul<transA = 1>(t, w2)",
        {"w2": (8, 7)},
        ("w1 8", "w2 7"),
        None,
        7,
    ),
    rows(
        "batches behind rows",
        "t = Transpose<perm = [1, 0, 2]>(h) s = MS.FusedMatMul<transBatchA = 1, transB = 1>(t, h) z = MatMul(s, h)",
    ),
    rows(
        "skip norm",
        "z = MS.SkipLayerNormalization(h, k, g, c)",
        {"k": (2, 5, 8), "g": (8,), "c": (8,)},
        (),
        {"w1": WHOLE},
    ),
    rows(
        "skip norm of the sum",
        "n, a, b, z = MS.SkipLayerNormalization(h, k, g, c, d)",
        {"k": (2, 5, 8), "g": (8,), "c": (8,), "d": (8,)},
        (),
        {"w1": WHOLE},
    ),
    rows(
        "skip RMS norm",
        "z = MS.SkipSimplifiedLayerNormalization(h, k, g)",
        {"k": (2, 5, 8), "g": (8,)},
        (),
        {"w1": WHOLE},
    ),
    rows(
        "words put into a space, normalised",
        "e, c = MS.EmbedLayerNormalization(ids, , word, place, , g, b) z = Add(h, e)",
        {"ids": np.arange(10, dtype=np.int32).reshape(2, 5), "word": (12, 8), "place": (6, 8), "g": (8,), "b": (8,)},
        (),
        {"w1": "normalises over the last axis"},
    ),
    rows(
        "RMS norm over the last axis by default, and what it divides by",
        "n, v = SimplifiedLayerNormalization(h, g) d = Mul(n, v) z = Add(d, n)",
        {"g": (8,)},
        (),
        {"w1": "normalises over axis 2"},
    ),
    rows("RMS norm", "z = SimplifiedLayerNormalization(h, g)", {"g": (8,)}, (), {"w1": "normalises over axis 2"}),
]

GEMM = Net(
    "gemm",
    '(float[4,6] x) => (float[4,3] y) { h = com.microsoft.FusedGemm<activation = "Relu", transB = 1>(x, w1, b1)'
    ' e = com.microsoft.FusedGemm<activation = "Sigmoid">(h, w2, b2) y = MatMul(e, w3) }',
    {"w1": (8, 6), "b1": (8,), "w2": (8, 5), "b2": (5,), "w3": (5, 3)},
    ("w1 8", "w2 5"),
    OUT,
)

QKV = {"wq": (8, 12), "wk": (8, 12), "wv": (8, 12), "w3": (12, 3)}
PROJECTED = "q = MatMul(h, wq) k = MatMul(h, wk) v = MatMul(h, wv)"
HEADED = ("w1 8", "wq 3x4 heads")
CACHE = ", float[2,3,2,4] pk, float[2,3,2,4] pv"
LENGTHS = {"last": np.int32([4, 4]), "total": np.int32([5])}
GROUPED = {"wq": (8, 32), "wk": (8, 16), "wv": (8, 16), "w3": (32, 3), **LENGTHS}
TURNS = {"cos": (9, 8), "sin": (9, 8)}


def attention(
    name: str,
    call: str,
    stored: Mapping[str, Stored],
    groups: tuple[str, ...] = HEADED,
    pinned: Mapping[str, str] | None = None,
    channels: int = 12,
    given: str = "",
    also: str = "",
    batch: int = 2,
) -> Net:
    return rows(name, call, stored, groups, pinned, channels, 8, given, also, batch)


ATTENTION = [
    attention(
        "merged", "z = MS.Attention<num_heads = 3>(h, w2, b2)", {"w2": (8, 36), "b2": (36,)}, ("w1 8", "w2 3x12 heads")
    ),
    attention(
        "merged without bias",
        "z = MS.Attention<num_heads = 3, unidirectional = 1>(h, w2)",
        {"w2": (8, 36)},
        ("w1 8", "w2 3x12 heads"),
    ),
    attention(
        "merged of several sizes",
        "z = MS.Attention<num_heads = 3, qkv_hidden_sizes = [6, 6, 12]>(h, w2, b2, mask)",
        {"w2": (8, 24), "b2": (24,), "mask": np.int32([[1, 1, 1, 1, 0]] * 2)},
        ("w1 8", "w2 3x8 heads"),
    ),
    attention(
        "merged with a bias of scores",
        "z = MS.Attention<num_heads = 3>(h, w2, b2, , , s)",
        {"w2": (8, 36), "b2": (36,), "s": (1, 3, 5, 5)},
        ("w1 8", "w2 3x12 heads"),
    ),
    attention(
        "merged with a cache",
        "z, p = MS.Attention<num_heads = 3>(h, w2, b2, , past)",
        {"w2": (8, 36), "b2": (36,)},
        ("w1 8",),
        {"w2": "it is an axis of the graph input 'past'"},
        given=", float[2,2,3,2,4] past",
        also=", float[2,2,3,7,4] p",
    ),
    attention(
        "merged of one head",
        "z = MS.Attention<num_heads = 1>(h, w2, b2)",
        {"w2": (8, 36), "b2": (36,)},
        ("w1 8",),
        {"w2": "has only one head"},
    ),
    attention("heads", f"{PROJECTED} z = MS.MultiHeadAttention<num_heads = 3>(q, k, v, b)", {**QKV, "b": (36,)}),
    attention(
        "heads with a bias of scores",
        f"{PROJECTED} z = MS.MultiHeadAttention<num_heads = 3>(q, k, v, , , s)",
        {**QKV, "s": (1, 3, 5, 5)},
    ),
    attention(
        "wider values",
        f"{PROJECTED} z = MS.MultiHeadAttention<num_heads = 3>(q, k, v, b)",
        {**QKV, "wv": (8, 24), "b": (48,), "w3": (24, 3)},
        channels=24,
    ),
    attention(
        "heads with caches",
        f"{PROJECTED} z, ok, ov = MS.MultiHeadAttention<num_heads = 3>(q, k, v, , , , pk, pv)",
        QKV,
        ("w1 8",),
        {n: "it is an axis of the graph input 'pk'" for n in ("wq", "wk", "wv")},
        given=CACHE,
        also=", float[2,3,7,4] ok, float[2,3,7,4] ov",
    ),
    attention(
        "caches out",
        f"{PROJECTED} z, ok, ov = MS.MultiHeadAttention<num_heads = 3>(q, k, v)",
        QKV,
        ("w1 8",),
        {n: "it reaches the graph output 'ok'" for n in ("wq", "wk", "wv")},
        also=", float[2,3,5,4] ok, float[2,3,5,4] ov",
    ),
    attention(
        "rotary",
        f"{PROJECTED} a = MS.RotaryEmbedding(q, p, cos, sin) b = MS.RotaryEmbedding(k, p, cos, sin)"
        " z = MS.MultiHeadAttention<num_heads = 3>(a, b, v)",
        {**QKV, "p": np.array([0]), "cos": (9, 2), "sin": (9, 2)},
    ),
    attention(
        "keys of 4 axes",
        f"{PROJECTED} k1 = Reshape(k, s) k2 = Transpose<perm = [0, 2, 1, 3]>(k1) v1 = Reshape(v, s)"
        " v2 = Transpose<perm = [0, 2, 1, 3]>(v1) z = MS.MultiHeadAttention<num_heads = 3>(q, k2, v2)",
        {**QKV, "s": ints(2, 5, 3, 4)},
    ),
    attention(
        "rotary of 4 axes",
        f"{PROJECTED} q1 = Reshape(q, s) q2 = Transpose<perm = [0, 2, 1, 3]>(q1) "
        "q3 = MS.RotaryEmbedding(q2, p, cos, sin) q4 = Transpose<perm = [0, 2, 1, 3]>(q3) q5 = Reshape(q4, s2)"
        " z = MS.MultiHeadAttention<num_heads = 3>(q5, k, v)",
        {**QKV, "s": ints(2, 5, 3, 4), "s2": ints(2, 5, 12), "p": np.array([0]), "cos": (9, 2), "sin": (9, 2)},
    ),
    attention(
        "rotary in part",
        f"{PROJECTED} a = MS.RotaryEmbedding<num_heads = 3, rotary_embedding_dim = 2>(q, p, cos, sin)"
        " z = MS.MultiHeadAttention<num_heads = 3>(a, k, v)",
        {**QKV, "p": np.array([0]), "cos": (9, 1), "sin": (9, 1)},
    ),
    attention(
        "groups of queries",
        f"{PROJECTED} z = MS.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, k, v, , , last, total)",
        GROUPED,
        ("w1 8", "wq 2x16 heads"),
        channels=32,
    ),
    attention(
        "groups of queries with a bias of scores",
        f"{PROJECTED} z = MS.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, k, v, , , last, total, , , , s)",
        {**GROUPED, "s": (1, 4, 5, 5)},
        ("w1 8", "wq 2x16 heads"),
        channels=32,
    ),
    attention(
        "groups of queries, turned",
        f"{PROJECTED} z = MS.GroupQueryAttention<num_heads = 4, kv_num_heads = 2, do_rotary = 1>"
        "(q, k, v, , , last, total, cos, sin)",
        {**GROUPED, **TURNS, "wq": (8, 64), "wk": (8, 32), "wv": (8, 32), "w3": (64, 3)},
        ("w1 8", "wq 2x32 heads"),
        channels=64,
    ),
    attention(
        "groups of queries in one",
        "a = MatMul(h, wa) z = MS.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(a, , , , , last, total)",
        {"wa": (8, 64), "w3": (32, 3), **LENGTHS},
        ("w1 8", "wa 2x32 heads"),
        channels=32,
    ),
    attention(
        "one key for all queries",
        f"{PROJECTED} z = MS.GroupQueryAttention<num_heads = 4, kv_num_heads = 1>(q, k, v, , , last, total)",
        {**GROUPED, "wk": (8, 8), "wv": (8, 8)},
        ("w1 8", "wq 4x8 heads"),
        {n: "has only one head" for n in ("wk", "wv")},
        channels=32,
    ),
    attention(
        "groups of queries with caches",
        f"{PROJECTED} z, ok, ov = MS.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>"
        "(q, k, v, pk, pv, last, total)",
        {**GROUPED, "last": np.int32([6]), "total": np.int32([7])},
        ("w1 8", "wq 2x16 heads"),
        {n: "it is an axis of the graph input 'pk'" for n in ("wk", "wv")},
        channels=32,
        given=", float[1,2,2,8] pk, float[1,2,2,8] pv",
        also=", float[1,2,7,8] ok, float[1,2,7,8] ov",
        batch=1,
    ),
]

REFUSED = {
    "com.microsoft.nchwc.Conv": "keeps channels in blocks made for one machine",
    "com.microsoft.NhwcFusedConv": "keeps channels last",
    "com.microsoft.PackedMultiHeadAttention": "works on sequences packed without their padding",
    "com.microsoft.PagedAttention": "works on sequences packed without their padding",
    "com.microsoft.DecoderMaskedMultiHeadAttention": "works on a cache that is shared between steps",
    "com.microsoft.Unheard": "has no rule (operator com.microsoft.Unheard)",
}
"""Operator -> why its neighbours are pinned."""


@pytest.mark.parametrize("net", [*FUSED, GEMM, *ATTENTION], ids=lambda net: net.name)
def test_nets(net: Net) -> None:
    check(net)


@pytest.mark.parametrize("name", ["skip norm", "skip norm of the sum", "skip RMS norm"])
def test_norms_that_may_average_over_fewer(name: str) -> None:
    """Where that is asked for, norms over channels let them go, and all their parameters go along."""
    net = _net(name)
    plan = Plan.of(load(net.model()), inexact=True)
    assert found(plan) == ("w1 8",)
    members = {member.name for member in plan.coupling.groups[0].members}
    assert members == {"w1", "b1", "w3", *net.stored}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """They are never run: what goes in and what comes out stays, and the reason says why."""
    net = images("refused", f"c = {name}(h, w2) z = Relu(c)", {"w2": (8, 8, 1, 1)}, ())
    found_ = explain(net.model())
    assert found_.groups == ()
    reasons = {pinned.name: pinned.reason for pinned in found_.pinned}
    assert reasons["w1"].startswith(f"{name.rpartition('.')[2]} 'c'")
    assert REFUSED[name] in reasons["w1"]


def test_kernels_of_one_machine_only() -> None:
    """BiasAdd and BiasSplitGelu have no kernel on a CPU: their groups can only be stated."""
    stored = {"w1": (6, 16), "k": (2, 5, 16), "w3": (8, 3), "c": (16,)}
    text = (
        "(float[2,5,6] x) => (float[2,5,3] y) { h = MatMul(x, w1) a = com.microsoft.BiasAdd(h, c, k)"
        " z = com.microsoft.BiasSplitGelu(a, c) y = MatMul(z, w3) }"
    )
    plan = Plan.of(load(Net("halves", text, stored, ()).model()))
    assert found(plan) == ("w1 8x2",)
    places = {member.name: member.places.tolist() for member in plan.coupling.groups[0].members}
    assert places["w1"] == places["c"] == [[i, i + 8] for i in range(8)]
    assert places["w3"] == [[i] for i in range(8)]


@pytest.mark.parametrize(
    ("call", "stored", "groups"),
    [
        ("a = MatMul(h, wa) r = Reshape(a, s) z = MS.MultiHeadAttention<num_heads = 3>(r)", (36, 3), "wa 3x12 heads"),
        (
            "q = MatMul(h, wq) a = MatMul(h, wa) r = Reshape(a, s) z = MS.MultiHeadAttention<num_heads = 3>(q, r)",
            (24, 2),
            "wq 3x4 heads",
        ),
    ],
    ids=["queries, keys and values", "keys and values"],
)
def test_packed_operands(call: str, stored: tuple[int, int], groups: str) -> None:
    """A CPU has no kernel for them: their groups can only be stated."""
    width, parts = stored
    net = attention("packed", call, {"wq": (8, 12), "wa": (8, width), "s": ints(2, 5, 3, parts, 4)}, channels=12)
    assert found(Plan.of(load(net.model()))) == ("w1 8", groups)


# ---------------------------------------------------------------- seeded bugs


def _net(name: str) -> Net:
    return next(net for net in (*FUSED, GEMM, *ATTENTION) if net.name == name)


def _caught(net: Net) -> bool:
    """Whether stated groups, or shrunk against masked, tell that something is wrong."""
    plan = Plan.of(load(net.model()))
    if found(plan) != net.groups:
        return True
    try:
        return bool(net.groups) and distance(net.model()) > 1e-4
    except PruneError:
        return True


Bug = Callable[[pytest.MonkeyPatch], None]


def _rule(operator: str, tie: Callable[[Site], None] | None = None, resize: bool = True) -> Bug:
    def seed(patch: pytest.MonkeyPatch) -> None:
        old = rules.RULES[MS, operator]
        patch.setitem(rules.RULES, (MS, operator), Rule(tie or old.tie, old.resize if resize else None))

    return seed


def _without_fourth(site: Site) -> None:
    alike(site, "Conv", (0, 1, 2))


def _plain_matmul(site: Site) -> None:
    alike(site, "MatMul", (0, 1))


def _queries_first(site: Site) -> None:
    """Query heads as if those of one key-value head were far apart."""
    rules.contrib_attention._group_query(site)
    query = site.axes(0)[2].reshape(2, 2, -1)
    site.labels.tie(query[0, 0], query[1, 0])


def _shifted_parts(site: Site, axis: Axis) -> list[Axis]:
    return np.split(np.roll(axis, 1), 3)


def _heads_only(cut: Cut, site: Site, name: str, value: Any) -> None:
    if name == "num_heads":
        SET(cut, site, name, value)


SET = Cut.set_attribute


def _patched(name: str, value: object) -> Bug:
    return lambda patch: patch.setattr(rules.contrib_attention, name, value)


BUGS: dict[str, tuple[str, Bug]] = {
    "what is added in a FusedConv is not tied": ("conv sum in two", _rule("FusedConv", _without_fourth)),
    "the groups of a FusedConv are not counted": ("depthwise", _rule("FusedConv", resize=False)),
    "any activation keeps 0": (
        "activated scores",
        lambda patch: patch.setattr(rules.contrib, "_activated", lambda site: True),
    ),
    "transposition is overlooked": ("left transposed", _rule("FusedMatMul", _plain_matmul)),
    "queries, keys and values are off by one": ("merged", _patched("_parts", _shifted_parts)),
    "heads are not counted": ("merged", _rule("Attention", resize=False)),
    "sizes of queries, keys and values stand": (
        "merged of several sizes",
        lambda patch: patch.setattr(Cut, "set_attribute", _heads_only),
    ),
    "heads of queries are mixed up": ("groups of queries", _rule("GroupQueryAttention", _queries_first)),
    "heads of keys are not counted": ("groups of queries", _rule("GroupQueryAttention", resize=False)),
    "heads that are turned are not counted": ("rotary in part", _rule("RotaryEmbedding", resize=False)),
}


EXTRA = {
    "conv sum in two": images(
        "conv sum in two",
        'a = Conv(x, w4) z = MS.FusedConv<activation = "Relu">(h, w2, b2, a)',
        {"w2": (8, 8, 1, 1), "b2": (8,), "w4": (8, 3, 1, 1)},
        ("w1 8", "w4 8"),
    ),
    "activated scores": Net(
        "activated scores",
        '(float[4,6] x) => (float[4,3] y) { h = com.microsoft.FusedGemm<activation = "Sigmoid">(x, w1)'
        " s = com.microsoft.FusedMatMul<transB = 1>(h, h) p = Softmax(s) z = MatMul(p, h) y = MatMul(z, w3) }",
        {"w1": (6, 8), "w3": (8, 3)},
        (),
        {"w1": "what is pruned is not 0 there", **OUT},
    ),
}


@pytest.mark.parametrize("net", EXTRA.values(), ids=lambda net: net.name)
def test_nets_of_bugs(net: Net) -> None:
    check(net)


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seed = BUGS[bug]
    net = EXTRA.get(name) or _net(name)
    assert not _caught(net)
    seed(monkeypatch)
    assert _caught(net)
