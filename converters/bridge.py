"""What every bridge shares: a pruner attached to parameters that live in a framework.

A bridge says which parameters are weights (as `onnxprune.graph.weights.Weight`, so that the core decides about
them exactly as about those of a file) and holds the masks in its framework. Nothing here decides or knows a
framework.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.algorithms.pruner import Clock, decide, target
from onnxprune.api import Pruner
from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.weights import Skipped, Weight
from onnxprune.results import Report, note, row

from . import deploy
from .channels import Channels


class Bridge(Pruner):
    """A pruner that holds its masks in a framework's model from the moment it is called with it.

    Epochs are counted from 1: `update_epoch(n)` says that n of them are finished, as in

        for epoch in range(1, 11):
            train(model)
            pruner.update_epoch(epoch)

    The callbacks for the frameworks' own loops do just that, whatever number their library gives an epoch.
    """

    def __init__(self, config_list: Any, **options: Any) -> None:
        super().__init__(config_list, **options)
        self.clock = Clock(0, 0)
        self.weights: tuple[Weight, ...] = ()
        self.skipped: tuple[Skipped, ...] = ()
        self._untouched: tuple[Skipped, ...] = ()
        self._channels: Channels | None = None  # where the configuration takes channels
        self._smaller = False  # channels have been cut out: what is left is held, and decided no more
        self._kept: dict[str, np.ndarray] = {}
        self._targets: list[float | None] | None = None
        self._holder: Any = None  # what holds the masks in a model; None before the call and after `remove`

    def update_epoch(self, epoch: int) -> None:
        """Move schedules that count epochs to `epoch`: prune what is due; what was pruned stays pruned.

        Args:
            epoch: the number of the epoch that has just finished; the first is 1.
        """
        super().update_epoch(epoch)
        self._due()

    def catch_up(self, finished: int) -> None:
        """Move on to the number of epochs finished where that is ahead: training was resumed, by a library's loop."""
        if finished > (self.clock.epoch or 0):
            self.update_epoch(finished)

    def step(self, steps: int = 1) -> None:
        """Move schedules that count optimizer steps on; costs nothing between two updates."""
        super().step(steps)
        self._due()

    @property
    def sparsity(self) -> float:
        """Share of zeros over the weights that the configuration governs."""
        return self.report.sparsity

    @property
    def report(self) -> Report:
        """One row per weight that is governed, and the ones skipped, with reasons."""
        rows = tuple(row(w, self._kept[w.name]) for w in self.weights if w.name in self._kept)
        groups = () if self._channels is None else self._channels.rows(self.config, self._kept)
        return Report(rows, self.skipped, groups)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; where a model is attached, its masks are held from now on."""
        super().load_state_dict(state)
        if self._holder is not None:
            self._check_masks()
            self._kept = {name: self.masks[name] for name in self.masks}
            self._targets = self._targets_now()
            self._hold(self._kept)

    def remove(self) -> None:
        """Stop holding the masks: what is left is a plain model with zeros in it."""
        if self._holder is not None:
            self._holder.remove()
            self._holder = None

    def _check(self, weights: Sequence[Weight], skipped: Sequence[Skipped], channels: Channels | None = None) -> None:
        """Refuse a model in which there is nothing to do, before anything is touched.

        Raises:
            PruneError: an entry of the configuration matches none of the weights; with what was left alone, and why.
                Channels are asked for, and there is no graph to say what goes along with them.
        """
        if self.config.coupled and channels is None:
            raise PruneError(
                "the patterns 'channel' and 'head' need the graph, which says what goes along with a channel: call the "
                "pruner with example_inputs, as in pruner(model, example_inputs). Where there are none (a TensorFlow "
                "graph), prune the exported file with onnxprune.prune"
            )
        try:
            self.config.assign(weights)
        except PruneError as error:
            reasons = "".join(f"; '{s.name}' ({s.op_type}) is left alone: {s.reason}" for s in skipped[:8])
            raise PruneError(f"{error}{reasons}") from None

    def _attach(
        self, weights: Sequence[Weight], skipped: Sequence[Skipped] = (), channels: Channels | None = None
    ) -> None:
        """Take charge of a model's weights, and of its channels where those are pruned, and prune what is due.

        Raises:
            PruneError: masks were loaded that do not fit.
        """
        self.weights, self._untouched = tuple(weights), tuple(skipped)
        self._channels, self._smaller = channels, False
        self._check_masks()
        self._kept = {name: self.masks[name] for name in self.masks}
        self._targets = None
        self._due()

    def _due(self) -> None:
        """Decide anew where the schedule asks for another sparsity than before."""
        now = self._targets_now()
        if self._holder is None or self._smaller or now == self._targets:
            return
        kept, misfits = decide(self.config, self.weights, self.clock, self._kept)
        if self._channels is not None:
            along, pinned = self._channels.decide(self.config, self.clock, self._kept)
            kept |= {name: kept[name] & mask if name in kept else mask for name, mask in along.items()}
            misfits += pinned
        self._kept = kept
        self.skipped = (*misfits, *self._untouched)
        self._targets = now
        self.masks = Masks(self._kept)
        self._hold(self._kept)

    def _targets_now(self) -> list[float | None]:
        return [target(entry, self.clock) for entry in self.config.entries if not entry.exclude]

    def _check_masks(self) -> None:
        shapes = {} if self._channels is None else self._channels.shapes
        shapes |= {weight.name: weight.shape for weight in self.weights}
        for name in self.masks:
            if shapes.get(name) != self.masks[name].shape:
                found = f"has the shape {list(shapes[name])}" if name in shapes else "does not exist in the model"
                raise PruneError(
                    f"the pruner's mask for weight '{name}' has the shape {list(self.masks[name].shape)}, but the "
                    f"weight {found}. It comes from a state_dict, or from the model that the pruner was called with "
                    "before: load the state_dict that was saved with this model, or make a new pruner"
                )

    def _write(
        self, candidate: deploy.Candidate, path: str | os.PathLike[str], keep_shape: bool = False
    ) -> deploy.Exported:
        """Check an exported model and write it: smaller where channels or grouped inputs are pruned."""
        return deploy.write(
            candidate,
            path,
            lambda model: note(model, self.config, self.report, self.clock),
            None if keep_shape else self._smaller_form(),
        )

    def _smaller_form(self) -> deploy.Smaller | None:
        """What makes the exported model smaller, by what is pruned; lowering leaves out dead channels, too."""
        if self.config.grouped:
            return deploy.lowered
        return deploy.compacted if self.config.coupled else None

    @abstractmethod
    def _hold(self, kept: Mapping[str, np.ndarray]) -> None:
        """Zero what the masks (weight name -> stored shape, True is kept) remove, and keep it zero from now on."""
