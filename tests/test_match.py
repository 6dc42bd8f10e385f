"""Which weight of a file is which of ours: against files whose correspondence is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from nets import parse
from onnxprune.converters.match import match

from onnxprune import PruneError
from onnxprune.graph.model import load
from onnxprune.graph.weights import Weight, find, parameter

F32 = np.float32


@dataclass(frozen=True, eq=False)
class Held:
    array: np.ndarray

    def read(self) -> np.ndarray:
        return self.array


def weight(name: str, stored: np.ndarray, axes: tuple[int, ...] | None = None, op: str = "MatMul") -> Weight:
    """A parameter whose axes, so reordered, are (output, input, *kernel)."""
    order = axes or tuple(range(stored.ndim))
    return parameter(name, (op,), Held(stored), stored.shape, stored.dtype, lambda x: x.transpose(order))


def pruned(values: np.ndarray, share: float, rng: np.random.Generator | None = None) -> np.ndarray:
    order = np.argsort(np.abs(values) if rng is None else rng.random(values.shape), axis=None, kind="stable")
    out = values.copy()
    out.reshape(-1)[order[: int(values.size * share)]] = 0
    return out


SHAPES = [(8, 6), (8, 6), (6, 8), (8, 8), (8, 8), (8, 8), (16, 8), (8, 6, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (4, 1, 20)]


def ours(seed: int) -> dict[str, np.ndarray]:
    """Role-ordered values by name."""
    rng = np.random.default_rng(seed)
    return {f"layer{i}.weight": rng.normal(size=shape).astype(F32) for i, shape in enumerate(SHAPES)}


def check(mine: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], exact: bool, **options) -> dict:
    """Match file weights, given in role order under our names, after renaming, shuffling and transposing them."""
    rng = np.random.default_rng(7)
    names = {name: f"onnx::MatMul_{i}" for i, name in enumerate(rng.permutation(list(found)))}
    file = [weight(names[n], np.ascontiguousarray(a.T), tuple(range(a.ndim))[::-1]) for n, a in found.items()]
    stored = [
        weight(n, np.ascontiguousarray(np.moveaxis(a, 0, -1)), (a.ndim - 1, *range(a.ndim - 1)))
        for n, a in mine.items()
    ]
    result = match(stored, [file[i] for i in rng.permutation(len(file))], **options)
    assert list(result) == list(mine)
    for name, one in result.items():
        assert one.theirs == (names[name],)
        assert np.array_equal(one.keep, np.moveaxis(found[name] != 0, 0, -1))
        assert (one.values is not None) == exact
        if exact:
            assert np.array_equal(one.values, np.moveaxis(found[name], 0, -1))
            assert not np.signbit(one.values[one.values == 0]).any()
            assert one.values.dtype == F32
    return result


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_surviving_values_decide_where_names_are_lost(seed, share):
    mine = ours(seed)
    result = check(mine, {n: pruned(a, share) for n, a in mine.items()}, True)
    assert {one.how for one in result.values()} == {"equal values"}


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_factor_per_output_leaves_only_the_zeros(seed, share):
    mine, rng = ours(seed), np.random.default_rng(seed)
    factors = {n: rng.normal(size=(len(a),) + (1,) * (a.ndim - 1)).astype(F32) for n, a in mine.items()}
    result = check(mine, {n: pruned(a, share) * factors[n] for n, a in mine.items()}, False)
    assert {one.how for one in result.values()} == {"values equal up to a factor per output"}


@pytest.mark.parametrize("seed", range(5))
def test_half_precision_is_rounding(seed):
    mine = ours(seed)
    file = [weight(f"w{i}", pruned(a, 0.5).astype(np.float16)) for i, a in enumerate(mine.values())]
    result = match([weight(n, a) for n, a in mine.items()], file[::-1])
    assert [one.theirs for one in result.values()] == [(f"w{i}",) for i in range(len(mine))]
    assert all(np.array_equal(o.values, f.values().astype(F32)) for o, f in zip(result.values(), file, strict=True))


BIG = [(32, 16), (32, 16), (32, 32), (8, 8, 3, 3), (8, 8, 3, 3), (300, 300), (300, 300)]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_weights_trained_on_elsewhere_correlate(seed, normalised):
    rng = np.random.default_rng(seed)
    mine = {f"layer{i}.weight": rng.normal(size=shape).astype(F32) for i, shape in enumerate(BIG)}
    moved = {
        n: np.where(p := pruned(a, 0.6), p + 0.2 * rng.normal(size=a.shape).astype(F32), p) for n, a in mine.items()
    }
    if normalised:
        moved = {n: a * rng.normal(size=(len(a),) + (1,) * (a.ndim - 1)).astype(F32) for n, a in moved.items()}
    result = check(mine, moved, not normalised, normalised=list(mine) if normalised else [])
    assert {one.how for one in result.values()} == {"similar values"}


@pytest.mark.parametrize("seed", range(5))
def test_our_own_zeros_are_evidence(seed):
    rng = np.random.default_rng(seed)
    mine = {n: pruned(a, 0.6, rng) for n, a in ours(seed).items() if a.size > 40}
    other = {n: np.where(a, rng.normal(size=a.shape), 0).astype(F32) for n, a in mine.items()}
    assert "zero pattern" in {one.how for one in check(mine, other, True).values()}


def named(arrays: Mapping[str, np.ndarray], op: str = "MatMul") -> list[Weight]:
    return [weight(n, a, op=op) for n, a in arrays.items()]


def test_a_name_decides_between_equal_weights():
    rng = np.random.default_rng(0)
    same = rng.normal(size=(6, 6)).astype(F32)
    files = {"a": pruned(same, 0.3), "b": pruned(same, 0.7)}
    result = match(named({"a": same, "b": same}), named(files))
    assert all(np.array_equal(one.values, files[n]) for n, one in result.items())
    assert {one.how for one in result.values()} == {"name and equal values"}
    with pytest.raises(PruneError, match=r"2 of 2 .* 'a' \[6, 6\] \(MatMul\): candidates: 'x', 'y'; 'b'"):
        match(named({"a": same, "b": same}), named({"x": files["a"], "y": files["b"]}))


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_equal_weights_may_be_one_or_equal_in_the_file(copies):
    same = np.random.default_rng(0).normal(size=(6, 6)).astype(F32)
    file = named({f"val_{i}": pruned(same, 0.4) for i in range(copies)})
    result = match(named({"a": same, "b": same.copy()}), file)
    assert all(np.array_equal(one.values, pruned(same, 0.4)) for one in result.values())


def test_a_name_is_no_proof():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12, 12)).astype(F32)
    result = match(named({"a": a, "b": b}), named({"a": pruned(b, 0.5), "b": pruned(a, 0.5)}))
    assert {n: one.theirs for n, one in result.items()} == {"a": ("b",), "b": ("a",)}


def test_names_alone_are_believed_only_where_all_of_a_shape_are_there():
    rng = np.random.default_rng(0)
    fresh = {f"conv{i}": rng.normal(size=(6, 6)).astype(F32) for i in range(3)}
    trained = {n: pruned(rng.normal(size=(6, 6)).astype(F32), 0.5) for n in fresh}
    result = match(named(fresh), named(trained))
    assert {(n, *one.theirs, one.how) for n, one in result.items()} == {(n, n, "name") for n in fresh}
    renumbered = dict(zip(["conv1", "conv2", "conv3"], trained.values(), strict=True))
    with pytest.raises(PruneError, match=r"3 of 3 weights .*'conv0' .*candidates: 'conv1', 'conv2', 'conv3'"):
        match(named(fresh), named(renumbered))


def test_a_shape_that_occurs_once_decides_last():
    rng = np.random.default_rng(0)
    fresh = {"a": rng.normal(size=(6, 5)).astype(F32), "b": rng.normal(size=(5, 6)).astype(F32)}
    file = {"x": np.zeros((5, 6), F32), "y": pruned(rng.normal(size=(6, 5)).astype(F32), 0.5)}
    result = match(named(fresh), named(file))
    assert {n: (*one.theirs, one.how) for n, one in result.items()} == {"a": ("y", "shape"), "b": ("x", "shape")}
    assert not result["b"].keep.any()


def test_kernel_axes_of_length_one_come_and_go():
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 4, 3), "b": (6, 4)}
    mine = {n: rng.normal(size=s).astype(F32) for n, s in shapes.items()}
    file = {"x": pruned(mine["a"], 0.5).reshape(6, 4, 1, 3), "y": pruned(mine["b"], 0.5).reshape(6, 4, 1, 1)}
    result = match(named(mine), named(file, "Conv"))
    assert np.array_equal(result["a"].values, file["x"].reshape(6, 4, 3))
    assert np.array_equal(result["b"].values, file["y"].reshape(6, 4))


@pytest.mark.parametrize("parts", [(4, 4), (8, 2, 2), (6, 6, 6, 6)])
@pytest.mark.parametrize("factor", [1, -3])
def test_blocks_of_rows_of_one_file_weight(parts, factor):
    rng = np.random.default_rng(0)
    mine = {f"part{i}": rng.normal(size=(rows, 12)).astype(F32) for i, rows in enumerate(parts)}
    kept = {n: pruned(a, 0.5) for n, a in mine.items()}
    merged = np.concatenate(list(kept.values())) * F32(factor)
    result = match(named(mine), named({"qkv": merged, "other": rng.normal(size=(24, 12)).astype(F32)}))
    for name, one in result.items():
        assert one.theirs == ("qkv",)
        assert np.array_equal(one.keep, kept[name] != 0)
        assert one.values is None if factor != 1 else np.array_equal(one.values, kept[name])


def test_one_of_ours_made_of_several_of_theirs():
    rng = np.random.default_rng(0)
    mine = {"in_proj": rng.normal(size=(24, 8)).astype(F32), "out": rng.normal(size=(8, 8)).astype(F32)}
    kept = {n: pruned(a, 0.5) for n, a in mine.items()}
    file = {"kv": kept["in_proj"][8:], "out": kept["out"], "q": kept["in_proj"][:8]}
    result = match(named(mine), named(file))
    assert result["in_proj"].theirs == ("q", "kv")
    assert np.array_equal(result["in_proj"].values, kept["in_proj"])


def test_an_embedding_may_be_missing_and_nothing_else():
    rng = np.random.default_rng(0)
    a, table = rng.normal(size=(2, 9, 7)).astype(F32)
    assert list(match([weight("t", table, op="Embedding"), weight("a", a)], named({"x": a}))) == ["a"]
    with pytest.raises(PruneError, match=r"1 of 2 weights .*'b' \[9, 7\] \(MatMul\): no candidate of its shape"):
        match(named({"a": a, "b": table}), named({"x": a}))


def test_two_copies_pruned_differently_are_refused():
    tied = np.random.default_rng(0).normal(size=(9, 7)).astype(F32)
    file = [weight("emb", tied, op="Embedding"), weight("val_3", pruned(tied, 0.5))]
    with pytest.raises(PruneError, match=r"'emb' .9, 7. twice, as 'emb' and 'val_3', with different zeros"):
        match(named({"emb": tied}), file)
    both = [weight("emb", pruned(tied, 0.5), op="Embedding"), weight("val_3", pruned(tied, 0.5))]
    assert np.array_equal(match(named({"emb": tied}), both)["emb"].values, pruned(tied, 0.5))


def test_one_copy_for_two_that_differ_is_refused():
    a = np.random.default_rng(0).normal(size=(6, 6)).astype(F32)
    b = np.where(pruned(a, 0.5), a, 2 * a)  # what survives in the file fits both
    with pytest.raises(PruneError, match="2 of 2 weights"):
        match(named({"a": a, "b": b}), named({"x": pruned(a, 0.5)}))
    with pytest.raises(PruneError, match="2 of 2 weights"):  # the one ends where the other lies
        match(named({"a": a, "b": a[2:]}), named({"x": np.concatenate([a, a[:3] + 1])}))


def test_copies_that_were_trained_apart_are_refused():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 20)).astype(F32)
    mine = {"a": a, "b": a + 0.01 * rng.normal(size=a.shape).astype(F32)}
    file = {
        n: pruned(v + 0.1 * rng.normal(size=v.shape).astype(F32), 0.5) for n, v in zip("xy", mine.values(), strict=True)
    }
    with pytest.raises(PruneError, match="2 of 2 weights"):
        match(named(mine), named(file))


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_several_that_correlate(seed):
    rng = np.random.default_rng(seed)
    a, noise = rng.normal(size=(2, 20, 20)).astype(F32)
    mine = {"a": a, "b": F32(0.55) * a + F32(0.83) * noise}
    check(mine, {n: pruned(v + 0.1 * rng.normal(size=v.shape).astype(F32), 0.5) for n, v in mine.items()}, True)


@pytest.mark.parametrize("seed", range(20))
def test_few_entries_are_no_evidence(seed):
    rng = np.random.default_rng(seed)
    mine = {n: rng.normal(size=(2, 3)).astype(F32) for n in "ab"}
    file = {n: rng.normal(size=(2, 3)).astype(F32) for n in "xy"}
    with pytest.raises(PruneError, match="2 of 2 weights"):
        match(named(mine), named(file))
    once = np.eye(5, dtype=F32)  # any weight is this up to a factor per output
    assert match(named({"a": rng.normal(size=(5, 5)).astype(F32)}), named({"x": once}))["a"].how == "shape"


def test_a_shape_alone_does_not_make_an_embedding_a_matrix():
    rng = np.random.default_rng(0)
    table, matrix, one, two = rng.normal(size=(4, 5, 5)).astype(F32)
    file = [weight("x", one), weight("y", two, op="Embedding")]
    result = match([weight("t", table, op="Embedding"), weight("m", matrix)], file)
    assert {n: one.theirs for n, one in result.items()} == {"t": ("y",), "m": ("x",)}


def net(conv: np.ndarray, rest: str, **arrays: np.ndarray) -> list[Weight]:
    model = parse(f"(float[1,4,8,8] x) => (float[1,8,6,6] y) {{ {rest} }}", W=conv, **arrays)
    return find(load(model))[0]


NORMALISED = "c = Conv(x, W) y = BatchNormalization(c, s, s, s, s)"
PLAIN = "y = Conv(x, W)"
SCALED = "c = Conv(x, W) d = Add(c, b) y = Mul(d, b)"


@pytest.mark.parametrize(
    ("left", "right", "carried"),
    [(NORMALISED, PLAIN, False), (NORMALISED, NORMALISED, True), (PLAIN, PLAIN, True), (NORMALISED, SCALED, True)],
)
def test_values_stay_behind_where_a_normalisation_is_gone(left, right, carried):
    rng = np.random.default_rng(0)
    arrays = {"s": np.ones(8, F32), "b": np.ones((8, 1, 1), F32)}
    mine, other = rng.normal(size=(2, 8, 4, 3, 3)).astype(F32)  # nothing in common but name and shape
    result = match(net(mine, left, **arrays), net(pruned(other, 0.5), right, **arrays))["W"]
    assert result.how == "name"
    assert (result.values is not None) == carried
    assert np.array_equal(result.keep, pruned(other, 0.5) != 0)


def test_elements_that_no_operand_reads_keep_their_values():
    rng = np.random.default_rng(0)
    bounds = {"b": np.array([0]), "e": np.array([6])}
    table = rng.normal(size=(9, 5)).astype(F32)
    model = parse("(float[2,5] x) => (float[2,6] y) { V = Slice(W, b, e) y = Gemm<transB=1>(x, V) }", W=table, **bounds)
    ours = find(load(model))[0]
    result = match(ours, named({"z": pruned(table[:6], 0.5)}))["W"]
    assert np.array_equal(result.values, np.concatenate([pruned(table[:6], 0.5), table[6:]]))
    assert np.array_equal(result.keep, result.values != 0)
