"""What goes into a model: the user's data in batches that fit it, or random inputs for timing it."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import onnx_ir as ir

from onnxprune.errors import PruneError
from onnxprune.graph.model import ModelSource, load
from onnxprune.runtime.session import ModelInput, describe, open_session

Array = np.ndarray[Any, np.dtype[Any]]
Feed = dict[str, Array]
DataSource = Union[str, "os.PathLike[str]", Mapping[str, Any], Iterable[Any], "Dataset"]

LABELS = "labels"
BATCH = 64
"""Samples run at once where the model leaves its batch dim open."""


LARGEST = 1 << 30
"""Bytes of the largest input that is made for a model."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one run. The first `samples` rows are data, what follows is padding to the model's fixed batch."""

    feed: Feed
    labels: Array | None
    samples: int
    padded: bool = False


@dataclass(frozen=True)
class Dataset:
    """Data checked against a model's inputs, to be iterated any number of times.

    `parts` are views of the user's arrays; types are cast and the last batch padded on the way out.
    """

    inputs: tuple[ModelInput, ...]
    parts: tuple[Batch, ...]
    fixed: int | None
    """The model's fixed batch size, if it has one and the data are to be cut to it."""
    whole: bool = False
    """Whether each part is a feed that is run as it is."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(part.samples for part in self.parts)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return self.parts[0].labels is not None

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        """Batches ready for the model."""
        for part in self.parts:
            feed = {}
            missing = 0 if self.fixed is None else self.fixed - part.samples
            for value in self.inputs:
                if value.name in part.feed:
                    array = part.feed[value.name].astype(value.dtype, copy=False)
                    if missing and has_samples(value, array):
                        array = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
                    feed[value.name] = array
            yield Batch(feed, part.labels, part.samples, missing > 0)


def load_data(source: DataSource, inputs: Sequence[ModelInput]) -> Dataset:
    """Data for evaluation, checked against the model's inputs and cut into batches.

    Args:
        source: a path to an .npz file or a mapping, with one array per model input (samples along the first
            axis; scalar inputs as they are) and optionally `labels`; or an iterable of feeds (each a mapping
            from input name to array, run as it is) or of pairs (feed, labels); or `module:function`, a
            function without arguments that returns one of these; or a Dataset. Arrays named `labels` are
            labels unless the model has an input of that name.
        inputs: the model's inputs, `Session.inputs`.

    Raises:
        PruneError: the source cannot be read, or names, types, shapes or lengths do not fit.
    """
    inputs = tuple(inputs)
    if isinstance(source, Dataset):
        for part in source.parts[:1]:
            _check_feed(part.feed, inputs, "the data", whole=source.fixed is None)
        return Dataset(inputs, source.parts, source.fixed, source.whole)
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if _is_reference(path):
            return load_data(_call(path), inputs)
        return _from_arrays(_read_npz(path), inputs, f"'{path}'")
    if isinstance(source, Mapping):
        return _from_arrays(_as_arrays(source, "the data"), inputs, "the data")
    if isinstance(source, Iterable) and not isinstance(source, np.ndarray):
        return _from_feeds(source, inputs)
    raise PruneError(
        f"data is a {type(source).__name__}; give an .npz file, a mapping from input name to array, an iterable of "
        f"such mappings or 'module:function'. The model's inputs are {_listed(inputs)}"
    )


def load_function(reference: str) -> Callable[..., Any]:
    """The function that `module:function` names, looked up with the working directory on the import path.

    Raises:
        PruneError: no such module or function, or its import fails.
    """
    module_name, _, name = reference.partition(":")
    cwd = os.getcwd()
    sys.path.insert(0, cwd)
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except Exception as error:
        raise PruneError(f"cannot load '{reference}': {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(cwd)
    if not callable(target):
        raise PruneError(f"'{reference}' is a {type(target).__name__}, not a function")
    return target  # type: ignore[no-any-return]


def _is_reference(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None and not os.path.exists(text)


def _call(reference: str) -> Any:
    function = load_function(reference)
    try:
        result = function()
    except Exception as error:
        raise PruneError(f"'{reference}' raised {type(error).__name__}: {error}") from error
    if isinstance(result, str) and _is_reference(result):
        raise PruneError(f"'{reference}' returned the string '{result}'; it must return data or the path of an .npz")
    return result


def _read_npz(path: str) -> Feed:
    try:
        with open(path, "rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise PruneError(f"'{path}' holds one unnamed array; save it with np.savez(path, input_name=array)")
            arrays = {name: content[name] for name in content.files}
        stray = next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None)
        if stray is not None:
            raise ValueError(f"'{stray}' in it is no array")
        return arrays
    except PruneError:
        raise
    except FileNotFoundError:
        raise PruneError(f"no such file: '{path}'; data is an .npz file or 'module:function'") from None
    except OSError as error:
        raise PruneError(f"cannot read '{path}': {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise many kinds
        hint = "write it with np.savez, without object arrays"
        raise PruneError(f"'{path}' is no readable .npz file ({error}); {hint}") from error


def _as_arrays(mapping: Mapping[Any, Any], what: str) -> Feed:
    arrays = {}
    for name, value in mapping.items():
        try:
            arrays[str(name)] = np.asarray(value)
        except Exception as error:  # ragged lists, tensors on another device
            kind = type(value).__name__
            raise PruneError(f"{what}: '{name}' ({kind}) does not convert to an array: {error}") from error
    return arrays


def _split_labels(arrays: Feed, inputs: tuple[ModelInput, ...]) -> tuple[Feed, Array | None]:
    if LABELS in arrays and all(value.name != LABELS for value in inputs):
        return {name: array for name, array in arrays.items() if name != LABELS}, arrays[LABELS]
    return arrays, None


def check_size(value: ModelInput, shape: Sequence[int]) -> None:
    """An input of a shape is not larger than what a file may ask for with a few bytes.

    Raises:
        PruneError: it is.
    """
    size = math.prod(shape) * value.dtype.itemsize
    if size > LARGEST:
        raise PruneError(
            f"input {value} takes {size / 2**30:.3g} GB in the shape {'x'.join(map(str, shape))}, and at most "
            f"{LARGEST >> 30} GB is given to one; export the model for smaller inputs"
        )


def has_samples(value: ModelInput, array: Array) -> bool:
    """Whether an input's first axis counts samples."""
    return value.required and array.ndim > 0


def _from_arrays(arrays: Feed, inputs: tuple[ModelInput, ...], what: str) -> Dataset:
    feed, labels = _split_labels(arrays, inputs)
    _check_feed(feed, inputs, what, whole=False)
    sampled = {v.name: feed[v.name] for v in inputs if v.name in feed and has_samples(v, feed[v.name])}
    counts = {name: len(array) for name, array in sampled.items()}
    if labels is not None:
        if labels.ndim == 0:
            raise PruneError(f"{what}: labels is a scalar; one label per sample is needed")
        counts[LABELS] = len(labels)
    hint = "for inputs without a sample axis, pass an iterable of feeds instead"
    if not sampled:
        raise PruneError(f"{what}: no input has a first axis to count samples along ({_listed(inputs)}); {hint}")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise PruneError(f"{what}: the first axis counts samples, but its lengths differ: {found}; {hint}")
    total = next(iter(counts.values()))
    if total == 0:
        raise PruneError(f"{what}: no samples; the arrays are empty")
    leading = {v.name: v.shape[0] for v in inputs if v.name in sampled and v.shape}
    sizes = {size for size in leading.values() if isinstance(size, int)}
    if len(sizes) > 1:
        raise PruneError(f"the model's inputs have no common batch size ({_listed(inputs)}); {hint}")
    fixed = sizes.pop() if sizes else None
    step = fixed or BATCH
    for value in inputs:
        if value.name in sampled:
            check_size(value, (step, *sampled[value.name].shape[1:]))
    parts = []
    for start in range(0, total, step):
        part = {name: array[start : start + step] if name in sampled else array for name, array in feed.items()}
        parts.append(Batch(part, None if labels is None else labels[start : start + step], min(step, total - start)))
    return Dataset(inputs, tuple(parts), fixed)


def _from_feeds(source: Iterable[Any], inputs: tuple[ModelInput, ...]) -> Dataset:
    parts: list[Batch] = []
    try:
        items = list(source)  # a generator gives its feeds once, and the baseline needs them too
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(f"the data raised {type(error).__name__} while being read: {error}") from error
    for index, item in enumerate(items):
        what = f"feed {index}"
        pair = isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Mapping)
        given = item[0] if pair else item
        if not isinstance(given, Mapping):
            raise PruneError(
                f"{what} is a {type(item).__name__}; a feed is a mapping from input name to array, or a pair "
                f"(feed, labels). The model's inputs are {_listed(inputs)}"
            )
        feed, labels = _split_labels(_as_arrays(given, what), inputs)
        if pair:
            labels = _as_arrays({LABELS: item[1]}, what)[LABELS]
        _check_feed(feed, inputs, what, whole=True)
        parts.append(Batch(feed, labels, _count(feed, labels)))
    if not parts:
        raise PruneError("the data holds no feeds; a generator that was already consumed gives none")
    if len({part.labels is None for part in parts}) > 1:
        missing = next(i for i, part in enumerate(parts) if part.labels is None)
        raise PruneError(f"feed {missing} has no labels while others have; give labels with all feeds or with none")
    return Dataset(inputs, tuple(parts), None, whole=True)


def _count(feed: Feed, labels: Array | None) -> int:
    """Samples in a feed: its labels, else the first dim its inputs share, else one."""
    if labels is not None:
        return len(labels) if labels.ndim else 1
    leading = {array.shape[0] if array.ndim else 1 for array in feed.values()}
    return max(leading.pop(), 1) if len(leading) == 1 else 1


def _check_feed(feed: Feed, inputs: tuple[ModelInput, ...], what: str, *, whole: bool) -> None:
    """Names, types and shapes; `whole` also compares the leading dim, which otherwise counts samples."""
    known = {value.name for value in inputs}
    if not (known >= feed.keys() and all(value.name in feed for value in inputs if value.required)):
        raise PruneError(f"{what} does not fit the model's inputs: expected {_listed(inputs)}; given {_given(feed)}")
    for value in inputs:
        if value.name not in feed:
            continue
        array = feed[value.name]
        _check_type(value, array, what)
        first = 0 if whole or not value.required else 1
        dims_fit = all(
            not isinstance(declared, int) or declared == size
            for declared, size in list(zip(value.shape, array.shape, strict=False))[first:]
        )
        if value.shape and (len(value.shape) != array.ndim or not dims_fit):
            rows = "" if first == 0 else " (the first axis counts samples)"
            raise PruneError(f"{what}: expected {value}{rows}, given {_given({value.name: array})}")


def _check_type(value: ModelInput, array: Array, what: str) -> None:
    """Safe casts; a narrower float, because numpy makes float64 by default; narrower integers that hold every value."""
    source, target = array.dtype, value.dtype
    detail = ""
    if target.kind == "O":
        fits = source.kind in "OUS"
    elif source.kind not in "biuf":
        fits = False
    elif array.size == 0 or np.can_cast(source, target, "safe"):
        fits = True
    elif target.kind == "b" or (source.kind == "f" and target.kind in "iu"):
        fits = False
    else:
        low, high = float(np.fmin.reduce(array, None)), float(np.fmax.reduce(array, None))
        if target.kind in "iu":
            fits = np.iinfo(target).min <= low and high <= np.iinfo(target).max
        else:  # integers stay exact up to the mantissa; floats may round, not overflow
            finfo = np.finfo(target)
            limit = float(finfo.max) if source.kind == "f" else 2.0 ** (finfo.nmant + 1)
            fits = all(abs(bound) <= limit or not np.isfinite(bound) for bound in (low, high))
        detail = f" with values from {low:g} to {high:g}, which do not fit"
    if not fits:
        given = _given({value.name: array})
        raise PruneError(f"{what}: expected {value}, given {given}{detail}; convert the array first")


def _listed(inputs: Iterable[ModelInput]) -> str:
    return ", ".join(str(value) for value in inputs if value.required) or "none"


def _given(arrays: Feed) -> str:
    return ", ".join(describe(name, array.dtype, array.shape) for name, array in arrays.items()) or "nothing"


# --- random inputs ---------------------------------------------------------------------------------------------------

_SEQUENCE = re.compile(r"seq|len|time|token|frame|step|word|past|position|^[tsl]$", re.I)
_SIZES = (  # what an unnamed size is taken for, by the dim's name
    (re.compile(r"batch|^[nb]$|^unk__|^num_samples$", re.I), 1),
    (_SEQUENCE, 128),
    (re.compile(r"height|width|^[hw]$", re.I), 224),
    (re.compile(r"chan|^c$", re.I), 3),
)
# Operators through which the values of an integer input reach an embedding unchanged.
_PASSES_VALUES = {
    "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Concat", "Expand",
    "Split", "Tile", "Pad",
}  # fmt: skip
_KEEPS_ROWS = {"Identity", "Cast", "DequantizeLinear"}
# EmbedLayerNormalization's operands: words, segments and positions -> their tables.
_TABLES = {0: 2, 1: 4, 8: 3}


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes from the form `input=1x3x224x224` (an empty right side is a scalar).

    Raises:
        PruneError: another form, a negative size, or an input named twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, dims = text.rpartition("=")
        if not equals or not name or not re.fullmatch(r"(\d+([x,]\d+)*)?", dims.strip()):
            raise PruneError(f"'{text}' is no shape; write input=1x3x224x224, one input each time")
        if name in shapes:
            raise PruneError(f"input '{name}' is given two shapes; give one")
        shapes[name] = tuple(int(d) for d in re.findall(r"\d+", dims))
    return shapes


def random_feeds(
    model: ModelSource,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    *,
    inputs: Sequence[ModelInput] | None = None,
) -> tuple[Feed, list[str]]:
    """Random inputs of the model's declared shapes, for timing it.

    Floats are drawn from N(0, 1). Integers are valid rows of the smallest embedding they index, where one can
    be traced, all ones where the name says mask, otherwise 0 or 1. Booleans are true, strings "a".

    Args:
        model: the model; its graph is read only if an integer input needs it.
        shapes: sizes of inputs with dynamic dims, by input name; a size given to a named dim holds for that
            name in every input.
        seed: of the random generator.
        inputs: the model's inputs if a session is at hand.

    Returns:
        One feed, and a note for every size that was assumed.

    Raises:
        PruneError: a shape is given for no such input, or contradicts the declared one.
    """
    inputs = tuple(inputs) if inputs is not None else open_session(model).inputs
    required = [value for value in inputs if value.required]
    sizes, notes = resolve_shapes(required, dict(shapes or {}))
    for value in required:
        check_size(value, sizes[value.name])
    rng = np.random.default_rng(seed)
    seeking = any(value.dtype.kind in "iu" for value in required)
    rows = _embedding_rows(model) if seeking else {}
    feed = {value.name: _random(value, sizes[value.name], rows.get(value.name), rng) for value in required}
    return feed, notes


def resolve_shapes(
    inputs: list[ModelInput], shapes: dict[str, Sequence[int]]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The shape each input is taken with: as given, as declared, else a sensible default, with a note for each default.

    Raises:
        PruneError: a shape is given for no input, or does not fit the declared one.
    """
    named: dict[str, int] = {}
    for name, given in shapes.items():
        value = next((v for v in inputs if v.name == name), None)
        if value is None:
            raise PruneError(f"a shape is given for '{name}', but the model's inputs are {_listed(inputs)}")
        fits = len(given) == len(value.shape) and all(
            not isinstance(d, int) or d == g for d, g in zip(value.shape, given, strict=True)
        )
        if value.shape and not fits:
            raise PruneError(f"the shape {'x'.join(map(str, given)) or '()'} does not fit {value}")
        for dim, size in zip(value.shape, given, strict=False):
            if isinstance(dim, str) and named.setdefault(dim, size) != size:
                raise PruneError(f"the shapes give dim '{dim}' two sizes, {named[dim]} and {size}")
    sizes: dict[str, tuple[int, ...]] = {}
    notes = []
    for value in inputs:
        if value.name in shapes:
            sizes[value.name] = tuple(int(d) for d in shapes[value.name])
            continue
        resolved = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                resolved.append(dim)
                continue
            known = dim is not None and dim in named
            size = named[dim] if dim is not None and known else _default_size(value, axis)
            if dim is not None:
                named[dim] = size
            resolved.append(size)
        sizes[value.name] = tuple(resolved)
        if any(not isinstance(dim, int) for dim in value.shape):
            shown = "x".join(map(str, resolved))
            notes.append(f"input {value} is taken as {shown}; set it with --shape {value.name}={shown}")
    return sizes, notes


def _default_size(value: ModelInput, axis: int) -> int:
    shape, dim, rank = value.shape, value.shape[axis], len(value.shape)
    if isinstance(dim, str):
        for pattern, size in _SIZES:
            if pattern.search(dim):
                return size
    if axis == 0:
        return 1
    if rank == 4:
        channels_last = shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)
        return 3 if axis == (3 if channels_last else 1) else 224
    return 128


def _random(value: ModelInput, shape: tuple[int, ...], rows: int | None, rng: np.random.Generator) -> Array:
    kind = value.dtype.kind
    if kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(value.dtype)
    if kind in "iu":
        if re.search(r"mask", value.name, re.I):
            return np.ones(shape, value.dtype)
        if re.fullmatch(r"sr|sample_?rate|sampling_?rate", value.name, re.I):
            return np.full(shape, 16000, value.dtype)
        high = min(rows if rows is not None else 2, int(np.iinfo(value.dtype).max))
        return np.asarray(rng.integers(0, max(high, 1), shape)).astype(value.dtype)
    return np.full(shape, True if kind == "b" else "a", value.dtype)


def _embedding_rows(model: ModelSource) -> dict[str, int]:
    """For each graph input that indexes tables: the rows of the smallest one."""
    graph = load(model).graph.graph
    found: dict[str, int] = {}
    for start in graph.inputs:
        queue, seen = [start], {start}
        rows = []
        while queue:
            for node, slot in queue.pop().uses():
                if node.op_type == "Gather" and slot == 1:
                    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                    rows.append(_size(node.inputs[0], axis))
                elif node.op_type in {"EmbedLayerNormalization", "QEmbedLayerNormalization"} and slot in _TABLES:
                    rows.append(_size(node.inputs[_TABLES[slot]], 0))
                elif node.op_type in _PASSES_VALUES and (slot == 0 or node.op_type == "Concat"):
                    fresh = [value for value in node.outputs if value not in seen]
                    seen.update(fresh)
                    queue.extend(fresh)
        known = [size for size in rows if size]
        if known and start.name is not None:
            found[start.name] = min(known)
    return found


def _size(table: ir.Value | None, axis: int) -> int | None:
    """The extent of a constant table along an axis, seen through casts and dequantisation."""
    while table is not None:
        producer = table.producer()
        constant = ir.convenience.get_const_tensor(table)
        if constant is not None:
            return constant.shape.numpy()[axis] if constant.shape.rank() else None
        if producer is None or producer.op_type not in _KEEPS_ROWS:
            return None
        table = producer.inputs[0]
    return None
