"""Weights in their roles: the stored tensors that feed the weight operands of a model's operators.

`find` walks every node of every graph, sub-graph and function call and traces each weight operand of
`roles.ROLES` back through constant expressions to the tensors stored behind it. A stored tensor is one
weight however many operators read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxprune.errors import PruneError
from onnxprune.graph import expression as ex
from onnxprune.graph.model import Model
from onnxprune.graph.roles import OPAQUE, ROLES, Role
from onnxprune.graph.scope import Scope
from onnxprune.graph.trace import Tracer, Untraceable, Use

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
INTEGERS = {
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.INT16,
    ir.DataType.UINT16,
}


class Storage(Protocol):
    """Where a weight's values are kept: a tensor of an ONNX model, or a framework's parameter."""

    def read(self) -> np.ndarray:
        """The values as stored; may be a read-only view."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored tensor in its role.

    Two layouts of the same elements: *stored*, as the file or the framework keeps them, and *role order*
    (output, input, *kernel), in which every decision is made. `role` and `stored` carry arrays of any type
    from one to the other.

    Attributes:
        name: the initializer's name, or that of a Constant node's output; unique in the model.
        op_types: operators that read it, the first one first.
        names: every name an `op_names` pattern may match: the weight's, its nodes' and its module's.
        shape: as stored.
        dtype: as stored.
        storage: where the values are.
        uses: the operands it feeds, by the first stored element that each reads.
        leaf: its leaf in the uses' expressions.
        parts: how many equal runs of its outputs read inputs that are not each other's: the groups of a convolution.
    """

    name: str
    op_types: tuple[str, ...]
    names: frozenset[str]
    shape: tuple[int, ...]
    dtype: np.dtype
    storage: Storage
    uses: tuple[Use, ...]
    leaf: ex.Leaf
    parts: int = 1

    @property
    def joint(self) -> bool:
        """Whether its operator reads one set of inputs for all outputs, and cannot be split."""
        return self.op_type in RECURRENT

    @property
    def op_type(self) -> str:
        """The operator that gives the weight its role."""
        return self.op_types[0]

    @property
    def size(self) -> int:
        """Number of elements that reach an operand: what a sparsity is a share of."""
        return int(np.prod(self.shape, dtype=np.int64)) if self._places is None else int(self._places.size)

    @property
    def role_shape(self) -> tuple[int, ...]:
        """(output, input, *kernel)."""
        if self._places is not None:
            return self._places.shape
        return self.role(np.broadcast_to(np.bool_(False), self.shape)).shape

    def values(self) -> np.ndarray:
        """The weight as its operator sees it, in role order: dequantised, scaled. A view where values are stored so."""
        use = self.uses[0]
        if self._places is None:
            return use.view(ex.compute(use.expression, self._read))
        computed = [use.view(ex.compute(use.expression, self._read)) for use in self.uses]
        flat = np.zeros(int(np.prod(self.shape, dtype=np.int64)), np.result_type(*computed))
        for use, values in zip(reversed(self.uses), reversed(computed), strict=True):  # what the first use sees counts
            seen = self.places(use).reshape(-1)
            flat[seen[seen >= 0]] = values.reshape(-1)[seen >= 0]
        return np.take(flat, self._places)

    def role(self, stored: np.ndarray) -> np.ndarray:
        """An array of the stored shape in role order."""
        if self._places is not None:
            return np.take(np.ascontiguousarray(stored), self._places)
        use = self.uses[0]
        return use.view(ex.push(use.expression, lambda leaf: stored))

    def stored(self, role: np.ndarray, fill: object = True) -> np.ndarray:
        """An array in role order in the stored shape; elements no operand reads are `fill`.

        It is the same memory where that is laid out as the weight is stored.
        """
        if self._places is not None:
            out = np.full(self.shape, fill, role.dtype)
            out.reshape(-1)[self._places] = role
        else:
            out = np.empty(self.shape, role.dtype)
            view = self.role(out)
            if view.shape == role.shape and _strides(view) == _strides(role) and view.ctypes.data == out.ctypes.data:
                return np.lib.stride_tricks.as_strided(role, out.shape, out.strides)
            view[...] = role
        return out

    def zero(self) -> np.ndarray | None:
        """The stored values that mean exactly 0.0, in the stored shape; None where it is 0 throughout."""
        if not any(_shifted(use.expression) for use in self.uses):
            return None
        flat = np.zeros(int(np.prod(self.shape, dtype=np.int64)), np.float64)
        for use in reversed(self.uses):
            ex.zeros(use.expression, self._indices, flat)
        return flat.reshape(self.shape)

    def pruned(self, keep: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """The stored array with every entry where `keep` is False at the value that means 0.0.

        Args:
            keep: boolean array of the stored shape.
            values: the stored array, read from storage unless given.
        """
        out = np.array(self.storage.read() if values is None else values)
        zero = self.zero()
        out[~keep] = 0 if zero is None else zero[~keep].astype(out.dtype)
        return out

    def zero_everywhere(self) -> bool:
        """Whether every operator sees exactly 0.0 in an entry at its `zero`: False where they disagree about it."""
        zero = self.zero()
        if zero is None:
            return True
        stored = zero.astype(self.dtype)
        for use in self.uses:
            seen = ex.compute(
                use.expression, lambda leaf: stored if leaf.tensor is self.leaf.tensor else self._read(leaf)
            )
            if np.any(seen[ex.push(use.expression, self._indices) >= 0]):
                return False
        return True

    def extent(self, use: Use) -> tuple[int, int]:
        """The first stored element that a use reads, and minus how many: uses sort alike however a graph is ordered."""
        if self._whole(use):
            return 0, -int(np.prod(self.shape, dtype=np.int64))
        read = np.unique(ex.push(use.expression, self._indices))
        read = read[read >= 0]
        return (int(read[0]), -read.size) if read.size else (0, 0)

    def places(self, use: Use) -> np.ndarray:
        """Stored position of every element that a use reads, in role order; negative where another tensor stands."""
        return use.view(ex.push(use.expression, self._indices))

    def _whole(self, use: Use) -> bool:
        """Whether a use reads every element once, as a numpy view of the stored array."""
        if sum(1 for _ in ex.leaves(use.expression)) != 1:
            return False
        small = np.prod(self.shape, dtype=np.int64) < 2**16
        probe = np.empty(self.shape, np.bool_) if small else _untouched(self.shape)
        view = use.view(ex.push(use.expression, lambda leaf: probe))
        alias = view.flags.writeable and np.may_share_memory(view, probe)  # Expand's broadcast is read-only
        return bool(view.size == probe.size and alias and 0 not in _strides(view))

    @cached_property
    def _places(self) -> np.ndarray | None:
        """Stored position of every element in role order; None where a numpy view gives it."""
        if self._whole(self.uses[0]):
            return None
        seen: set[tuple[int, ...]] = set()
        parts: list[np.ndarray] = []
        taken = np.zeros(int(np.prod(self.shape, dtype=np.int64)), np.bool_)
        for use in self.uses:
            part = _rectangle(self.places(use))
            if part.shape in seen and parts and any(np.array_equal(part, p) for p in parts):
                continue
            fresh = ~taken[part]
            taken[part.reshape(-1)] = True
            if fresh.all() and np.unique(part).size == part.size:
                seen.add(part.shape)
                parts.append(part)
            elif fresh.any():  # partly the same elements: what is new joins as a row of its own
                parts.append(_first_seen(part[fresh])[None, :])
        alike = all(p.ndim == parts[0].ndim and p.shape[1:] == parts[0].shape[1:] for p in parts)
        joined: np.ndarray = np.concatenate(parts if alike else [p.reshape(-1) for p in parts])
        return joined if alike else joined[None, :]

    def _read(self, leaf: ex.Leaf) -> np.ndarray:
        if leaf.tensor is self.leaf.tensor:
            return self.storage.read()
        return np.broadcast_to(leaf.tensor.dtype.numpy().type(0), leaf.shape)

    def _indices(self, leaf: ex.Leaf) -> np.ndarray:
        if leaf.tensor is self.leaf.tensor:
            return np.arange(int(np.prod(self.shape, dtype=np.int64))).reshape(self.shape)
        return np.broadcast_to(np.int64(-1), leaf.shape)


def parameter(
    name: str,
    op_types: Sequence[str],
    storage: Storage,
    shape: Sequence[int],
    dtype: np.dtype,
    view: Callable[[np.ndarray], np.ndarray],
    names: Iterable[str] = (),
    parts: int = 1,
) -> Weight:
    """A weight that is kept elsewhere than in a graph: a framework's parameter.

    Args:
        name: unique name.
        op_types: operators it feeds, ONNX's names and the framework's, the one that gives the role first.
        storage: where its values are.
        shape: as stored.
        dtype: as stored.
        view: the stored array in role order (output, input, *kernel).
        names: further names an `op_names` pattern may match.
        parts: runs of its outputs that read inputs of their own.
    """
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(storage.read()), dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape(shape), name=name
    )
    leaf = ex.Leaf(ir.Value(name=name, const_value=tensor), tensor)
    use = Use(name, op_types[0], 0, leaf, view)
    known = frozenset({name, name.rpartition(".")[0], *names}) - {""}
    return Weight(name, tuple(op_types), known, tuple(shape), dtype, storage, (use,), leaf, parts)


@dataclass(frozen=True)
class Skipped:
    """A weight that is left alone, and why."""

    name: str
    op_type: str
    reason: str


@dataclass(frozen=True, eq=False)
class TensorStorage:
    """A tensor of a model as a weight's storage."""

    model: Model
    tensor: ir.TensorProtocol

    def read(self) -> np.ndarray:
        """The stored array, read-only."""
        return self.model.read(self.tensor)


@dataclass
class _Found:
    leaf: ex.Leaf
    uses: list[Use] = field(default_factory=list)
    where: str = ""


def find(model: Model) -> tuple[list[Weight], list[Skipped]]:
    """The weights of a model in graph order, and those that are left alone with the reason."""
    tracer = Tracer(model.graph)
    found: dict[int, _Found] = {}
    skipped: dict[int, Skipped] = {}
    said: set[str] = set()

    def skip(value: ir.Value, where: str, op_type: str, reason: str) -> None:
        if id(value) not in skipped:
            name = _unique(str(value.name), where, said)
            said.add(name)
            skipped[id(value)] = Skipped(name, op_type, reason)

    for node, scope in tracer.nodes():
        for index, use_of in _operands(tracer, node, scope):
            value = node.inputs[index]
            assert value is not None
            try:
                use = use_of()
            except Untraceable as error:
                if node.op_type != "Gather":  # most constants that are looked up are no embeddings
                    skip(tracer.origin(value, scope), scope.path, node.op_type, str(error))
                continue
            for leaf in ex.leaves(use.expression):
                entry = found.setdefault(id(leaf.tensor), _Found(leaf, where=scope.path))
                entry.uses.append(use)
    weights: list[Weight] = []
    taken: set[str] = set()
    for entry in found.values():
        uses = _roles_first(entry.uses, tracer)
        reason = _unsupported(entry.leaf)
        if reason:
            if uses[0].op_type != "Gather":
                skip(entry.leaf.value, entry.where, uses[0].op_type, reason)
            continue
        name = _unique(str(entry.leaf.value.name), entry.where, taken)
        names = frozenset({name, name.rpartition(".")[0], *(use.node for use in uses)}) - {""}
        tensor = entry.leaf.tensor
        storage = TensorStorage(model, tensor)
        dtype = np.dtype(tensor.dtype.numpy())
        weight = Weight(name, (), names, entry.leaf.shape, dtype, storage, tuple(uses), entry.leaf)
        try:
            weight = _in_order(weight)
            zero = weight.zero_everywhere()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            skip(entry.leaf.value, entry.where, uses[0].op_type, f"{uses[0].op_type} cannot read it: {error}")
            continue
        if zero:
            taken.add(name)
            weights.append(weight)
        else:
            skip(
                entry.leaf.value,
                entry.where,
                weight.op_type,
                "it is read with different zero points: no stored value is 0.0 to all of them",
            )
    return weights, list(skipped.values())


def _operands(tracer: Tracer, node: ir.Node, scope: Scope) -> Iterator[tuple[int, Callable[[], Use]]]:
    """The constant weight operands of a node, each with a function that traces it."""
    key = (node.domain, node.op_type)
    if key in OPAQUE:
        for index in OPAQUE[key][0]:
            if _given(node, index) and tracer.is_constant(node.inputs[index], scope):
                yield index, partial(_refuse, OPAQUE[key][1])
        return
    given = [r for r in ROLES.get(key, ()) if _given(node, r.operand)]
    constant = [r for r in given if tracer.is_constant(node.inputs[r.operand], scope)]
    if key[1] == "Gather":
        for role in constant:
            yield role.operand, partial(_table, tracer, node, scope, role)
        return
    both = key[1] in {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"} or (key[1] == "Einsum" and len(node.inputs) > 2)
    if both or len(constant) == 1:
        for role in constant:
            yield role.operand, partial(tracer.use, node, scope, role)
    if both or not constant:
        for role in given:
            behind = "" if role in constant else tracer.behind(node.inputs[role.operand], scope)
            if behind:
                yield (
                    role.operand,
                    partial(
                        _refuse, f"the {behind} after it takes a shape, a scale or a zero point known at run time only"
                    ),
                )


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _refuse(reason: str) -> Use:
    raise Untraceable(reason)


def _table(tracer: Tracer, node: ir.Node, scope: Scope, role: Role) -> Use:
    """The Use of an embedding: a matrix of real numbers, where many a Gather looks up shapes, indices and scalars."""
    use = tracer.use(node, scope, role)
    values = ex.compute(use.expression, lambda leaf: np.broadcast_to(leaf.tensor.dtype.numpy().type(0), leaf.shape))
    if values.ndim < 2 or ir.DataType.from_numpy(values.dtype) not in FLOATS:
        raise Untraceable("it is no matrix of real numbers")
    return use


def _roles_first(uses: list[Use], tracer: Tracer) -> list[Use]:
    """Uses with those as an embedding last: tied to a MatMul, it is the MatMul's weight.

    A Gather of constant positions only moves what another operator reads; alone, it is an embedding of fixed positions.
    """
    gathers = [use for use in uses if use.op_type == "Gather"]
    others = [use for use in uses if use.op_type != "Gather"]
    if others:
        gathers = [u for u in gathers if u.site is None or not tracer.is_constant(u.site.inputs[1], u.scope)]
    return others + gathers


def _in_order(weight: Weight) -> Weight:
    """A weight with its uses, and so the elements in role order, in an order that is not that of the operators.

    Uses of the same extent stay in graph order.
    """
    uses = weight.uses
    if len(uses) > 1:
        uses = tuple(sorted(uses, key=lambda use: (use.op_type == "Gather", *weight.extent(use))))
    types = dict.fromkeys("Embedding" if use.op_type == "Gather" else use.op_type for use in uses)
    weight = replace(weight, op_types=tuple(types), uses=uses)
    return replace(weight, parts=_parts(uses[0], weight.role_shape[0]))


def _parts(use: Use, outputs: int) -> int:
    """How many equal runs of outputs read inputs of their own: groups of a convolution, matrices of a batch."""
    parts = 1
    if "Conv" in use.op_type and use.site is not None:
        parts = int(use.scope.attributes(use.site).get("group", 1))
    elif "MatMul" in use.op_type:
        shape = ex.push(use.expression, lambda leaf: np.broadcast_to(np.bool_(False), leaf.shape)).shape
        parts = math.prod(shape[:-2])
    return parts if parts and outputs % parts == 0 else 1


def _unsupported(leaf: ex.Leaf) -> str:
    if leaf.tensor.dtype not in FLOATS | INTEGERS:
        name = leaf.tensor.dtype.name
        return f"its type {name} cannot be pruned (float16, bfloat16, float32, float64 and quantised integers can)"
    if leaf.tensor.size == 0:
        return "it is empty"
    return ""


def _unique(name: str, where: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    stem = f"{where}/{name}" if where else name
    return next(c for c in (stem, *(f"{stem}.{i}" for i in range(2, 10_000))) if c not in taken)


def _shifted(expression: ex.Expression) -> bool:
    if isinstance(expression, ex.Leaf):
        return False
    if isinstance(expression, ex.Scale):
        return expression.zero is not None or _shifted(expression.arg)
    return any(_shifted(arg) for arg in expression.args)


def _untouched(shape: tuple[int, ...]) -> np.ndarray:
    """An array whose memory is reserved but never used: only its addresses matter."""
    return np.empty(shape, np.bool_)


def _strides(view: np.ndarray) -> list[int]:
    return [s for s, d in zip(view.strides, view.shape, strict=True) if d > 1]


def _rectangle(indices: np.ndarray) -> np.ndarray:
    """The part of an index array that is this weight's: a sub-box where it is one, else its elements as one row."""
    if (indices >= 0).all():
        return indices
    ours = indices >= 0
    axes = [np.flatnonzero(ours.any(tuple(a for a in range(ours.ndim) if a != axis))) for axis in range(ours.ndim)]
    box = indices[np.ix_(*axes)]
    return box if (box >= 0).all() else _first_seen(indices[ours])[None, :]


def _first_seen(flat: np.ndarray) -> np.ndarray:
    """The distinct entries in order of first appearance."""
    _, first = np.unique(flat, return_index=True)
    return flat[np.sort(first)]


def _finite_squares(values: np.ndarray) -> bool:
    """Whether the sum of squares is finite, which is one fast read; a large value may make it infinite as well."""
    if not (values.flags.c_contiguous or values.flags.f_contiguous) or values.dtype.itemsize < 4:
        return False
    flat = values.ravel("K")
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)))


def check_finite(weight: Weight, values: np.ndarray) -> None:
    """Refuse NaN and infinite weights, by name.

    Raises:
        PruneError: with the number of such entries.
    """
    if values.dtype.kind in "iu" or values.size == 0:
        return
    if values.dtype.itemsize == 2:  # half floats have no fast maximum; their bits have
        infinity = np.array(np.inf, values.dtype).view(np.uint16)
        finite = bool((values.view(np.uint16) & np.uint16(0x7FFF)).max() < infinity)
    else:
        finite = _finite_squares(values) or bool(np.isfinite(values.max()) and np.isfinite(values.min()))
    bad = 0 if finite else int(np.count_nonzero(~np.isfinite(values.astype(np.float64))))
    if bad:
        raise PruneError(
            f"weight '{weight.name}' {list(weight.shape)} ({weight.op_type}) holds {bad} entries that are NaN or "
            "infinite; it has no meaningful magnitudes: exclude it by op_names, or repair the model"
        )
