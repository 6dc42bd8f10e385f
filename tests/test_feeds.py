"""Data in every form that users have it, and random inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxprune.errors import PruneError
from onnxprune.runtime.feeds import (
    BATCH,
    Dataset,
    load_data,
    load_function,
    parse_shapes,
    random_feeds,
)
from onnxprune.runtime.session import ModelInput, open_session

X = (ModelInput("x", np.dtype(np.float32), ("N", 3)),)
TWO = (ModelInput("ids", np.dtype(np.int64), ("N", 2)), ModelInput("x", np.dtype(np.float32), ("N", 3)))


def rows(count: int, dtype: Any = np.float32) -> np.ndarray:
    return np.arange(count * 3).reshape(count, 3).astype(dtype)


def all_rows(data: Dataset, name: str = "x") -> np.ndarray:
    return np.concatenate([batch.feed[name][: batch.samples] for batch in data])


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')


@pytest.mark.parametrize("form", ["npz", "path", "mapping", "pairs", "generator", "labels key", "function"])
def test_every_form_gives_the_same_data(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = rows(5), np.array([0, 1, 2, 1, 0])
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    (tmp_path / "forms_of_data.py").write_text("def data():\n    return 'data.npz'\n")
    monkeypatch.chdir(tmp_path)
    pairs = [({"x": x[i : i + 1]}, labels[i : i + 1]) for i in range(5)]
    source: Any = {
        "npz": "data.npz",
        "path": tmp_path / "data.npz",
        "mapping": {"x": x, "labels": labels},
        "pairs": pairs,
        "generator": (pair for pair in pairs),
        "labels key": [{**feed, "labels": label} for feed, label in pairs],
        "function": "forms_of_data:data",
    }[form]
    data = load_data(source, X)
    assert data.samples == 5
    assert data.labelled
    for _ in range(2):  # a generator's feeds, too, are there a second time
        np.testing.assert_array_equal(all_rows(data), x)
        np.testing.assert_array_equal(np.concatenate([batch.labels for batch in data]), labels)
    assert load_data(data, X).samples == 5
    sys.modules.pop("forms_of_data", None)


@pytest.mark.parametrize(
    ("dim", "count", "sizes", "padded"),
    [
        ("N", 2 * BATCH + 1, [BATCH, BATCH, 1], False),
        (1, 3, [1, 1, 1], False),
        (4, 6, [4, 2], True),
        (4, 8, [4, 4], False),
    ],
)
def test_batches_follow_the_declared_batch(dim: int | str, count: int, sizes: list[int], padded: bool) -> None:
    data = load_data({"x": rows(count), "labels": np.zeros(count)}, (ModelInput("x", np.dtype(np.float32), (dim, 3)),))
    batches = list(data)
    assert [batch.samples for batch in batches] == sizes
    assert batches[-1].padded == padded
    if isinstance(dim, int):
        assert all(batch.feed["x"].shape == (dim, 3) for batch in batches)
    np.testing.assert_array_equal(all_rows(data), rows(count))


def test_feeds_run_as_given() -> None:
    data = load_data([{"x": rows(2)}, {"x": rows(70)}], X)
    assert [batch.samples for batch in data] == [2, 70]
    assert not data.labelled


def test_scalars_and_defaults_go_with_every_batch() -> None:
    inputs = (
        *X,
        ModelInput("rate", np.dtype(np.int64), ()),
        ModelInput("scale", np.dtype(np.float32), (2,), required=False),
    )
    data = load_data({"x": rows(BATCH + 1), "rate": 16000, "scale": np.ones(2)}, inputs)
    for batch in data:
        assert batch.feed["rate"] == 16000
        assert batch.feed["scale"].shape == (2,)
    assert len(next(iter(load_data({"x": rows(2), "rate": 1}, inputs))).feed) == 2  # the default is not required


def test_an_input_named_labels_is_no_label() -> None:
    inputs = (ModelInput("labels", np.dtype(np.float32), ("N", 3)),)
    assert not load_data({"labels": rows(2)}, inputs).labelled


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("uint8", "float32"),
        ("float64", "float32"),
        ("float64", "float16"),
        ("int64", "float32"),
        ("int64", "int32"),
        ("int64", "uint8"),
        ("bool", "float32"),
        ("bool", "int64"),
        ("<U3", "O"),
    ],
)
def test_casts_that_keep_the_values(source: str, target: str) -> None:
    array = np.array([[0, 1, 1]]).astype(source)
    [batch] = load_data({"x": array}, (ModelInput("x", np.dtype(target), ("N", 3)),))
    assert batch.feed["x"].dtype == np.dtype(target)
    np.testing.assert_array_equal(batch.feed["x"], array)


@pytest.mark.parametrize(
    ("array", "target", "message"),
    [
        (np.array([[0.5, 1, 2]]), "int64", r"expected 'x' int64\[N, 3\], given 'x' float64\[1, 3\]"),
        (np.array([[1, 2, 300]]), "uint8", "values from 1 to 300, which do not fit"),
        (np.array([[-1, 2, 3]]), "uint64", "values from -1 to 3, which do not fit"),
        (np.array([[1, 2, 2**24 + 1]]), "float32", "which do not fit"),
        (np.array([[1.0, 2, 1e5]]), "float16", "values from 1 to 100000, which do not fit"),
        (np.array([[1, 0, 1]]), "bool", r"expected 'x' bool\[N, 3\]"),
        (np.array([["a", "b", "c"]]), "float32", r"given 'x' string\[1, 3\]"),
        (np.array([[1, 2, 3]]), "O", r"expected 'x' string\[N, 3\], given 'x' int64"),
        (np.array([[1j, 2, 3]]), "float32", "given 'x' complex128"),
    ],
)
def test_casts_that_would_change_the_values(array: np.ndarray, target: str, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        load_data({"x": array}, (ModelInput("x", np.dtype(target), ("N", 3)),))


@pytest.mark.parametrize(
    ("source", "inputs", "message"),
    [
        ({"y": rows(2)}, X, r"expected 'x' float32\[N, 3\]; given 'y' float32\[2, 3\]"),
        ({"x": rows(2), "y": rows(2)}, X, "given 'x' .*'y'"),
        ({"x": rows(2)}, TWO, r"expected 'ids' int64\[N, 2\], 'x' float32\[N, 3\]; given 'x'"),
        ({}, X, "given nothing"),
        (
            {"x": np.zeros((2, 4))},
            X,
            r"expected 'x' float32\[N, 3\] \(the first axis counts samples\), given 'x' .*\[2, 4\]",
        ),
        ({"x": np.zeros(3)}, X, "expected 'x'"),
        ({"x": rows(2), "labels": np.zeros(3)}, X, "lengths differ: 'x' 2, 'labels' 3"),
        ({"x": rows(2), "labels": 1}, X, "labels is a scalar"),
        ({"x": rows(2), "ids": np.zeros((3, 2), int)}, TWO, "lengths differ: 'ids' 3, 'x' 2; .*iterable of feeds"),
        ({"x": rows(0)}, X, "no samples"),
        ({"x": 5}, (ModelInput("x", np.dtype(np.float32), ()),), "no input has a first axis"),
        ({"x": [[1, 2, 3], [1]]}, X, "'x' .list. does not convert to an array"),
        (
            {"x": rows(2), "h": rows(2)},
            (ModelInput("x", np.dtype(np.float32), (1, 3)), ModelInput("h", np.dtype(np.float32), (2, 3))),
            "no common batch size",
        ),
        ([], X, "holds no feeds"),
        ([rows(2)], X, r"feed 0 is a ndarray; a feed is a mapping .*'x' float32\[N, 3\]"),
        (
            [{"x": rows(1)}, {"x": np.zeros((1, 4))}],
            X,
            r"feed 1: expected 'x' float32\[N, 3\], given 'x' float64\[1, 4\]",
        ),
        ([{"x": rows(2)}], (ModelInput("x", np.dtype(np.float32), (1, 3)),), r"feed 0: expected 'x' float32\[1, 3\]"),
        ([({"x": rows(1)}, [1]), {"x": rows(1)}], X, "feed 1 has no labels"),
        (rows(2), X, "data is a ndarray; give an .npz file"),
        (3, X, "data is a int"),
        ("nowhere.npz", X, "no such file: 'nowhere.npz'"),
        ("no_such_module:f", X, "cannot load 'no_such_module:f': ModuleNotFoundError"),
        ("math:nothing", X, "cannot load 'math:nothing': AttributeError"),
        ("math:pi", X, "'math:pi' is a float, not a function"),
        ("math:sin", X, "'math:sin' raised TypeError"),
    ],
)
def test_data_that_do_not_fit(source: Any, inputs: tuple[ModelInput, ...], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        load_data(source, inputs)


def test_a_generator_that_fails() -> None:
    def feeds() -> Any:
        yield {"x": rows(1)}
        raise KeyError("lost")

    with pytest.raises(PruneError, match="the data raised KeyError while being read: 'lost'"):
        load_data(feeds(), X)


def test_files_that_are_no_data(tmp_path: Path) -> None:
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    with pytest.raises(PruneError, match=r"no readable \.npz file"):
        load_data(text, X)
    np.savez(tmp_path / "whole.npz", x=rows(100))
    cut = tmp_path / "cut.npz"
    cut.write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    with pytest.raises(PruneError, match=r"no readable \.npz file"):
        load_data(cut, X)
    np.save(tmp_path / "one.npy", rows(2))
    with pytest.raises(PruneError, match=r"np.savez\(path, input_name=array\)"):
        load_data(tmp_path / "one.npy", X)
    np.savez(tmp_path / "objects.npz", x=np.array([[1, "a", None]], dtype=object))
    with pytest.raises(PruneError, match="without object arrays"):
        load_data(tmp_path / "objects.npz", X)
    with pytest.raises(PruneError, match="cannot read"):
        load_data(tmp_path, X)


def test_functions_come_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_only.py").write_text(
        "class Data:\n    @staticmethod\n    def again():\n        return 'here_only:Data.again'\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_function("here_only:Data.again")() == "here_only:Data.again"
    assert sys.path == before
    with pytest.raises(PruneError, match="must return data"):
        load_data("here_only:Data.again", X)
    sys.modules.pop("here_only")


def test_parse_shapes() -> None:
    assert parse_shapes(["x=1x3x224x224", "a=b=2,5", "s="]) == {"x": (1, 3, 224, 224), "a=b": (2, 5), "s": ()}


@pytest.mark.parametrize("text", ["x", "=1x2", "x=1x-2", "x=1xN", "x=1.5", "x=1xx2"])
def test_parse_shapes_refuses(text: str) -> None:
    with pytest.raises(PruneError, match=f"'{text}' is no shape; write input=1x3x224x224"):
        parse_shapes([text])


def test_parse_shapes_refuses_two_for_one() -> None:
    with pytest.raises(PruneError, match="'x' is given two shapes"):
        parse_shapes(["x=1", "x=2"])


IMAGE = "g (float[batch, 3, height, width] x) => (float[batch, 3, height, width] y) { y = Identity(x) }"
PLAIN = "g (float[2, 3] x) => (float[2, 3] y) { y = Identity(x) }"
UNNAMED = (
    "g (float[?, ?, ?, 3] x, float[?, ?] z) => (float[?, ?, ?, 3] y, float[?, ?] w) { y = Identity(x) w = Identity(z) }"
)
MIXED = """g (bool[2] b, string[2] s, int64[2, seq] input_mask, uint8[40] u, int64 sr)
    => (bool[2] b1, string[2] s1, int64[2, seq] m1, uint8[40] u1, int64 r1)
    { b1 = Identity(b) s1 = Identity(s) m1 = Identity(input_mask) u1 = Identity(u) r1 = Identity(sr) }"""
TEXT = """g (int64[batch, seq] ids, int32[batch, seq] kinds) => (float[batch, seq, 2] y)
    <float[5, 2] small = {0,1,2,3,4,5,6,7,8,9}, float[6, 2] large = {0,1,2,3,4,5,6,7,8,9,10,11},
     int8[3, 2] table = {0,1,2,3,4,5}, float scale = {0.5}>
    {
        floats = DequantizeLinear(table, scale)
        wide = Cast<to = 7>(kinds)
        few = Gather(small, ids)
        many = Gather(large, ids)
        words = Add(few, many)
        types = Gather<axis = 0>(floats, wide)
        y = Add(words, types)
    }"""


def test_random_feeds_have_the_declared_shapes() -> None:
    feed, notes = random_feeds(parse(PLAIN), seed=1)
    assert feed["x"].shape == (2, 3)
    assert feed["x"].dtype == np.float32
    assert notes == []
    np.testing.assert_array_equal(feed["x"], random_feeds(parse(PLAIN), seed=1)[0]["x"])
    assert not np.array_equal(feed["x"], random_feeds(parse(PLAIN), seed=2)[0]["x"])


def test_random_feeds_say_what_they_assume() -> None:
    feed, notes = random_feeds(parse(IMAGE))
    assert feed["x"].shape == (1, 3, 224, 224)
    assert notes == [
        "input 'x' float32[batch, 3, height, width] is taken as 1x3x224x224; set it with --shape x=1x3x224x224"
    ]
    feed, notes = random_feeds(parse(UNNAMED))
    assert {name: array.shape for name, array in feed.items()} == {"x": (1, 224, 224, 3), "z": (1, 128)}
    assert len(notes) == 2


def test_an_assumed_size_holds_for_its_name_in_every_input() -> None:
    feed, _ = random_feeds(parse("g (float[2, q] x, float[q, 3] w) => (float[2, 3] y) { y = MatMul(x, w) }"))
    assert (feed["x"].shape, feed["w"].shape) == ((2, 128), (128, 3))


def test_a_given_size_holds_for_its_name_in_every_input() -> None:
    feed, notes = random_feeds(parse(TEXT), {"ids": (2, 7)})
    assert feed["kinds"].shape == (2, 7)
    assert [note[:13] for note in notes] == ["input 'kinds'"]


def test_random_integers_are_rows_of_the_tables_they_index() -> None:
    feed, _ = random_feeds(parse(TEXT), {"ids": (8, 50)})
    assert set(np.unique(feed["ids"])) == {0, 1, 2, 3, 4}
    assert set(np.unique(feed["kinds"])) == {0, 1, 2}
    assert open_session(parse(TEXT)).run(feed)[0].shape == (8, 50, 2)


def test_random_inputs_of_other_types() -> None:
    feed, _ = random_feeds(parse(MIXED))
    assert feed["b"].all()
    assert list(feed["s"]) == ["a", "a"]
    assert (feed["input_mask"] == 1).all()
    assert feed["input_mask"].shape == (2, 128)
    assert set(np.unique(feed["u"])) == {0, 1}
    assert feed["sr"] == 16000
    assert len(open_session(parse(MIXED)).run(feed)) == 5


@pytest.mark.parametrize(
    ("text", "shapes", "message"),
    [
        (IMAGE, {"z": (1,)}, "a shape is given for 'z', but the model's inputs are 'x'"),
        (IMAGE, {"x": (1, 3, 8)}, r"the shape 1x3x8 does not fit 'x' float32\[batch, 3, height, width\]"),
        (IMAGE, {"x": (1, 4, 8, 8)}, "the shape 1x4x8x8 does not fit"),
        (TEXT, {"ids": (2, 7), "kinds": (2, 8)}, "give dim 'seq' two sizes, 7 and 8"),
    ],
)
def test_shapes_that_do_not_fit(text: str, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        random_feeds(parse(text), shapes)
