"""What a pruner asks of the thing it prunes, be it a Keras model or a TensorFlow graph."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from onnxprune.graph.weights import Skipped, Weight

from ..deploy import Candidate


class Holder(Protocol):
    """A model whose weights can be read, and whose masks are held while it trains.

    Attributes:
        weights: the weights in their roles; what their storage reads is the framework's.
        skipped: what is left alone, with reasons.
    """

    weights: tuple[Weight, ...]
    skipped: tuple[Skipped, ...]

    def at(self, sess: Any) -> AbstractContextManager[None]:
        """While open, storages read the values of now, and `hold` writes. Revived entries are zeroed on entry."""

    def hold(self, kept: Mapping[str, np.ndarray]) -> None:
        """Zero what masks (weight name -> stored shape, True is kept) remove, and keep it zero from now on."""

    def remove(self) -> None:
        """Stop holding: the model is as it was before, with zeros in it."""

    def candidate(self, kept: Mapping[str, np.ndarray], example_inputs: Any, outputs: Any, sess: Any) -> Candidate:
        """The model as exported to be deployed, to be checked while `at` is open."""
