"""A file that was pruned elsewhere, back into the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.graph.weights import Weight, check_finite, find

from ..deploy import difference, tolerance
from ..match import Match, match
from ..reimport import resumed
from . import exporting
from .binding import Binding, bind
from .pruners import AGPPruner, LevelPruner, SensitivityPruner, TorchPruner

PRUNERS: dict[str, type[TorchPruner]] = {"level": LevelPruner, "agp": AGPPruner, "sensitivity": SensitivityPruner}


def reimport(model: nn.Module, source: ModelSource, example_inputs: Any, config_list: Any = None) -> TorchPruner:
    """Load a pruned file's weights into a module, and hold its masks from now on.

    The file may be any export of the module: unfolded, optimised or by torch's old exporter, whose names are lost and
    layouts transposed. Weights are matched by name, surviving values, and shape (see `onnxprune.converters.match`).
    Where a BatchNorm was folded into a weight, its zeros carry over and the values stay the module's. Biases, norms and
    buffers carry over where the file has them under their names.

    Args:
        model: the module, wrapped or not.
        source: the file's path, an onnx.ModelProto or an onnx_ir.Model.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments that both can compute with.
        config_list: how to prune on from here, as the pruners take it (a mapping with a `pruner` says which one;
            otherwise level); weights that no entry names keep the file's zeros. Unless given, that is all.

    Returns:
        The pruner that holds the masks.

    Raises:
        PruneError: a weight cannot be matched, or is not finite; onnxruntime's outputs for the file differ from the
            module's where all values carried over. The module is unchanged.
    """
    module = exporting.unwrap(model)
    binding, file = bind(module, example_inputs), load(source)
    theirs = find(file)[0]
    for weight in theirs:
        check_finite(weight, weight.values())
    matches = match(binding.weights, theirs)
    pruner = resumed(PRUNERS, binding.weights, {name: one.keep for name, one in matches.items()}, config_list)
    carried = _carried(binding, matches, file)
    places = {w.name: w.storage for w in binding.weights} | {name: place for name, (place, _) in carried.items()}
    before = {name: np.array(place.read()) for name, place in places.items()}
    try:
        _write(carried)
        pruner._start(module, binding.weights, binding.skipped, example_inputs)
        if all(one.values is not None for one in matches.values()):
            own = sorted(set(binding.names.values()) - carried.keys())
            _compare(module, source, file, theirs, example_inputs, own)
    except BaseException:
        pruner.remove()
        _write({name: (places[name], values) for name, values in before.items()})
        raise
    return pruner


def _carried(binding: Binding, matches: Mapping[str, Match], file: Model) -> dict[str, tuple[Any, np.ndarray]]:
    """What to write where, by parameter or buffer name: matched weights, and the rest where the file has its name."""
    written: dict[str, tuple[Any, np.ndarray]] = {}
    weights = {w.name: w for w in binding.weights}
    for name, one in matches.items():
        if one.values is not None:
            written[name] = (weights[name].storage, one.values)
    folded = {name.rpartition(".")[0] for name, one in matches.items() if one.values is None}
    for initializer, name in binding.names.items():
        if name in weights or name.rpartition(".")[0] in folded:  # a folded layer's bias has other values for a reason
            continue
        value = file.graph.graph.initializers.get(initializer)
        if value is None or value.const_value is None:
            continue
        place, values = binding.sources[initializer], file.read(value.const_value)
        current = place.read()
        if values.shape != current.shape or not (values.dtype == current.dtype or (_real(values) and _real(current))):
            continue
        if _real(values) and not np.isfinite(values.astype(np.float64)).all():
            raise PruneError(
                f"initializer '{initializer}' {list(values.shape)} of the file holds NaN or infinite values; nothing "
                "was written"
            )
        written[name] = (place, values.astype(current.dtype))
    return written


@torch.no_grad()
def _write(values: Mapping[str, tuple[Any, np.ndarray]]) -> None:
    for place, array in values.values():
        place.write(array)


def _real(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" or values.dtype.name == "bfloat16"


def _compare(
    module: nn.Module, source: ModelSource, file: Model, theirs: list[Weight], example_inputs: Any, kept: list[str]
) -> None:
    """Check that the module computes what the file computes; not for files with quantised weights, which differ."""
    from onnxprune.runtime.session import open_session

    if any(w.dtype.kind in "iu" for w in theirs):
        return
    allowed = tolerance({*exporting.type_names(module), *(w.dtype.name for w in theirs)})
    session = open_session(source, label="the pruned file")
    types = {given.name: given.dtype for given in session.inputs}
    feeds = {n: a.astype(types[n]) if _real(a) else a for n, a in exporting.feeds(file, example_inputs).items()}
    found = difference(exporting.outputs(module, example_inputs), session.run(feeds))
    if not found <= allowed:
        listed = ", ".join(kept[:6] + ["..."] * (len(kept) > 6))
        own = f" These tensors kept the module's values, because the file does not name them: {listed}." if kept else ""
        raise PruneError(
            f"with the file's weights the module's outputs differ from the file's by {found:.1e} of their scale (at "
            f"most {allowed:.0e} is accepted), so the module was left as it was.{own} Load the weights that the file "
            "was exported from into the module, or export the file with names kept"
        )
