"""Files in and out: sources stay as they are, external data stays external, files grow by next to nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from model_files import HALF, LAYOUTS, many_small, net, places, run, stored, tree, typed, values, write_external
from nets import parse
from onnx import TensorProto, numpy_helper

import onnxprune
from onnxprune import PruneError, inspect, prune
from onnxprune.graph.model import load


@pytest.mark.parametrize("kept", ["inline", "typed", "external"])
def test_what_is_read_of_a_model_is_read_only(kept: str, tmp_path: Path) -> None:
    source: Path | onnx.ModelProto = typed(net()) if kept == "typed" else net()
    if kept == "external":
        source = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    model = load(source)
    read = [model.read(value.const_value) for value in model.graph.graph.initializers.values() if value.const_value]
    assert read
    assert not any(array.flags.writeable for array in read)


# ------------------------------------------------------------------ external data


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same folder", "another folder"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_external_data_is_pruned_as_inline_data_is(layout: str, elsewhere: bool, tmp_path: Path) -> None:
    model = net()
    source = write_external(model, tmp_path / "model.onnx", LAYOUTS[layout])
    before = tree(tmp_path)
    inline = prune(model, HALF)
    folder = tmp_path / "out" if elsewhere else tmp_path
    folder.mkdir(exist_ok=True)
    target = folder / "pruned.onnx"

    result = prune(source, HALF, target)

    assert result.path == target
    assert result.masks == inline.masks
    assert len(result.masks) == 5
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    expected = inline.to_proto()
    assert stored(onnx.load(target)) == stored(expected) == stored(result.to_proto())
    assert stored(expected) != stored(model)
    onnx.save(expected, tmp_path / "twin.onnx")
    assert run(target, model) == run(tmp_path / "twin.onnx", model)

    was, now = places(source), places(target)
    assert {name: place[1:] for name, place in now.items()} == {name: place[1:] for name, place in was.items()}
    made = {name for name, _, _ in now.values()}
    assert {str(Path(name).name) for name in after.keys() - before.keys()} == {*made, "pruned.onnx"}
    assert all(name.startswith("pruned.onnx.") and name.endswith("data") for name in made)
    assert len(made) == len({os.path.normpath(name) for name, _, _ in was.values()})
    for name, (file, offset, length) in now.items():  # whatever is no tensor's is carried along
        original = bytearray((tmp_path / was[name][0]).read_bytes())
        copy = bytearray((folder / file).read_bytes())
        for other, (its, start, size) in now.items():
            if its == file:
                assert os.path.normpath(was[other][0]) == os.path.normpath(was[name][0])
                original[start : start + size] = copy[start : start + size] = bytes(size)
        assert original == copy
        assert offset + length <= len(copy)


def test_the_data_survives_being_saved_by_others(tmp_path: Path) -> None:
    """onnx and onnx-ir write external data in their own layouts."""
    model = net()
    onnx.save_model(
        onnx.ModelProto.FromString(model.SerializeToString()),
        tmp_path / "a.onnx",
        save_as_external_data=True,
        location="a.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    ir.save(ir.from_proto(model), tmp_path / "b.onnx", external_data="b.bin", size_threshold_bytes=0)
    for name in "ab":
        result = prune(tmp_path / f"{name}.onnx", HALF, tmp_path / f"{name}-pruned.onnx")
        assert stored(onnx.load(result.path)) == stored(prune(model, HALF).to_proto())


def test_rerunning_onto_the_same_output_leaves_one_model(tmp_path: Path) -> None:
    model = net()
    source = write_external(model, tmp_path / "model.onnx", LAYOUTS["two files"])
    (tmp_path / "pruned.onnx.5.data").write_text("somebody else's")
    before = tree(tmp_path)
    for sparsity in (0.2, 0.5, 0.7, 0.9):
        result = prune(source, [{"sparsity": sparsity}], tmp_path / "pruned.onnx")
        assert stored(onnx.load(result.path)) == stored(prune(model, [{"sparsity": sparsity}]).to_proto())
        after = tree(tmp_path)
        assert {name: after[name] for name in before} == before
        files = {place[0] for place in places(result.path).values()}
        assert after.keys() - before.keys() == {"pruned.onnx", *files}
        assert len(files) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place(layout: str, tmp_path: Path) -> None:
    model = net()
    path = write_external(model, tmp_path / "model.onnx", LAYOUTS[layout])
    own = layout == "the exporter's name"
    before = tree(tmp_path)
    with pytest.raises(PruneError, match="is the input itself"):
        prune(path, HALF, path)
    assert tree(tmp_path) == before
    result = prune(path, HALF, path, force=True)
    expected = stored(prune(model, HALF).to_proto())
    assert stored(onnx.load(path)) == expected
    kept = {name for name in before if name != "model.onnx" and not own}
    assert tree(tmp_path).keys() == kept | {"model.onnx", *(place[0] for place in places(path).values())}
    # the result goes on working, although the data it was made from may be gone
    assert stored(result.to_proto()) == expected
    assert stored(onnx.load(result.save(tmp_path / "again.onnx"))) == expected


def test_the_source_keeps_its_data_whatever_the_output_is_called(tmp_path: Path) -> None:
    """A copy of a model file refers to the data of the first; pruning the one onto the other must not remove them."""
    path = write_external(net(), tmp_path / "model.onnx", LAYOUTS["the exporter's name"])
    copy = shutil.copy(path, tmp_path / "copy.onnx")
    data = (tmp_path / "model.onnx.data").read_bytes()
    prune(copy, HALF, path)
    assert (tmp_path / "model.onnx.data").read_bytes() == data
    assert stored(onnx.load(copy)) == stored(net())
    assert stored(onnx.load(path)) == stored(prune(net(), HALF).to_proto())


def test_the_output_is_never_the_data_of_the_input(tmp_path: Path) -> None:
    path = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    os.symlink("weights.bin", tmp_path / "link.onnx")
    before = tree(tmp_path)
    for name in ("weights.bin", "link.onnx"):
        with pytest.raises(PruneError, match=r"is the external data file of the input; choose another name"):
            prune(path, HALF, tmp_path / name, force=True)
    assert tree(tmp_path) == before


def test_a_target_cannot_name_files_to_remove(tmp_path: Path) -> None:
    """An existing target is a stranger's file: the data it claims to have are not ours to delete."""
    model = net()
    hostile = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor, place in zip(
        hostile.graph.initializer,
        ("pruned.onnx.data/../../keep.data", "../keep.data", "other.data", str(tmp_path / "keep.data")),
        strict=False,
    ):
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)
    folder = tmp_path / "sub"
    folder.mkdir()
    (tmp_path / "keep.data").write_text("keep")
    (folder / "other.data").write_text("keep")
    (folder / "pruned.onnx.data").mkdir()
    onnx.save(hostile, folder / "pruned.onnx")
    prune(model, HALF, folder / "pruned.onnx")
    assert (tmp_path / "keep.data").exists()
    assert (folder / "other.data").exists()


def two_names(same: bool) -> onnx.ModelProto:
    arrays = {"v": values(8, 8), "w": values(8, 8) if same else values(8, 8, seed=1)}
    return parse("(float[2, 8] x) => (float[2, 8] y) { a = MatMul(x, v) y = MatMul(a, w) }", **arrays)


@pytest.mark.parametrize(
    ("config", "grows"),
    [
        ([{"sparsity": 0.5}], 0),
        ([{"sparsity": 0.5}, {"op_names": "w", "exclude": True}], 256),
        ([{"sparsity": 0.5}, {"op_names": "w", "sparsity": 0.7}], 512),
    ],
    ids=["pruned alike", "one of them pruned", "pruned differently"],
)
def test_tensors_that_share_bytes_part_where_they_must(config: list[dict], grows: int, tmp_path: Path) -> None:
    model = two_names(same=True)
    path = write_external(model, tmp_path / "model.onnx", LAYOUTS["one file"])
    proto = onnx.load(path, load_external_data=False)
    first, second = (t.external_data for t in proto.graph.initializer)
    second[1].value = first[1].value
    path.write_bytes(proto.SerializeToString())
    before = tree(tmp_path)
    result = prune(path, config, tmp_path / "pruned.onnx")
    twin = prune(model, config)
    assert result.masks == twin.masks
    assert stored(onnx.load(result.path)) == stored(twin.to_proto()) == stored(result.to_proto())
    assert os.path.getsize(f"{result.path}.data") == os.path.getsize(tmp_path / "weights.bin") + grows
    assert {name: tree(tmp_path)[name] for name in before} == before


@pytest.mark.parametrize("spared", ["v", "w", "none"])
@pytest.mark.parametrize("starts", [(0, 32), (32, 0), (0, 0)], ids=str)
def test_tensors_that_overlap(starts: tuple[int, int], spared: str, tmp_path: Path) -> None:
    config = [*HALF, {"op_names": spared, "exclude": True}][: 1 if spared == "none" else 2]
    model = two_names(same=False)
    flat = values(96)
    flat.tofile(tmp_path / "d.bin")
    for tensor, start in zip(model.graph.initializer, starts, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(flat[start : start + 64].reshape(8, 8), tensor.name))
    twin = prune(model, config)
    for tensor, start in zip(model.graph.initializer, starts, strict=True):
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "d.bin"), ("offset", start * 4)):
            tensor.external_data.add(key=key, value=str(value))
    onnx.save(model, tmp_path / "model.onnx")
    result = prune(tmp_path / "model.onnx", config, tmp_path / "pruned.onnx")
    assert stored(onnx.load(result.path)) == stored(twin.to_proto())


def test_linked_data(tmp_path: Path) -> None:
    """Hard links as package managers make them, and a model cache's links, whose data lie beside the real model."""
    model = net()
    real = tmp_path / "blobs"
    real.mkdir()
    write_external(model, real / "0123", LAYOUTS["one file"])
    expected = stored(prune(model, HALF).to_proto())
    cache = tmp_path / "snapshot"
    cache.mkdir()
    os.symlink("../blobs/0123", cache / "model.onnx")
    os.symlink("../blobs/weights.bin", cache / "weights.bin")
    hard = tmp_path / "hard"
    hard.mkdir()
    os.link(real / "0123", hard / "model.onnx")
    os.link(real / "weights.bin", hard / "weights.bin")
    before = tree(real)
    for folder in (cache, hard):
        assert inspect(folder / "model.onnx").size > 0
        result = prune(folder / "model.onnx", HALF, folder / "pruned.onnx")
        assert stored(onnx.load(result.path)) == expected == stored(result.to_proto())
        assert not (folder / "pruned.onnx.data").is_symlink()
        prune(folder / "pruned.onnx", HALF, folder / "pruned.onnx", force=True)
    assert tree(real) == before


def test_data_that_goes_away_is_said(tmp_path: Path) -> None:
    path = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    result = prune(path, HALF)
    for change in (lambda: os.truncate(tmp_path / "weights.bin", 10), lambda: os.unlink(tmp_path / "weights.bin")):
        change()
        with pytest.raises(PruneError, match=r"can no longer be read.*load the model again"):
            result.to_proto()
    with pytest.raises(PruneError, match=r"can no longer be read.*load the model again"):
        result.save(tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["model.onnx"]


def test_an_onnx_ir_model_with_external_data(tmp_path: Path) -> None:
    model = net()
    path = write_external(model, tmp_path / "model.onnx", LAYOUTS["two files"])
    view = ir.load(path)
    before = tree(tmp_path)
    result = prune(view, HALF, tmp_path / "pruned.onnx")
    assert stored(onnx.load(result.path)) == stored(prune(model, HALF).to_proto())
    assert {name: tree(tmp_path)[name] for name in before} == before


def test_external_data_of_a_constant(tmp_path: Path) -> None:
    model = parse("(float[2, 4] x) => (float[2, 4] y) { k = Constant<value = float[1] {0}>() y = MatMul(x, k) }")
    model.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(values(4, 4), "k"))
    path = write_external(model, tmp_path / "model.onnx", LAYOUTS["one file"])
    twin = prune(model, HALF)
    for source in (path, ir.load(path)):
        result = prune(source, HALF, tmp_path / "pruned.onnx")
        assert result.masks == twin.masks
        assert stored(onnx.load(result.path)) == stored(twin.to_proto())


def test_external_data_in_a_function_body(tmp_path: Path) -> None:
    model = parse(
        """(float[2, 4] x) => (float[2, 4] y) { y = own.f(x) }
        <domain: "own", opset_import: ["": 21]>
        f (a) => (c) { k = Constant<value = float[1] {0}>() c = MatMul(a, k) }"""
    )
    tensor = model.functions[0].node[0].attribute[0].t
    tensor.CopyFrom(numpy_helper.from_array(values(4, 4), "k"))
    path = write_external(model, tmp_path / "model.onnx", LAYOUTS["one file"])
    twin = prune(model, HALF)
    result = prune(path, HALF, tmp_path / "pruned.onnx")
    assert result.masks == twin.masks
    assert stored(onnx.load(result.path)) == stored(twin.to_proto())


# ------------------------------------------------------------------ models in memory


def test_a_model_in_memory_is_not_changed(tmp_path: Path) -> None:
    for model in (net(), many_small()):
        before = model.SerializeToString(deterministic=True)
        result = prune(model, HALF, tmp_path / "a.onnx", sparse=True)
        result.save(tmp_path / "b.onnx")
        result.to_proto().graph.initializer[0].ClearField("raw_data")
        inspect(model)
        assert model.SerializeToString(deterministic=True) == before
        view = ir.from_proto(model)
        shown = ir.to_proto(view).SerializeToString(deterministic=True)
        assert prune(view, HALF, tmp_path / "c.onnx").masks == result.masks
        assert ir.to_proto(view).SerializeToString(deterministic=True) == shown
        assert stored(onnx.load(tmp_path / "b.onnx")) == stored(onnx.load(tmp_path / "c.onnx"))


def test_the_same_input_makes_the_same_bytes(tmp_path: Path) -> None:
    path = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    for folder in "ab":
        (tmp_path / folder).mkdir()
        prune(path, HALF, tmp_path / folder / "pruned.onnx")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


# ------------------------------------------------------------------ size and record


SIZES: dict[str, Callable[[], onnx.ModelProto]] = {
    "raw": net,
    "typed fields": lambda: typed(net()),
    "zeros in typed fields": lambda: typed(prune(net(), [{"sparsity": 0.95}]).to_proto()),
    "many small weights": many_small,
    "float16 zeros in int32_data": lambda: typed(
        parse(
            "(float16[1, 300] x) => (float16[1, 300] y) { y = MatMul(x, w) }",
            w=np.where(np.arange(90_000) % 50, 0, 1).reshape(300, 300).astype(np.float16),
        )
    ),
}


@pytest.mark.parametrize("sparse", [False, True], ids=["", "sparse"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", SIZES)
def test_the_file_grows_by_4_kilobytes_at_most(kind: str, sparsity: float, sparse: bool, tmp_path: Path) -> None:
    model = SIZES[kind]()
    onnx.save(model, tmp_path / "model.onnx")
    result = prune(tmp_path / "model.onnx", [{"sparsity": sparsity}], tmp_path / "out.onnx", sparse=sparse)
    assert len(result.masks) > 0
    assert os.path.getsize(tmp_path / "out.onnx") <= os.path.getsize(tmp_path / "model.onnx") + 4096
    onnx.save(result.to_proto(), tmp_path / "inline.onnx")
    assert run(tmp_path / "out.onnx", model) == run(tmp_path / "inline.onnx", model)
    if sparsity == 0:
        assert run(tmp_path / "out.onnx", model) == run(tmp_path / "model.onnx", model)


def test_typed_fields_are_pruned_as_raw_data_are() -> None:
    raw, fields = prune(net(), HALF), prune(typed(net()), HALF)
    assert raw.masks == fields.masks
    assert stored(raw.to_proto()) == stored(fields.to_proto())


def test_the_record(tmp_path: Path) -> None:
    model = net()
    model.metadata_props.add(key="author", value="someone")
    path: Path | onnx.ModelProto = model
    for sparsity in (0.3, 0.5):
        result = prune(path, [{"sparsity": sparsity, "op_types": "default"}], tmp_path / "out.onnx", force=True)
        path = tmp_path / "out.onnx"
        props = [(p.key, p.value) for p in onnx.load(path).metadata_props]
        assert [key for key, _ in props] == ["author", "onnxprune"]
        assert dict(props)["author"] == "someone"
        record = json.loads(dict(props)["onnxprune"])
        assert record["config_list"] == [{"sparsity": sparsity, "op_types": "default"}]
        assert record["pruner"] == "level"
        assert record["version"] == onnxprune.__version__
        assert record["zeros"] == result.report.zeros
        assert record["sparsity"] == pytest.approx(result.sparsity, abs=1e-6)
        assert record["weights"] == 5
    long = [{"sparsity": 0.5}, *({"sparsity": 0.5, "op_types": "default", "op_names": "*" * i} for i in range(1, 200))]
    prune(model, long, tmp_path / "long.onnx")
    (text,) = [p.value for p in onnx.load(tmp_path / "long.onnx").metadata_props if p.key == "onnxprune"]
    assert len(text) < 2048
    assert json.loads(text)["config_list"] == "200 entries"


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}))
def test_tensors_of_every_type_are_read(kind: int, raw: bool) -> None:
    """Of an odd number of elements, so that packed types do not fill their last byte."""
    if raw and kind == TensorProto.STRING:
        return
    tensor = TensorProto(name="w", data_type=kind, dims=[3, 3])
    if raw:
        tensor.raw_data = bytes(-(-9 * ir.DataType(kind).bitwidth // 8))
    else:
        entries = ["a"] * 9 if kind == TensorProto.STRING else [1] * 9
        tensor = onnx.helper.make_tensor("w", kind, [3, 3], entries)
    model = parse("(float[2] x) => (float[2] y) { y = Identity(x) }")
    model.graph.initializer.append(tensor)
    assert load(model).proto.graph.initializer[0] == tensor


# ------------------------------------------------------------------ above 2 GB

ROWS, COLUMNS = 2**20 + 2**17, 512  # of float32: 2.25 GB


def table(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["table", "i"], ["x"]))
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("i", TensorProto.INT64, [2]))
    return model


@pytest.mark.slow
def test_a_file_above_2_gigabytes(tmp_path: Path) -> None:
    small = values(COLUMNS, 30)
    model = table(parse(f"(float[2, {COLUMNS}] x) => (float[2, 30] y) {{ y = MatMul(x, w) }}"))
    size = ROWS * COLUMNS * 4
    with open(tmp_path / "weights.bin", "wb") as file:
        file.truncate(size)  # takes no room on disk
        file.seek(7 * COLUMNS * 4)
        row = values(COLUMNS, seed=1)
        file.write(row.tobytes())
        file.seek(size)
        file.write(small.tobytes())
    for name, shape, offset in (("table", (ROWS, COLUMNS), 0), ("w", small.shape, size)):
        tensor = model.graph.initializer.add(name=name, data_type=1, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "weights.bin"), ("offset", offset)):
            tensor.external_data.add(key=key, value=str(value))
    onnx.save(model, tmp_path / "model.onnx")
    assert [w.name for w in inspect(tmp_path / "model.onnx").weights] == ["table", "w"]
    result = prune(tmp_path / "model.onnx", HALF, tmp_path / "out.onnx")
    assert list(result.masks) == ["w"]
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"i": np.array([7, ROWS - 1])})
    np.testing.assert_allclose(output[0], row @ (small * result.masks["w"]), rtol=1e-3, atol=1e-2)
    assert not output[1].any()
    assert os.path.getsize(tmp_path / "out.onnx.data") == size + small.nbytes


@pytest.mark.slow
def test_a_model_in_memory_above_2_gigabytes(tmp_path: Path) -> None:
    small = values(COLUMNS, 30)
    model = table(parse(f"(float[2, {COLUMNS}] x) => (float[2, 30] y) {{ y = MatMul(x, w) }}", w=small))
    row = values(COLUMNS, seed=1)
    big = bytearray(ROWS * COLUMNS * 4)
    big[7 * row.nbytes : 8 * row.nbytes] = row.tobytes()
    tensor = model.graph.initializer.add(name="table", data_type=1, dims=(ROWS, COLUMNS))
    tensor.raw_data = bytes(big)
    del big
    result = prune(model, HALF, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["out.onnx", "out.onnx.data"]
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"i": np.array([7, ROWS - 1])})
    np.testing.assert_allclose(output[0], row @ (small * result.masks["w"]), rtol=1e-3, atol=1e-2)
    assert all(offset % 4096 == 0 for _, offset, _ in places(result.path).values())
    assert inspect(result.path).size == ROWS * COLUMNS + small.size
    again = prune(result.path, [{"sparsity": 0.7}], tmp_path / "again.onnx")
    assert again.report.zeros == int(small.size * 0.7)


def test_moving_tensors_out_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a limit of 3 KB in place of protobuf's 2 GB."""
    from onnxprune.graph import saving as module

    model = typed(net())
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.setattr(module, "PROTOBUF_LIMIT", 3000)
    monkeypatch.setattr(module, "PAGE", 128)
    result = prune(tmp_path / "model.onnx", HALF, tmp_path / "out.onnx")
    assert set(places(result.path)) == {"conv", "half"}
    assert all(place[1] % 128 == 0 for place in places(result.path).values())
    assert stored(onnx.load(result.path)) == stored(prune(net(), HALF).to_proto())
    assert model == typed(net())
    monkeypatch.setattr(module, "PROTOBUF_LIMIT", 100)
    with pytest.raises(PruneError, match="larger than 2 GB even without its tensors"):
        prune(tmp_path / "model.onnx", HALF, tmp_path / "other.onnx")
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "out.onnx", "out.onnx.data"]
