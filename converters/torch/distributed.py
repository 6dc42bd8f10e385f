"""One set of masks on every rank, whatever each rank's own weights would have said."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from torch import distributed

from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks


def active() -> bool:
    """Whether this is one of several processes that torch.distributed has joined."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def agreed(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks of rank 0, on every rank; alone, the masks themselves.

    Rank 0's, because DistributedDataParallel spreads rank 0's weights: a pruner called before the model is wrapped may
    see other weights on every rank. A collective: every rank has to get here, so every rank calls the pruner,
    `update_epoch` and `step` alike. A mask takes one bit an entry on the way.

    Args:
        masks: weight name -> boolean array of the stored shape, as this rank decided.

    Raises:
        PruneError: on every rank, where the ranks hold weights of other names or shapes.
    """
    if not active():
        return dict(masks)
    weights = [(name, *mask.shape) for name, mask in masks.items()]
    mine = hashlib.sha256(repr(weights).encode()).hexdigest()
    everyone: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    if len(set(everyone)) > 1:
        others = [rank for rank, digest in enumerate(everyone) if digest != everyone[0]]
        raise PruneError(
            f"ranks {others} prune weights of other names or shapes than rank 0 (this rank: {len(weights)}, the first "
            f"{weights[:1]}); give every rank the same model and configuration"
        )
    box = [Masks(masks) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0)
    first = box[0]
    assert first is not None
    return {name: first[name] for name in masks}
