"""What lives or dies together in a model: its groups of channels, and what pins the others."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model
from onnxprune.graph.shapes import SMALL
from onnxprune.graph.weights import Skipped, Weight, find
from onnxprune.structure import facts as known
from onnxprune.structure.cutting import Stuck, cut, keep
from onnxprune.structure.flow import Flow, walk
from onnxprune.structure.labels import LONG, Axis, Solution
from onnxprune.structure.prepare import empty, prepare, skeleton
from onnxprune.structure.reading import changed, sizes_behind
from onnxprune.structure.rules import SHAPES
from onnxprune.structure.site import Site

TRIALS = 50
"""Nodes that may turn out to be impossible to cut before a model is given up."""


@dataclass(frozen=True, eq=False)
class Member:
    """A stored tensor that goes along with a group.

    Attributes:
        name: the tensor.
        axis: its axis that is cut.
        role: 'output' of a weight, 'input' of a weight, or 'parameter' (a bias, a norm's scale, a constant).
        places: (size of the group, positions of each channel): where along the axis each channel lies.
    """

    name: str
    axis: int
    role: str
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are alike: each may go or stay on its own, and takes the same places of the same tensors along.

    Attributes:
        name: the first weight that produces them.
        classes: the class of each channel.
        members: what is cut with them.
        heads: whether they are attention heads.
    """

    name: str
    classes: np.ndarray
    members: tuple[Member, ...]
    heads: bool = False

    @property
    def size(self) -> int:
        """Number of channels."""
        return int(self.classes.size)

    @property
    def producers(self) -> tuple[Member, ...]:
        """The weights whose outputs the channels are."""
        return tuple(member for member in self.members if member.role == "output")

    @property
    def width(self) -> int:
        """Positions of one channel in the first producer: 1, or the size of a head."""
        return int(self.producers[0].places.shape[1])


@dataclass(frozen=True)
class Pinned:
    """A weight whose outputs stay, and why."""

    name: str
    op_type: str
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class Coupling:
    """The groups of a model.

    Attributes:
        model: the model in the form that is cut (functions inlined, constants stored).
        weights: its weights in roles.
        skipped: what is no weight, with reasons.
        flow: the labels.
        solution: their classes.
        groups: what can be pruned.
        pinned: the weights whose outputs cannot, wholly or in part.
    """

    model: Model
    weights: tuple[Weight, ...]
    skipped: tuple[Skipped, ...]
    flow: Flow
    solution: Solution
    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]

    @cached_property
    def by_name(self) -> dict[str, Weight]:
        """The weights in roles."""
        return {weight.name: weight for weight in self.weights}

    def dead(self, removed: Mapping[str, np.ndarray]) -> np.ndarray:
        """Class -> whether it goes.

        Args:
            removed: group name -> which of its channels go.
        """
        dead = np.zeros(self.solution.root.size, np.bool_)
        for group in self.groups:
            if group.name in removed:
                dead[group.classes[removed[group.name]]] = True
        return dead


def couple(
    model: Model,
    sizes: Mapping[str, Sequence[int]],
    others: Mapping[str, Sequence[int]] | None = None,
    shared: Container[str] = (),
    inexact: bool = False,
) -> Coupling:
    """Find the groups of a model.

    Args:
        model: any model; it is not changed.
        sizes: a shape for each graph input.
        others: other shapes, where some dims are open: what differs then varies from run to run.
        shared: vectors that stay one however many nodes read them.
        inexact: whether norms over channels let them go, though they then average over fewer.

    Raises:
        PruneError: no operator of the graph can be followed.
    """
    ready = prepare(model, shared)
    bare = skeleton(ready)
    facts = known.gather(bare, sizes, SHAPES)
    second = None
    if facts.guessed or (others is not None and dict(others) != dict(sizes)):
        second = known.gather(bare, sizes if others is None else others, SHAPES, more=1)
    for name, shape in facts.shapes.items():
        if any(size > LONG for size in shape):
            raise PruneError(
                f"'{name}' has the shape {list(shape)}: positions are followed along axes of up to {LONG}, so no "
                "channels can be found; prune single entries, or export the model with smaller inputs"
            )
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in bare.opset_import}
    flow = walk(bare.graph, facts, second, opsets, inexact)
    weights, skipped = find(ready)
    for _ in range(TRIALS):
        solution = flow.labels.solve()
        groups = _groups(flow, solution, weights)
        stuck = _rehearse(bare, flow, solution, groups, sizes)
        if stuck is None:
            return Coupling(
                ready, tuple(weights), tuple(skipped), flow, solution, groups, _pinned(flow, solution, weights)
            )
        axes, reason = stuck
        for axis in axes:
            flow.labels.pin(axis, reason)
    raise PruneError(f"{TRIALS} nodes cannot be made smaller; the last one: {reason}")


def _groups(flow: Flow, solution: Solution, weights: Sequence[Weight]) -> tuple[Group, ...]:
    """Classes that touch the same axes of the same tensors, as often."""
    roles = {weight.name: _axis_roles(weight) for weight in weights}
    touched: dict[int, list[tuple[int, int]]] = {}
    entries: list[tuple[str, int, np.ndarray]] = []
    order = [weight.name for weight in weights if weight.name in flow.stored]
    order += [name for name in flow.stored if name not in set(order)]
    for name in order:
        for axis, labels in enumerate(flow.axes[name] or ()):
            classes = solution.classes(labels)
            if (classes >= 0).any():
                found, counts = np.unique(classes[classes >= 0], return_counts=True)
                for label, count in zip(found.tolist(), counts.tolist(), strict=True):
                    touched.setdefault(label, []).append((len(entries), count))
                entries.append((name, axis, classes))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for label, signature in touched.items():
        alike.setdefault(tuple(signature), []).append(label)
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for key, labels_ in alike.items():
        if len(labels_) < 2:
            continue
        classes = np.array(sorted(labels_))
        members = []
        for index, count in key:
            name, axis, where = entries[index]
            picked = np.flatnonzero(np.isin(where, classes))
            ordered = picked[np.lexsort((picked, where[picked]))].reshape(classes.size, count)
            members.append(Member(name, axis, roles[name][axis] if name in roles else "parameter", ordered))
        first = next((member for member in members if member.role == "output"), None)
        if first is None:
            continue
        rank = np.argsort(first.places[:, 0], kind="stable")
        members = [replace(member, places=member.places[rank]) for member in members]
        taken[first.name] = taken.get(first.name, 0) + 1
        name = first.name if taken[first.name] == 1 else f"{first.name}#{taken[first.name]}"
        groups.append(Group(name, classes[rank], tuple(members), bool(solution.heads[classes].any())))
    return tuple(groups)


def _axis_roles(weight: Weight) -> dict[int, str]:
    """Stored axis -> 'output', 'input' or 'parameter' (a kernel's, a direction's)."""
    found = {}
    for axis, size in enumerate(weight.shape):
        shape = [1] * len(weight.shape)
        shape[axis] = size
        places = np.broadcast_to(np.arange(size, dtype=np.int32).reshape(shape), weight.shape)
        seen = weight.role(places)
        found[axis] = "parameter"
        if size > 1:
            for k, role in enumerate(("output", "input")):
                others = [i for i in range(seen.ndim) if i != k]
                line = seen[tuple(slice(None) if i == k else slice(0, 1) for i in range(seen.ndim))]
                steps = [seen.strides[i] == 0 or seen.shape[i] == 1 for i in others]
                if all(steps) or (seen == line).all():
                    found[axis] = role
    return found


def _pinned(flow: Flow, solution: Solution, weights: Sequence[Weight]) -> tuple[Pinned, ...]:
    found = []
    for weight in weights:
        axes = flow.axes.get(weight.name) or ()
        outputs = [axes[axis] for axis, role in _axis_roles(weight).items() if role == "output" and axis < len(axes)]
        held = [(axis.size, root, solution.pinned[root]) for axis in outputs for root in [solution.root[axis]]]
        if not held or any(size > 1 and not pinned.any() for size, _, pinned in held):
            continue  # nothing, or heads that go whole, though what lies inside of them stays
        _, root, pinned = max(held, key=lambda line: line[0])  # a recurrent weight's directions count, too
        if pinned.any():
            reason = solution.reasons.get(int(root[pinned][0]), "")
            found.append(Pinned(weight.name, weight.op_type, int(pinned.sum()), reason))
    return tuple(found)


def _rehearse(
    bare: onnx.ModelProto, flow: Flow, solution: Solution, groups: Sequence[Group], sizes: Mapping[str, Sequence[int]]
) -> tuple[list[Axis], str] | None:
    """Cut every other channel of all groups, without data, and see whether ONNX infers the shapes that are expected.

    Returns:
        The axes of the first node that cannot be made smaller, and why; None where all can.
    """
    dead = np.zeros(solution.root.size, np.bool_)
    for group in groups:
        dead[group.classes[1::2]] = True
    trial = onnx.ModelProto()
    trial.CopyFrom(bare)
    try:
        cut(trial, flow, solution, dead, _shorten)
    except Stuck as error:
        return _around(error.site), str(error)
    seen = known.gather(trial, sizes, SHAPES)
    for site in flow.sites:
        for name, axes in zip(site.node.output, site.outputs, strict=False):
            root = [solution.root[axis] for axis in axes]
            wanted = tuple(int((solution.pinned[r] | ~dead[r]).sum()) for r in root)
            if name and name not in flow.facts.unknown and seen.shapes.get(name) != wanted:
                got = list(seen.shapes[name]) if name in seen.shapes else seen.unknown.get(name, "unknown")
                around = _around(site)
                if all(solution.pinned[solution.root[axis]].all() for axis in around):
                    around += sizes_behind(flow, site)
                return around, f"the shape of {site.what} would be {got} where {list(wanted)} is needed"
    return changed(flow, solution, dead, seen)


def _around(site: Site) -> list[Axis]:
    return [axis for axes in (*site.inputs, *site.outputs) for axis in axes or ()]


def _shorten(tensor: TensorProto, alive: list[np.ndarray]) -> None:
    """Cut a tensor in shape only; a small one's content goes too."""
    if math.prod(tensor.dims) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
        tensor.CopyFrom(numpy_helper.from_array(keep(numpy_helper.to_array(tensor), alive), tensor.name))
        return
    empty(tensor)
    for axis, stays in enumerate(alive):
        tensor.dims[axis] = int(stays.sum())
