"""The front door: prune a model, look into one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx

from onnxprune import config as configuration
from onnxprune.algorithms.pruner import Clock
from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.pipeline import run
from onnxprune.results import Report, Result, Row, check_target

if TYPE_CHECKING:
    from onnxprune.lowering.lower import Lowering


class Pruner:
    """A configuration at work on models; knows where in its schedule it is.

    Args:
        config_list: a list of entries, a mapping around one, or the path of a file with either.
        options: `score`, `pattern`, `allocation`: defaults of all entries.
    """

    kind: ClassVar[str | None] = None

    def __init__(self, config_list: configuration.ConfigSource, **options: Any) -> None:
        self.config = configuration.load(config_list, **{"pruner": self.kind, **options})
        self.clock = Clock()
        self.masks = Masks()

    def update_epoch(self, epoch: int) -> None:
        """Move schedules that count epochs to `epoch`; what is pruned by then stays pruned from now on."""
        self.clock = Clock(int(epoch), self.clock.step or 0)

    def step(self, steps: int = 1) -> None:
        """Move schedules that count optimizer steps on."""
        self.clock = Clock(self.clock.epoch or 0, (self.clock.step or 0) + steps)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is and what is pruned, as plain values and arrays."""
        return {"epoch": self.clock.epoch, "step": self.clock.step, "masks": {n: self.masks[n] for n in self.masks}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            PruneError: it is not one.
        """
        try:
            self.clock = Clock(state["epoch"], state["step"])
            self.masks = Masks({name: np.asarray(mask, np.bool_) for name, mask in state["masks"].items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PruneError(f"this is no state_dict of a pruner: {type(error).__name__} {error}") from error

    def prune(self, model: ModelSource, *, epoch: int | None = None, step: int | None = None, **options: Any) -> Result:
        """Prune a model at one point of the schedule.

        Args:
            model: a path, an onnx.ModelProto or an onnx_ir.Model; it is not changed.
            epoch: the epoch to prune for; otherwise that of the last `update_epoch`, or the end of the schedule.
            step: the same for optimizer steps.
            options: as for `onnxprune.prune`.
        """
        following = epoch is None and step is None and self.clock != Clock()
        clock = self.clock if following else Clock(epoch, step)
        result = run(model, self.config, clock=clock, held=self.masks if following else None, **options)
        if following:
            self.masks = result.masks.packed()
        return result


class LevelPruner(Pruner):
    """Level: the int(n * sparsity) entries of smallest magnitude of each weight."""

    kind = "level"


class AGPPruner(Pruner):
    """AGP (Zhu & Gupta 2017): level pruning whose sparsity rises along a cubic schedule."""

    kind = "agp"


class SensitivityPruner(Pruner):
    """Sensitivity (Han et al. 2015): thresholds in units of each weight's spread and measured sensitivity."""

    kind = "sensitivity"


def prune(
    model: ModelSource,
    config: configuration.ConfigSource | Pruner,
    output: str | os.PathLike[str] | None = None,
    data: Any = None,
    *,
    pruner: str | None = None,
    score: str | None = None,
    pattern: str | None = None,
    allocation: str | None = None,
    inexact: bool | None = None,
    reconstruct: bool | None = None,
    epoch: int | None = None,
    step: int | None = None,
    **options: Any,
) -> Result:
    """Prune a model and, where asked, evaluate and write it.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model; it is not changed.
        config: a config list, a mapping around one, the path of a file with either, or a pruner object.
        output: the file to write.
        data: inputs and optional labels, as `onnxprune.evaluate` takes them; dense and pruned are compared on them,
            and the sensitivity pruner and the allocation 'sensitivity' measure with them.
        pruner: 'level', 'agp', 'sensitivity' or 'sparsegpt'.
        score: default of the entries' `score`.
        pattern: default of the entries' `pattern`.
        allocation: default of the entries' `allocation`.
        inexact: whether norms over channels let them go: they then average over fewer, and fine-tuning has to follow.
        reconstruct: whether what survives of each weight is refitted by least squares, so that on calibration data it
            comes close to what the dense one computes.
        epoch: for schedules, the epoch to prune for; the end unless given.
        step: the same for optimizer steps.
        options: `calibration` (what decides where that is not `data`, in the same forms; labels are not needed),
            `max_memory` (for calibrating: bytes, or a text such as '2GB'; a quarter of the machine's unless given),
            `checkpoint` (a file that each layer is kept in while SparseGPT or reconstruction is at work, so that an
            interrupted run can go on; it is removed at the end),
            `max_drop` (write nothing where the metric falls by more or, without labels, agreement with the dense
            model is lower than 1 - max_drop), `metric` (a callable or 'module:function'),
            `keep_shape` (zero in place where the pattern is 'channel', 'head' or 'grouped', instead of cutting out and
            lowering), `verify` (False: do not hold the model against the zeroed one in onnxruntime), `timing` and
            `latency_table` (as `onnxprune.lower` takes them), `align` (channel
            counts are rounded to multiples of it; what suits the machine unless given), `compact` (cut out, without
            changing what is computed, the channels that zeros have made dead), `shapes` (sizes of inputs with open
            dims), `sparse` (store as sparse_initializer what that makes smaller), `force` (allow output over the
            input), `threads` (of onnxruntime).

    Returns:
        The result: masks, report, evaluation, `save` and `to_proto`.

    Raises:
        PruneError: bad input; nothing has been written.
    """
    if isinstance(config, Pruner):
        if any(o is not None for o in (pruner, score, pattern, allocation, inexact, reconstruct)):
            raise PruneError(
                "pruner, score, pattern, allocation, inexact and reconstruct belong to the pruner object; "
                "give them when making it"
            )
        return config.prune(model, epoch=epoch, step=step, output=output, data=data, **options)
    options_ = {"pruner": pruner, "score": score, "pattern": pattern, "allocation": allocation, "inexact": inexact}
    checked = configuration.load(config, **options_, reconstruct=reconstruct)
    return run(model, checked, clock=Clock(epoch, step), output=output, data=data, **options)


@dataclass(frozen=True, eq=False)
class Lowered:
    """A lowered model.

    Attributes:
        model: the model; the one given where no layer gains.
        report: layer by layer.
        path: the file written, or None.
    """

    model: Model = field(repr=False)
    report: Lowering
    path: Path | None = None

    def to_proto(self) -> onnx.ModelProto:
        """The model as one protobuf, external data loaded."""
        return self.model.to_proto()


def lower(
    model: ModelSource,
    output: str | os.PathLike[str] | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 1,
    timing: bool = True,
    latency_table: str | os.PathLike[str] | None = None,
    verify: bool = True,
    force: bool = False,
) -> Lowered:
    """Write the layers of a model whose zeros leave groups of outputs with inputs of their own as smaller operators.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model, pruned with the pattern 'grouped', or with zeros that
            have it; it is not changed.
        output: the file to write.
        shapes: sizes of inputs with open dims: what layers are timed at.
        threads: of onnxruntime, when timing.
        timing: False: take what a static model says is faster, and do not time.
        latency_table: a JSON file of times. Where it exists they are taken from it, and nothing is timed here; else
            it is written.
        verify: False: do not hold the lowered model against the one given in onnxruntime.
        force: allow output over the input.

    Raises:
        PruneError: bad input, or the outputs differ; nothing has been written.
    """
    from onnxprune.lowering.latency import Latencies
    from onnxprune.lowering.lower import lowered

    source = load(model)
    target = None if output is None else Path(output)
    if target is not None:
        check_target(source, target, force)
    found, report = lowered(source, shapes, Latencies.open(threads, latency_table, timing), verify)
    if target is None:
        return Lowered(found, report)
    with found.stage(target) as staged:
        return Lowered(found, report, staged.commit())


__all__ = [
    "AGPPruner",
    "LevelPruner",
    "Lowered",
    "Masks",
    "Pruner",
    "Report",
    "Result",
    "Row",
    "SensitivityPruner",
    "lower",
    "prune",
]
