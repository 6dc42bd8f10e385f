"""Which class an output predicts, and how often that is the label or what another model predicts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxprune.errors import PruneError

Array = np.ndarray[Any, np.dtype[Any]]

_HINT = "give a metric, a function (outputs, labels) -> float as 'module:function' or a callable"


@dataclass
class Top1:
    """Counts of right and equal predictions, batch after batch, over the first output of one or two models.

    The class axis is the one that the labels lack; without labels, or where several fit, the last of an output of
    up to three dims ([N, C], [N, T, C]) and the second of a larger one ([N, C, H, W]). Dims of size 1 do not
    count. An output of integers, booleans or strings in the shape of the labels is itself the prediction. One
    float for each sample ([N] or [N, 1]) is a binary score: a probability above 0.5 or, if any lies outside [0, 1], a
    logit above 0. NaN predicts nothing: it is wrong, and agrees with nothing.
    """

    output: str
    total: int = 0
    right: int = 0
    baseline_right: int = 0
    equal: int = 0
    note: str | None = None
    """Says which axis was taken for the classes where that is not obvious."""
    _scores: list[tuple[Array | None, Array | None, Array | None]] = field(default_factory=list)

    def update(self, output: Any, baseline: Any, labels: Array | None, samples: int) -> None:
        """Count one batch; `baseline` is the other model's output, None if there is none."""
        if baseline is None:
            predicted, truth, is_score = self._arrange(output, labels, samples)
            other, missing = None, False
        else:  # the baseline settles which shape is expected; an output of another shape predicts nothing
            other, truth, is_score = self._arrange(baseline, labels, samples)
            missing = not isinstance(output, np.ndarray) or output.shape != baseline.shape
            predicted = other if missing else self._arrange(output, labels, samples)[0]
        if self.total and is_score != bool(self._scores):
            raise PruneError(f"the shape of output '{self.output}' changes its meaning between feeds; {_HINT}")
        self.total += predicted.size
        counted = (None if missing else predicted, other, truth)
        if is_score:
            self._scores.append(counted)
        else:
            self._count(*counted)

    def copy(self) -> Top1:
        """The counts so far, to finish apart."""
        return replace(self, _scores=list(self._scores))

    def finish(self) -> bool:
        """Settle the threshold of binary scores; False if, without labels, they may as well be a regression's."""
        if not self._scores:
            return True
        values = [array for scores, others, _ in self._scores for array in (scores, others) if array is not None]
        probabilities = all(bool((np.isnan(a) | ((a >= 0) & (a <= 1))).all()) for a in values)
        if not probabilities and self._scores[0][2] is None:
            return False

        def decide(scores: Array | None) -> Array | None:
            if scores is None:
                return None
            return np.where(np.isnan(scores), -1, scores > (0.5 if probabilities else 0))

        for scores, others, truth in self._scores:
            self._count(decide(scores), decide(others), truth)
        self._scores.clear()
        return True

    def _count(self, predicted: Array | None, other: Array | None, truth: Array | None) -> None:
        self.right += _matches(predicted, truth)
        self.baseline_right += _matches(other, truth)
        self.equal += _matches(predicted, other)

    def _arrange(self, output: Any, labels: Array | None, samples: int) -> tuple[Array, Array | None, bool]:
        """Predictions (or binary scores, if the last item is true) and the labels in the same shape."""
        if not isinstance(output, np.ndarray):
            raise PruneError(f"output '{self.output}' is a {type(output).__name__}, not a tensor; {_HINT}")
        if output.size == 0:
            raise self._refusal(output, labels)
        values, truth = _squeeze(output), None if labels is None else _squeeze(labels)
        if values.ndim == 0:
            values = values[None]
        if truth is not None and truth.ndim == 0:
            truth = truth[None]
        if values.dtype.kind in "ObiuSU" and (truth is None or truth.shape == values.shape):
            return values, truth, False
        if values.ndim == 1 and values.size > 1 and samples == 1:
            values = values[None]  # one sample, without a batch axis
        if values.dtype.kind not in "fbiu":
            raise self._refusal(output, labels)
        if values.ndim == 1:
            if truth is not None:
                truth = self._class_numbers(truth, 2, output)
                if truth.shape != values.shape:
                    raise self._refusal(output, labels)
            return values.astype(np.float64), truth, True
        preferred = values.ndim - 1 if values.ndim <= 3 else 1
        if truth is None:
            axis = preferred
        else:
            fitting = [a for a in range(1, values.ndim) if values.shape[:a] + values.shape[a + 1 :] == truth.shape]
            if not fitting and truth.shape == values.shape and values.ndim == 2 and _is_one_hot(truth):
                truth, fitting = truth.argmax(1), [1]
            if not fitting:
                raise self._refusal(output, labels)
            axis = preferred if preferred in fitting else fitting[0]
            truth = self._class_numbers(truth, values.shape[axis], output)
        if values.ndim > 2 and self.note is None:
            classes = values.shape[axis]
            self.note = f"top-1 is taken over the {classes} classes of output '{self.output}' {list(output.shape)}"
        predicted = values.argmax(axis)
        if values.dtype.kind == "f":  # argmax takes NaN for the largest
            predicted = np.where(np.isnan(values).any(axis), -1, predicted)
        return predicted, truth, False

    def _class_numbers(self, labels: Array, classes: int, output: Array) -> Array:
        shape = list(output.shape)
        if labels.dtype.kind not in "biuf" or not np.array_equal(labels, np.floor(labels.astype(np.float64))):
            raise PruneError(
                f"labels ({labels.dtype}) are not class numbers, so top-1 of output '{self.output}' {shape} is not "
                f"defined; {_HINT}"
            )
        numbers = labels.astype(np.int64)
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
        if low < 0 or high >= classes:
            raise PruneError(
                f"labels reach from {numbers.min()} to {high}, but output '{self.output}' {shape} has {classes} "
                f"classes, 0 to {classes - 1}; renumber the labels, or {_HINT}"
            )
        return numbers

    def _refusal(self, output: Array, labels: Array | None) -> PruneError:
        given = "no labels" if labels is None else f"labels {labels.dtype}{list(labels.shape)}"
        return PruneError(
            f"top-1 is not defined for output '{self.output}' {output.dtype}{list(output.shape)} and {given}: it needs "
            f"one class number per sample and an axis of classes; {_HINT}"
        )


def _squeeze(array: Array) -> Array:
    """Without its dims of size 1, the first kept."""
    return np.squeeze(array, axis=tuple(axis for axis in range(1, array.ndim) if array.shape[axis] == 1))


def _is_one_hot(labels: Array) -> bool:
    return labels.dtype.kind in "biuf" and bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())


def _matches(left: Array | None, right: Array | None) -> int:
    if left is None or right is None:
        return 0
    if left.dtype.kind in "OSU" or right.dtype.kind in "OSU":
        left, right = left.astype(str), right.astype(str)
    return int(np.count_nonzero(left == right))
