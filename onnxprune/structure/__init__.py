"""What must live or die together in a graph, and how to cut it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onnxprune.graph.model import ModelSource, load
from onnxprune.graph.weights import Skipped


@dataclass(frozen=True)
class MemberInfo:
    """A stored tensor that goes along with a group: which axis is cut, and what it is to the tensor."""

    name: str
    axis: int
    role: str


@dataclass(frozen=True)
class GroupInfo:
    """Channels that live or die one by one, each with its places in all members.

    `width` is the number of rows of the first member that one channel takes: 1, or the size of a head.
    """

    name: str
    size: int
    width: int
    heads: bool
    members: tuple[MemberInfo, ...]


@dataclass(frozen=True)
class PinnedInfo:
    """A weight whose outputs stay, and why."""

    name: str
    op_type: str
    outputs: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The groups of a model, the weights whose outputs are pinned, and what is no weight that can be pruned."""

    groups: tuple[GroupInfo, ...]
    pinned: tuple[PinnedInfo, ...]
    skipped: tuple[Skipped, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def explain(model: ModelSource, shapes: Mapping[str, Sequence[int]] | None = None) -> Explanation:
    """What lives or dies together in a model.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model; no large tensor is read.
        shapes: sizes of inputs with open dims.

    Raises:
        PruneError: the model cannot be read, or the shapes do not fit.
    """
    from onnxprune.structure.plan import Plan

    coupling = Plan.of(load(model), shapes).coupling
    groups = tuple(
        GroupInfo(g.name, g.size, g.width, g.heads, tuple(MemberInfo(m.name, m.axis, m.role) for m in g.members))
        for g in coupling.groups
    )
    pinned = tuple(PinnedInfo(p.name, p.op_type, p.size, p.reason) for p in coupling.pinned)
    return Explanation(groups, pinned, coupling.skipped)
