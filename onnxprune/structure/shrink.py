"""A decision about channels carried out: zeroed in place, or cut out of the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph import saving, valid
from onnxprune.graph.expression import per_axis
from onnxprune.graph.model import Model, encode, open_proto, subgraphs
from onnxprune.graph.sliced import Part, Slice, Sliced
from onnxprune.graph.stored import Change, File
from onnxprune.graph.tensors import clear, external_tensors, point
from onnxprune.graph.weights import Weight
from onnxprune.structure.coupling import Coupling
from onnxprune.structure.cutting import Stuck, cut, keep

Removed = Mapping[str, np.ndarray]
"""Group name -> boolean array, True where the channel goes."""


@dataclass(frozen=True, eq=False)
class Lines:
    """Which entries of a tensor stay: those whose position stays along every axis.

    Attributes:
        alive: for each axis of the stored shape a boolean array, True where the position stays.
    """

    alive: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, as stored."""
        return tuple(stays.size for stays in self.alive)

    def mask(self) -> np.ndarray:
        """A boolean array of the stored shape, True is kept."""
        keep_ = np.ones(self.shape, np.bool_)
        for axis, stays in enumerate(self.alive):
            np.moveaxis(keep_, axis, 0)[~stays] = False
        return keep_

    @cached_property
    def _rows(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """What stays of the axes of rows, and what stays of a row: the last axis that loses positions and all after."""
        last = max((axis for axis, stays in enumerate(self.alive) if not stays.all()), default=-1)
        width = math.prod(stays.size for stays in self.alive[last + 1 :])
        return self.alive[: max(last, 0)], np.repeat(self.alive[last] if last >= 0 else np.True_, width)

    def flat(self, start: int, stop: int) -> np.ndarray:
        """The entries from start to stop of the mask, in C order."""
        outer, inner = self._rows
        first, last = start // inner.size, -(-stop // inner.size)
        rows = np.ones(last - first, np.bool_)
        places = np.arange(first, last)
        for stays in reversed(outer):
            rows &= stays[places % stays.size]
            places //= stays.size
        flat: np.ndarray = np.logical_and.outer(rows, inner).reshape(-1)
        return flat[start - first * inner.size :][: stop - start]


def lines(coupling: Coupling, removed: Removed) -> dict[str, Lines]:
    """Which entries of which stored tensors stay, in a model that keeps its shapes.

    Those are the weights in roles, outputs and inputs, and all biases, scales and constants that go along, but for what
    is divided by or raised to: a zero there would do harm.

    Returns:
        Tensor name -> what stays of it; only tensors that lose entries.
    """
    dead = coupling.dead(removed)
    found = {}
    for name in coupling.flow.stored:
        if name not in coupling.flow.solid:
            stays = _alive(coupling, dead, name)
            if not all(axis.all() for axis in stays):
                found[name] = Lines(tuple(stays))
    return found


def kept(coupling: Coupling, removed: Removed) -> dict[str, np.ndarray]:
    """`lines` as boolean arrays of the stored shapes."""
    return {name: stays.mask() for name, stays in lines(coupling, removed).items()}


def alive(coupling: Coupling, removed: Removed, name: str) -> list[np.ndarray]:
    """Which positions of a stored tensor stay, axis by axis, when channels are cut out."""
    return _alive(coupling, coupling.dead(removed), name)


def _alive(coupling: Coupling, dead: np.ndarray, name: str) -> list[np.ndarray]:
    solution = coupling.solution
    roots = [solution.root[axis] for axis in coupling.flow.axes[name] or ()]
    return [solution.pinned[root] | ~dead[root] for root in roots]


def gone(coupling: Coupling, live: Callable[[str], np.ndarray | None]) -> dict[str, np.ndarray]:
    """The channels of which nothing is left.

    Args:
        coupling: the groups.
        live: stored tensor -> which of its entries are left (stored shape); None where that does not count.

    Returns:
        Group name -> True where no entry of any tensor that goes along is left; one channel always stays.
    """
    removed = {}
    for group in coupling.groups:
        empty = np.ones(group.size, np.bool_)
        told = [(member, live(member.name)) for member in group.members if member.name not in coupling.flow.solid]
        for member, entries in told:
            if entries is not None:
                lines = np.moveaxis(entries, member.axis, 0).reshape(entries.shape[member.axis], -1)
                empty &= ~lines[member.places].any((1, 2))
        if empty.all():  # or nothing was told
            empty[: 1 if any(entries is not None for _, entries in told) else None] = False
        removed[group.name] = empty
    return removed


def zero(coupling: Coupling, kept: Mapping[str, Lines | np.ndarray]) -> None:
    """Put 0 into the coupling's own model where entries do not stay.

    Args:
        coupling: the groups.
        kept: stored tensor -> the channels of it that stay, or the single entries (True is kept, stored shape).
    """
    model = coupling.model
    values = {str(v.name): v for graph in model.graph.graphs() for v in graph.initializers.values()}
    for name, stays in kept.items():
        tensor = values[name].const_value
        assert tensor is not None
        weight = coupling.by_name.get(name)
        plain = name not in coupling.flow.shifted and (weight is None or weight.zero() is None)
        if isinstance(stays, Lines) and plain and tensor.dtype.bitwidth >= 8:
            model.edit(tensor, Blanked(stays))
            continue
        mask = stays.mask() if isinstance(stays, Lines) else stays
        nought: np.ndarray = np.zeros((), tensor.dtype.numpy())
        if name in coupling.flow.shifted:
            zero_point, axis = coupling.flow.shifted[name]
            stored = values[zero_point].const_value
            assert stored is not None
            nought = model.current(stored)
            block = -(-mask.shape[axis] // nought.shape[axis]) if nought.ndim > 1 else 0
            nought = per_axis(nought, mask.shape, axis, block)
        model.edit(tensor, partial(_zeroed, weight, nought, mask))


@dataclass(frozen=True, eq=False)
class Blanked:
    """Zeros in place of what does not stay of a stored tensor, all at once or part by part."""

    stays: Lines

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """The tensor with zeros in it."""
        out = np.array(array, order="C")
        self.part(out.reshape(-1), 0)
        return out

    def part(self, values: np.ndarray, start: int) -> None:
        """Put zeros into a part of it."""
        bits = values.view(f"u{values.dtype.itemsize}")
        np.multiply(bits, self.stays.flat(start, start + values.size), out=bits)  # leaves neither a sign nor a NaN


def _zeroed(weight: Weight | None, nought: np.ndarray, mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    return np.where(mask, array, nought).astype(array.dtype) if weight is None else weight.pruned(mask, array)


def shrink(coupling: Coupling, removed: Removed) -> Model:
    """A model without the channels that go; edits of the coupling's model are kept.

    Tensors in files stay there: what is left of them is read when the model is saved, or looked at.

    Raises:
        PruneError: a node cannot be made smaller.
    """
    model = coupling.model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    values = {str(v.name): v.const_value for graph in model.graph.graphs() for v in graph.initializers.values()}
    cuts: dict[str, list[np.ndarray]] = {}

    def fill(tensor: TensorProto, alive: list[np.ndarray]) -> None:
        stored = values[tensor.name]
        assert stored is not None
        kind, name = tensor.data_type, tensor.name
        if _part(model, tensor, alive) is not None:
            cuts[name] = alive
            tensor.dims[:] = [int(np.count_nonzero(stays)) for stays in alive]
            return
        array = keep(model.current(stored), alive)
        tensor.Clear()
        tensor.name, tensor.data_type = name, kind
        tensor.dims.extend(array.shape)
        tensor.raw_data = encode(array, ir.DataType(kind))

    try:
        cut(proto, coupling.flow, coupling.solution, coupling.dead(removed), fill)
    except Stuck as error:
        raise PruneError(f"the model cannot be made smaller: {error}; leave the layers around it out") from None
    before = _read(model.proto)
    after = _read(proto)
    for graph in subgraphs(proto):
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name in before - after:  # sizes and indices that others have taken the place of
                del graph.initializer[index]
    return open_proto(proto, model.folder, model.path, _left(model, proto, cuts))


def _part(model: Model, tensor: TensorProto, alive: Sequence[np.ndarray] | None) -> Part | None:
    """What is left of a tensor in a file, edits carried out; None where that takes all of it in memory.

    Args:
        model: the model.
        tensor: one of its tensors.
        alive: for each axis which positions stay; None where all do.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    extent = model.extent(tensor)
    edit = model.edits.get(model.place(tensor))
    if edit is None and alive is None:
        return extent
    kind = ir.DataType(tensor.data_type)
    if kind.bitwidth < 8 or not (edit is None or isinstance(edit[1], Change)):
        return None
    stays = tuple(np.ones(size, np.bool_) for size in tensor.dims) if alive is None else tuple(alive)
    return Slice(extent, kind.numpy(), stays, None if edit is None else edit[1])


def _left(model: Model, proto: onnx.ModelProto, cuts: Mapping[str, list[np.ndarray]]) -> dict[str, File | Sliced]:
    """The data files of a model that was cut: location -> what is left of the file; its tensors are pointed there.

    Args:
        model: the model that was cut.
        proto: what was made of it; tensors that are cut have their new sizes already.
        cuts: tensor -> for each axis which positions stay; all others stay as they are.
    """
    parts: dict[str, list[tuple[TensorProto, Part]]] = {}
    originals = {t.name: t for t in external_tensors(model.proto)}
    for tensor in list(external_tensors(proto)):
        alive = cuts.get(tensor.name)
        part = _part(model, tensor if alive is None else originals[tensor.name], alive)
        if part is None:
            content = saving.content(model, tensor)
            clear(tensor)
            tensor.raw_data = content
        else:
            parts.setdefault(model.data[valid.location(tensor)].path, []).append((tensor, part))
    data: dict[str, File | Sliced] = {}
    for path, found in parts.items():
        sliced = Sliced(path, [part for _, part in found])
        for (tensor, _), offset in zip(found, sliced.offsets, strict=True):
            location = valid.location(tensor)
            data[location] = sliced
            point(tensor, location, offset)
    return data


def _read(proto: onnx.ModelProto) -> set[str]:
    """The names that nodes and outputs refer to."""
    names = {name for graph in subgraphs(proto) for node in graph.node for name in node.input}
    return names | {value.name for graph in subgraphs(proto) for value in graph.output}
