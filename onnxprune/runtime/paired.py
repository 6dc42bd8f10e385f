"""Models held against the dense one sample by sample, on as few samples as it takes to tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from onnxprune.runtime.evaluate import Comparison, Evaluation
from onnxprune.runtime.feeds import Dataset
from onnxprune.runtime.session import Session

FIRST_LOOK = 256
"""Samples after which a comparison is first looked at; then twice as many, and so on."""
Z = 2.576
"""Of a 99 % interval at each look, so that the few looks together stay near 95 %."""
CACHED = 1 << 28
"""Bytes of the dense model's outputs that are kept."""


class Stopped(Exception):  # noqa: N818  it is no error
    """Somebody wants no more results."""


Enough = Callable[[float, float], bool]
"""(loss, half its interval) -> whether that will do."""


@dataclass(eq=False)
class Paired:
    """A dense model on data in random order; what it computes is computed once.

    Attributes:
        dense: its session.
        dataset: the data.
        metric: as `evaluate` takes it; with one of the user's own all samples are evaluated every time.
    """

    dense: Session
    dataset: Dataset
    metric: Any = None
    _references: dict[int, list[Any]] = field(default_factory=dict)

    def compare(
        self, session: Session, enough: Enough, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[Evaluation, float]:
        """Evaluate a model until `enough` is known of its loss; returns that, and half its interval (0: all samples).

        Raises:
            Stopped: `stopped` said so between two batches.
        """
        comparison = Comparison.of(session, self.dense, self.dataset, self.metric)
        total, look = self.dataset.samples, FIRST_LOOK
        for index, batch in enumerate(self.dataset):
            if stopped():
                raise Stopped
            reference = comparison.update(batch, self._references.get(index))
            if index not in self._references and reference is not None and self._room(reference):
                self._references[index] = reference
            if look <= comparison.samples < total and comparison.function is None:
                look *= 2
                found = comparison.result()
                half = half_width(found)
                if enough(found.loss, half):
                    return found, half
        return comparison.result(), 0.0

    def _room(self, outputs: list[Any]) -> bool:
        def size(of: list[Any]) -> int:
            return sum(getattr(output, "nbytes", CACHED) for output in of)

        return sum(map(size, self._references.values())) + size(outputs) <= CACHED


def half_width(found: Evaluation) -> float:
    """Half the 99 % interval of a loss, of samples paired with the dense model's.

    The interval of Bonett & Price (2012) for a difference of paired proportions: two samples are added, one that the
    pruned model alone gets wrong and one that the dense model alone does. How many differ is bounded by how many
    predictions do. Without classes the loss is 1 - cosine, from 0 to 2, whose square is at most twice the loss.
    """
    assert found.agreement is not None
    number = found.samples + 2
    changed = 2 * found.loss if found.agreement.top1 is None else 1 - found.agreement.top1
    second = (max(changed, abs(found.loss)) * found.samples + 2) / number
    mean = found.loss * found.samples / number
    return Z * math.sqrt(max(second - mean**2, 0.0) / number)
