"""What pruning gives: a model, its masks and a report, and the record of it in the model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxprune import config as configuration
from onnxprune._version import __version__
from onnxprune.algorithms.pruner import Clock
from onnxprune.errors import PruneError
from onnxprune.graph import values
from onnxprune.graph.files import writing
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import Model
from onnxprune.graph.weights import Skipped, Weight

if TYPE_CHECKING:
    from onnxprune.lowering.lower import Lowering
    from onnxprune.runtime.evaluate import Evaluation
    from onnxprune.structure.channels import GroupRow
    from onnxprune.structure.shrink import Lines


@dataclass(frozen=True)
class Row:
    """One weight of a report: its stored shape, its number of entries, and how many of them are zero."""

    name: str
    op_type: str
    shape: tuple[int, ...]
    size: int
    zeros_before: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        rows: one per weight that was pruned.
        skipped: the weights left alone, with reasons.
        groups: one per group of channels, where channels or heads were pruned.
        notes: what a user should know besides.
        difference: of the shrunk model from the masked one, as a share of the outputs' scale; None where not checked.
        lowering: what became of layers with grouped inputs; None where none were asked for, or zeros are kept.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    groups: tuple[GroupRow, ...] = ()
    difference: float | None = None
    lowering: Lowering | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Entries of all rows."""
        return sum(row.size for row in self.rows)

    @property
    def zeros(self) -> int:
        """Zeros of all rows."""
        return sum(row.zeros for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all rows."""
        return self.zeros / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(row), "shape": list(row.shape), "sparsity": row.sparsity} for row in self.rows]
        total = {"size": self.size, "zeros": self.zeros, "sparsity": self.sparsity}
        channels = {"groups": [asdict(group) for group in self.groups], "difference": self.difference}
        lowering = None if self.lowering is None else asdict(self.lowering)
        return {
            "weights": rows,
            "skipped": [asdict(s) for s in self.skipped],
            **total,
            **channels,
            "lowering": lowering,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model.

    Attributes:
        masks: weight name -> boolean array of the stored shape, True is kept. Those of a model of more than 4 million
            entries are worked out from its file when they are looked at, as long as that is what it was; `packed()`
            puts them into memory.
        report: one row per weight, and the ones skipped, with reasons.
        evaluation: dense beside pruned under onnxruntime, where data was given.
        path: the file written; None where none was asked for, or the gate was not met.
        accepted: False where accuracy fell by more than `max_drop`.
        file_bytes: what was written, external data too; None where nothing was.
    """

    model: Model = field(repr=False)
    masks: Masks
    report: Report
    evaluation: Evaluation | None = None
    path: Path | None = None
    accepted: bool = True
    file_bytes: int | None = None

    @property
    def sparsity(self) -> float:
        """Share of zeros over the weights that the configuration governs."""
        return self.report.sparsity

    def save(self, path: str | os.PathLike[str], *, sparse: bool = False, force: bool = False) -> Path:
        """Write the pruned model: to a temporary file in the target's folder, then renamed.

        Args:
            path: the target; external data goes to a new file beside it.
            sparse: store initializers above the break-even sparsity as sparse_initializer.
            force: allow the target to be the source.
        """
        target = Path(path)
        check_target(self.model, target, force)
        with self.model.stage(target, sparse_storage=sparse) as staged:
            return staged.commit()

    def to_proto(self) -> onnx.ModelProto:
        """The pruned model as one protobuf, external data loaded."""
        return self.model.to_proto()


def row(weight: Weight, keep: np.ndarray | Lines) -> Row:
    """One weight of a report: zeros before its mask, and after."""
    if not isinstance(keep, np.ndarray):
        found = values.of(weight)
        if not found.in_file:
            return row(weight, keep.mask())
        counts = values.zeros(found), values.zeros(found, stays=keep.flat)
        return Row(weight.name, weight.op_type, weight.shape, weight.size, *counts)
    zero = weight.values() == 0
    before = int(np.count_nonzero(zero))
    zero |= ~weight.role(keep)
    return Row(weight.name, weight.op_type, weight.shape, weight.size, before, int(np.count_nonzero(zero)))


def note(model: Model, config: configuration.Config, report: Report, clock: Clock) -> None:
    """Record in the model's metadata_props what was done to it (at most 2 KB)."""
    record: dict[str, Any] = {"version": __version__, "pruner": config.pruner, "config_list": config.source}
    record |= {"sparsity": round(report.sparsity, 6), "zeros": report.zeros, "weights": len(report.rows)}
    record |= {key: value for key, value in asdict(clock).items() if value is not None}
    if len(json.dumps(record, default=list)) > 2000:
        record["config_list"] = f"{len(config.source)} entries"
    for entry in [p for p in model.proto.metadata_props if p.key == "onnxprune"]:
        model.proto.metadata_props.remove(entry)
    model.proto.metadata_props.add(key="onnxprune", value=json.dumps(record, default=list, sort_keys=True))


def check_target(model: Model, target: Path, force: bool) -> None:
    """Refuse a target that is a folder, or the model itself unless forced."""
    with writing(target):
        same = model.path is not None and target.exists() and os.path.samefile(model.path, target)
        folder = target.is_dir()
    if same and not force:
        raise PruneError(
            f"the output '{target}' is the input itself; choose another name, or --force (force=True) to replace it"
        )
    if folder:
        raise PruneError(f"the output '{target}' is a folder; give the name of a file in it")
