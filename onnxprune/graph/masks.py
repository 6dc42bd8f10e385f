"""Masks: which entries of which weights are kept. In memory and on disk they take one bit an entry.

Those of large models are worked out again whenever they are looked at, and take no memory at all.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from onnxprune.errors import PruneError
from onnxprune.graph import files, saving

LIMIT = 2**30
"""Bytes of one array in a mask file: bits for 8.6 billion entries. A file that declares more is refused unread."""

Make = Callable[[], np.ndarray]
"""Works out a mask."""

_MEMBERS = ["index.npy", "bits.npy"]


class Masks(Mapping[str, np.ndarray]):
    """Weight name -> boolean array of the stored shape; True is kept, False is pruned. Immutable."""

    def __init__(self, masks: Mapping[str, np.ndarray] | None = None) -> None:
        """Pack masks; they are copied."""
        self._bits: dict[str, tuple[np.ndarray | Make, tuple[int, ...]]]
        if isinstance(masks, Masks):
            self._bits = dict(masks._bits)
        else:
            arrays = ((name, np.asarray(mask, np.bool_)) for name, mask in (masks or {}).items())
            self._bits = {name: (np.packbits(mask), mask.shape) for name, mask in arrays}

    @classmethod
    def made(cls, makers: Mapping[str, tuple[Make, tuple[int, ...]]]) -> Masks:
        """Masks that are worked out whenever they are looked at: for each weight how, and its stored shape."""
        masks = cls()
        masks._bits = dict(makers)
        return masks

    def packed(self) -> Masks:
        """The same masks, each in memory."""
        masks = Masks()
        masks._bits = {name: (self._packed(name), shape) for name, (_, shape) in self._bits.items()}
        return masks

    def __or__(self, other: Masks) -> Masks:
        """These masks and others; of one name, the others count."""
        masks = Masks()
        masks._bits = {**self._bits, **other._bits}
        return masks

    def __getitem__(self, name: str) -> np.ndarray:
        """The mask of a weight, a fresh array.

        Raises:
            PruneError: it has to be worked out from a model file that is not what it was.
        """
        bits, shape = self._bits[name]
        if not isinstance(bits, np.ndarray):
            return bits()
        return np.unpackbits(bits, count=math.prod(shape)).view(np.bool_).reshape(shape)

    def _packed(self, name: str) -> np.ndarray:
        bits, _ = self._bits[name]
        return bits if isinstance(bits, np.ndarray) else np.packbits(bits())

    def __iter__(self) -> Iterator[str]:
        """Weight names, in the order given."""
        return iter(self._bits)

    def __len__(self) -> int:
        """Number of weights."""
        return len(self._bits)

    def __repr__(self) -> str:
        """Names and shapes."""
        return f"Masks({', '.join(f'{name}{list(shape)}' for name, (_, shape) in self._bits.items())})"

    def __eq__(self, other: object) -> bool:
        """Same names, shapes and bits."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self._bits.keys() == other._bits.keys() and all(
            shape == other._bits[name][1] and np.array_equal(self._packed(name), other._packed(name))
            for name, (_, shape) in self._bits.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz of two uint8 arrays: `index`, a JSON list of [name, shape], and `bits`, each mask's in turn.

        Raises:
            PruneError: the file cannot be written; what stood there is untouched.
        """
        target = files.resolve(Path(path))
        if target.is_dir():
            raise PruneError(f"cannot write masks to '{target}', a folder; give the name of a file in it")
        index = json.dumps([[name, list(shape)] for name, (_, shape) in self._bits.items()])
        bits = np.concatenate([np.empty(0, np.uint8), *(self._packed(name) for name in self._bits)])
        with saving.replacing(target) as draft, open(draft, "wb") as file:  # given a name, numpy would append .npz
            np.savez_compressed(file, index=np.frombuffer(index.encode(), np.uint8), bits=bits)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote.

        Raises:
            PruneError: the file is missing, or holds no masks.
        """
        if not Path(path).is_file():
            raise PruneError(f"no such file: '{path}'; masks are written by Masks.save")
        masks = cls()
        try:
            with zipfile.ZipFile(path) as archive:
                sizes = {member.filename: member.file_size for member in archive.infolist()}
            if sorted(sizes) != sorted(_MEMBERS) or max(sizes.values()) > LIMIT:
                raise ValueError(f"it holds {str(sizes)[:200]}")
            with np.load(path, allow_pickle=False) as data:
                index, bits = data["index"], data["bits"]
            if bits.dtype != np.uint8 or bits.ndim != 1:
                raise ValueError(f"its bits are {bits.dtype.name}{list(bits.shape)}")
            start = 0
            for name, shape in json.loads(index.tobytes()):
                end = start + _packed(name, shape)
                if name in masks._bits or end > bits.size:
                    raise ValueError(f"mask '{name}' of shape {shape} is given twice or lacks bits")
                masks._bits[name] = (bits[start:end], tuple(shape))
                start = end
            if start != bits.size:
                raise ValueError(f"it has {bits.size} bytes of bits for masks that need {start}")
        except Exception as error:  # a hostile file makes zipfile, numpy and json raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise PruneError(f"'{path}' holds no masks written by onnxprune ({reason}); save them again") from error
        return masks


def _packed(name: object, shape: object) -> int:
    """Bytes of a mask's bits, after looking at what a file says of it."""
    if not isinstance(name, str) or not isinstance(shape, list) or any(type(d) is not int or d < 0 for d in shape):
        raise ValueError(f"{str(name)[:100]!r}: {str(shape)[:100]} is no name and shape")
    np.broadcast_to(np.bool_(False), shape)  # refuses a shape that no array can have
    return -(-math.prod(shape) // 8)
