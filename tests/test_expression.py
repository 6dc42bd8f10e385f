"""Moves and scales against onnxruntime, over random arguments and random chains."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from nets import parse, run
from onnx import helper, numpy_helper
from test_backend_cases import cases

from onnxprune.graph import constants, trace
from onnxprune.graph import expression as ex
from onnxprune.graph.model import load
from onnxprune.graph.weights import find

Rng = np.random.Generator
Arguments = tuple[list[np.ndarray], dict[str, object]]


def shape_of(rng: Rng) -> tuple[int, ...]:
    return tuple(int(d) for d in rng.integers(1, 5, rng.integers(1, 5)))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def transpose(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    return [], {"perm": rng.permutation(len(shape)).tolist()} if rng.integers(2) else {}


def reshape(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    size = int(np.prod(shape))
    first = int(rng.choice([d for d in range(1, size + 1) if size % d == 0]))
    dims = [first, size // first]
    if rng.integers(2):
        dims[rng.integers(2)] = -1
    if rng.integers(2):
        dims = [0, *rng.permutation([1, -1])]
    return [ints(*dims)], {}


def squeeze(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    ones = [i - len(shape) * int(rng.integers(2)) for i, d in enumerate(shape) if d == 1 and rng.integers(2)]
    return ([ints(*ones)], {}) if ones else ([], {})


def unsqueeze(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    rank = len(shape) + int(rng.integers(1, 3))
    axes = rng.permutation(rank)[: rank - len(shape)]
    return [ints(*(axes - rank * rng.integers(2)))], {}


def flatten(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    return [], {"axis": int(rng.integers(-len(shape), len(shape) + 1))} if rng.integers(2) else {}


def slices(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    """Every kind of bound: negative, beyond the ends, backwards; but never an empty result."""
    axes = rng.permutation(len(shape))[: rng.integers(1, len(shape) + 1)]
    bounds = []
    for axis in axes:
        size, step = shape[axis], int(rng.choice([-3, -2, -1, 1, 2, 3]))
        first, last = sorted(int(i) for i in rng.integers(0, size, 2))
        if step > 0:
            start = int(rng.choice([first, first - size, *([-size - 5] if first == 0 else [])]))
            end = int(rng.choice([last + 1, *([last + 1 - size] if last + 1 < size else [2**40])]))
        else:
            start = int(rng.choice([last, last - size, *([size + 5] if last == size - 1 else [])]))
            end = int(
                rng.choice([first - 1 if first else -size - 1, first - 1 - size, *([-(2**40)] if first == 0 else [])])
            )
        bounds.append((start, end, int(axis - len(shape) * rng.integers(2)), step))
    starts, ends, along, steps = zip(*bounds, strict=True)
    return [ints(*starts), ints(*ends), ints(*along), ints(*steps)], {}


def gather(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    axis = int(rng.integers(-len(shape), len(shape)))
    size = shape[axis]
    return [rng.integers(-size, size, rng.integers(1, 4, rng.integers(0, 3)), dtype=np.int64)], {"axis": axis}


def expand(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    grown = [int(rng.integers(1, 4)) if d == 1 else int(rng.choice([1, d])) for d in shape]
    return [ints(*([2] * int(rng.integers(2))), *grown)], {}


def tile(rng: Rng, shape: tuple[int, ...]) -> Arguments:
    return [ints(*rng.integers(1, 3, len(shape)))], {}


ARGUMENTS = {
    "Identity": lambda rng, shape: ([], {}),
    "Transpose": transpose,
    "Reshape": reshape,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Flatten": flatten,
    "Slice": slices,
    "Gather": gather,
    "Expand": expand,
    "Tile": tile,
}


def chain(op_types: list[str], rng: Rng, x: np.ndarray) -> tuple[onnx.ModelProto, list[ex.Array]]:
    """A model that puts W through operators with random arguments, and what the moves make of it step by step."""
    model = parse("() => (float[1] y) { }", W=x)
    model.graph.output.pop()
    steps, name = [x], "W"
    for index, op_type in enumerate(op_types):
        if steps[-1].ndim == 0:
            break
        given, attributes = ARGUMENTS[op_type](rng, steps[-1].shape)
        names = [f"{index}.{i}" for i in range(len(given))]
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(given, names, strict=True))
        model.graph.node.append(helper.make_node(op_type, [name, *names], [f"v{index}"], **attributes))
        model.graph.output.add(name=f"v{index}")
        name = f"v{index}"
        steps.append(ex.MOVES[op_type](steps[-1], *given, **attributes))
    return model, steps[1:]


def test_every_move_is_tried():
    assert set(ARGUMENTS) | {"Concat"} == set(ex.MOVES)


@pytest.mark.parametrize("op_type", ARGUMENTS)
def test_move_equals_onnxruntime(op_type):
    rng = np.random.default_rng(list(op_type.encode()))
    for _ in range(25):
        shape = shape_of(rng)
        model, steps = chain([op_type], rng, np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
        assert np.array_equal(run(model)[0], steps[0]), model.graph
        assert run(model)[0].shape == steps[0].shape


@pytest.mark.parametrize("seed", range(60))
def test_layout_of_a_random_chain_equals_onnxruntime(seed):
    """A weight's role order, found by tracing, is where onnxruntime moves its entries."""
    rng = np.random.default_rng(seed)
    shape = shape_of(rng)
    w = rng.permutation(np.arange(1, 1 + np.prod(shape), dtype=np.float32)).reshape(shape)
    model, steps = chain(rng.choice([*ARGUMENTS], rng.integers(1, 6)).tolist(), rng, w)
    seen = run(model)[-1]
    assert np.array_equal(steps[-1], seen)
    if seen.ndim == 0:
        return
    last = model.graph.output[-1].name
    del model.graph.output[:]
    if seen.ndim > 2:  # an operand whose role order is its own: a matrix
        model.graph.initializer.append(numpy_helper.from_array(ints(-1, seen.shape[-1]), "matrix"))
        model.graph.node.add(op_type="Reshape", input=[last, "matrix"], output=["V"])
        last, seen = "V", seen.reshape(-1, seen.shape[-1])
    model.graph.input.add(name="x").type.CopyFrom(helper.make_tensor_type_proto(1, [2, seen.shape[-1]]))
    model.graph.node.add(op_type="Gemm" if seen.ndim == 2 else "MatMul", input=["x", last], output=["y"])
    if seen.ndim == 2:
        model.graph.node[-1].attribute.append(helper.make_attribute("transB", 1))
    model.graph.output.add(name="y")
    (weight,), skipped = find(load(model))
    assert skipped == []
    _, first = np.unique(seen, return_index=True)
    assert weight.size == first.size
    assert np.array_equal(weight.values().reshape(-1), seen.reshape(-1)[np.sort(first)])
    assert np.array_equal(weight.role(w), weight.values())
    keep = np.isin(w, seen.reshape(-1)[: seen.size // 2])
    assert np.array_equal(weight.stored(weight.role(keep), fill=False), keep)


@pytest.mark.parametrize(
    ("sizes", "count", "length"), [(None, 3, 6), (None, 3, 7), (None, 1, 5), ([2, 0, 4], 3, 6), ([1, 5], 2, 6)]
)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_split_equals_onnxruntime(sizes, count, length, axis):
    shape = [2, 2, 2]
    shape[axis] = length
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    outputs = [f"y{i}" for i in range(count)]
    model = parse("() => (float[1] y) { }", W=x, **({} if sizes is None else {"n": ints(*sizes)}))
    model.graph.output.pop()
    attributes = {"axis": axis, "num_outputs": count} if sizes is None else {"axis": axis}
    model.graph.node.append(helper.make_node("Split", ["W"] if sizes is None else ["W", "n"], outputs, **attributes))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    for index, expected in enumerate(run(model)):
        assert np.array_equal(ex.split(x, sizes, count, axis, index), expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize(
    ("parameters", "axis", "block"),
    [((), 1, 0), ((4,), 0, 0), ((6,), 1, 0), ((6,), -1, 0), ((2, 6), 0, 2), ((4, 2), 1, 4)],
)
@pytest.mark.parametrize("shifted", [True, False])
def test_dequantize_equals_onnxruntime(dtype, parameters, axis, block, shifted):
    rng = np.random.default_rng([axis + 1, block, len(parameters)])
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max, (4, 6), dtype, endpoint=True)
    scale = rng.uniform(0.01, 2, parameters).astype(np.float32).reshape(parameters)
    zero = np.asarray(rng.integers(info.min, info.max, parameters, dtype, endpoint=True)).reshape(parameters)
    model = parse(
        "() => (float[4,6] y) { y = DequantizeLinear(W, s, z) }", W=x, s=scale, z=zero if shifted else zero * 0
    )
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    model.graph.node[0].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    spread = [ex.per_axis(p, x.shape, axis, block) for p in (scale, zero)]
    assert np.array_equal(ex.dequantize(x, spread[0], spread[1] if shifted else None), run(model)[0])


@pytest.mark.parametrize(
    ("operator", "shape", "side", "axis", "made"),
    [
        ("Expand", (3, 1), [2, 3, 4], 0, (2, 3, 4)),
        ("Tile", (3, 2), [2, 5], 0, (6, 10)),
        ("Gather", (10, 4), [1, 2, 2], 0, (3, 4)),
        ("Gather", (10, 4), [[1, 0], [3, 3]], 1, (10, 2, 2)),
    ],
)
def test_the_size_of_what_grows_is_known_before(operator, shape, side, axis, made):
    assert constants.moved(operator, shape, [np.array(side)], axis) == np.prod(made)


UNKNOWN = {"GroupNormalization", "ImageDecoder", "MaxUnpool", "MeanVarianceNormalization", "NonMaxSuppression", "Range"}
"""Operators of whose results ONNX's inference does not always tell the size: then they are not computed."""


def test_how_much_a_node_makes_is_known_before():
    """Of ONNX's own cases: exactly, or more, or it is not known; where less was told, a file could ask for anything."""
    said = Counter()
    for model, inputs, outputs in cases().values():
        node = model.graph.node[0]
        tensors = all(isinstance(x, np.ndarray | np.generic) and x.dtype != object for x in (*inputs, *outputs))
        if len(model.graph.node) > 1 or node.domain or any(a.HasField("g") for a in node.attribute) or not tensors:
            continue
        given = {value.name: np.asarray(x) for value, x in zip(model.graph.input, inputs, strict=False)}
        try:
            made = constants._largest(node, given, model.opset_import[0].version)
        except Exception:
            said[node.op_type, "unknown"] += 1
            continue
        most = max(np.size(x) for x in outputs)
        assert made >= most, model.graph.name
        said[node.op_type, "known" if made == most else "more"] += 1
    unknown = {op for op, what in said if what == "unknown"}
    assert sum(count for (_, what), count in said.items() if what == "known") > 1000
    assert unknown == constants.FEWER | UNKNOWN


@pytest.mark.parametrize("constant", [False, True])
def test_room_for_constants_grows_with_what_is_stored(constant, monkeypatch):
    """In initializers or in Constant nodes: twice as many elements may be computed, and one result more."""
    monkeypatch.setattr(trace, "COMPUTED", 0)
    made = "v = Constant<value = float[3] {1, 2, 3}>()" if constant else ""
    for steps, names in ((4, ["w"]), (5, [])):
        chain = " ".join(f"v{i + 1} = Add(v{i}, v)" for i in range(steps))
        text = (
            f"(float[2,1] x) => (float[2,3] y) {{ {made} v0 = Neg(v) {chain} h = Mul(w, v{steps}) y = MatMul(x, h) }}"
        )
        stored = {} if constant else {"v": np.array([1, 2, 3], np.float32)}
        model = parse(text, w=np.ones((1, 3), np.float32), **stored)
        assert [weight.name for weight in find(load(model))[0]] == names, steps


def test_attribute_forms_of_early_operator_sets():
    """What is an input today was an attribute once; onnxruntime no longer runs all of these."""
    x = np.arange(6.0).reshape(1, 2, 3)
    assert ex.MOVES["Reshape"](x, shape=[3, 2], consumed_inputs=[0]).shape == (3, 2)
    assert ex.MOVES["Squeeze"](x, axes=[0]).shape == (2, 3)
    assert ex.MOVES["Unsqueeze"](x, axes=[0, 2]).shape == (1, 1, 1, 2, 3)
    assert np.array_equal(ex.MOVES["Slice"](x, starts=[1], ends=[2**31], axes=[2]), x[:, :, 1:])
    assert np.array_equal(ex.MOVES["Slice"](x, starts=[0, 1], ends=[1, 2]), x[0:1, 1:2])
    assert ex.MOVES["Reshape"](np.empty((0, 3)), np.array([3, 0]), allowzero=1).shape == (3, 0)


def test_zeros_of_a_joined_operand():
    """Each leaf's stored value for 0.0, through a move that joins shifted and plain parts."""
    (a, b), _ = find(
        load(
            parse(
                "(float[2,3] x) => (float[2,4] y) "
                "{ p = DequantizeLinear(A, s, z) q = Cast<to=1>(B) V = Concat<axis=1>(p, q) y = MatMul(x, V) }",
                A=np.arange(6, dtype=np.uint8).reshape(3, 2),
                B=np.arange(6, dtype=np.float16).reshape(3, 2),
                s=np.array([1, 2], np.float32),
                z=np.array([3, 5], np.uint8),
            )
        )
    )
    assert a.zero().tolist() == [[3, 5]] * 3
    assert not b.zero().any()
    assert a.values().tolist() == [[-3, -1, 1], [-8, -4, 0]]
    assert b.values().tolist() == [[0, 2, 4], [1, 3, 5]]
    assert a.pruned(np.zeros((3, 2), np.bool_)).tolist() == [[3, 5]] * 3
