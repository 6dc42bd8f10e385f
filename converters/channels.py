"""Channels of a model that lives in a framework: decided on its exported graph, with the values it has now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from onnxprune.algorithms.pruner import Clock
from onnxprune.config import Config
from onnxprune.graph.model import Model
from onnxprune.graph.weights import Skipped, Weight
from onnxprune.structure import channels as decisions
from onnxprune.structure import shrink
from onnxprune.structure.coupling import Coupling, Group, Pinned
from onnxprune.structure.plan import Plan

Read = Callable[[str], np.ndarray]
"""Initializer -> the values that its parameter has now, in the stored shape."""


@dataclass(eq=False)
class Channels:
    """The groups of a bound graph.

    Attributes:
        plan: of the graph as it was exported; its model has the values of the last `pull`.
        names: initializer -> the name of the parameter that it is.
        read: the live values of these initializers.
        align: counts are rounded to multiples of it; None is what suits the machine.
    """

    plan: Plan
    names: Mapping[str, str]
    read: Read = field(repr=False)
    align: int | None = None

    @classmethod
    def of(
        cls,
        graph: Model,
        shapes: Mapping[str, Sequence[int]],
        weights: Sequence[Weight],
        names: Mapping[str, str],
        read: Read,
    ) -> Channels:
        """Find the groups of a graph; those that reach a weight which is no parameter of the framework are left alone.

        Args:
            graph: as exported, unfolded.
            shapes: sizes of its inputs.
            weights: the framework's, named as parameters are; what they read is live.
            names: initializer -> parameter.
            read: the live values of these initializers.

        Raises:
            PruneError: no operator of the graph can be followed.
        """
        plan = Plan.of(graph, shapes, names.keys())
        by_name = {weight.name: weight for weight in weights}
        coupling = plan.coupling
        live = []
        for weight in coupling.weights:
            bound = by_name.get(names.get(weight.name, ""))
            if bound is not None:
                known = {"op_types": bound.op_types, "names": bound.names, "storage": bound.storage}
                live.append(replace(weight, **known))  # type: ignore[arg-type]
        plan.coupling = _without(replace(coupling, weights=tuple(live)), coupling, {weight.name for weight in live})
        return cls(plan, dict(names), read)

    @property
    def coupling(self) -> Coupling:
        """The groups."""
        return self.plan.coupling

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> its shape, for all that may be cut or zeroed."""
        stored = self.coupling.flow.stored
        return {name: tuple(stored[key].dims) for key, name in self.names.items() if key in stored}

    def decide(
        self, config: Config, clock: Clock, held: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], list[Skipped]]:
        """The masks of all parameters that lose channels, and the weights whose channels stay, with reasons.

        Args:
            config: the configuration.
            clock: where in its schedule each entry is.
            held: parameter -> mask of earlier (True is kept); channels they removed stay removed.

        Raises:
            PruneError: a weight is not finite.
        """
        self._pull(weights=False)
        earlier = {key: held[name] for key, name in self.names.items() if name in held}
        masks, skipped = self.plan.decide(config, clock, earlier, self.align)
        named: dict[str, np.ndarray] = {}
        for key, mask in masks.items():
            if key in self.names:
                name = self.names[key]
                named[name] = named[name] & mask if name in named else mask
        return named, [replace(entry, name=self.names.get(entry.name, entry.name)) for entry in skipped]

    def rows(self, config: Config, kept: Mapping[str, np.ndarray]) -> tuple[decisions.GroupRow, ...]:
        """The groups that a configuration governs, and how many of their channels masks keep."""
        stored = {key: kept[name] for key, name in self.names.items() if name in kept}
        removed = shrink.gone(self.coupling, stored.get)
        assigned = config.assign(self.coupling.weights)
        pattern = {w.name: config.entries[index].pattern for index, chosen in assigned for w in chosen}
        rows = []
        for group, row in zip(self.coupling.groups, decisions.rows(self.coupling, removed), strict=True):
            asked = {pattern.get(member.name) for member in group.producers}
            if asked <= {"channel", "head"} and (group.heads or pattern[group.producers[0].name] == "channel"):
                rows.append(replace(row, name=self._named(row.name)))
        return tuple(rows)

    def dead(self, counts: Callable[[str], bool]) -> dict[str, np.ndarray]:
        """The channels all of whose parameters are zero now; `counts` says which initializers have to be."""

        def live(name: str) -> np.ndarray | None:
            return self.read(name) != 0 if name in self.names and counts(name) else None

        return shrink.gone(self.coupling, live)

    def cut(self, removed: Mapping[str, np.ndarray]) -> Model:
        """The graph with the live values, without some of its channels.

        Raises:
            PruneError: a node cannot be made smaller.
        """
        self._pull()
        self.plan.removed = dict(removed)
        return self.plan.cut()

    def alive(self, removed: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
        """Initializer -> which positions stay along each of its axes; only of parameters that become smaller."""
        found = {}
        for key in self.names:
            if key in self.coupling.flow.stored:
                axes = shrink.alive(self.coupling, removed, key)
                if not all(stays.all() for stays in axes):
                    found[key] = axes
        return found

    def _named(self, group: str) -> str:
        """A group's name with that of its first parameter."""
        key, mark, number = group.rpartition("#")
        return f"{self.names.get(key, key)}#{number}" if mark else self.names.get(group, group)

    def _pull(self, weights: bool = True) -> None:
        """Give the graph the live values; without the weights, which are read where they are anyway."""
        graph = self.coupling.model.graph.graph
        for key in self.names:
            value = graph.initializers.get(key)
            if value is not None and value.const_value is not None and (weights or key not in self.coupling.by_name):
                self.coupling.model.edit(value.const_value, partial(_replaced, self.read(key)))


def _without(coupling: Coupling, whole: Coupling, live: set[str]) -> Coupling:
    """A coupling without the groups that go through weights of the graph that are no live ones."""
    lost = whole.by_name.keys() - live
    groups: list[Group] = []
    pinned = [entry for entry in coupling.pinned if entry.name in live]
    for group in coupling.groups:
        foreign = next((member.name for member in group.members if member.name in lost), None)
        if foreign is None:
            groups.append(group)
            continue
        reason = f"its channels go through '{foreign}', which is no parameter that can be pruned"
        for member in group.producers:
            if member.name in live:
                op_type = coupling.by_name[member.name].op_type
                pinned.append(Pinned(member.name, op_type, int(member.places.size), reason))
    return replace(coupling, groups=tuple(groups), pinned=tuple(pinned))


def _replaced(current: np.ndarray, values: np.ndarray) -> np.ndarray:
    return current
