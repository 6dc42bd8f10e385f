"""Ways to prune that a search tries, and what a file weighs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from onnxprune.graph.model import Staged


@dataclass(frozen=True)
class Recipe:
    """A way to prune, but for how much.

    Attributes:
        pattern: what shape goes.
        allocation: how much from each weight.
        pruner: of a configuration.
        score: what makes an entry matter.
        reconstruct: whether what survives is refitted.
    """

    pattern: str
    allocation: str
    pruner: str = "level"
    score: str = "magnitude"
    reconstruct: bool = False

    @property
    def refits(self) -> bool:
        """Whether the values of what survives change, too."""
        return self.reconstruct or self.pruner != "level"

    def __str__(self) -> str:
        """In words, from what it does first."""
        scored = self.pruner if self.pruner != "level" else self.score
        return f"{self.pattern}, {self.allocation}, {scored}{', reconstructed' * self.reconstruct}"


def recipes(target: str) -> list[Recipe]:
    """What is tried for a target; the cheap ones first."""
    if target == "size":
        return [
            Recipe("unstructured", "global"),
            Recipe("unstructured", "uniform", pruner="sparsegpt"),
            Recipe("unstructured", "sensitivity"),
            Recipe("unstructured", "sensitivity", pruner="sparsegpt"),
        ]
    found = [Recipe(pattern, how) for how in ("uniform", "sensitivity") for pattern in ("channel", "grouped")]
    return found + [Recipe(r.pattern, r.allocation, reconstruct=True) for r in found]


def deflated(staged: Staged) -> int:
    """Bytes of a model's files, compressed as they are when shipped: zeros take no room then."""
    total = 0
    for name in (staged.path.name, *staged.data):
        packer = zlib.compressobj(1)
        with open(staged.path.parent / name, "rb") as file:
            while chunk := file.read(1 << 22):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total
