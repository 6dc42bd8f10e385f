"""From an operand back to the stored tensors behind it, through nodes, sub-graphs and function calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.errors import PruneError
from onnxprune.graph import constants
from onnxprune.graph import expression as ex
from onnxprune.graph.loops import bodies, unchanged_state
from onnxprune.graph.roles import CONTRIB, Role
from onnxprune.graph.scope import MAIN, Scope
from onnxprune.graph.tensors import stored_tensors

NONDETERMINISTIC = {"RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}

RESHAPING = ex.MOVES.keys() - {"Concat", "Gather"} | {
    "Split",
    "SplitToSequence",
    "SequenceAt",
    "Cast",
    "CastLike",
    "DequantizeLinear",
}
"""Operators whose result is their first operand, moved or converted; a Gather at run time is a look-up."""


HEIGHT = 64
"""Operators that may stand one behind the other between a stored tensor and an operand."""

LEAVES = 4096
"""Stored tensors that an operand may be made of, each as often as it occurs."""

GROWN = 1 << 24
"""Elements of what is made larger on its way, in all, before what is stored is taken for too little to prune."""

COMPUTED = 1 << 25
"""Elements of all constants that are computed, in addition to twice those that are stored."""


class Untraceable(Exception):  # noqa: N818  (a finding, not an error)
    """A constant operand that cannot be followed to a stored tensor; the text is the reason a user reads."""


@dataclass(frozen=True, eq=False)
class Use:
    """One operator that reads a weight: the operand's expression, and the operand's view in role order."""

    node: str
    op_type: str
    operand: int
    expression: ex.Expression
    view: Callable[[np.ndarray], np.ndarray]
    site: ir.Node | None = None
    scope: Scope = MAIN


class Tracer:
    """Follows values of one model to where they are stored."""

    def __init__(self, model: ir.Model) -> None:
        """A tracer of the model's graphs and functions."""
        self.model = model
        self._constant: dict[tuple[int, Scope], bool] = {}
        self._height: dict[tuple[int, Scope], int] = {}
        self._traced: dict[tuple[int, Scope], ex.Expression | Untraceable] = {}
        self._computed: dict[tuple[int, Scope], np.ndarray] = {}
        self._room = COMPUTED + 2 * sum(int(tensor.size) for _, tensor in stored_tensors(model))
        self._scopes: dict[tuple[int, Scope], Scope] = {}
        self._bodies = dict(bodies(model))

    def nodes(self) -> Iterator[tuple[ir.Node, Scope]]:
        """Every node in order, those of sub-graphs and of called functions included, with the calls that lead to it."""
        yield from self._walk(self.model.graph, Scope())

    def is_constant(self, value: ir.Value | None, scope: Scope) -> bool:
        """Whether a value is the same at every run: stored, or computed from stored values only."""
        stack = [self._resolve(value, scope)]
        while stack:
            key = stack[-1]
            if key is None:
                stack.pop()
                continue
            seen, where = key
            if (id(seen), where) in self._constant:
                stack.pop()
                continue
            inputs = _constant_inputs(seen)
            if isinstance(inputs, bool):
                self._constant[id(seen), where] = inputs
                stack.pop()
                continue
            keys = [self._resolve(v, where) for v in inputs]
            known = [None if k is None else self._constant.get((id(k[0]), k[1])) for k in keys]
            missing = next((k for k, v in zip(keys, known, strict=True) if k is not None and v is None), None)
            if any(k is False for k in known) or missing is None:
                self._constant[id(seen), where] = not any(k is False for k in known)
                self._height[id(seen), where] = 1 + max(
                    (self._height.get((id(k[0]), k[1]), 0) for k in keys if k is not None), default=0
                )
                stack.pop()
            else:
                stack.append(missing)
        end = self._resolve(value, scope)
        return end is not None and self._constant[id(end[0]), end[1]]

    def use(self, node: ir.Node, scope: Scope, role: Role) -> Use:
        """The Use of a node's weight operand.

        Raises:
            Untraceable: the operand is constant, but cannot be followed to stored tensors.
        """
        attributes = scope.attributes(node)
        try:
            traced = self.trace(node.inputs[role.operand], scope)
            layout = _layout(traced)
            role.view(layout, attributes)
            if role.zero_point is not None:
                traced = self._quantised(node, scope, role, traced, layout.shape, attributes)
        except PruneError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise Untraceable(f"its layout cannot be computed as the graph describes it: {error}") from error
        return Use(node.name or "", node.op_type, role.operand, traced, lambda x: role.view(x, attributes), node, scope)

    def trace(self, value: ir.Value | None, scope: Scope) -> ex.Expression:
        """The expression that computes a constant value from stored tensors.

        Raises:
            Untraceable: an operator on the way neither moves data nor scales it by a constant.
        """
        value, scope = self._there(value, scope)
        key = (id(value), scope)
        if key not in self._traced:
            if self._height.get(key, 0) > HEIGHT:
                raise Untraceable(f"more than {HEIGHT} operators stand between it and where it is read")
            try:
                self._traced[key] = self._trace(value, scope)
            except Untraceable as reason:
                self._traced[key] = reason
        found = self._traced[key]
        if isinstance(found, Untraceable):
            raise found
        return found

    def _trace(self, value: ir.Value, scope: Scope) -> ex.Expression:
        node = value.producer()
        if node is None:
            assert value.const_value is not None
            return ex.Leaf(value, value.const_value)
        attributes = scope.attributes(node)
        op = node.op_type
        if op == "Constant":
            if isinstance(attributes.get("value"), ir.TensorProtocol):
                return ex.Leaf(value, attributes["value"])
            raise Untraceable(
                f"it is given as the attribute '{next(iter(attributes), '?')}' of a Constant node; store it as a tensor"
            )
        if node.domain not in ("", "ai.onnx") and (node.domain, op) != (CONTRIB, "DequantizeLinear"):
            raise Untraceable(f"it is computed by {node.domain}.{op}, which has no rule")
        if op in ex.MOVES:
            return self._move(node, scope, attributes)
        if op == "Split":
            given = self._side(node, 1, scope)
            sizes = attributes.get("split") if given is None else [int(s) for s in given]
            apply = partial(
                ex.split,
                sizes=sizes,
                count=len(node.outputs),
                axis=int(attributes.get("axis", 0)),
                index=int(value.index() or 0),
            )
            return ex.Move(apply, (self.trace(node.inputs[0], scope),))
        if op == "SequenceAt":
            return self._entry(node, scope)
        if op in {"Cast", "CastLike"}:
            return self._cast(node, scope, attributes)
        if op in {"Mul", "Div"}:
            return self._product(node, scope, op)
        if op == "Sub":
            return self._shift(node, scope)
        if op == "DequantizeLinear":
            return self._dequantize(node, scope, attributes)
        raise Untraceable(
            f"it is computed by {op}{f' {node.name!r}' if node.name else ''}, "
            "which neither moves nor scales its elements"
        )

    def constant(self, value: ir.Value | None, scope: Scope) -> np.ndarray:
        """A small constant's value, computed with ONNX's reference implementation where it is not stored.

        Raises:
            Untraceable: it cannot be computed.
        """
        value, scope = self._there(value, scope)
        node = value.producer()
        if node is None:
            assert value.const_value is not None
            return value.const_value.numpy()
        if node.op_type == "Constant":
            attributes = scope.attributes(node)
            if isinstance(attributes.get("value"), ir.TensorProtocol):
                return np.asarray(attributes["value"].numpy())
            return np.asarray(next(iter(attributes.values())))
        fixed = _static_shape(node)
        if fixed is not None:
            return fixed
        key = (id(value), scope)
        if key not in self._computed:
            what = f"the constant '{value.name}' on its way cannot be computed"
            if self._height.get(key, 0) > HEIGHT:
                raise Untraceable(f"{what}: more than {HEIGHT} operators stand before it")
            try:
                self._computed[key] = self._evaluate(node, scope)[int(value.index() or 0)]
            except Untraceable:
                raise
            except Exception as error:
                raise Untraceable(f"{what}: {error}") from error
        return self._computed[key]

    # ------------------------------------------------------------ one method per kind of node

    def _move(self, node: ir.Node, scope: Scope, attributes: dict[str, Any]) -> ex.Expression:
        function = ex.MOVES[node.op_type]
        if node.op_type == "Concat":
            args = tuple(self.trace(v, scope) for v in node.inputs)
            stored = [leaf for arg in args for leaf in itertools.islice(ex.leaves(arg), LEAVES + 1)]
            if len(stored) > LEAVES:
                raise Untraceable(f"it is put together from more than {LEAVES} pieces")
            _check_growth(sum(math.prod(leaf.shape) for leaf in stored), stored)
            return ex.Move(partial(function, **attributes), args)
        sides = [self._side(node, i, scope) for i in range(1, len(node.inputs))]
        arg = self.trace(node.inputs[0], scope)
        if node.op_type in {"Expand", "Tile", "Gather"}:
            size = constants.moved(node.op_type, _layout(arg).shape, sides, int(attributes.get("axis", 0)))
            _check_growth(size, list(ex.leaves(arg)))
        return ex.Move(lambda x: function(x, *sides, **attributes), (arg,))

    def _entry(self, node: ir.Node, scope: Scope) -> ex.Expression:
        """An entry of a sequence, as torch exports the projections of cross-attention."""
        sequence, within = self._there(node.inputs[0], scope)
        maker = sequence.producer()
        index = int(self.constant(node.inputs[1], scope))
        if maker is not None and maker.op_type == "SequenceConstruct":
            return self.trace(maker.inputs[index], within)
        if maker is None or maker.op_type != "SplitToSequence":
            raise Untraceable(f"it is an entry of a sequence made by {maker and maker.op_type}, which has no rule")
        apply = partial(ex.entry, sizes=self._side(maker, 1, within), index=index, **within.attributes(maker))
        return ex.Move(apply, (self.trace(maker.inputs[0], within),))

    def _cast(self, node: ir.Node, scope: Scope, attributes: dict[str, Any]) -> ex.Expression:
        target = int(attributes["to"]) if node.op_type == "Cast" else self.constant(node.inputs[1], scope).dtype
        dtype = ir.DataType(target).numpy() if isinstance(target, int) else target
        if not _is_float(dtype):
            raise Untraceable(f"it is cast to {dtype}")
        return ex.Scale(lambda x: x.astype(dtype), self.trace(node.inputs[0], scope), keeps=True)

    def _product(self, node: ir.Node, scope: Scope, op: str) -> ex.Expression:
        """The factor that has the product's full shape is the weight, the other one its scale."""
        sides = [self.constant_shape(v, scope) for v in node.inputs]
        full = np.broadcast_shapes(*sides)
        index = 0 if op == "Div" or sides[0] == full else 1
        if sides[index] != full:
            raise Untraceable(
                f"it is a product of {list(sides[0])} and {list(sides[1])}, neither of the operand's shape"
            )
        weight = self.trace(node.inputs[index], scope)
        if self._sources(node.inputs[1 - index], scope).keys() & {id(leaf.value) for leaf in ex.leaves(weight)}:
            raise Untraceable(
                "its scale is computed from the weight itself (weight normalisation); fold it before pruning"
            )
        factor = self.constant(node.inputs[1 - index], scope)
        if op == "Mul":
            return ex.Scale(lambda x: x * factor.astype(x.dtype), weight)
        return ex.Scale(lambda x: x / factor.astype(x.dtype), weight)

    def _shift(self, node: ir.Node, scope: Scope) -> ex.Expression:
        """Sub by a constant zero point, as decomposed dequantisation has it."""
        arg = self.trace(node.inputs[0], scope)
        zero = self.constant(node.inputs[1], scope)
        if not ex.as_stored(arg):
            raise Untraceable("a constant is subtracted after it was scaled")
        shape = _layout(arg).shape
        if np.broadcast_shapes(shape, zero.shape) != shape:
            raise Untraceable(
                f"it is the difference of {list(shape)} and {list(zero.shape)}, the first not of the operand's shape"
            )
        for leaf in ex.leaves(arg):
            stored = leaf.tensor.dtype.numpy()
            if not np.array_equal(zero.astype(stored).astype(np.float64), zero.astype(np.float64)):
                raise Untraceable(
                    f"the zero point {zero.reshape(-1)[:4]} subtracted from it is no {np.dtype(stored).name}"
                )
        return ex.Scale(lambda x: x - zero.astype(x.dtype), arg, _shift_or_none(zero))

    def _dequantize(self, node: ir.Node, scope: Scope, attributes: dict[str, Any]) -> ex.Expression:
        scale = _real(self.constant(node.inputs[1], scope))
        zero = self._side(node, 2, scope)
        resolved = self._there(node.inputs[0], scope)
        producer = resolved[0].producer()
        if producer is not None and producer.op_type == "QuantizeLinear":  # 0.0 comes back as 0.0
            before = self._side(producer, 2, resolved[1])
            if not np.array_equal(0 if zero is None else zero, 0 if before is None else before):
                raise Untraceable("it is quantised with one zero point and dequantised with another")
            return ex.Scale(lambda x: x, self.trace(producer.inputs[0], resolved[1]))
        arg = self.trace(node.inputs[0], scope)
        if not ex.as_stored(arg):
            raise Untraceable("it is dequantised after it was scaled")
        axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
        shape = _layout(arg).shape
        spread_scale = _fitting(ex.per_axis(scale, shape, axis, block), shape)
        spread_zero = None if zero is None else _fitting(ex.per_axis(zero, shape, axis, block), shape)
        return ex.Scale(lambda x: ex.dequantize(x, spread_scale, spread_zero), arg, _shift_or_none(spread_zero))

    def _quantised(
        self,
        node: ir.Node,
        scope: Scope,
        role: Role,
        operand: ex.Expression,
        shape: tuple[int, ...],
        attributes: dict[str, Any],
    ) -> ex.Expression:
        """The operand of an operator that dequantises it itself."""
        parameters: list[np.ndarray | None] = []
        for index in (role.scale, role.zero_point):
            if index is None or index < 0 or index >= len(node.inputs) or node.inputs[index] is None:
                parameters.append(None)
            elif not self.is_constant(node.inputs[index], scope):
                raise Untraceable(f"the scale or zero point of {node.op_type} is computed at run time")
            else:
                spread = role.spread(self.constant(node.inputs[index], scope), shape, attributes)
                parameters.append(_fitting(spread, shape))
        scale, zero = parameters
        factor = np.ones((), np.float32) if scale is None else _real(scale)
        return ex.Scale(lambda x: ex.dequantize(x, factor, zero), operand, _shift_or_none(zero))

    # ------------------------------------------------------------ looking around

    def constant_shape(self, value: ir.Value | None, scope: Scope) -> tuple[int, ...]:
        """Shape of a constant value, without computing it where its expression is known."""
        try:
            return _layout(self.trace(value, scope)).shape
        except Untraceable:
            return self.constant(value, scope).shape

    def origin(self, value: ir.Value, scope: Scope) -> ir.Value:
        """The largest stored tensor that a value is computed from; the value itself where there is none."""
        return max(self._sources(value, scope).values(), key=_stored_size, default=value)

    def behind(self, value: ir.Value | None, scope: Scope) -> str:
        """The operator that makes a changing value of a stored matrix by moving or casting it; empty for an activation.

        Something beside the data then arrives at run time: the shape, a scale.
        """
        op = ""
        while (resolved := self._resolve(value, scope)) is not None:
            value, scope = resolved
            node = value.producer()
            if node is None or self.is_constant(value, scope):
                try:
                    stored = op and self.is_constant(value, scope) and len(self.constant_shape(value, scope)) > 1
                except Untraceable:
                    return ""
                return op if stored else ""
            if node.op_type not in RESHAPING or not node.inputs:
                return ""
            op, value = node.op_type, node.inputs[0]
        return ""

    def _side(self, node: ir.Node, index: int, scope: Scope) -> np.ndarray | None:
        if index >= len(node.inputs) or node.inputs[index] is None:
            return None
        return self.constant(node.inputs[index], scope)

    def _sources(self, value: ir.Value | None, scope: Scope) -> dict[int, ir.Value]:
        """The stored values a constant is computed from, by their id."""
        sources: dict[int, ir.Value] = {}
        seen: set[tuple[int, Scope]] = set()
        stack = [(value, scope)]
        while stack:
            resolved = self._resolve(*stack.pop())
            if resolved is None or (id(resolved[0]), resolved[1]) in seen:
                continue
            seen.add((id(resolved[0]), resolved[1]))
            node = resolved[0].producer()
            if node is None or node.op_type == "Constant":
                sources[id(resolved[0])] = resolved[0]
            else:
                stack.extend((v, resolved[1]) for v in node.inputs)
        return sources

    def _evaluate(self, node: ir.Node, scope: Scope) -> list[np.ndarray]:
        proto = ir.to_proto(node)
        for attribute in [a for a in proto.attribute if a.ref_attr_name]:
            proto.attribute.remove(attribute)
        given = {str(v.name): self.constant(v, scope) for v in node.inputs if v is not None}
        for name, attribute in node.attributes.items():
            if attribute.is_ref() and (resolved := scope.attribute(attribute)) is not None:
                proto.attribute.append(onnx.helper.make_attribute(name, resolved))
        versions = dict((scope.function or self.model.graph).opset_imports) or dict(self.model.graph.opset_imports)
        if self._room < 0:
            raise ValueError("too many elements are computed before it")
        results = constants.compute(proto, given, versions, GROWN)
        self._room -= sum(result.size for result in results)
        return results

    def _walk(self, graph: ir.Graph | ir.Function, scope: Scope) -> Iterator[tuple[ir.Node, Scope]]:
        for node in graph:
            yield node, scope
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                    yield from self._walk(attribute.as_graph(), scope)
                elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
                    for inner in attribute.as_graphs():
                        yield from self._walk(inner, scope)
            inside = self._enter(node, scope)
            if inside is not None and inside.function is not None:
                yield from self._walk(inside.function, inside)

    def _enter(self, node: ir.Node, scope: Scope) -> Scope | None:
        """The scope inside a call of a model-local function; None where the node is no such call."""
        function = self.model.functions.get(node.op_identifier())
        if function is None:
            return None
        return self._scopes.setdefault((id(node), scope), Scope(node, function, scope))

    def _there(self, value: ir.Value | None, scope: Scope) -> tuple[ir.Value, Scope]:
        """Where a value that cannot do without really comes from."""
        resolved = self._resolve(value, scope)
        if resolved is None:
            raise Untraceable("an operand on its way is left out")
        return resolved

    def _resolve(self, value: ir.Value | None, scope: Scope) -> tuple[ir.Value, Scope] | None:
        """Where a value really comes from.

        A function's formal input is the call's, a call's output the function's, and a state that a loop hands on
        unchanged is what the loop was given.
        """
        while value is not None:
            node = value.producer()
            if node is not None:
                inside = self._enter(node, scope)
                if inside is None or inside.function is None:
                    return value, scope
                value, scope = inside.function.outputs[int(value.index() or 0)], inside
                continue
            if value.is_graph_input() and id(value.graph) in self._bodies:
                given = unchanged_state(value, self._bodies[id(value.graph)])
                if given is None:
                    return value, scope
                value = given
                continue
            if scope.function is None or scope.call is None or scope.parent is None:
                return value, scope
            formal = next((i for i, v in enumerate(scope.function.inputs) if v is value), None)
            if formal is None:
                return value, scope
            if formal >= len(scope.call.inputs):
                return None
            value, scope = scope.call.inputs[formal], scope.parent
        return None


def _static_shape(node: ir.Node) -> np.ndarray | None:
    """What a Shape node returns where the dimensions it asks for are fixed."""
    value = node.inputs[0] if node.inputs else None
    if node.op_type != "Shape" or value is None or value.shape is None:
        return None
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else None
    dims = value.shape.dims[start:end]
    return np.array(dims, np.int64) if all(isinstance(dim, int) for dim in dims) else None


def _constant_inputs(value: ir.Value) -> bool | list[ir.Value]:
    """Whether a value is constant, or the inputs that decide it."""
    node = value.producer()
    if node is None:
        return value.const_value is not None
    if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
        return True
    if _static_shape(node) is not None:
        return True
    inputs = [v for v in node.inputs if v is not None]
    graphs = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    if not inputs or graphs or node.op_type in NONDETERMINISTIC:
        return False
    return inputs


def _fitting(parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point that can be broadcast to the shape of what it is for."""
    known = zip(reversed(parameter.shape), reversed(shape), strict=False)
    if parameter.ndim > len(shape) or any(size not in (1, whole) for size, whole in known):
        raise Untraceable(f"its scale or zero point of shape {list(parameter.shape)} does not fit {list(shape)}")
    return parameter


def _real(scale: np.ndarray) -> np.ndarray:
    """A scale that makes real numbers of integers."""
    if not _is_float(scale.dtype):
        raise Untraceable(f"its scale is of the type {scale.dtype}, which is no real number")
    return scale


def _is_float(dtype: Any) -> bool:
    return bool(np.issubdtype(dtype, np.floating)) or dtype in (ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16))


def _stored_size(value: ir.Value) -> int:
    """Number of entries of an initializer or of a Constant node's tensor; 0 of anything else."""
    node = value.producer()
    held = value.const_value if node is None else node.attributes["value"].value if "value" in node.attributes else None
    return held.size if isinstance(held, ir.TensorProtocol) else 0


def _check_growth(size: int, stored: list[ex.Leaf]) -> None:
    """Refuse an operand that is out of all proportion to what is stored.

    Raises:
        Untraceable: it is.
    """
    kept = sum(math.prod(leaf.shape) for leaf in {id(leaf.value): leaf for leaf in stored}.values())
    if size > GROWN and size > 2 * kept:
        raise Untraceable(f"its {kept} entries are spread to {size}, too many to follow")


def _layout(expression: ex.Expression) -> np.ndarray:
    """An array of the operand's shape that costs little."""
    try:
        return ex.layout(expression)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise Untraceable(f"its layout cannot be computed as the graph describes it: {error}") from error


def _shift_or_none(zero: np.ndarray | None) -> np.ndarray | None:
    """A zero point; None where it is 0 throughout, and so shifts nothing."""
    return None if zero is None or not np.any(zero) else zero
