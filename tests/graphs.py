"""Random valid ONNX graphs for hypothesis: chains of steps over images, sequences and matrices, and ONNX's own cases.

A step takes a value to another one by one or several nodes, with weights of its own. Steps are put into branches,
loops and functions as they are; weights are stored in many ways. Everything is tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from graph_builder import BATCH, IMAGE, MATRIX, MS, OPSET, SEQUENCE, TYPES, Builder, Step, Value, step
from graph_steps import activation, gemm, matmul
from hypothesis import strategies as st
from onnx import TensorProto, defs, helper, numpy_helper


@dataclass(frozen=True, eq=False)
class Graph:
    """A model with what it is fed.

    Attributes:
        model: the model.
        feed: its inputs.
        steps: what it is made of.
        rough: whether it rounds to integers somewhere: the last place of a sum may then decide about a step.
    """

    model: onnx.ModelProto
    feed: dict[str, np.ndarray]
    steps: tuple[str, ...]
    rough: bool

    def __repr__(self) -> str:
        return f"Graph({' '.join(self.steps)})\n{onnx.printer.to_text(self.model)[:4000]}"


# ------------------------------------------------------------------ steps inside of others


def _inside(b: Builder, v: Value, table: dict[str, Step]) -> tuple[Value, list[onnx.NodeProto], list[TensorProto]]:
    """A step that is put elsewhere: its result, its nodes, and what it stores."""
    nodes, stored, seen = b.nodes, b.stored, b.seen
    b.nodes, b.stored, b.seen, b.nested = [], [], [v], b.nested + 1
    shared, b.shared = b.shared, {}
    done = _take(b, v, table)
    made = done, b.nodes, b.stored
    b.nodes, b.stored, b.seen, b.nested, b.shared = nodes, stored, seen, b.nested - 1, shared
    return made


def _info(b: Builder, v: Value) -> onnx.ValueInfoProto:
    """A value of known rank."""
    return helper.make_tensor_value_info(v.name, TYPES[b.dtype.name], [None] * len(v.shape))


def _body(b: Builder, v: Value, done: Value, nodes: list[onnx.NodeProto], stored: list[TensorProto]) -> onnx.GraphProto:
    """A graph of one output; what it stores is kept inside, or captured."""
    out = b.fresh("out")
    nodes = [*nodes, helper.make_node("Identity", [done.name], [out])]
    within = b.flip()
    if not within:
        b.stored.extend(stored)
    return helper.make_graph(nodes, b.fresh("body"), [], [_info(b, done._replace(name=out))], stored * within)


@step(IMAGE, SEQUENCE, MATRIX)
def branch(b: Builder, v: Value) -> Value:
    """If: a step, or the identity or another one of the same shape."""
    if b.nested:
        return v
    then = _inside(b, v, _table(v))
    other = _inside(b, v, _table(v))
    if other[0].shape != then[0].shape:
        other = then if then[0].shape != v.shape else (v, [], [])
        if then[0].shape != v.shape:
            return _outside(b, then)
    graphs = [_body(b, v, *part) for part in (then, other)]
    condition = b.store(np.array(b.flip())) if b.flip() else "flag"
    return then[0]._replace(name=b.node("If", condition, then_branch=graphs[0], else_branch=graphs[1]))


def _outside(b: Builder, part: tuple[Value, list[onnx.NodeProto], list[TensorProto]]) -> Value:
    b.nodes.extend(part[1])
    b.stored.extend(part[2])
    return part[0]


@step(IMAGE, SEQUENCE, MATRIX)
def loop(b: Builder, v: Value) -> Value:
    """Loop: a step that keeps the shape, twice."""
    if b.nested:
        return v
    state = v._replace(name=b.fresh("state"))
    part = _inside(b, state, _table(v))
    if part[0].shape != v.shape:
        part = (v._replace(name=state.name), [], [])
    body = _body(b, state, *part)
    go = b.fresh("go")
    body.node.append(helper.make_node("Identity", [f"{go}_in"], [go]))
    given = [(f"{go}_i", TensorProto.INT64, ()), (f"{go}_in", TensorProto.BOOL, ())]
    body.input.extend(helper.make_tensor_value_info(*one) for one in given)
    body.input.append(_info(b, state))
    body.output.insert(0, helper.make_tensor_value_info(go, TensorProto.BOOL, ()))
    return v._replace(name=b.node("Loop", b.store(np.int64(2)), b.store(np.array(True)), v.name, body=body))


@step(SEQUENCE)
def scan(b: Builder, v: Value) -> Value:
    """Scan: a product at each step of the sequence, and a state that sums up."""
    if b.nested:
        return v
    now, state = b.fresh("now"), b.fresh("state")
    part = _inside(b, Value(now, (v.shape[0], v.channels)), {"gemm": gemm, "matmul": matmul, "activation": activation})
    body = _body(b, v, *part)
    more = b.fresh("more")
    body.node.append(helper.make_node("Add", [state, body.output[0].name], [more]))
    body.input.extend(_info(b, v._replace(name=name, shape=(0, 0))) for name in (state, now))
    body.output.insert(0, _info(b, Value(more, (0, 0))))
    width = part[0].channels
    first = b.node(
        "Expand",
        b.store(np.zeros((1, width), b.dtype)),
        b.node("Concat", b.node("Shape", v.name, end=1), b.ints(width), axis=0),
    )
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    name = b.node("Scan", first, v.name, outputs=2, body=body, num_scan_inputs=1, **axes)
    return v.with_channels(f"{name}b", width)


@step(IMAGE, SEQUENCE, MATRIX)
def function(b: Builder, v: Value) -> Value:
    """A step in a model-local function, called once or twice."""
    if b.nested:
        return v
    formal = v._replace(name=b.fresh("formal"))
    done, nodes, stored = _inside(b, formal, _table(v))
    if any(node.op_type in {"If", "Loop", "Scan"} for node in nodes) or done.name == formal.name:
        return v
    free = {name for node in nodes for name in node.input if name}
    names = [tensor.name for tensor in stored if tensor.name in free]
    constants = [t for t in stored if t.data_type == TensorProto.INT64]
    names = [name for name in names if name not in {t.name for t in constants}]
    held = [helper.make_node("Constant", [], [t.name], value=t) for t in constants]
    called = b.fresh("Step")
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
    b.functions.append(helper.make_function("own", called, [formal.name, *names], [done.name], [*held, *nodes], opsets))
    b.stored.extend(t for t in stored if t.name in names)
    name = b.node(called, v.name, *names, domain="own")
    if done.shape == v.shape and b.flip():
        name = b.node(called, name, *names, domain="own")
    return done._replace(name=name)


# ------------------------------------------------------------------ whole graphs


def _table(v: Value) -> dict[str, Step]:
    return IMAGE if len(v.shape) > 3 else SEQUENCE if len(v.shape) == 3 else MATRIX


def _take(b: Builder, v: Value, table: dict[str, Step]) -> Value:
    name = b.pick(*table)
    b.steps.append(name)
    done = table[name](b, v)
    b.seen.append(done)
    return done


HEAVY = {
    id(IMAGE): ("conv", "conv", "conv", "batch_norm", "conv_transpose", "squeeze_excite"),
    id(SEQUENCE): ("matmul", "matmul", "attention", "recurrent", "feed_forward"),
    id(MATRIX): ("gemm", "gemm", "matmul"),
}
"""Steps with weights: every other step is one of them."""


@st.composite
def chains(draw: Callable[[Any], Any], longest: int = 7) -> Graph:
    """A chain of steps, its last value an output, and sometimes one on the way, too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["float32", "float32", "float32", "float16", "float64"]))
    images = ["image"] * 2 * (kind != "float64")  # onnxruntime has no kernels
    family = draw(st.sampled_from(["matrix", "sequence", *images]))
    choices: list[frozenset[str]] = [frozenset(), frozenset({"batch"}), frozenset({"batch", "size"})]
    b = Builder(draw, np.dtype(kind), rng, draw(st.sampled_from(choices)))
    shape = {"image": (BATCH, 3, 4, 4), "sequence": (BATCH, 5, 4), "matrix": (BATCH, 6)}[family]
    dims: list[Any] = list(shape)
    if "batch" in b.open:
        dims[0] = "N"
    if "size" in b.open and family != "matrix":
        dims[2 if family == "image" else 1] = "L"
    v = Value("x", shape)
    b.seen.append(v)
    for index in range(draw(st.integers(2, longest))):
        table = _table(v)
        heavy = {name: table[name] for name in HEAVY[id(table)]}
        v = _take(b, v, heavy if index % 2 == 0 else table)
    outputs = [v]
    if len(b.seen) > 3 and draw(st.booleans()):
        outputs.append(b.pick(*b.seen[1:]))
    inputs = [helper.make_tensor_value_info("x", TYPES[kind], dims)]
    feed = {"x": rng.normal(size=shape).astype(kind)}
    if any("flag" in node.input for node in b.nodes):
        inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, ()))
        feed["flag"] = np.array(bool(draw(st.booleans())))
    outputs = [u for u in dict.fromkeys(outputs) if u.name != "x"] or [v._replace(name=b.node("Identity", "x"))]
    infos = [_info(b, u) for u in outputs]
    graph = helper.make_graph(b.nodes, "g", inputs, infos, b.stored)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
    opsets += [helper.make_opsetid("own", 1)] * bool(b.functions)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=b.functions)
    return Graph(model, feed, (kind, *sorted(b.open), *b.steps), b.rough)


STEPPED = {
    *("Floor", "Ceil", "Round", "Sign", "QuantizeLinear", "DynamicQuantizeLinear", "Cast", "CastLike", "Mod", "OneHot"),
    *("ArgMax", "ArgMin", "TopK", "Hardmax", "Less", "Greater", "Equal", "LessOrEqual", "GreaterOrEqual", "BitCast"),
}
"""Operators whose results jump."""

NEWEST = 25
"""Operator set that onnxruntime knows all of: cases of newer ones are taken for the oldest that is the same."""

REAL = (np.float32, np.float16, np.float64)


def unfit(model: onnx.ModelProto, inputs: Sequence[Any]) -> str:
    """Why a case cannot stand between two layers; empty where it can."""
    if not inputs or not all(isinstance(value, (np.ndarray, np.generic)) for value in inputs):
        return "an operand is no tensor"
    if len(model.graph.input) != len(inputs) or any(not value.name for value in model.graph.input):
        return "an operand is left out"
    if all(np.asarray(value).dtype not in REAL or not np.ndim(value) for value in inputs):
        return "no operand with an axis holds real numbers"
    if not np.size(inputs[_place(inputs)]):
        return "the operand is empty"
    if _shape(model.graph.output[0].type) is None:
        return "the first result is no tensor"
    return ""


def _place(inputs: Sequence[Any]) -> int:
    return next(i for i, value in enumerate(inputs) if np.asarray(value).dtype in REAL and np.ndim(value))


def _shape(kind: onnx.TypeProto) -> list[int] | None:
    return [d.dim_value for d in kind.tensor_type.shape.dim] if kind.HasField("tensor_type") else None


def sandwich(model: onnx.ModelProto, inputs: Sequence[Any], rng: np.random.Generator, convolve: bool) -> Graph:
    """A case between two layers: products along the last axis, or convolutions of 1x1. All else it takes is stored."""
    place = _place(inputs)
    first = np.asarray(inputs[place])
    kind = helper.np_dtype_to_tensor_dtype(first.dtype)
    convolve = convolve and first.ndim >= 3 and kind != TensorProto.DOUBLE
    axis = 1 if convolve else first.ndim - 1
    given = list(first.shape)
    given[axis] = 3
    size = first.shape[axis]
    shape = (size, 3, *[1] * (first.ndim - 2)) if convolve else (3, size)
    op = "Conv" if convolve else "MatMul"
    values = list(model.graph.input)
    nodes = [helper.make_node(op, ["before", "w_before"], [values[place].name]), *model.graph.node]
    stored = [numpy_helper.from_array(rng.uniform(-1, 1, shape).astype(first.dtype), "w_before")]
    stored += [
        numpy_helper.from_array(np.asarray(a), v.name)
        for i, (v, a) in enumerate(zip(values, inputs, strict=True))
        if i != place
    ]
    outputs = list(model.graph.output)
    sizes = _shape(outputs[0].type) or []
    same = outputs[0].type.tensor_type.elem_type == kind
    if same and len(sizes) >= (3 if convolve else 1) and all(sizes):
        behind = sizes[1] if convolve else sizes[-1]
        shape = (2, behind, *[1] * (len(sizes) - 2)) if convolve else (behind, 2)
        stored.append(numpy_helper.from_array(rng.uniform(-1, 1, shape).astype(first.dtype), "w_behind"))
        nodes.append(helper.make_node(op, [outputs[0].name, "w_behind"], ["sandwiched"]))
        outputs[0] = helper.make_tensor_value_info("sandwiched", kind, [None] * len(sizes))
    info = [helper.make_tensor_value_info("before", kind, given)]
    graph = helper.make_graph(nodes, "g", info, outputs, [*model.graph.initializer, *stored])
    opsets = {o.domain: o.version for o in model.opset_import}
    names = {node.op_type for node in model.graph.node if not node.domain}
    since = [defs.get_schema(name, opsets.get("", OPSET), "").since_version for name in names]
    if opsets.get("", NEWEST + 1) > NEWEST:
        opsets[""] = max(OPSET, *since, 0)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=model.functions)
    feed = {"before": rng.uniform(0.1, 1, given).astype(first.dtype)}
    return Graph(made, feed, (first.dtype.name, op, *sorted(names)), bool(names & STEPPED))


@cache
def atoms() -> dict[str, list[tuple[onnx.ModelProto, list[Any]]]]:
    """ONNX's own cases of one node that can stand between two layers, by operator."""
    from test_backend_cases import cases

    found: dict[str, list[tuple[onnx.ModelProto, list[Any]]]] = {}
    for model, inputs, _ in cases().values():
        if len(model.graph.node) == 1 and not unfit(model, inputs) and sum(map(np.size, inputs)) < 4000:
            found.setdefault(model.graph.node[0].op_type, []).append((model, inputs))
    del found["Scan"], found["Upsample"]  # of old operator sets only
    return found


@st.composite
def sandwiches(draw: Callable[[Any], Any]) -> Graph:
    """One of ONNX's cases between two products or two convolutions."""
    table = atoms()
    model, inputs = draw(st.sampled_from(table[draw(st.sampled_from(sorted(table)))]))
    return sandwich(model, inputs, np.random.default_rng(draw(st.integers(0, 2**16))), draw(st.booleans()))


def graphs() -> st.SearchStrategy[Graph]:
    """Three chains for each sandwich."""
    return st.one_of(chains(), chains(), chains(), sandwiches())
