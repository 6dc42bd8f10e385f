"""Constant expressions: what stands between a stored tensor and the operand it feeds.

An expression is a tree of three kinds of node: a leaf is a stored tensor, a move puts elements elsewhere
(Transpose, Reshape, Slice, Concat, ...), a scale changes values but not places (Cast, Mul by a constant,
DequantizeLinear). Nothing here knows layouts: pushing an array through the moves *is* the layout,
whether it holds values, a mask or element indices.

Adding a data-moving operator is one function in MOVES, with ONNX's attributes as keyword parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and the 4-bit integers with numpy)
import numpy as np
import onnx_ir as ir

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Leaf:
    """A stored tensor: the value that holds it, its array's shape and type."""

    value: ir.Value
    tensor: ir.TensorProtocol

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return tuple(self.tensor.shape.numpy())


@dataclass(frozen=True, eq=False)
class Move:
    """Elements change places: `apply` maps the operands' arrays to the result's, whatever they hold."""

    apply: Callable[..., Array]
    args: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Scale:
    """Elements change value: `apply` computes it.

    `zero` is the input that comes out as 0 (None: 0 itself); `keeps` says that every value stays what it is, but for
    its type.
    """

    apply: Callable[[Array], Array]
    arg: Expression
    zero: Array | None = None
    keeps: bool = False


Expression = Leaf | Move | Scale


def leaves(expression: Expression) -> Iterator[Leaf]:
    """The stored tensors of an expression, left to right."""
    if isinstance(expression, Leaf):
        yield expression
    else:
        for arg in expression.args if isinstance(expression, Move) else (expression.arg,):
            yield from leaves(arg)


def push(expression: Expression, read: Callable[[Leaf], Array]) -> Array:
    """Move arrays of the leaves' shapes to the operand's layout; scales are passed over."""
    if isinstance(expression, Leaf):
        return read(expression)
    if isinstance(expression, Scale):
        return push(expression.arg, read)
    return expression.apply(*(push(arg, read) for arg in expression.args))


def compute(expression: Expression, read: Callable[[Leaf], Array]) -> Array:
    """The operand's values, given the leaves' values."""
    if isinstance(expression, Leaf):
        return read(expression)
    if isinstance(expression, Scale):
        return expression.apply(compute(expression.arg, read))
    return expression.apply(*(compute(arg, read) for arg in expression.args))


def layout(expression: Expression) -> Array:
    """An array of the operand's shape that costs little."""
    return push(expression, lambda leaf: np.broadcast_to(np.bool_(False), leaf.shape))


def as_stored(expression: Expression) -> bool:
    """Whether values arrive as they are stored, moved and cast at most."""
    if isinstance(expression, Leaf):
        return True
    if isinstance(expression, Move):
        return all(as_stored(arg) for arg in expression.args)
    return expression.keeps and as_stored(expression.arg)


def zeros(expression: Expression, indices: Callable[[Leaf], Array], out: Array) -> None:
    """Write, for every element, the stored value that the operand sees as exactly 0.

    Args:
        expression: the operand's expression.
        indices: array of positions in `out` for a leaf, of the leaf's shape; negative ones are passed over.
        out: flat array to fill (it holds 0 where nothing shifts the zero).
    """
    if isinstance(expression, Leaf):
        return
    if isinstance(expression, Scale):
        if expression.zero is not None:
            places = push(expression.arg, indices)
            wanted = np.broadcast_to(expression.zero, places.shape)
            out[places[places >= 0]] = wanted[places >= 0]
            return
        zeros(expression.arg, indices, out)
        return
    for arg in expression.args:
        zeros(arg, indices, out)


# ------------------------------------------------------- moves: operator -> function(data, *constants, **attributes)


def _identity(x: Array) -> Array:
    return x


def _transpose(x: Array, *, perm: Sequence[int] | None = None) -> Array:
    return np.transpose(x, perm)


def _reshape(x: Array, shape: Array | None = None, *, allowzero: int = 0, **attributes: Any) -> Array:
    dims = [int(d) for d in (attributes["shape"] if shape is None else shape)]
    if not allowzero:
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


def _squeeze(x: Array, axes: Array | None = None, **attributes: Any) -> Array:
    chosen = attributes.get("axes") if axes is None else axes
    return x.squeeze(None if chosen is None else tuple(int(a) for a in chosen))


def _unsqueeze(x: Array, axes: Array | None = None, **attributes: Any) -> Array:
    chosen = attributes["axes"] if axes is None else np.atleast_1d(axes)
    return np.expand_dims(x, tuple(int(a) for a in chosen))


def _flatten(x: Array, *, axis: int = 1) -> Array:
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1) if x.size else x.reshape(x.shape[0], 0)


def _slice(
    x: Array,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
    **attributes: Any,
) -> Array:
    begin = [int(i) for i in (attributes["starts"] if starts is None else starts)]
    stop = [int(i) for i in (attributes["ends"] if ends is None else ends)]
    along = [int(a) for a in (attributes.get("axes", range(len(begin))) if axes is None else axes)]
    stride = [1] * len(begin) if steps is None else [int(s) for s in steps]
    where = [slice(None)] * x.ndim
    for start, end, axis, step in zip(begin, stop, along, stride, strict=True):
        size = x.shape[axis]
        start = start + size if start < 0 else start
        end = end + size if end < 0 else end
        if step > 0:
            where[axis] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        else:
            end = min(max(end, -1), size - 1)
            where[axis] = slice(min(max(start, 0), size - 1), None if end < 0 else end, step)
    return x[tuple(where)]


def _concat(*parts: Array, axis: int) -> Array:
    return np.concatenate(parts, axis)


def _gather(x: Array, indices: Array, *, axis: int = 0) -> Array:
    return np.take(x, indices.astype(np.int64), axis)


def _expand(x: Array, shape: Array) -> Array:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(d) for d in shape)))


def _tile(x: Array, repeats: Array) -> Array:
    return np.tile(x, tuple(int(r) for r in repeats))


MOVES: dict[str, Callable[..., Array]] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Slice": _slice,
    "Concat": _concat,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
}
"""Operators (domain ai.onnx) whose result holds elements of their data operand. Split is cut by `split`."""


def split(x: Array, sizes: Sequence[int] | None, count: int, axis: int, index: int) -> Array:
    """Output `index` of a Split into `count` outputs of the given sizes (None: equal, the last one smaller)."""
    length = x.shape[axis]
    step = -(-length // count)
    bounds = np.cumsum([0, *sizes]) if sizes is not None else [min(i * step, length) for i in range(count + 1)]
    where = [slice(None)] * x.ndim
    where[axis] = slice(int(bounds[index]), int(bounds[index + 1]))
    return x[tuple(where)]


def entry(x: Array, sizes: Array | None, index: int, *, axis: int = 0, keepdims: int = 1) -> Array:
    """Entry `index` of a SplitToSequence: of sizes given one by one, of one size (the last one smaller), or single."""
    length = x.shape[axis]
    if sizes is None and not keepdims:
        single: Array = np.moveaxis(x, axis, 0)[index]
        return single
    if sizes is None or sizes.ndim == 0:
        step = 1 if sizes is None else int(sizes)
        cut = [min(step, length - start) for start in range(0, length, step)]
    else:
        cut = [int(size) for size in sizes]
    return split(x, cut, len(cut), axis, range(len(cut))[index])


# ---------------------------------------------------------------- scales


def per_axis(parameter: Array, shape: Sequence[int], axis: int, block_size: int = 0) -> Array:
    """A quantisation parameter broadcast against a tensor.

    It is a scalar, or has one entry per position of `axis`, or one per block of it.
    """
    if parameter.size == 1:
        return parameter.reshape(())
    axis = axis + len(shape) if axis < 0 else axis
    if block_size:
        return np.take(parameter, np.arange(shape[axis]) // block_size, axis)
    if parameter.ndim == 1 and len(shape) > 1:
        dims = [1] * len(shape)
        dims[axis] = -1
        return parameter.reshape(dims)
    return parameter


def dequantize(x: Array, scale: Array, zero_point: Array | None) -> Array:
    """(x - zero_point) * scale in the type of the scale."""
    shifted = x.astype(np.float32)
    if zero_point is not None:
        shifted = shifted - zero_point.astype(np.float32)
    return (shifted * scale.astype(np.float32)).astype(scale.dtype)
