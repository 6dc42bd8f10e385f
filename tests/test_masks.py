"""Masks in memory and in files."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from onnxprune import Masks, PruneError

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 0, 3), (4, 3, 3, 3), (1, 1, 1, 1, 1), (1000, 13)]


def masks(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.random(shape) < 0.5 for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_comes_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    given = masks(shape)
    packed = Masks(given)
    packed.save(tmp_path / "m.npz")
    for back in (packed, Masks.load(tmp_path / "m.npz")):
        assert back["w0"].dtype == np.bool_
        assert back["w0"].shape == shape
        assert np.array_equal(back["w0"], given["w0"])


def test_many_masks_keep_names_order_and_bits(tmp_path: Path) -> None:
    names = ["b", "a", "häßlich/名.weight", "with space\n", "nul\0", "", "a/b.npy", "x" * 2000]
    given = {name: mask for name, mask in zip(names, masks(*SHAPES[:8]).values(), strict=True)}
    Masks(given).save(tmp_path / "m.npz")
    back = Masks.load(tmp_path / "m.npz")
    assert list(back) == names
    assert back == Masks(given)
    assert dict(back).keys() == given.keys()


def test_no_masks_at_all(tmp_path: Path) -> None:
    Masks().save(tmp_path / "m.npz")
    assert len(Masks.load(tmp_path / "m.npz")) == 0


def test_they_are_equal_when_names_shapes_and_bits_are() -> None:
    one = Masks(masks((3, 5)))
    assert one == Masks(one) == Masks(dict(one))
    assert one != Masks(masks((5, 3)))
    assert one != Masks({"other": one["w0"]})
    assert one != Masks({"w0": ~one["w0"]})
    assert one != {"w0": one["w0"]}


def test_a_mask_handed_out_is_a_copy() -> None:
    given = masks((3, 5))
    packed = Masks(given)
    packed["w0"][:] = False
    given["w0"][:] = False
    assert np.array_equal(packed["w0"], masks((3, 5))["w0"])


def test_strided_and_integer_masks() -> None:
    base = masks((6, 8))["w0"]
    assert np.array_equal(Masks({"w": base.T[::2]})["w"], base.T[::2])
    assert np.array_equal(Masks({"w": base.astype(np.uint8) * 3})["w"], base)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5])
def test_a_bit_an_entry(kept: float, tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((512, 1024)) < kept
    packed = Masks({"w": mask})
    packed.save(tmp_path / "m.npz")
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        assert sum(member.file_size for member in archive.infolist()) <= mask.size // 8 + 512
    assert (tmp_path / "m.npz").stat().st_size <= mask.size // 8 + 1024


def test_the_same_masks_make_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        Masks(masks(*SHAPES)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_they_are_saved_under_the_very_name_given(tmp_path: Path) -> None:
    Masks(masks((3,))).save(tmp_path / "no-extension")
    assert os.listdir(tmp_path) == ["no-extension"]


# ------------------------------------------------------------------ failures leave what was there

FULL = """
import resource, sys
import numpy as np
from onnxprune import Masks, PruneError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Masks({"w": np.random.default_rng(0).random(10**6) < 0.5}).save(sys.argv[1])
except PruneError as error:
    print(error)
"""


def test_no_room_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "m.npz"
    Masks(masks((3, 5))).save(target)
    before = target.read_bytes()
    told = subprocess.run([sys.executable, "-c", FULL, target], capture_output=True, text=True, check=True)
    assert f"cannot write '{target}'" in told.stdout
    assert "Nothing was changed" in told.stdout
    assert os.listdir(tmp_path) == ["m.npz"]
    assert target.read_bytes() == before


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.npz"
    Masks(masks((3, 5))).save(target)
    before = target.read_bytes()

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Masks(masks((9,))).save(target)
    assert os.listdir(tmp_path) == ["m.npz"]
    assert target.read_bytes() == before


def test_a_missing_folder_or_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=r"folder .*none' does not exist; create it first"):
        Masks().save(tmp_path / "none" / "m.npz")
    with pytest.raises(PruneError, match="give the name of a file"):
        Masks().save(tmp_path)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ files that were never written by save


class Loud:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pickle-was-here",)


def npy(array: np.ndarray, pickled: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()


def header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def index(*entries: object) -> bytes:
    return npy(np.frombuffer(json.dumps(list(entries)).encode(), np.uint8))


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(f"{name}.npy", content)
    return file.getvalue()


BITS = npy(np.array([255], np.uint8))

HOSTILE = {
    "empty": b"",
    "text": b"not a zip at all",
    "a plain array": BITS,
    "a pickle": pickle.dumps(Loud()),
    "nothing inside": archive(),
    "other arrays": archive(x=BITS),
    "an array more": archive(index=index(["w", [8]]), bits=BITS, more=BITS),
    "a pickle inside": archive(index=index(["w", [8]]), bits=npy(np.array([Loud()], object), pickled=True)),
    "a pickle as index": archive(index=npy(np.array([Loud()], object), pickled=True), bits=BITS),
    "too few bits": archive(index=index(["w", [9]]), bits=BITS),
    "too many bits": archive(index=index(["w", [8]]), bits=npy(np.zeros(2, np.uint8))),
    "bits of another type": archive(index=index(["w", [8]]), bits=npy(np.array([1.0]))),
    "bits of another rank": archive(index=index(["w", [8]]), bits=npy(np.zeros((1, 1), np.uint8))),
    "a negative size": archive(index=index(["w", [-8]]), bits=BITS),
    "two negative sizes": archive(index=index(["w", [-4, -2]]), bits=BITS),
    "a fractional size": archive(index=index(["w", [8.0]]), bits=BITS),
    "a size that is true": archive(index=index(["w", [8, True]]), bits=BITS),
    "sizes beyond any array": archive(index=index(["w", [10**18, 10**18, 0]]), bits=npy(np.zeros(0, np.uint8))),
    "a size beyond any array": archive(index=index(["w", [10**30]]), bits=BITS),
    "too many axes": archive(index=index(["w", [1] * 100 + [8]]), bits=BITS),
    "a name that is none": archive(index=index([1, [8]]), bits=BITS),
    "a name twice": archive(index=index(["w", [4]], ["w", [4]]), bits=npy(np.zeros(2, np.uint8))),
    "an index of another form": archive(index=index(1, 2), bits=BITS),
    "an index too deep": archive(index=npy(np.frombuffer(b"[" * 100_000, np.uint8)), bits=BITS),
    "an index that is no JSON": archive(index=npy(np.frombuffer(b"\xff{", np.uint8)), bits=BITS),
    "a terabyte declared": archive(index=index(["w", [2**43]]), bits=header("(1099511627776,)")),
    "an exabyte declared": archive(index=index(["w", [8]]), bits=header("(2**60,)") + header("(1152921504606846976,)")),
    "a header that nests": archive(index=index(["w", [8]]), bits=header("(" * 4000 + ")" * 4000)),
    "a header that calls": archive(index=index(["w", [8]]), bits=header("__import__('os').mkdir('pickle-was-here')")),
    "objects declared": archive(index=index(["w", [8]]), bits=header("(1,)", "'|O'") + pickle.dumps([Loud()])),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_of_another_kind_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.npz").write_bytes(HOSTILE[kind])
    with pytest.raises(PruneError, match=r"'m\.npz' holds no masks written by onnxprune"):
        Masks.load("m.npz")
    assert os.listdir() == ["m.npz"]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    Masks(masks(*SHAPES)).save(whole)
    content = whole.read_bytes()
    part = tmp_path / "part.npz"
    for length in range(0, len(content), 13):
        part.write_bytes(content[:length])
        with pytest.raises(PruneError, match="holds no masks"):
            Masks.load(part)


def test_a_damaged_file_is_refused_or_read_right(tmp_path: Path) -> None:
    given = Masks(masks(*SHAPES))
    given.save(tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    part = tmp_path / "part.npz"
    refused = 0
    for place in range(0, len(content), 5):
        part.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            assert Masks.load(part) == given
        except PruneError:
            refused += 1
    assert refused > len(content) // 5 // 2


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("index.npy", index(["w", [2**34]]))
        with out.open("bits.npy", "w") as member:
            member.write(header("(2147483648,)"))
            for _ in range(32):
                member.write(bytes(2**20))
    raw = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x01\x02", 24),):  # the directory now says 2 GB
        at = raw.rindex(signature)
        raw[at + place : at + place + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(PruneError, match="holds no masks"):
        Masks.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(PruneError, match=r"no such file: .*; masks are written by Masks\.save"):
            Masks.load(path)
