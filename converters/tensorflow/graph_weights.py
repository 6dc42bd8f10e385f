"""The weights of a TensorFlow graph: which variable feeds which operator's weight operand, and in which layout.

What the core does for an ONNX graph, for the ops of `tf.Graph`: an operand is followed back to the variables behind
it, the ops between become the core's constant expressions, and each operator's row says which ONNX operand it is.
Layout and order of ties are then those of the exported file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorflow as tf

from onnxprune.errors import PruneError
from onnxprune.graph import expression as ex
from onnxprune.graph.roles import ROLES
from onnxprune.graph.trace import Use
from onnxprune.graph.weights import FLOATS, Skipped, Weight, parameter

v1 = tf.compat.v1

Array = np.ndarray
Move = Callable[..., Array]

HANDLES = {"VarHandleOp"}
REFS = {"VariableV2", "Variable"}
GATHERS = {"Gather", "GatherV2", "ResourceGather"}
CALLS = {
    "While",
    "StatelessWhile",
    "If",
    "StatelessIf",
    "Case",
    "StatelessCase",
    "PartitionedCall",
    "StatefulPartitionedCall",
}


@dataclass(frozen=True, eq=False)
class Variable:
    """A variable that is a weight.

    Attributes:
        op: the op that makes it.
        object: the tf.Variable.
        edges: (op, input index) where one of its values starts on its way to a weight operand.
        gathers: ops that look rows up in the variable itself, without reading it first.
    """

    op: Any
    object: Any
    edges: tuple[tuple[Any, int], ...]
    gathers: tuple[Any, ...]


@dataclass(frozen=True)
class Fetched:
    """A weight's storage: the values fetched last from a session."""

    values: Mapping[str, Array]
    name: str

    def read(self) -> Array:
        """The values.

        Raises:
            PruneError: none were fetched yet.
        """
        if self.name not in self.values:
            raise PruneError(
                f"the values of variable '{self.name}' are not known before a session has run the graph; run it first"
            )
        return self.values[self.name]


class _UntraceableError(Exception):
    """The text is the reason a user reads."""


# -------------------- operators: op -> ONNX operator, operand, layout


def _same(x: Array) -> Array:
    return x


def _kernel(x: Array) -> Array:
    """(*kernel, a, b) to (b, a, *kernel): Conv from (in, out), ConvTranspose from (out, in)."""
    return np.transpose(x, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)))


def _depthwise(x: Array) -> Array:
    """(*kernel, channels, multiplier) to Conv's (channels * multiplier, 1, *kernel)."""
    return _kernel(x.reshape(*x.shape[:-2], 1, -1))


def _adjoint(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _einsum(op: Any, index: int) -> Move:
    """A weight's axes to MatMul's (K, N): those it shares with the other operand, then those of the output."""
    equation = op.get_attr("equation").decode()
    terms, output = equation.replace(" ", "").split("->")
    ours = terms.split(",")[index]
    other = terms.split(",")[1 - index]
    shared = [a for a in ours if a in other and a not in output]
    own = [a for a in ours if a in output and a not in other]
    if "." in ours or len(set(ours)) < len(ours) or len(shared) + len(own) < len(ours):
        raise _UntraceableError(f"Einsum '{equation}' does not multiply it as a matrix")
    order = [ours.index(a) for a in shared + own]
    size = len(shared)

    def matrix(x: Array) -> Array:
        x = x.transpose(order)
        return x.reshape(int(np.prod(x.shape[:size], dtype=np.int64)), -1)

    return matrix


def _operands(op: Any) -> dict[int, tuple[str, int, Callable[[], Move]]]:
    """The weight operands of an op: index -> (ONNX operator, its operand, the layout it has there)."""
    kind = op.type
    if kind in {"Conv2D", "Conv3D"}:
        return {1: ("Conv", 1, lambda: _kernel)}
    if kind == "DepthwiseConv2dNative":
        return {1: ("Conv", 1, lambda: _depthwise)}
    if kind in {"Conv2DBackpropInput", "Conv3DBackpropInputV2"}:
        return {1: ("ConvTranspose", 1, lambda: _kernel)}
    if kind == "Einsum" and len(op.inputs) == 2:
        return {0: ("MatMul", 1, lambda: _einsum(op, 0)), 1: ("MatMul", 1, lambda: _einsum(op, 1))}
    if kind in {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"}:
        flags = ("transpose_a", "transpose_b") if kind == "MatMul" else ("adj_x", "adj_y")
        layouts = [_adjoint if op.get_attr(flag) else _same for flag in flags]
        return {0: ("MatMul", 0, lambda: layouts[0]), 1: ("MatMul", 1, lambda: layouts[1])}
    if kind == "Gather" or (kind == "GatherV2" and _static(op.inputs[2]) == 0):
        return {0: ("Gather", 0, lambda: _same)}
    return {}


# -------------------- ops that move elements: op -> function, operands


def _static(tensor: Any) -> Any:
    return tf.get_static_value(tensor)


def _known(op: Any, index: int) -> Any:
    value = _static(op.inputs[index])
    if value is None:
        raise _UntraceableError(f"the {op.type} '{op.name}' after it takes a value known at run time only")
    return value


def _strided(op: Any) -> Move:
    begin, end, step = (_known(op, i) for i in (1, 2, 3))
    masks = {name: int(op.get_attr(f"{name}_mask")) for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    index: list[Any] = []
    for i in range(len(begin)):
        bit = 1 << i
        if masks["ellipsis"] & bit:
            index.append(Ellipsis)
        elif masks["new_axis"] & bit:
            index.append(None)
        elif masks["shrink_axis"] & bit:
            index.append(int(begin[i]))
        else:
            first = None if masks["begin"] & bit else int(begin[i])
            index.append(slice(first, None if masks["end"] & bit else int(end[i]), int(step[i])))
    return lambda x: x[tuple(index)]


def _slice(op: Any) -> Move:
    begin, size = _known(op, 1), _known(op, 2)
    index = tuple(slice(int(b), None if s < 0 else int(b + s)) for b, s in zip(begin, size, strict=True))
    return lambda x: x[index]


def _part(op: Any, output: int) -> tuple[Move, tuple[int, ...]]:
    """One of the pieces that a split makes."""
    if op.type == "Split":
        axis, parts = int(_known(op, 0)), int(op.get_attr("num_split"))
        return lambda x: np.split(x, parts, axis)[output], (1,)
    sizes, axis = _known(op, 1), int(_known(op, 2))
    return lambda x: np.split(x, np.cumsum(sizes)[:-1], axis)[output], (0,)


def _move(op: Any, output: int) -> tuple[Move, tuple[int, ...]]:
    """What an op does to places, and the inputs it does it to."""
    kind = op.type
    if kind in {"Identity", "StopGradient", "PreventGradient", "Snapshot", "Enter"}:
        return _same, (0,)
    if kind == "Reshape":
        shape = _known(op, 1)
        return lambda x: x.reshape(shape), (0,)
    if kind == "Transpose":
        order = _known(op, 1)
        return lambda x: x.transpose(order), (0,)
    if kind == "ExpandDims":
        axis = int(_known(op, 1))
        return lambda x: np.expand_dims(x, axis), (0,)
    if kind == "Squeeze":
        axes = tuple(op.get_attr("squeeze_dims")) or None
        return lambda x: x.squeeze(axes), (0,)
    if kind == "StridedSlice":
        return _strided(op), (0,)
    if kind == "Slice":
        return _slice(op), (0,)
    if kind in {"Split", "SplitV"}:
        return _part(op, output)
    if kind == "Unpack":
        axis = int(op.get_attr("axis"))
        return lambda x: np.moveaxis(x, axis, 0)[output], (0,)
    if kind == "Pack":
        axis = int(op.get_attr("axis"))
        return lambda *x: np.stack(x, axis), tuple(range(len(op.inputs)))
    if kind == "ConcatV2":
        last = len(op.inputs) - 1
        axis = int(_known(op, last))
        return lambda *x: np.concatenate(x, axis), tuple(range(last))
    raise _UntraceableError(f"the {kind} '{op.name}' between it and its operator cannot be followed")


# -------------------- the search


@dataclass
class _Found:
    op: Any
    leaf: ex.Leaf
    uses: list[Use] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    edges: dict[tuple[str, int], tuple[Any, int]] = field(default_factory=dict)
    gathers: list[Any] = field(default_factory=list)


def find(graph: Any, values: Mapping[str, Array]) -> tuple[list[tuple[Weight, Variable]], list[Skipped]]:
    """The weights of a graph in the order of its ops, and those that are left alone with the reason. Edits nothing.

    Args:
        graph: a tf.Graph.
        values: where the weights' storages look for the variable's values, by name of its op.
    """
    return _Search(graph, values).run()


class _Search:
    def __init__(self, graph: Any, values: Mapping[str, Array]) -> None:
        self.graph, self.values = graph, values
        self.behind = _variables_behind(graph)
        self.objects = _objects(graph)
        self.trainable = {v.op.name for v in graph.get_collection(v1.GraphKeys.TRAINABLE_VARIABLES)}
        self.found: dict[str, _Found] = {}
        self.skipped: dict[str, Skipped] = {}

    def run(self) -> tuple[list[tuple[Weight, Variable]], list[Skipped]]:
        for op in self.graph.get_operations():
            if op.type == "ResourceGather" and op.inputs[0].op.type in HANDLES:
                self._look_up(op)
            elif op.type in CALLS:
                self._called(op)
            elif operands := _operands(op):
                self._operator(op, operands)
        weights = [pair for found in self.found.values() if found.uses and (pair := self._weight(found))]
        names = {weight.name for weight, _ in weights}
        return weights, [s for name, s in self.skipped.items() if name not in names]

    def _operator(self, op: Any, operands: Mapping[int, tuple[str, int, Callable[[], Move]]]) -> None:
        constant = [k for k in operands if self.behind.get(op.inputs[k].op.name)]
        if len(constant) > 1:
            trained = [k for k in constant if self.behind[op.inputs[k].op.name] & self.trainable]  # type: ignore[operator]
            constant = trained if len(trained) == 1 else constant
        several = f"both operands of {op.type} '{op.name}' are variables" if len(constant) > 1 else ""
        gradient = _is_gradient(op)
        for k in constant:
            kind, operand, layout = operands[k]
            edges: list[tuple[Any, Any, int]] = []
            try:
                traced = self._expression(op, k, edges)
                use = self._use(op, kind, operand, ex.Move(layout(), (traced,)))
                for variable, reader, index in edges:
                    found = self._of(variable)
                    found.edges[reader.name, index] = (reader, index)
                    if not gradient and not several and use not in found.uses:
                        found.uses.append(use)
                        found.kinds.append(op.type)
                if several:
                    raise _UntraceableError(several)
            except _UntraceableError as reason:
                if not gradient and kind != "Gather":
                    self._skip(self.behind[op.inputs[k].op.name] or (), op.type, str(reason))

    def _look_up(self, op: Any) -> None:
        try:
            found = self._of(op.inputs[0].op)
        except _UntraceableError:  # a table of integers is no embedding
            return
        found.gathers.append(op)
        if len(found.leaf.shape) > 1 and not _is_gradient(op):
            found.uses.append(self._use(op, "Gather", 0, found.leaf))
            found.kinds.append(op.type)

    def _called(self, op: Any) -> None:
        for tensor in op.inputs:
            for name in self.behind.get(tensor.op.name) or ():
                shape = _shape(self.graph.get_operation_by_name(name))
                if shape is not None and len(shape) > 1:
                    reason = f"it is read inside the {op.type} '{op.name}', whose body cannot be edited; unroll it"
                    self._skip((name,), op.type, reason)

    def _expression(self, op: Any, index: int, edges: list[tuple[Any, Any, int]]) -> ex.Expression:
        """What computes an input from variables; notes where their values start on their way."""
        tensor = op.inputs[index]
        producer = tensor.op
        variable = _read_by(producer)
        if variable is not None:
            edges.append((variable, op, index))
            return self._of(variable).leaf
        if producer.type == "Cast":
            dtype = np.dtype(tensor.dtype.as_numpy_dtype)
            return ex.Scale(lambda x: x.astype(dtype), self._expression(producer, 0, edges), keeps=True)
        move, operands = _move(producer, tensor.value_index)
        return ex.Move(move, tuple(self._expression(producer, i, edges) for i in operands))

    def _use(self, op: Any, kind: str, operand: int, expression: ex.Expression) -> Use:
        role = next(r for r in ROLES["", kind] if r.operand == operand)
        layout = ex.push(expression, lambda leaf: np.broadcast_to(np.bool_(False), leaf.shape))
        if kind == "Gather" and layout.ndim < 2:
            raise _UntraceableError("it is no matrix")
        try:
            role.view(layout, {})
        except (LookupError, TypeError, ValueError) as error:
            raise _UntraceableError(f"its layout cannot be computed: {error}") from error
        return Use(op.name, kind, operand, expression, lambda x: role.view(x, {}))

    def _of(self, op: Any) -> _Found:
        if op.name not in self.found:
            shape = _shape(op)
            dtype = tf.as_dtype(op.get_attr("dtype"))
            if shape is None:
                raise _UntraceableError("its shape is not known before it runs")
            try:
                kind = ir.DataType.from_numpy(np.dtype(dtype.as_numpy_dtype))
            except (TypeError, ValueError):
                kind = None
            if kind not in FLOATS:
                raise _UntraceableError(
                    f"its type {dtype.name} cannot be pruned (float16, bfloat16, float32 and float64 can)"
                )
            storage = Fetched(self.values, op.name)
            weight = parameter(op.name, ("",), storage, shape, np.dtype(dtype.as_numpy_dtype), _same)
            self.found[op.name] = _Found(op, weight.leaf)
        return self.found[op.name]

    def _weight(self, found: _Found) -> tuple[Weight, Variable] | None:
        name = found.op.name
        if name not in self.objects:
            self._skip(
                (name,),
                found.kinds[0],
                "it is in none of the graph's collections, so that training ops to come cannot be told to hold it",
            )
            return None
        names = {name, f"{name}:0", name.rpartition("/")[0], *(use.node for use in found.uses)} - {""}
        storage = Fetched(self.values, name)
        dtype = np.dtype(tf.as_dtype(found.op.get_attr("dtype")).as_numpy_dtype)
        weight = Weight(name, (), frozenset(names), found.leaf.shape, dtype, storage, tuple(found.uses), found.leaf)
        roles = list(zip(found.uses, found.kinds, strict=True))
        if len(roles) > 1:  # as in a file, not by the order of the operators
            roles.sort(key=lambda pair: (pair[0].op_type == "Gather", *weight.extent(pair[0])))
        types = [t for use, kind in roles for t in ("Embedding" if use.op_type == "Gather" else use.op_type, kind)]
        weight = replace(weight, op_types=tuple(dict.fromkeys(types)), uses=tuple(use for use, _ in roles))
        return weight, Variable(found.op, self.objects[name], tuple(found.edges.values()), tuple(found.gathers))

    def _skip(self, names: Iterable[str], op_type: str, reason: str) -> None:
        for name in names:
            self.skipped.setdefault(name, Skipped(name, op_type, reason))


def _variables_behind(graph: Any) -> dict[str, frozenset[str] | None]:
    """For every op the variables its outputs are computed from; None where data, chance or state enter."""
    behind: dict[str, frozenset[str] | None] = {}
    for last in graph.get_operations():
        waiting = [last]
        while waiting:  # inputs first: ops of loops and branches are not made in that order
            op = waiting[-1]
            sources = _sources(op)
            missing = [t.op for t in sources or () if t.op.name not in behind]
            if missing and op.name not in behind:
                waiting += missing
                continue
            waiting.pop()
            sets = [behind[t.op.name] for t in sources or ()]
            known = [s for s in sets if s is not None]
            own = {op.name} if op.type in HANDLES | REFS else ()
            behind[op.name] = None if sources is None or len(known) < len(sets) else frozenset(own).union(*known)
    return behind


def _sources(op: Any) -> list[Any] | None:
    """The tensors that an op's outputs are computed from; None where something enters that no tensor tells of."""
    if op.type in HANDLES | REFS | {"Const"}:
        return []
    if op.type == "Switch":
        return list(op.inputs[:1])
    stateful = op.op_def.is_stateful and op.type not in {"ReadVariableOp", "ResourceGather"}
    if not op.inputs or stateful or _writes(op) or op.type in {"Merge", "NextIteration"}:  # every loop goes through one
        return None
    return list(op.inputs)


def _writes(op: Any) -> bool:
    return any(tensor.dtype._is_ref_dtype for tensor in op.outputs)


def _read_by(op: Any) -> Any:
    """The variable that an op's output is the value of; None where it is no variable's."""
    if op.type in REFS:
        return op
    if op.type == "Identity" and op.inputs[0].op.type in REFS:
        return op.inputs[0].op
    if op.type == "ReadVariableOp":
        if op.inputs[0].op.type in HANDLES:
            return op.inputs[0].op
        raise _UntraceableError(f"it is read inside a loop or a branch by '{op.name}'")
    return None


def _shape(op: Any) -> tuple[int, ...] | None:
    shape = tf.TensorShape(op.get_attr("shape"))
    return tuple(int(d) for d in shape) if shape.is_fully_defined() else None


def _objects(graph: Any) -> dict[str, Any]:
    """Name of its op -> tf.Variable."""
    keys = v1.GraphKeys
    listed = (keys.GLOBAL_VARIABLES, keys.TRAINABLE_VARIABLES, keys.LOCAL_VARIABLES, keys.MODEL_VARIABLES)
    return {v.op.name: v for key in listed for v in graph.get_collection(key) if hasattr(v, "op")}


def _is_gradient(op: Any) -> bool:
    """Whether an op was made by differentiating: tf.gradients calls it '<op>_grad/...', a tape 'gradient_tape/...'."""
    parts = op.name.split("/")[:-1]
    return any(part.endswith("_grad") for part in parts) or "gradient_tape" in parts
