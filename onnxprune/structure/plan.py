"""Channels of one model: found, chosen, zeroed, cut out, and checked."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.algorithms.pruner import Clock
from onnxprune.config import Config
from onnxprune.errors import PruneError
from onnxprune.graph.model import Model
from onnxprune.graph.weights import Skipped
from onnxprune.structure import channels, shrink, verify
from onnxprune.structure.coupling import Coupling, couple
from onnxprune.structure.sizes import Sizes, choose


@dataclass(eq=False)
class Plan:
    """What is to become of the channels of a model.

    Attributes:
        coupling: the groups of the model.
        sizes: two shapes of each graph input, different in every open dim.
        removed: group name -> True where a channel goes; empty before `decide`.
    """

    coupling: Coupling
    sizes: tuple[Sizes, Sizes]
    removed: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        shapes: Mapping[str, Sequence[int]] | None = None,
        shared: Container[str] = (),
        inexact: bool = False,
    ) -> Plan:
        """Find the groups of a model, which is not changed.

        Args:
            model: the model.
            shapes: sizes of inputs with open dims.
            shared: vectors that are one parameter however many nodes read them.
            inexact: whether norms over channels let them go.

        Raises:
            PruneError: the shapes do not fit the inputs.
        """
        sizes = choose(model, shapes)
        return cls(couple(model, *sizes, shared, inexact), sizes)

    def choose(
        self,
        config: Config,
        clock: Clock,
        held: Mapping[str, np.ndarray] | None = None,
        align: int | None = None,
        norms: Mapping[str, np.ndarray] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, shrink.Lines], list[Skipped]]:
        """Choose channels; returns what stays of each stored tensor when they are zeroed, and what is pinned."""
        self.removed, skipped = channels.decide(config, self.coupling, clock, held, align, norms, shares)
        return shrink.lines(self.coupling, self.removed), skipped

    def decide(
        self, config: Config, clock: Clock, held: Mapping[str, np.ndarray] | None = None, align: int | None = None
    ) -> tuple[dict[str, np.ndarray], list[Skipped]]:
        """`choose`, with masks (any stored tensor -> True is kept)."""
        found, skipped = self.choose(config, clock, held, align)
        return {name: stays.mask() for name, stays in found.items()}, skipped

    @property
    def groups(self) -> tuple[channels.GroupRow, ...]:
        """The decision, group by group."""
        return channels.rows(self.coupling, self.removed)

    def zero(self, masks: Mapping[str, shrink.Lines | np.ndarray]) -> None:
        """Put zeros into the coupling's model."""
        shrink.zero(self.coupling, masks)

    def cut(self) -> Model:
        """The model without what goes. Zeros put into the coupling's model are kept."""
        return shrink.shrink(self.coupling, self.removed)

    def check(self, shrunk: Model) -> float:
        """Hold a shrunk model against the masked one under onnxruntime; returns the largest relative difference.

        Raises:
            PruneError: they differ by more than rounding does.
        """
        worst = verify.difference(self.coupling.model, shrunk, *self.sizes)
        if worst > verify.TOLERANCE and worst > (allowed := verify.tolerance(self.coupling.model, self.sizes[0])):
            raise PruneError(
                f"the shrunk model differs from the masked one by {worst:.2g} of its outputs' scale, more than "
                f"{allowed:.1g}: nothing is written. Prune with keep_shape (--keep-shape), or leave layers out"
            )
        return worst
