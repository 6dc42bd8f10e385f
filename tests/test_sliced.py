"""Tensors cut out of files: what is read is what cutting the arrays gives, wherever reading begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.algorithms.cuts import Cut, Zeroing
from onnxprune.errors import PruneError
from onnxprune.graph import sliced
from onnxprune.graph.sliced import Slice, Sliced
from onnxprune.graph.stored import Extent, File
from onnxprune.graph.values import Values
from onnxprune.structure.cutting import keep
from onnxprune.structure.shrink import Blanked, Lines

SHAPES = [(), (7,), (1, 40), (40, 1), (12, 30), (6, 5, 3, 3), (1, 2, 9, 16), (3, 0, 4), (64, 64)]
DTYPES = [np.float32, np.float16, np.int8, np.float64]


def alive(shape: tuple[int, ...], seed: int, share: float) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.random(size) < share for size in shape)


@pytest.fixture(params=[1 << 20, 97, 16], ids=["large chunks", "odd chunks", "tiny chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sliced, "CHUNK", request.param)
    return int(request.param)


def stored(path: Path, arrays: list[np.ndarray]) -> list[Extent]:
    """The arrays in a file, seven bytes between them."""
    content, places = b"", []
    for array in arrays:
        content += b"-" * 7
        places.append((len(content), array.nbytes))
        content += array.tobytes()
    path.write_bytes(content)
    return [Extent(File.of(str(path)), *place) for place in places]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, 1.0])
def test_what_is_read_is_what_cutting_gives(chunk: int, share: float, tmp_path: Path) -> None:
    arrays = [
        np.random.default_rng(i).integers(-99, 99, shape).astype(dtype)
        for i, (shape, dtype) in enumerate((shape, dtype) for shape in SHAPES for dtype in DTYPES)
    ]
    extents = stored(tmp_path / "data", arrays)
    stays = [alive(array.shape, i, share) for i, array in enumerate(arrays)]
    parts: list[Slice | Extent] = [Slice(e, a.dtype, s) for e, a, s in zip(extents, arrays, stays, strict=True)]
    wanted = [keep(array, list(s)).tobytes() for array, s in zip(arrays, stays, strict=True)]
    parts[3], wanted[3] = extents[3], arrays[3].tobytes()  # one stays as it is
    file = Sliced("data", parts)
    content = bytearray(file.size)
    for offset, part in zip(file.offsets, wanted, strict=True):
        assert content[offset : offset + len(part)] == bytes(len(part))  # nothing overlaps
        content[offset : offset + len(part)] = part
    assert file.read(0, file.size + 10) == content
    with file.open() as opened:
        assert opened.read() == content
    rng = np.random.default_rng(1)
    for start, stop in np.sort(rng.integers(0, file.size + 2, (100, 2))).tolist():
        assert file.read(start, stop - start) == content[start:stop]
    for part, offset, bytes_ in zip(parts, file.offsets, wanted, strict=True):
        assert Extent(file, offset, part.length).array().tobytes() == bytes_


@pytest.mark.parametrize("shape", [(12, 30), (6, 5, 3, 3)])
def test_changes_come_before_the_cut(chunk: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (extent,) = stored(tmp_path / "data", [array])
    stays, other = alive(shape, 1, 0.6), Lines(alive(shape, 2, 0.6))
    size = np.sort(np.abs(array), axis=None)[array.size // 2]
    values = Values(shape, tuple(range(len(shape))), array.dtype, extent)
    cut = Cut(array.dtype, int(size.view(np.uint32)), array.size, array.size // 2 + 1, 0)
    for change, changed in (
        (Blanked(other), np.where(other.mask(), array, np.float32(0))),
        (Zeroing(cut, values), np.where(np.abs(array) > size, array, np.float32(0))),
    ):
        assert np.array_equal(change(array), changed)
        part = Slice(extent, array.dtype, stays, change)
        assert Sliced("data", [part]).read(0, part.length) == keep(changed, list(stays)).tobytes()


@pytest.mark.parametrize("shape", [(7,), (12, 30), (6, 5, 3, 3), (1, 2, 9, 16)])
def test_lines_are_flat_as_their_mask_is(shape: tuple[int, ...]) -> None:
    for seed, share in enumerate((0.0, 0.5, 0.9, 1.0)):
        for whole in range(len(shape) + 1):  # the last axes lose nothing
            stays = alive(shape[:whole], seed, share) + alive(shape[whole:], seed, 1.0)
            lines = Lines(stays)
            mask = np.ones(shape, np.bool_)
            for axis, line in enumerate(stays):
                mask &= line.reshape([-1 if i == axis else 1 for i in range(len(shape))])
            assert np.array_equal(lines.mask(), mask)
            for start, stop in [(0, mask.size), (3, 4), (5, mask.size - 1), (0, 0)]:
                assert np.array_equal(lines.flat(start, stop), mask.reshape(-1)[start:stop])


def test_a_file_that_was_written_to_is_told(tmp_path: Path) -> None:
    array = np.arange(100, dtype=np.float32)
    (extent,) = stored(tmp_path / "data", [array])
    part = Slice(extent, array.dtype, alive((100,), 0, 0.5))
    (tmp_path / "data").write_bytes(bytes(10))
    with pytest.raises(PruneError, match="has changed since it was loaded"):
        Sliced("data", [part]).read(0, 10)
