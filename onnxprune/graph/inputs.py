"""What a weight is multiplied with: an operator's other operand as the rows of a matrix.

Every product with a weight reads, in role order, y[r, o] = sum over j of x[r, j] * w[o, j], where j runs over inputs
and kernel positions, and r over samples and positions. A `Layout` lays an activation out as those rows, group by
group where a weight's outputs do not all see the same inputs. Adding an operator is one row in LAYOUTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx

from onnxprune.graph.roles import CONTRIB

Array = np.ndarray


class NoRowsError(Exception):
    """The other operand of a weight cannot be had as rows; the text is the reason a user reads."""


class Layout(Protocol):
    """How activations become rows; hashable, so that weights that see the same rows share what is made of them."""

    def blocks(self, arrays: Sequence[Array], most: int) -> Iterator[Array]:
        """The rows, in blocks (groups, rows, inputs * kernel positions) of about `most` elements."""


@dataclass(frozen=True)
class Inputs:
    """The rows of one weight operand: which values of the graph they are made of, and how."""

    values: tuple[str, ...]
    layout: Layout

    def blocks(self, arrays: Sequence[Array], most: int = 1 << 22) -> Iterator[Array]:
        """See `Layout.blocks`; in the type of the arrays, half floats as float32."""
        given = [a.astype(np.float32) if a.dtype.kind == "f" and a.dtype.itemsize < 4 else a for a in arrays]
        return self.layout.blocks(given, most)


def of(node: onnx.NodeProto, operand: int, shape: Sequence[int]) -> Inputs:
    """The rows that a node multiplies its weight operand with.

    Args:
        node: the node, of a graph without calls of functions.
        operand: index of the weight operand.
        shape: of the weight operand, as the node reads it.

    Raises:
        NoRowsError: there is no rule for it.
    """
    make = LAYOUTS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
    if make is None:
        raise NoRowsError(f"what {node.op_type} multiplies it with is not measured")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return make(node, operand, tuple(shape), attributes)


# ------------------------------------------------------------------------------------------------- matrix products


@dataclass(frozen=True)
class Rows:
    """The rows of a matrix product: (..., rows, inputs), or (..., inputs, rows) where `turned`.

    Attributes:
        turned: whether the last two axes change places.
        factor: what the product is multiplied with.
        batch: the leading axes of the weight, each of which has outputs of its own.
    """

    turned: bool = False
    factor: float = 1.0
    batch: tuple[int, ...] = ()

    def blocks(self, arrays: Sequence[Array], most: int) -> Iterator[Array]:
        """(groups, rows, inputs) at once: it is no larger than the activation itself."""
        x = arrays[0]
        if self.turned and x.ndim > 1:
            x = x.swapaxes(-1, -2)
        if self.factor != 1.0:
            x = x * np.asarray(self.factor, x.dtype)
        if math.prod(self.batch) == 1:
            yield x.reshape(1, -1, x.shape[-1])
            return
        x = x.reshape(*[1] * (2 - x.ndim), *x.shape)
        x = np.broadcast_to(x, (*np.broadcast_shapes(x.shape[:-2], self.batch), *x.shape[-2:]))
        own = (*[1] * (x.ndim - 2 - len(self.batch)), *self.batch)
        groups = [axis for axis, size in enumerate(own) if size > 1]
        summed = [axis for axis in range(x.ndim - 1) if axis not in groups]
        yield x.transpose(*groups, *summed, x.ndim - 1).reshape(math.prod(self.batch), -1, x.shape[-1])


def _product(node: onnx.NodeProto, operand: int, shape: tuple[int, ...], attributes: dict[str, Any]) -> Inputs:
    """MatMul, Gemm and their relatives: flags are named after operands A and B."""
    other = 1 - operand
    if attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
        raise NoRowsError(f"{node.op_type} with transBatchA or transBatchB is not measured")
    swapped = bool(attributes.get("transA" if other == 0 else "transB", 0))
    layout = Rows(swapped != (other == 1), float(attributes.get("alpha", 1.0)), shape[:-2])
    return Inputs((node.input[other],), layout)


def _attention(node: onnx.NodeProto, operand: int, shape: tuple[int, ...], attributes: dict[str, Any]) -> Inputs:
    return Inputs((node.input[0],), Rows())


# ---------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class Patches:
    """The patches a convolution sees: (N, inputs, *spatial) to rows of (inputs of a group, *kernel).

    Attributes:
        group: number of groups.
        kernel: sizes of the kernel.
        strides: of the windows.
        dilations: of the kernel.
        pads: begin and end for each spatial axis; None for those that `auto` asks for.
        auto: auto_pad, where it depends on the input's size.
    """

    group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    auto: str = "NOTSET"

    def blocks(self, arrays: Sequence[Array], most: int) -> Iterator[Array]:
        """(groups, windows, inputs * kernel), some samples or lines of windows at a time."""
        x = arrays[0]
        pads = self.pads
        if self.auto.startswith("SAME"):
            pads = tuple(self._same(size, axis) for axis, size in enumerate(x.shape[2:]))
        yield from _windows(_padded(x, pads), self, most)

    def _same(self, size: int, axis: int) -> tuple[int, int]:
        stride, reach = self.strides[axis], (self.kernel[axis] - 1) * self.dilations[axis] + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        small, large = total // 2, total - total // 2
        return (small, large) if self.auto == "SAME_UPPER" else (large, small)


@dataclass(frozen=True)
class Turned:
    """The patches a transposed convolution sees: those of a convolution over the input with zeros put in between.

    Attributes:
        group: number of groups.
        kernel: sizes of the kernel.
        strides: zeros put between neighbours, plus one.
        dilations: of the kernel.
        pads: what is cut off the result at the begin and the end of each spatial axis.
        extra: output_padding.
        shape: output_shape, from which the pads then follow; empty where it is not given.
        auto: auto_pad.
    """

    group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    extra: tuple[int, ...]
    shape: tuple[int, ...] = ()
    auto: str = "NOTSET"

    def blocks(self, arrays: Sequence[Array], most: int) -> Iterator[Array]:
        """(groups, positions of the result, inputs * kernel), some samples or lines at a time."""
        x = arrays[0]
        spatial = x.shape[2:]
        spread = np.zeros(
            (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(spatial, self.strides, strict=True))), x.dtype
        )
        spread[tuple([slice(None)] * 2 + [slice(None, None, s) for s in self.strides])] = x
        pads = []
        for axis, size in enumerate(spatial):
            reach = (self.kernel[axis] - 1) * self.dilations[axis]
            begin, end = self._cut(axis, size, reach)
            pads.append((reach - begin, reach - end + self.extra[axis]))
        plain = Patches(self.group, self.kernel, (1,) * len(spatial), self.dilations, tuple(pads))
        yield from _windows(_padded(spread, plain.pads), plain, most, flip=True)

    def _cut(self, axis: int, size: int, reach: int) -> tuple[int, int]:
        stride = self.strides[axis]
        if self.shape:
            total = stride * (size - 1) + self.extra[axis] + reach + 1 - self.shape[axis]
        elif self.auto.startswith("SAME"):
            total = stride * (size - 1) + self.extra[axis] + reach + 1 - size * stride
        else:
            return self.pads[axis]
        small, large = total // 2, total - total // 2
        return (small, large) if self.auto == "SAME_UPPER" else (large, small)


def _padded(x: Array, pads: Sequence[tuple[int, int]]) -> Array:
    """With zeros put before and after each spatial axis; negative numbers cut off."""
    if any(pad > 0 for pair in pads for pad in pair):
        x = np.pad(x, [(0, 0), (0, 0), *((max(begin, 0), max(end, 0)) for begin, end in pads)])
    cut = [slice(max(-begin, 0), x.shape[axis] - max(-end, 0)) for axis, (begin, end) in enumerate(pads, 2)]
    return x[tuple([slice(None)] * 2 + cut)]


def _windows(x: Array, shape: Patches, most: int, flip: bool = False) -> Iterator[Array]:
    dims = len(shape.kernel)
    reach = tuple((k - 1) * d + 1 for k, d in zip(shape.kernel, shape.dilations, strict=True))
    if any(size < r for size, r in zip(x.shape[2:], reach, strict=True)):
        return
    view: Array = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, 2 + dims)))  # type: ignore[call-overload]
    taps = [
        slice(r - 1, None, -d) if flip else slice(None, None, d) for d, r in zip(shape.dilations, reach, strict=True)
    ]
    view = view[tuple([slice(None)] * 2 + [slice(None, None, s) for s in shape.strides] + taps)]
    samples, inputs = view.shape[:2]
    line = math.prod((inputs, *view.shape[3:]))  # elements of one sample's first line of windows
    many = max(1, most // max(line * view.shape[2], 1))
    lines = view.shape[2] if many > 1 or line * view.shape[2] <= most else max(1, most // line)
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    for first in range(0, samples, many):
        for top in range(0, view.shape[2], lines):
            part = view[first : first + many, :, top : top + lines]
            grouped = part.reshape(part.shape[0], shape.group, inputs // shape.group, *part.shape[2:])
            columns = grouped.transpose(order)
            yield columns.reshape(shape.group, -1, inputs // shape.group * math.prod(shape.kernel))


def _sizes(attributes: dict[str, Any], name: str, count: int, default: int) -> tuple[int, ...]:
    return tuple(int(v) for v in attributes.get(name, [default] * count))


def _geometry(shape: tuple[int, ...], attributes: dict[str, Any]) -> dict[str, Any]:
    dims = len(shape) - 2
    auto = attributes.get("auto_pad", b"NOTSET")
    flat = _sizes(attributes, "pads", 2 * dims, 0)
    return {
        "group": int(attributes.get("group", 1)),
        "kernel": shape[2:],
        "strides": _sizes(attributes, "strides", dims, 1),
        "dilations": _sizes(attributes, "dilations", dims, 1),
        "pads": tuple(zip(flat[:dims], flat[dims:], strict=True)),
        "auto": auto.decode() if isinstance(auto, bytes) else str(auto),
    }


def _conv(node: onnx.NodeProto, operand: int, shape: tuple[int, ...], attributes: dict[str, Any]) -> Inputs:
    patches = Patches(**_geometry(shape, attributes))
    if patches.auto == "VALID":
        patches = replace(patches, pads=((0, 0),) * len(patches.kernel))
    return Inputs((node.input[0],), patches)


def _conv_transpose(node: onnx.NodeProto, operand: int, shape: tuple[int, ...], attributes: dict[str, Any]) -> Inputs:
    geometry = _geometry(shape, attributes)
    dims = len(shape) - 2
    if geometry["auto"] == "VALID":
        geometry["pads"] = ((0, 0),) * dims
    extra = _sizes(attributes, "output_padding", dims, 0)
    return Inputs((node.input[0],), Turned(**geometry, extra=extra, shape=_sizes(attributes, "output_shape", 0, 0)))


# ------------------------------------------------------------------------------------------------ recurrent layers


@dataclass(frozen=True)
class Steps:
    """What a recurrent layer reads at each step, up to each sequence's end; both directions see the same.

    The arrays are the inputs (steps, batch, inputs) and, where `lengths`, the sequences' lengths.
    """

    lengths: bool
    batch_first: bool

    def blocks(self, arrays: Sequence[Array], most: int) -> Iterator[Array]:
        """(1, steps, inputs) at once."""
        x = arrays[0].swapaxes(0, 1) if self.batch_first else arrays[0]
        yield x[_running(x, arrays[1] if self.lengths else None)][None]


@dataclass(frozen=True)
class States:
    """What a recurrent layer's second weight reads: the state before each step, direction by direction.

    The arrays are all states (steps, directions, batch, hidden) and, as the flags say, the sequences' lengths and the
    first states (directions, batch, hidden).

    Attributes:
        lengths: whether lengths are given.
        initial: whether first states are given; they are 0 otherwise.
        reverse: of each direction, whether it runs backwards.
        batch_first: whether all arrays have the batch first.
    """

    lengths: bool
    initial: bool
    reverse: tuple[bool, ...]
    batch_first: bool

    def blocks(self, arrays: Sequence[Array], most: int) -> Iterator[Array]:
        """(directions, steps, hidden) at once."""
        states = arrays[0].transpose(1, 2, 0, 3) if self.batch_first else arrays[0]
        lengths = arrays[1] if self.lengths else np.full(states.shape[2], len(states))
        first = np.zeros_like(states[0])
        if self.initial:
            first = arrays[-1].swapaxes(0, 1) if self.batch_first else arrays[-1]
        running = _running(states[:, 0], lengths)
        rows = []
        for direction, backwards in enumerate(self.reverse):
            before = np.empty_like(states[:, direction])
            if backwards:
                before[:-1] = states[1:, direction]
                before[np.maximum(lengths - 1, 0), np.arange(len(lengths))] = first[direction]
            else:
                before[0], before[1:] = first[direction], states[:-1, direction]
            rows.append(before[running])
        yield np.stack(rows)


def _running(x: Array, lengths: Array | None) -> Array:
    """(steps, batch): which steps are within their sequence."""
    steps, batch = x.shape[:2]
    return np.arange(steps)[:, None] < (np.full(batch, steps) if lengths is None else lengths)[None, :]


def _recurrent(node: onnx.NodeProto, operand: int, shape: tuple[int, ...], attributes: dict[str, Any]) -> Inputs:
    batch_first = bool(attributes.get("layout", 0))
    lengths = (node.input[4],) if len(node.input) > 4 and node.input[4] else ()
    if operand == 1:
        return Inputs((node.input[0], *lengths), Steps(bool(lengths), batch_first))
    if node.op_type == "GRU" and not attributes.get("linear_before_reset", 0):
        raise NoRowsError("a GRU without linear_before_reset multiplies it with states it does not hand out")
    if not node.output or not node.output[0]:
        raise NoRowsError(f"{node.op_type} does not hand out its states (its output Y is left out)")
    initial = (node.input[5],) if len(node.input) > 5 and node.input[5] else ()
    direction = attributes.get("direction", b"forward")
    text = direction.decode() if isinstance(direction, bytes) else str(direction)
    reverse = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[text]
    values = (node.output[0], *lengths, *initial)
    return Inputs(values, States(bool(lengths), bool(initial), reverse, batch_first))


Make = Callable[[onnx.NodeProto, int, tuple[int, ...], dict[str, Any]], Inputs]

LAYOUTS: dict[tuple[str, str], Make] = {
    **dict.fromkeys([("", "MatMul"), ("", "Gemm")], _product),
    **dict.fromkeys([(CONTRIB, op) for op in ("FusedMatMul", "FusedGemm", "TransposeMatMul")], _product),
    (CONTRIB, "Attention"): _attention,
    **dict.fromkeys([("", "Conv"), (CONTRIB, "FusedConv")], _conv),
    ("", "ConvTranspose"): _conv_transpose,
    **dict.fromkeys([("", "LSTM"), ("", "GRU"), ("", "RNN")], _recurrent),
}
"""(domain, operator) -> what its weights are multiplied with."""
