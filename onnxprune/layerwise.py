"""Pruning with calibration data, layer by layer in the order they run.

A *part* is a matrix of a weight that is multiplied with rows of its own: usually the weight itself. SparseGPT chooses
and updates its entries by the rows that it reads in the model as pruned so far; reconstruction refits what survives, so
that from those rows it comes as close as it can to what it computed in the dense model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune._version import __version__
from onnxprune.algorithms import reconstruct as least_squares
from onnxprune.algorithms.patterns import Pattern, parse
from onnxprune.algorithms.reconstruct import Moments
from onnxprune.algorithms.scores import CALIBRATED
from onnxprune.algorithms.sparsegpt import sparsegpt
from onnxprune.checkpoint import Checkpoint
from onnxprune.config import SPARSEGPT, Config
from onnxprune.errors import PruneError
from onnxprune.graph import expression as ex
from onnxprune.graph.companions import bias, only_reader, readers, stored
from onnxprune.graph.model import Model
from onnxprune.graph.stored import CHUNK
from onnxprune.graph.weights import FLOATS, Skipped, Weight, find
from onnxprune.runtime.calibrate import Calibration, Layer, calibration, find_layers, moments, norms
from onnxprune.runtime.feeds import Dataset
from onnxprune.runtime.stream import Flat


def check() -> None:
    """Refuse before anything is calibrated where the linear algebra is missing.

    Raises:
        PruneError: it is.
    """
    if importlib.util.find_spec("scipy") is None:
        raise PruneError("sparsegpt, and what is reconstructed, need scipy: pip install 'onnxprune[calibration]'")


@dataclass(frozen=True, eq=False)
class Part:
    """A matrix of a weight, and the operators that multiply it.

    Attributes:
        layers: the operators, each reading the same places.
        groups: which groups of their rows count.
        places: (groups, outputs, columns): stored position of each entry.
    """

    layers: tuple[Layer, ...]
    groups: np.ndarray
    places: np.ndarray

    @property
    def weight(self) -> Weight:
        """The weight it is of."""
        return self.layers[0].weight

    @property
    def place(self) -> int:
        """The node at which it is settled: the first one that reads it."""
        return self.layers[0].place


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model with calibration data.

    Attributes:
        model: the model.
        data: the data, in feeds.
        layers: the weights that a configuration governs, at the operators that read them, in the order they run.
        reasons: weights whose inputs cannot be read, and why.
        notes: what a user should know about the data.
    """

    model: Model
    data: Calibration
    layers: tuple[Layer, ...]
    reasons: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: Model,
        weights: Sequence[Weight],
        dataset: Dataset,
        memory: str | float | None,
        threads: int | None,
    ) -> Calibrated:
        """Find the layers of some weights, and cut the data to what memory allows.

        Raises:
            PruneError: the model does not run on the data.
        """
        layers, reasons = find_layers(model, weights)
        data = calibration(model, dataset, layers, memory, threads)
        return cls(model, data, tuple(layers), reasons, _idle(model, layers))

    def norms(self, config: Config) -> dict[str, np.ndarray]:
        """The norms of the inputs of all weights in role order, where a score needs them; see `calibrate.norms`."""
        wanted = any(entry.score in CALIBRATED for entry in config.entries)
        return norms(self.model, self.layers, self.data) if wanted else {}

    def duplicate(self) -> Model:
        """A copy of the model, which has not been edited yet: what reconstruction is held against."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        copy = self.model.made(proto)
        copy.origin = self.model.origin
        return copy

    def checkpoint(
        self, path: str | os.PathLike[str] | None, config: Config, masks: Mapping[str, np.ndarray]
    ) -> Checkpoint:
        """What an interrupted run of `apply` has left, if anything, before the model is edited.

        Raises:
            PruneError: the file is no checkpoint, or another run's.
        """
        if path is None:
            return Checkpoint(None, {})
        states = {name: hashlib.blake2b(digest_size=16) for name in ("model", "data", "options")}
        states["model"].update(self.model.proto.SerializeToString(deterministic=True))
        for file in self.model.data.values():
            for start in range(0, file.size, CHUNK):
                states["model"].update(file.read(start, CHUNK))
        for feed in self.data.feeds:
            for name, array in feed.items():
                states["data"].update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        told = [config.pruner, config.reconstruct, config.source, self.data.memory, self.data.threads]
        states["options"].update(json.dumps(told, default=str).encode())
        for name, mask in masks.items():
            states["options"].update(name.encode() + np.packbits(mask).tobytes())
        key = {name: state.hexdigest() for name, state in states.items()}
        return Checkpoint.open(path, {**key, "version": __version__})

    def apply(
        self,
        config: Config,
        weights: Sequence[Weight],
        masks: Mapping[str, np.ndarray],
        dense: Model,
        keep: Checkpoint | None = None,
    ) -> dict[str, np.ndarray]:
        """Choose and update entries by SparseGPT, and refit what survives, as a configuration asks.

        Args:
            config: the validated configuration.
            weights: all weights of the model.
            masks: stored tensor -> True where it is kept; put into the model already. For SparseGPT, they say how many
                entries of each weight go.
            dense: the model before.
            keep: what each step is kept in, so that an interrupted run can go on.

        Returns:
            The masks, as SparseGPT chose them where it did.
        """
        chosen = {w.name: parse(config.entries[i].pattern) for i, own in config.assign(weights) for w in own}
        found, fixed = parts([layer for layer in self.layers if layer.weight.name in masks])
        fixed |= {name: reason for name, reason in self.reasons.items() if name in masks}
        copies = {name: np.array(mask) for name, mask in masks.items()}
        refit = Refit(self.model, dense, self.data, copies, keep or Checkpoint(None, {}))
        instead = "pruned by magnitude and " if config.pruner == SPARSEGPT else ""
        self.notes.extend(f"'{name}' is {instead}not refitted: {reason}" for name, reason in fixed.items())
        refit.run(found, chosen if config.pruner == SPARSEGPT else {}, config.reconstruct)
        self.notes.extend(refit.notes)
        return refit.masks

    def unread(self, config: Config, weights: Sequence[Weight]) -> list[Skipped]:
        """The weights that a score needs the inputs of, which cannot be read."""
        found = []
        for index, chosen in config.assign(weights):
            if config.entries[index].score in CALIBRATED or config.pruner == SPARSEGPT:
                found += [Skipped(w.name, w.op_type, self.reasons[w.name]) for w in chosen if w.name in self.reasons]
        return found


def parts(layers: Sequence[Layer]) -> tuple[list[Part], dict[str, str]]:
    """The matrices of some weights, in the order they run; and weights that cannot be changed as such, and why."""
    by_weight: dict[str, list[Layer]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight.name, []).append(layer)
    found: list[Part] = []
    reasons: dict[str, str] = {}
    for name, own in by_weight.items():
        reason = _fixed(own)
        made = {} if reason else _matrices(own)
        if reason or isinstance(made, str):
            reasons[name] = reason or str(made)
        else:
            found += made.values()
    return sorted(found, key=lambda part: (part.place, part.layers[0].use.operand)), reasons


def _fixed(layers: Sequence[Layer]) -> str:
    """Why the values of a weight are left as they are; empty where they may change."""
    weight = layers[0].weight
    if "Embedding" in weight.op_types:
        return "it is an embedding too, whose rows are not to change"
    if weight.leaf.tensor.dtype not in FLOATS or not all(_plain(layer.use.expression) for layer in layers):
        return "it is stored quantised or scaled"
    return ""


def _plain(expression: ex.Expression) -> bool:
    if isinstance(expression, ex.Leaf):
        return True
    if isinstance(expression, ex.Scale):
        return expression.keeps and _plain(expression.arg)
    return all(_plain(arg) for arg in expression.args)


def _matrices(layers: Sequence[Layer]) -> dict[bytes, Part] | str:
    """The different matrices that operators read of one weight; or the reason why they are none."""
    made: dict[bytes, Part] = {}
    for layer in layers:
        ours = layer.places >= 0
        rows = np.all(ours, axis=2)
        if (rows != ours.any(2)).any():
            return "its inputs are joined with those of another tensor"
        counts = rows.sum(1)
        groups: np.ndarray = counts > 0
        if len(set(counts[groups])) != 1:
            return "its outputs are joined unevenly with those of another tensor"
        places = layer.places[groups][rows[groups]].reshape(int(groups.sum()), -1, layer.places.shape[2])
        key = places.tobytes() + str(places.shape).encode()
        before = made.get(key)
        made[key] = Part((layer,) if before is None else (*before.layers, layer), groups, places)
    flat = np.concatenate([part.places.reshape(-1) for part in made.values()])
    if np.unique(flat).size < flat.size:
        return "operators read different parts of it that overlap"
    return made


@dataclass(eq=False)
class Refit:
    """A model changed layer by layer, beside the dense one.

    Attributes:
        model: the model, as far as it is pruned; it is changed.
        dense: the model before; it is not changed.
        data: what both run on.
        masks: stored tensor -> True where it is kept; changed where SparseGPT chooses.
        keep: the steps that are done.
        notes: what a user should know about the data.
    """

    model: Model
    dense: Model
    data: Calibration
    masks: dict[str, np.ndarray]
    keep: Checkpoint
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Both models stand at their inputs."""
        self.flat = Flat.of(self.model)
        self.tensors, self.originals = stored(self.model), stored(self.dense)
        self.weights = {weight.name: weight for weight in find(self.dense)[0]}
        self.read = readers(self.flat.proto.graph)
        self.now, self.before = self.data.stream(self.model), self.data.stream(self.dense)
        self._last: tuple[object, tuple[Moments, Moments]] | None = None
        self._passed: object = None
        self._few: list[tuple[str, int, int]] = []
        self._changed: dict[str, np.ndarray] = {}

    def run(self, found: Sequence[Part], patterns_: Mapping[str, Pattern], reconstruct: bool) -> None:
        """Settle parts, and norms between them, in the order they run.

        Args:
            found: the parts.
            patterns_: weight -> pattern, for those that SparseGPT chooses the entries of.
            reconstruct: whether to refit what survives.
        """
        steps: list[tuple[int, Part | onnx.NodeProto]] = [(part.place, part) for part in found]
        if reconstruct:
            nodes = enumerate(self.flat.proto.graph.node)
            steps += [(place, node) for place, node in nodes if node.op_type == "BatchNormalization"]
        for index, (place, step) in enumerate(sorted(steps, key=lambda pair: pair[0])):
            kept = self.keep.arrays(str(index))
            if kept is not None:
                self._repeat(step, place, reconstruct, kept)
                self._few += [tuple(few) for few in self.keep.records[str(index)]]
                continue
            self._changed, told = {}, len(self._few)
            if isinstance(step, Part):
                self._settle(step, patterns_.get(step.weight.name), reconstruct)
            else:
                self._normalise(step, place)
            self.keep.add(str(index), self._few[told:], self._changed)
        self.notes += _too_few(self._few)

    def _repeat(self, step: Part | onnx.NodeProto, place: int, reconstruct: bool, kept: Mapping[str, bytes]) -> None:
        """Go past a step that an interrupted run has done: the streams go on alike, and so does what they give."""
        if isinstance(step, Part):
            self._pass(step, reconstruct)
        elif not self._is_shared(step):
            for stream in (self.now, self.before):
                for _ in stream.read([step.input[0]], place):
                    pass
        for key, content in kept.items():
            kind, name = key.split(" ", 1)
            if kind == "mask":
                self.masks[name][...] = np.frombuffer(content, np.bool_).reshape(self.masks[name].shape)
                continue
            tensor = self.tensors[name] if kind == "vector" else self._tensor(step)
            array = np.frombuffer(content, tensor.dtype.numpy()).reshape(tensor.shape.numpy())
            self.model.edit(tensor, lambda _, array=array: array)  # type: ignore[misc]

    def _tensor(self, step: Part | onnx.NodeProto) -> ir.TensorProtocol:
        assert isinstance(step, Part)
        return step.weight.leaf.tensor

    def _pass(self, part: Part, reconstruct: bool) -> None:
        key = (part.layers[0].inputs, part.groups.tobytes())
        if self._passed == key and len(part.layers) == 1:
            return
        self._passed = key if len(part.layers) == 1 else None
        names = sorted({name for layer in part.layers for name in layer.inputs.values})
        for stream in (self.now, self.before) if reconstruct else (self.now,):
            for _ in stream.read(names, part.place):
                pass

    def _settle(self, part: Part, pattern: Pattern | None, reconstruct: bool) -> None:
        weight = part.weight
        original = self.weights[weight.name].storage.read().reshape(-1)[part.places].astype(np.float64)
        tensor = weight.leaf.tensor
        array = np.array(self.model.current(tensor))
        flat, mask = array.reshape(-1), self.masks[weight.name].reshape(-1)
        keep = mask[part.places]
        halves = self._sums(part, reconstruct)
        total = halves[0] + halves[1]
        if total.count < total.x.shape[1]:
            self._few.append((weight.name, total.count, total.x.shape[1]))
        values = np.where(keep, flat[part.places].astype(np.float64), 0.0)
        inputs = part.places.shape[2] // part.layers[0].positions
        if pattern is not None and not pattern.misfit((part.places.shape[0] * part.places.shape[1], inputs)):
            values, gone = sparsegpt(original, total.xx, pattern, int(np.count_nonzero(~keep)), inputs)
            keep = ~gone
            mask[part.places] = keep
        if reconstruct:
            values = self._refitted(part, original, values, keep, halves)
        flat[part.places] = values.astype(array.dtype)
        self._changed |= {f"weight {weight.name}": array, f"mask {weight.name}": self.masks[weight.name]}
        self.model.edit(tensor, lambda _: array)

    def _sums(self, part: Part, reconstruct: bool) -> tuple[Moments, Moments]:
        """The sums over a part's rows, for two halves of the data; the last ones serve all weights that read them."""
        key = (part.layers[0].inputs, part.groups.tobytes())
        if self._last is not None and self._last[0] == key and len(part.layers) == 1:
            return self._last[1]
        self._last = None  # two at a time would take twice the memory
        groups, _, columns = part.places.shape
        needed = 8 * groups * columns**2 * (6 if reconstruct else 3)  # two halves, and what is added to them
        if needed > self.data.memory:
            raise PruneError(
                f"the Gram matrices of weight '{part.weight.name}' ({columns} inputs) take {needed / 2**20:,.0f} MB, "
                f"and max_memory is {self.data.memory / 2**20:,.0f} MB; allow more (--max-memory), or leave it out"
            )
        layers = [(layer, part.groups) for layer in part.layers]
        found = moments(layers, self.now, self.before if reconstruct else None, self.data, part.place)
        if len(part.layers) == 1:
            self._last = key, found
        return found

    def _refitted(
        self, part: Part, original: np.ndarray, values: np.ndarray, keep: np.ndarray, halves: tuple[Moments, Moments]
    ) -> np.ndarray:
        """Weights, and the bias, that come closest to what the dense layer computed."""
        layer = part.layers[0]
        whole = len(part.layers) == 1 and part.places.size == layer.places.size
        outputs = part.places.shape[0] * part.places.shape[1]
        own = bias(layer.node, layer.use.operand, outputs, self.tensors, self.read) if whole else None
        after = only_reader(layer.node, self.read) if whole else None
        free = own is not None or (after is not None and after.op_type == "BatchNormalization")
        first, second = (half.centred() for half in halves) if free else halves
        ridge = least_squares.choose_ridge(original, values, keep, (first, second))
        total = halves[0] + halves[1]
        fitted = least_squares.refit(original, values, keep, total.centred() if free else total, ridge)
        if own is not None and total.count:
            shift = np.einsum("gok,gk->go", original, total.d) - np.einsum("gok,gk->go", fitted, total.x)
            self._store(own.name, lambda before: before + (shift / (total.count * own.factor)).reshape(before.shape))
        return fitted

    def _normalise(self, node: onnx.NodeProto, place: int) -> None:
        """Give a BatchNorm statistics with which its output has the mean and the deviation that it had."""
        names = node.input[3:5]
        if self._is_shared(node):
            return
        moved = [_statistics(stream.read([node.input[0]], place)) for stream in (self.now, self.before)]
        (mean, variance), (mean_before, variance_before) = moved
        alive = (variance > 0) & (variance_before > 0)
        ratio = np.divide(variance, variance_before, out=np.ones_like(variance), where=alive)
        self._store(names[0], lambda old: np.where(alive, mean - (mean_before - old) * np.sqrt(ratio), old))
        self._store(names[1], lambda old: old * ratio)

    def _is_shared(self, node: onnx.NodeProto) -> bool:
        """Whether a norm's statistics are computed, or those of another one too."""
        return any(name not in self.tensors or len(self.read[name]) > 1 for name in node.input[3:5])

    def _store(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Give a stored vector new values, computed from the dense model's; what a mask zeroes stays zero."""
        before = self.dense.read(self.originals[name])
        after = change(before.astype(np.float64)).astype(before.dtype)
        if name in self.masks:
            after[~self.masks[name]] = 0
        self._changed[f"vector {name}"] = after
        self.model.edit(self.tensors[name], lambda _: after)


def _statistics(batches: Iterable[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel (axis 1) over all batches."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for (x,) in batches:
        axes = (0, *range(2, x.ndim))
        wide = x.astype(np.float64)
        count += x.size // x.shape[1]
        total, squares = total + wide.sum(axes), squares + np.square(wide).sum(axes)
    mean = total / max(count, 1)
    return mean, np.maximum(squares / max(count, 1) - mean**2, 0.0)


def _idle(model: Model, layers: Sequence[Layer]) -> list[str]:
    """What to say of weights that no output of the model depends on."""
    flat = Flat.of(model)
    used = set(flat.behind([value.name for value in flat.proto.graph.output], {}))
    idle = sorted({layer.weight.name for layer in layers} - {la.weight.name for la in layers if la.place in used})
    return [f"the model's outputs do not depend on weight '{name}': pruning it changes nothing" for name in idle]


def _too_few(few: Sequence[tuple[str, int, int]]) -> list[str]:
    """What to say of layers that see fewer rows than they have inputs."""
    if not few:
        return []
    name, count, inputs = max(few, key=lambda item: item[2] / max(item[1], 1))
    what = f"{len(few)} weights have" if len(few) > 1 else "one weight has"
    return [
        f"the calibration data are few: {what} more inputs than rows to fit them to ('{name}': {inputs} inputs, "
        f"{count} rows), so that a ridge decides what the data leave open; more samples help"
    ]
