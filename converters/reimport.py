"""The pruner that goes on from a file: what every bridge's `reimport` ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from onnxprune import config as configuration
from onnxprune.graph.weights import Weight

from .bridge import Bridge

P = TypeVar("P", bound=Bridge)


def resumed(
    pruners: Mapping[str, type[P]], weights: Sequence[Weight], masks: Mapping[str, np.ndarray], config_list: Any
) -> P:
    """A pruner that knows a file's masks; under the user's configuration lies one that only holds them.

    Args:
        pruners: a bridge's pruners by kind.
        weights: the model's weights.
        masks: what the file keeps, by weight name.
        config_list: how to prune on from here; None only holds.

    Raises:
        PruneError: the configuration is wrong, or matches nothing.
    """
    held = [name for name in masks if not masks[name].all()]
    rest = [w.name for w in weights if w.name in masks and w.op_type != "Embedding"]
    base = [{"op_names": held if config_list is not None else list(dict.fromkeys(rest + held)), "sparsity": 0.0}]
    if config_list is None:
        pruner = pruners["level"](base)
    else:
        pruner = pruners[configuration.load(config_list).pruner](config_list)
        user = pruner.config
        user.assign(weights)
        if held:
            under = configuration.load(base, pruner=user.pruner)
            entries, origin = (*under.entries, *user.entries), [*under.source, *user.source]
            pruner.config = configuration.Config(pruner=user.pruner, entries=entries, source=origin)
    pruner.load_state_dict({"epoch": 0, "step": 0, "masks": {name: masks[name] for name in held}})
    return pruner
