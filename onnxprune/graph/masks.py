"""Masks: which entries of which weights are kept. In memory and on disk they take one bit an entry."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from onnxprune.errors import PruneError


class Masks(Mapping[str, np.ndarray]):
    """Weight name -> boolean array of the stored shape; True is kept, False is pruned. Immutable."""

    def __init__(self, masks: Mapping[str, np.ndarray] | None = None) -> None:
        if isinstance(masks, Masks):
            self._bits = dict(masks._bits)
        else:
            self._bits = {name: (np.packbits(mask), mask.shape) for name, mask in (masks or {}).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """The mask of a weight, unpacked into a fresh array."""
        bits, shape = self._bits[name]
        return np.unpackbits(bits, count=int(np.prod(shape, dtype=np.int64))).view(np.bool_).reshape(shape)

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
            shape == other._bits[name][1] and np.array_equal(bits, other._bits[name][0])
            for name, (bits, shape) in self._bits.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz: for each weight its packed bits (uint8) and its shape (int64)."""
        arrays: dict[str, np.ndarray] = {}
        for index, (name, (bits, shape)) in enumerate(self._bits.items()):
            arrays[f"{index}.name"] = np.array(name)
            arrays[f"{index}.shape"] = np.array(shape, np.int64)
            arrays[f"{index}.bits"] = bits
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PruneError(f"cannot write masks to '{target}': {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote.

        Raises:
            PruneError: the file is missing, or holds no masks.
        """
        masks = cls()
        try:
            with np.load(path, allow_pickle=False) as data:
                for index in range(len(data.files) // 3):
                    shape = tuple(int(d) for d in data[f"{index}.shape"])
                    bits = data[f"{index}.bits"]
                    if min(shape, default=0) < 0 or bits.dtype != np.uint8 or bits.shape != (-(-int(np.prod(shape, dtype=object)) // 8),):
                        raise ValueError(f"mask {index} has {bits.shape} bytes of bits for the shape {shape}")
                    masks._bits[str(data[f"{index}.name"])] = (bits, shape)
        except FileNotFoundError:
            raise PruneError(f"no such file: '{path}'; masks are written by Masks.save") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise PruneError(f"'{path}' holds no masks written by onnxprune: {error}") from error
        return masks
