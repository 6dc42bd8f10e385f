"""How long it takes to find the groups of large models, of which only shapes are there: `python bench_labels.py`."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, parser

from onnxprune.graph.model import load
from onnxprune.structure.coupling import couple
from onnxprune.structure.flow import walk
from onnxprune.structure.sizes import choose

Sizes = dict[str, tuple[int, ...]]


def resnet50() -> tuple[str, Sizes]:
    """Bottlenecks 3-4-6-3 with live BatchNorms."""
    lines, sizes = [], {}

    def conv(source: str, name: str, inputs: int, outputs: int, kernel: int, stride: int) -> str:
        sizes[f"{name}_w"] = (outputs, inputs, kernel, kernel)
        norm = [f"{name}_{p}" for p in ("scale", "shift", "mean", "variance")]
        sizes.update(dict.fromkeys(norm, (outputs,)))
        pad = kernel // 2
        lines.append(
            f"{name}_c = Conv<strides=[{stride},{stride}], pads=[{pad},{pad},{pad},{pad}]>({source}, {name}_w)"
        )
        lines.append(f"{name} = BatchNormalization({name}_c, {', '.join(norm)})")
        return name

    lines.append(f"stem = Relu({conv('image', 'first', 3, 64, 7, 2)})")
    lines.append("x0 = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(stem)")
    value, inputs, count = "x0", 64, 0
    for stage, depth in enumerate((3, 4, 6, 3)):
        middle = 64 * 2**stage
        for place in range(depth):
            stride = 2 if stage and not place else 1
            count += 1
            a = conv(value, f"a{count}", inputs, middle, 1, 1)
            lines.append(f"ar{count} = Relu({a})")
            b = conv(f"ar{count}", f"b{count}", middle, middle, 3, stride)
            lines.append(f"br{count} = Relu({b})")
            c = conv(f"br{count}", f"c{count}", middle, 4 * middle, 1, 1)
            short = value if place else conv(value, f"s{count}", inputs, 4 * middle, 1, stride)
            lines += [f"sum{count} = Add({c}, {short})", f"x{count} = Relu(sum{count})"]
            value, inputs = f"x{count}", 4 * middle
    sizes |= {"fc": (1000, 2048), "fc_bias": (1000,)}
    lines += [f"mean = GlobalAveragePool({value})", "flat = Flatten(mean)", "y = Gemm<transB=1>(flat, fc, fc_bias)"]
    return f"g (float[1,3,224,224] image) => (float[1,1000] y) {{ {chr(10).join(lines)} }}", sizes


def llama(width: int = 2048, depth: int = 22, inner: int = 5632, heads: int = 32, shared: int = 4) -> tuple[str, Sizes]:
    """TinyLlama, 1.1 billion parameters: rotary embedding, grouped-query attention, SwiGLU, as exporters write them."""
    size, vocabulary = width // heads, 32000
    times = heads // shared
    sizes: Sizes = {"embedding": (vocabulary, width), "head": (width, vocabulary), "last": (width,)}
    lines = ["x0 = Gather(embedding, tokens)"]

    def norm(source: str, name: str, scale: str) -> str:
        lines.extend(
            [
                f"{name}p = Pow({source}, two)",
                f"{name}m = ReduceMean<keepdims=1>({name}p, minus)",
                f"{name}e = Add({name}m, epsilon)",
                f"{name}r = Sqrt({name}e)",
                f"{name}d = Div({source}, {name}r)",
                f"{name} = Mul({scale}, {name}d)",
            ]
        )
        return name

    def turn(source: str, name: str) -> str:
        lines.extend(
            [
                f"{name}a = Slice({source}, zero, half, three)",
                f"{name}b = Slice({source}, half, end, three)",
                f"{name}n = Neg({name}b)",
                f"{name}c = Concat<axis=-1>({name}n, {name}a)",
                f"{name}x = Mul({source}, cosine)",
                f"{name}y = Mul({name}c, sine)",
                f"{name} = Add({name}x, {name}y)",
            ]
        )
        return name

    for i in range(depth):
        sizes |= {
            f"q{i}w": (width, width),
            f"k{i}w": (width, shared * size),
            f"v{i}w": (width, shared * size),
            f"o{i}w": (width, width),
            f"g{i}w": (width, inner),
            f"u{i}w": (width, inner),
            f"d{i}w": (inner, width),
            f"n{i}s": (width,),
            f"f{i}s": (width,),
        }
        n = norm(f"x{i}", f"n{i}", f"n{i}s")
        for name, shape in (("q", "many"), ("k", "few"), ("v", "few")):
            lines += [f"{name}{i}f = MatMul({n}, {name}{i}w)", f"{name}{i}r = Reshape({name}{i}f, {shape})"]
            lines.append(f"{name}{i}t = Transpose<perm=[0,2,1,3]>({name}{i}r)")
        turn(f"q{i}t", f"q{i}p")
        turn(f"k{i}t", f"k{i}p")
        for name, source in (("k", f"k{i}p"), ("v", f"v{i}t")):
            lines += [f"{name}{i}z = Unsqueeze({source}, two_int)", f"{name}{i}e = Expand({name}{i}z, repeated)"]
            lines.append(f"{name}{i}h = Reshape({name}{i}e, merged)")
        lines += [
            f"k{i}x = Transpose<perm=[0,1,3,2]>(k{i}h)",
            f"s{i}a = MatMul(q{i}p, k{i}x)",
            f"s{i}b = Mul(s{i}a, scale)",
            f"s{i}c = Add(s{i}b, causal)",
            f"s{i} = Softmax<axis=-1>(s{i}c)",
            f"c{i}a = MatMul(s{i}, v{i}h)",
            f"c{i}b = Transpose<perm=[0,2,1,3]>(c{i}a)",
            f"c{i} = Reshape(c{i}b, flat)",
            f"o{i} = MatMul(c{i}, o{i}w)",
            f"h{i} = Add(x{i}, o{i})",
        ]
        f = norm(f"h{i}", f"f{i}", f"f{i}s")
        lines += [
            f"g{i} = MatMul({f}, g{i}w)",
            f"gs{i} = Sigmoid(g{i})",
            f"ga{i} = Mul(g{i}, gs{i})",
            f"u{i} = MatMul({f}, u{i}w)",
            f"m{i} = Mul(ga{i}, u{i})",
            f"d{i} = MatMul(m{i}, d{i}w)",
            f"x{i + 1} = Add(h{i}, d{i})",
        ]
    lines.append(f"y = MatMul({norm(f'x{depth}', 'z', 'last')}, head)")
    t = 16
    ints = {
        "minus": [-1], "zero": [0], "half": [size // 2], "end": [2**31], "three": [3], "two_int": [2],
        "many": [1, t, heads, size], "few": [1, t, shared, size], "repeated": [1, shared, times, t, size],
        "merged": [1, heads, t, size], "flat": [1, t, width],
    }  # fmt: skip
    small = ", ".join(f"int64[{len(v)}] {k} = {{{', '.join(map(str, v))}}}" for k, v in ints.items())
    floats = "float two = {2}, float epsilon = {0.00001}, float scale = {0.125}"
    sizes |= {"cosine": (1, 1, t, size), "sine": (1, 1, t, size), "causal": (1, 1, t, t)}
    body = "\n".join(lines)
    return f"g (int64[1,{t}] tokens) => (float[1,{t},{vocabulary}] y) <{small}, {floats}> {{ {body} }}", sizes


def write(text: str, sizes: Sizes, folder: Path) -> Path:
    """A model whose large tensors lie in a sparse file of zeros."""
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    offset = 0
    for name, shape in sizes.items():
        if np.prod(shape) <= 8192:
            model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
            continue
        tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        length = 4 * int(np.prod(shape))
        for key, value in (("location", "weights"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
        offset += length
    (folder / "weights").touch()
    os.truncate(folder / "weights", offset)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def parameters(sizes: Sizes) -> int:
    return sum(int(np.prod(shape)) for shape in sizes.values())


def label_times() -> list[str]:
    """One line per model: CPU seconds to find the groups, and for the labels alone."""
    lines = []
    for name, (text, sizes) in (("ResNet-50", resnet50()), ("transformer", llama())):
        with tempfile.TemporaryDirectory() as folder:
            model = load(write(text, sizes, Path(folder)))
            shapes = choose(model)
            start = time.process_time()
            coupling = couple(model, *shapes)
            whole = time.process_time() - start
        flow = coupling.flow
        again = walk(flow.source, flow.facts, flow.second, flow.opsets)
        start = time.process_time()
        again.labels.solve()
        solved = time.process_time() - start
        counted = f"{parameters(sizes) / 1e6:.0f} M parameters, {len(coupling.groups)} groups"
        lines.append(
            f"{name}, {counted}: {whole:.2f} s in all, {flow.labels.count} labels solved in {solved:.2f} s (CPU time)"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(label_times()))
