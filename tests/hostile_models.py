"""Models that somebody made to do harm: each a function that writes model.onnx, and what it needs, into a folder.

Beside the folder lies another one, `outside`, with a file `secret.bin` that no run may open.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from bad_input import net
from nets import parse, pi
from onnx import TensorProto, helper, numpy_helper

Make = Callable[[Path], object]

BOMB = 2**30


def write(folder: Path, model: onnx.ModelProto) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString())


# ------------------------------------------------------------------ external data


def external(location: str, size: int | None = 48, **entries: object) -> Make:
    """A model whose weight lies elsewhere; of the given size, where that is a file in the folder."""

    def make(folder: Path) -> None:
        model = net()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        spelt = location.format(outside=folder.parent / "outside")
        for key, value in {"location": spelt, **entries}.items():
            tensor.external_data.add(key=key, value=str(value))
        write(folder, model)
        if size is not None:
            (folder / spelt).write_bytes(bytes(size))

    return make


def linked(target: str) -> Make:
    """A model whose weight lies in what is a link."""

    def make(folder: Path) -> None:
        external("w.bin", None)(folder)
        os.symlink(target.format(outside=folder.parent / "outside"), folder / "w.bin")

    return make


def through_a_folder(folder: Path) -> None:
    os.symlink(folder.parent / "outside", folder / "sub")
    external("sub/secret.bin", None)(folder)


def pipe(folder: Path) -> None:
    external("w.bin", None)(folder)
    os.mkfifo(folder / "w.bin")


def in_a_constant(folder: Path) -> None:
    """The tensor of a Constant node in a branch lies outside."""
    external("{outside}/secret.bin", None)(folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = model.graph.initializer.pop()
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=tensor)],
        "b",
        [],
        [helper.make_tensor_value_info("k", 1, [4, 3])],
    )
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    model.graph.node.insert(0, helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))
    write(folder, model)


def sparse_outside(folder: Path) -> None:
    external("{outside}/secret.bin", None)(folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = model.graph.initializer.pop()
    item = model.graph.sparse_initializer.add(dims=[4, 3])
    item.values.CopyFrom(tensor)
    item.values.dims[:] = [12]
    item.indices.CopyFrom(numpy_helper.from_array(np.arange(12)))
    write(folder, model)


# ------------------------------------------------------------------ shapes


def tensor(**fields: object) -> Make:
    """The weight is a tensor of these fields."""

    def make(folder: Path) -> None:
        model = net()
        model.graph.initializer[0].CopyFrom(TensorProto(name="w", **fields))
        write(folder, model)

    return make


def sparse(dims: list[int], indices: np.ndarray) -> Make:
    """The weight is a sparse tensor."""

    def make(folder: Path) -> None:
        model = net()
        del model.graph.initializer[:]
        item = model.graph.sparse_initializer.add(dims=dims)
        item.values.CopyFrom(numpy_helper.from_array(np.ones(len(indices), np.float32), "w"))
        item.indices.CopyFrom(numpy_helper.from_array(indices))
        write(folder, model)

    return make


def declared(shape: str) -> Make:
    """An input, and what is computed from it, of a huge shape."""

    def make(folder: Path) -> None:
        write(
            folder,
            parse(f"(float[{shape}, 4] x) => (float[{shape}, 3] y) {{ y = MatMul(x, w) }}", w=pi(4, 3)),
        )

    return make


def text(body: str, **arrays: np.ndarray) -> Make:
    """A model from its text."""
    return lambda folder: write(folder, parse(body, **arrays))


def grown(body: str, **arrays: np.ndarray) -> Make:
    """A weight made huge on its way to a MatMul."""
    return text(f"(float[N, 4] x) => (float[N, M] y) {{ {body} y = MatMul(x, h) }}", **arrays)


def chain(operator: str, levels: int, *more: str) -> str:
    """A weight that goes through one operator again and again."""
    rest = "".join(f", {name}" for name in more)
    lines = [f"a{i + 1} = {operator}(a{i}{rest})" for i in range(levels)]
    return " ".join(["a0 = Identity(w)", *lines, f"h = Identity(a{levels})"])


def doubled(operator: str, levels: int) -> str:
    lines = [f"a{i + 1} = {operator}(a{i}, a{i})" for i in range(levels)]
    return " ".join(["a0 = Identity(w)", *lines, f"h = Identity(a{levels})"])


# ------------------------------------------------------------------ graphs


def deep(levels: int) -> Make:
    """Sub-graphs in sub-graphs, written by hand: protobuf neither writes nor reads so many."""

    def make(folder: Path) -> None:
        def field(number: int, content: bytes) -> bytes:
            out = bytearray()
            for value in (number << 3 | 2, len(content)):
                while value > 0x7F:
                    out.append(value & 0x7F | 0x80)
                    value >>= 7
                out.append(value)
            return bytes(out) + content

        graph = b""
        for _ in range(levels):
            node = field(4, b"If") + field(5, field(1, b"then_branch") + field(6, graph))
            graph = field(1, node)
        model = net()
        (folder / "model.onnx").write_bytes(model.SerializeToString() + field(7, graph))

    return make


def laughs(levels: int) -> Make:
    """Functions that call the next one twice, so that the last one runs 2 to the power of their number times."""

    def make(folder: Path) -> None:
        functions = [
            f'<domain: "own", opset_import: ["": 21, "own": 1]> f{i} (a) => (c) '
            f"{{ b = own.f{i + 1}(a) c = own.f{i + 1}(b) }}"
            for i in range(levels)
        ]
        last = f'<domain: "own", opset_import: ["": 21]> f{levels} (a) => (b) {{ b = Relu(a) }}'
        body = "(float[N, 4] x) => (float[N, 3] y) { z = own.f0(x) y = MatMul(z, w) }"
        write(folder, parse("\n".join([body, *functions, last]), w=pi(4, 3)))

    return make


def nodes(count: int) -> Make:
    """A file of empty nodes, of which each takes two bytes in it and hundreds in memory."""

    def make(folder: Path) -> None:
        model = net().SerializeToString()
        content = b"\x0a\x00" * count
        length = bytearray()
        value = len(content)
        while value > 0x7F:
            length.append(value & 0x7F | 0x80)
            value >>= 7
        length.append(value)
        (folder / "model.onnx").write_bytes(model + b"\x3a" + bytes(length) + content)

    return make


def metadata(folder: Path) -> None:
    """An entry of metadata of 1 GB."""
    write(folder, net())
    with open(folder / "model.onnx", "ab") as file:
        entry = b"\x0a\x01k\x12" + varint(BOMB)
        file.write(b"\x72" + varint(len(entry) + BOMB) + entry)
        file.truncate(file.tell() + BOMB)


def documented(folder: Path) -> None:
    """A description of 1 GB."""
    write(folder, net())
    with open(folder / "model.onnx", "ab") as file:
        file.write(b"\x32" + varint(BOMB))
        file.truncate(file.tell() + BOMB)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def disguised(content: bytes) -> Make:
    return lambda folder: (folder / "model.onnx").write_bytes(content)


def pickled(folder: Path) -> None:
    """A pickle that leaves a mark when it is opened."""
    import pickle

    class Mark:
        def __reduce__(self) -> tuple[object, tuple[str, int]]:
            return os.mkdir, (str(folder.parent / "outside" / "executed"), 0o700)

    (folder / "model.onnx").write_bytes(pickle.dumps(Mark()))


CALLS = "os:getcwd"

REFUSED: dict[str, tuple[Make, str]] = {
    "data above": (external("../outside/secret.bin", None), "outside the model's folder"),
    "data above, spelt in a circle": (external("sub/../../outside/secret.bin", None), "outside the model's folder"),
    "data at an absolute place": (external("{outside}/secret.bin", None), "outside the model's folder"),
    "data at a device": (external("/dev/zero", None), "outside the model's folder"),
    "data of the process": (external("/proc/self/environ", None), "outside the model's folder"),
    "data behind a link": (linked("{outside}/secret.bin"), "outside the model's folder"),
    "data behind a link to a device": (linked("/dev/zero"), "outside the model's folder"),
    "data behind a linked folder": (through_a_folder, "outside the model's folder"),
    "data in a pipe": (pipe, "no regular file"),
    "data of a Constant outside": (in_a_constant, "outside the model's folder"),
    "sparse data outside": (sparse_outside, "outside the model's folder"),
    "data missing": (external("w.bin", None), "missing"),
    "an offset beyond the file": (external("w.bin", 48, offset=2**40), "needs 48 bytes at offset"),
    "a negative offset": (external("w.bin", 48, offset=-(2**20)), "needs 48 bytes at offset"),
    "a length beyond the file": (external("w.bin", 48, length=2**40), "needs 48 bytes at offset"),
    "a negative length": (external("w.bin", 48, length=-48), "needs 48 bytes at offset"),
    "an offset that overflows": (external("w.bin", 48, offset=2**64 - 24), "needs 48 bytes at offset"),
    "an offset of many digits": (external("w.bin", 48, offset="9" * 100_000), "must be numbers|needs 48 bytes"),
    "a huge weight": (tensor(data_type=1, dims=[2**40, 2**20], raw_data=bytes(48)), "48 are stored"),
    "a weight whose size overflows": (tensor(data_type=1, dims=[2**32, 2**32], raw_data=b""), "0 are stored"),
    "a huge weight without data": (tensor(data_type=1, dims=[2**31]), "0 are stored"),
    "a huge weight of strings": (tensor(data_type=8, dims=[2**31]), "0 are stored"),
    "a weight of a million axes": (tensor(data_type=1, dims=[1] * 1_000_000, raw_data=bytes(4)), "axes|parts"),
    "a sparse bomb": (sparse([2**20, 2**20], np.array([5])), "more memory when dense"),
    "a sparse bomb that overflows": (sparse([2**33, 2**33], np.array([5])), "more memory when dense"),
    "a sparse bomb of many axes": (sparse([2**8] * 8, np.zeros((1, 8), np.int64)), "more memory when dense"),
    "a negative sparse shape": (sparse([-4, -3], np.array([5])), "inconsistent"),
    "sparse entries outside": (sparse([4, 3], np.array([2**62])), "inconsistent"),
    "a cycle": (
        text("(float[2, 4] x) => (float[2, 4] y) { a = Identity(b) b = Identity(a) y = MatMul(x, a) }"), "cycle",
    ),
    "a cycle in a branch": (
        text("""(float[2, 4] x, bool c) => (float[2, 4] y) { y = If(c) <
            then_branch = t () => (float[2, 4] p) { a = Add(x, b) b = Relu(a) p = Relu(b) },
            else_branch = e () => (float[2, 4] q) { q = Identity(x) }> }"""),
        "cycle",
    ),
    "a cycle through a branch": (
        text("""(float[2, 4] x, bool c) => (float[2, 4] y) { a = If(c) <
            then_branch = t () => (float[2, 4] p) { p = Add(x, b) },
            else_branch = e () => (float[2, 4] q) { q = Identity(x) }> b = Relu(a) y = Relu(b) }"""),
        "cycle",
    ),
    "a node that reads itself": (text("(float[2, 4] x) => (float[2, 4] y) { y = Add(x, y) }"), "cycle"),
    "a name twice": (
        text("(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) y = Neg(x) }"), "is given twice",
    ),
    "a function that calls itself": (
        text("""(float[N, 4] x) => (float[N, 4] y) { y = own.f(x) }
            <domain: "own", opset_import: ["": 21, "own": 1]> f (a) => (b) { b = own.f(a) }"""),
        "calls itself",
    ),
    "functions that call each other": (
        text("""(float[N, 4] x) => (float[N, 4] y) { y = own.f(x) }
            <domain: "own", opset_import: ["": 21, "own": 1]> f (a) => (b) { b = own.g(a) }
            <domain: "own", opset_import: ["": 21, "own": 1]> g (a) => (b) { b = own.f(a) }"""),
        "calls itself",
    ),
    "functions that call each other in branches": (
        text("""(float[N, 4] x, bool c) => (float[N, 4] y) { y = own.f(x, c) }
            <domain: "own", opset_import: ["": 21, "own": 1]> f (a, c) => (b) { b = If(c) <
                then_branch = t () => (float[N, 4] p) { p = own.f(a, c) },
                else_branch = e () => (float[N, 4] q) { q = Relu(a) }> }"""),
        "calls itself",
    ),
    "functions that multiply": (laughs(40), "call each other so often"),
    "10,000 levels of sub-graphs": (deep(10_000), "protobuf cannot parse|levels"),
    "90 levels of sub-graphs": (deep(90), "protobuf cannot parse|levels"),
    "ten million nodes": (nodes(10_000_000), "nodes"),
    "1 GB of metadata": (metadata, "beside its tensors"),
    "1 GB of description": (documented, "beside its tensors"),
    "a pickle": (pickled, "is not an ONNX model"),
    "a zip": (disguised(b"PK\x03\x04" + bytes(100_000)), "is not an ONNX model"),
    "100 MB of zeros": (disguised(bytes(100_000_000)), "is not an ONNX model"),
    "100 MB of ones": (disguised(b"\xff" * 100_000_000), "is not an ONNX model"),
}  # fmt: skip
"""Models that every command refuses, and what it says of them."""

BEARABLE: dict[str, Make] = {
    "the model itself as data": external("model.onnx", None, offset=0),
    "a weight expanded": grown("s = Constant<value = int64[2] {4, 1099511627776}>() h = Expand(w, s)", w=pi(4, 1)),
    "a weight expanded by much": grown("s = Constant<value = int64[2] {4, 1073741824}>() h = Expand(w, s)", w=pi(4, 1)),
    "a weight tiled": grown("s = Constant<value = int64[2] {1, 1099511627776}>() h = Tile(w, s)", w=pi(4, 3)),
    "a weight tiled by much": grown("s = Constant<value = int64[2] {1, 1073741824}>() h = Tile(w, s)", w=pi(4, 3)),
    "a weight joined with itself": grown(doubled("Concat<axis = 1>", 60), w=pi(4, 3)),
    "a weight joined with itself for long": grown(doubled("Concat<axis = 1>", 30), w=pi(4, 3)),
    "a weight multiplied by itself": grown(doubled("Mul", 60), w=pi(4, 3)),
    "a weight scaled again and again": grown(chain("Mul", 60, "s"), w=pi(4, 3), s=pi(3)),
    "a weight transposed again and again": grown(chain("Transpose", 3_000), w=pi(4, 4)),
    "a column and a row added": grown("s = Add(a, b) h = Mul(w, s)", a=pi(2**16, 1), b=pi(1, 2**16), w=pi(1, 1)),
    "a column and a row multiplied": grown(
        "s = MatMul(a, b) m = ReduceMax<keepdims = 0>(s) h = Mul(w, m)", a=pi(2**16, 1), b=pi(1, 2**16), w=pi(4, 3)
    ),
    "a column and a row added again and again": grown(
        f"s0 = Add(a, b) {' '.join(f's{i + 1} = Add(s{i}, a)' for i in range(60))}"
        " m = ReduceMax<keepdims = 0>(s60) h = Mul(w, m)",
        a=pi(4000, 1),
        b=pi(1, 4000),
        w=pi(4, 3),
    ),
    "columns and rows added": grown(
        f"{' '.join(f's{i} = Add(a, b) m{i} = ReduceMax<keepdims = 0>(s{i})' for i in range(60))}"
        f" t = Sum({', '.join(f'm{i}' for i in range(60))}) h = Mul(w, t)",
        a=pi(4000, 1),
        b=pi(1, 4000),
        w=pi(4, 3),
    ),
    "a pool of a large constant": grown(
        "e = Expand(o, s) p = MaxPool<kernel_shape = [3, 3]>(e) m = ReduceMax<keepdims = 0>(p) h = Mul(w, m)",
        o=pi(1, 1, 1, 1),
        s=np.array([1, 1, 4000, 4000]),
        w=pi(4, 3),
    ),
    "an RNN over a long constant": grown(
        "e = Expand(o, s) p = RNN<hidden_size = 1>(e, a, b) m = ReduceMax<keepdims = 0>(p) h = Mul(w, m)",
        **{name: pi(1, 1, 1) for name in "oab"},
        s=np.array([1_000_000, 1, 1]),
        w=pi(4, 3),
    ),
    "an Einsum of six vectors": grown(
        'e = Einsum<equation = "a,b,c,d,e,f->">(v, v, v, v, v, v) h = Mul(w, e)', v=pi(999), w=pi(4, 3)
    ),
    "a range of 16 bits": lambda folder: write(
        folder,
        parse(
            "(float16[N, 4] x) => (float16[N, M] y) { r = Range(a, b, c) h = Reshape(r, s) y = MatMul(x, h) }",
            opset=27,
            a=np.float16(0).reshape(()),
            b=np.float16(60000).reshape(()),
            c=np.float16(1e-4).reshape(()),
            s=np.array([4, -1]),
        ),
    ),
    "a shape that is huge": grown(
        "s = Constant<value = int64[1] {1099511627776}>() "
        "z = ConstantOfShape<value = int64[1] {1}>(s) h = Reshape(w, z)",
        w=pi(4, 3),
    ),
    "a shape that is large": grown(
        "s = Constant<value = int64[1] {4294967296}>() z = ConstantOfShape<value = int64[1] {1}>(s) h = Reshape(w, z)",
        w=pi(4, 3),
    ),
    "a scale that is huge": grown(
        "s = Constant<value = int64[2] {4, 4294967296}>() z = ConstantOfShape(s) h = Mul(w, z)", w=pi(4, 1)
    ),
    "a chain of 3,000 nodes": lambda folder: write(
        folder,
        parse(
            "(float[N, 4] x) => (float[N, 3] y) { a0 = Identity(x) "
            + " ".join(f"a{i + 1} = Relu(a{i})" for i in range(3_000))
            + " y = MatMul(a3000, w) }",
            w=pi(4, 3),
        ),
    ),
    "functions that call on for long": laughs(8),
}
"""Models that are refused, or pruned for what they are; what does not run them ends."""

HUGE: dict[str, Make] = {
    "a huge input": declared(str(2**40)),
    "a large input": declared(str(2**33)),
    "a gigantic input": declared(str(2**62)),
}
"""Models that can be pruned, but not be given an input."""
