"""The steps of random graphs: each takes a value to another one by one or several nodes, with weights of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from graph_builder import IMAGE, MATRIX, MS, SEQUENCE, Builder, Value, step
from onnx import TensorProto

# ------------------------------------------------------------------ any value

SMOOTH: dict[str, dict[str, Any]] = {
    **{"Relu": {}, "Sigmoid": {}, "Tanh": {}, "LeakyRelu": {"alpha": 0.1}, "Elu": {}, "Selu": {}, "Celu": {}},
    **{"HardSigmoid": {}, "HardSwish": {}, "Softplus": {}, "Softsign": {}, "Erf": {}, "Abs": {}, "Neg": {}, "Gelu": {}},
    **{"Sin": {}, "Cos": {}, "Atan": {}, "Asinh": {}, "Mish": {}, "Identity": {}, "Dropout": {}, "Shrink": {}},
    **{"ThresholdedRelu": {}, "Cosh": {}, "Sinh": {}, "Clip": {}, "Exp": {}},
}
ROUGH = ("Floor", "Ceil", "Round", "Sign")
FUSED = ("Gelu", "FastGelu", "QuickGelu")


@step(IMAGE, SEQUENCE, MATRIX)
def activation(b: Builder, v: Value) -> Value:
    op = b.pick(*SMOOTH)
    name = b.node("Tanh", v.name) if op in ("Exp", "Cosh", "Sinh") else v.name
    return v._replace(name=b.node(op, name, **SMOOTH[op]))


@step(IMAGE, SEQUENCE, MATRIX)
def fused_activation(b: Builder, v: Value) -> Value:
    return v._replace(name=b.node(b.pick(*FUSED), v.name, domain=MS))


@step(IMAGE, SEQUENCE, MATRIX)
def rounded(b: Builder, v: Value) -> Value:
    b.rough = True
    return v._replace(name=b.node("Add", v.name, b.node(b.pick(*ROUGH), v.name)))


def _spread(b: Builder, v: Value, low: float = 0.2) -> str:
    """A parameter per channel, a number, or one for every position of the channel's last axes."""
    form = b.pick("channel", "number", "ones")
    shape = [1] * len(v.shape)
    shape[v.axis] = v.channels
    if v.axis == len(v.shape) - 1 and form == "channel":
        shape = shape[-1:]
    return b.store(b.numbers(*([] if form == "number" else shape), low=low), "p")


@step(IMAGE, SEQUENCE, MATRIX)
def arithmetic(b: Builder, v: Value) -> Value:
    op = b.pick("Add", "Mul", "Sub", "Div", "Max", "Min", "Pow", "Mean", "Sum")
    other = _spread(b, v)
    if op == "Pow":
        return v._replace(name=b.node(op, b.node("Sigmoid", v.name), other))
    swap = op not in ("Div",) and b.flip()
    return v._replace(name=b.node(op, *((other, v.name) if swap else (v.name, other))))


@step(IMAGE, SEQUENCE, MATRIX)
def residual(b: Builder, v: Value) -> Value:
    """Two paths from here, or one from earlier, summed or multiplied."""
    alike = [u for u in b.seen if u.shape == v.shape]
    other = b.pick(*alike[-3:]) if alike else v
    return v._replace(name=b.node(b.pick("Add", "Mul", "Sub", "Max"), v.name, other.name))


@step(IMAGE, SEQUENCE, MATRIX)
def beside(b: Builder, v: Value) -> Value:
    """Concat with an earlier value of the same size."""
    alike = [u for u in b.seen if len(u.shape) == len(v.shape) and v.with_channels("", u.channels).shape == u.shape]
    other = b.pick(*alike[-3:]) if alike else v
    if v.channels + other.channels > 24:
        return v
    return v.with_channels(b.node("Concat", v.name, other.name, axis=v.axis), v.channels + other.channels)


@step(IMAGE, SEQUENCE, MATRIX)
def halves(b: Builder, v: Value) -> Value:
    """Split, something done to one part, and both together again in one way or another."""
    if v.channels < 4 or v.channels % 2:
        return v
    first = b.node("Split", v.name, outputs=2, axis=v.axis, num_outputs=2)
    part = v.with_channels(first, v.channels // 2)
    done = activation(b, part)
    if b.flip():
        return v._replace(name=b.node("Concat", f"{first}b", done.name, axis=v.axis))
    return part._replace(name=b.node(b.pick("Mul", "Add"), done.name, f"{first}b"))


@step(IMAGE, SEQUENCE, MATRIX)
def picked(b: Builder, v: Value) -> Value:
    """Some channels: a Slice, or a Gather in another order."""
    if b.flip():
        start, stride = b.pick(0, 1), b.pick(1, 2)
        count = len(range(start, v.channels, stride))
        if not count:
            return v
        ends = (b.ints(start), b.ints(2**31), b.ints(v.axis), b.ints(stride))
        return v.with_channels(b.node("Slice", v.name, *ends), count)
    places = b.rng.permutation(v.channels)[: max(2, v.channels - b.pick(0, 1))]
    return v.with_channels(b.node("Gather", v.name, b.ints(*places.tolist()), axis=v.axis), len(places))


@step(IMAGE, SEQUENCE, MATRIX)
def turned(b: Builder, v: Value) -> Value:
    """Transposed, worked on, and back."""
    order = b.rng.permutation(len(v.shape)).tolist()
    there = b.node("Transpose", v.name, perm=order)
    done = b.node(b.pick("Relu", "Sigmoid"), there)
    return v._replace(name=b.node("Transpose", done, perm=np.argsort(order).tolist()))


@step(IMAGE, SEQUENCE, MATRIX)
def gated(b: Builder, v: Value) -> Value:
    """Where, or the product with a softmax over some axis."""
    if b.flip():
        return v._replace(name=b.node("Where", b.node("Greater", v.name, _spread(b, v)), v.name, _spread(b, v)))
    axis = b.pick(v.axis, -1, 1)
    return v._replace(name=b.node("Mul", v.name, b.node("Softmax", v.name, axis=axis)))


@step(IMAGE, SEQUENCE, MATRIX)
def padded(b: Builder, v: Value) -> Value:
    """Channels of zeros, or of copies, beside; or as many as there are once more."""
    if v.channels > 8:
        return v
    if b.flip():
        times = [2 if i == v.axis else 1 for i in range(len(v.shape))]
        return v.with_channels(b.node("Tile", v.name, b.ints(*times)), 2 * v.channels)
    pads = [0] * (2 * len(v.shape))
    pads[v.axis], pads[len(v.shape) + v.axis] = b.pick(0, 1), 2
    return v.with_channels(b.node("Pad", v.name, b.ints(*pads)), v.channels + sum(pads))


@step(IMAGE, SEQUENCE, MATRIX)
def quantised(b: Builder, v: Value) -> Value:
    """Through int8 and back."""
    if b.dtype == np.float64:
        return v
    b.rough = True
    scale = b.store(np.asarray(0.05, b.dtype))
    zero = b.store(np.asarray(b.pick(0, 3), b.pick(np.int8, np.uint8)))
    return v._replace(name=b.node("DequantizeLinear", b.node("QuantizeLinear", v.name, scale, zero), scale, zero))


@step(IMAGE, SEQUENCE, MATRIX)
def shaped(b: Builder, v: Value) -> Value:
    """To another shape and back, by sizes that are computed or stored."""
    name = b.node("Unsqueeze", v.name, b.ints(b.pick(0, 1, len(v.shape))))
    flat = b.node("Reshape", name, b.node("Shape", v.name))
    return v._replace(name=b.node("Relu", flat))


# ------------------------------------------------------------------ images


def _sizes(v: Value) -> tuple[int, ...]:
    return v.shape[2:]


@step(IMAGE)
def conv(b: Builder, v: Value) -> Value:
    groups = b.pick(*(g for g in (1, 2, v.channels) if v.channels % g == 0))
    outputs = groups * b.pick(1, *(n for n in (2, 3, 6) if groups * n <= 12))
    kernel = b.pick(1, 3)
    weight = b.weight(outputs, v.channels // groups, *[kernel] * len(_sizes(v)))
    bias = [b.vector(outputs)] if b.flip() else []
    more: dict[str, Any] = {"group": groups, "pads": [kernel // 2] * 2 * len(_sizes(v))}
    fused = b.dtype == np.float32 and b.flip()
    if fused:
        more |= {"domain": MS, "activation": "Relu"}
    name = b.node("FusedConv" if fused else "Conv", v.name, weight, *bias, **more)
    return v.with_channels(name, outputs)


@step(IMAGE)
def conv_transpose(b: Builder, v: Value) -> Value:
    groups = b.pick(*(g for g in (1, 2, v.channels) if v.channels % g == 0))
    each = b.pick(1, 2, 3)
    weight = b.weight(v.channels, each, *[3] * len(_sizes(v)))
    name = b.node("ConvTranspose", v.name, weight, group=groups, pads=[1] * 2 * len(_sizes(v)))
    return v.with_channels(name, each * groups)


@step(IMAGE)
def batch_norm(b: Builder, v: Value) -> Value:
    given = [b.vector(v.channels) for _ in range(4)]
    return v._replace(name=b.node("BatchNormalization", v.name, *given))


@step(IMAGE)
def image_norm(b: Builder, v: Value) -> Value:
    op = b.pick("InstanceNormalization", "GroupNormalization", "LRN", "MeanVarianceNormalization", "LpNormalization")
    if op in ("InstanceNormalization", "GroupNormalization"):
        more = {"num_groups": b.pick(*(g for g in (1, 2, v.channels) if v.channels % g == 0))} if op[0] == "G" else {}
        return v._replace(name=b.node(op, v.name, b.vector(v.channels), b.vector(v.channels), **more))
    more = {"LRN": {"size": 3}, "LpNormalization": {"axis": 1}}.get(op, {})
    return v._replace(name=b.node(op, v.name, **more))


@step(IMAGE)
def prelu(b: Builder, v: Value) -> Value:
    shape = (v.channels, *[1] * len(_sizes(v))) if b.flip() else (1,)
    return v._replace(name=b.node("PRelu", v.name, b.store(b.numbers(*shape), "p")))


@step(IMAGE)
def pool(b: Builder, v: Value) -> Value:
    op = b.pick("MaxPool", "AveragePool", "LpPool")
    rank = len(_sizes(v))
    return v._replace(name=b.node(op, v.name, kernel_shape=[3] * rank, pads=[1] * 2 * rank))


@step(IMAGE)
def squeeze_excite(b: Builder, v: Value) -> Value:
    rank = len(_sizes(v))
    op = b.pick("GlobalAveragePool", "GlobalMaxPool", "ReduceMean")
    mean = b.node(op, v.name, *([b.ints(*range(2, 2 + rank))] if op == "ReduceMean" else []))
    small = b.node("Relu", b.node("Conv", mean, b.weight(3, v.channels, *[1] * rank)))
    scale = b.node("HardSigmoid", b.node("Conv", small, b.weight(v.channels, 3, *[1] * rank)))
    return v._replace(name=b.node("Mul", *b.pick((v.name, scale), (scale, v.name))))


@step(IMAGE)
def shuffle(b: Builder, v: Value) -> Value:
    if v.channels % 2 or "size" in b.open or len(v.shape) != 4:
        return v
    parts = b.ints(-1, 2, v.channels // 2, *_sizes(v))
    there = b.node("Transpose", b.node("Reshape", v.name, parts), perm=[0, 2, 1, 3, 4])
    return v._replace(name=b.node("Reshape", there, b.ints(-1, v.channels, *_sizes(v))))


@step(IMAGE)
def depth_to_space(b: Builder, v: Value) -> Value:
    if v.channels % 4 or len(v.shape) != 4:
        return v
    name = b.node("DepthToSpace", v.name, blocksize=2, mode=b.pick("DCR", "CRD"))
    return v._replace(name=b.node("SpaceToDepth", b.node("Relu", name), blocksize=2))


@step(IMAGE)
def resize(b: Builder, v: Value) -> Value:
    if len(v.shape) != 4 or v.shape[2] > 6:
        return v
    scales = b.store(np.array([1, 1, 2, 2], np.float32))
    name = b.node("Resize", v.name, "", scales, mode=b.pick("nearest", "linear"))
    return v._replace(name=b.node("MaxPool", name, kernel_shape=[2, 2], strides=[2, 2]))


@step(IMAGE)
def quantised_conv(b: Builder, v: Value) -> Value:
    """QLinearConv, or ConvInteger on what DynamicQuantizeLinear makes."""
    if b.dtype != np.float32 or len(v.shape) != 4:
        return v
    b.rough = True
    outputs, zero = b.pick(2, 4), b.store(np.uint8(10))
    codes = b.store(b.rng.integers(-100, 100, (outputs, v.channels, 1, 1)).astype(np.int8), "w")
    if b.flip():
        data = b.node("DynamicQuantizeLinear", v.name, outputs=3)
        whole = b.node("Cast", b.node("ConvInteger", data, codes, f"{data}c"), to=TensorProto.FLOAT)
        scale = b.node("Mul", f"{data}b", b.store(np.float32(0.01)))
        return v.with_channels(b.node("Mul", whole, scale), outputs)
    step_ = b.store(np.float32(0.1))
    data = b.node("QuantizeLinear", v.name, step_, zero)
    scale = b.store(b.rng.uniform(0.001, 0.01, outputs if b.flip() else ()).astype(np.float32))
    zeros = b.store(np.zeros(b.stored[-1].dims, np.int8))
    result = b.node("QLinearConv", data, step_, zero, codes, scale, zeros, step_, zero)
    return v.with_channels(b.node("DequantizeLinear", result, step_, zero), outputs)


@step(IMAGE)
def to_sequence(b: Builder, v: Value) -> Value:
    """Positions become steps."""
    if len(v.shape) != 4:
        return v
    flat = b.node("Reshape", v.name, b.ints(0, 0, -1))
    name = b.node("Transpose", flat, perm=[0, 2, 1])
    return Value(name, (v.shape[0], v.shape[2] * v.shape[3], v.channels))


@step(IMAGE)
def to_matrix(b: Builder, v: Value) -> Value:
    """Means over positions, or all of them beside each other."""
    if "size" in b.open or b.flip():
        mean = b.node("GlobalAveragePool", v.name)
        return Value(b.node("Flatten", mean), (v.shape[0], v.channels))
    return Value(b.node("Flatten", v.name), (v.shape[0], int(np.prod(v.shape[1:]))))


# ------------------------------------------------------------------ sequences and matrices


@step(SEQUENCE, MATRIX)
def matmul(b: Builder, v: Value) -> Value:
    outputs = b.pick(4, 2, 6, 8)
    weight = b.weight(v.channels, outputs)
    fused = b.dtype == np.float32 and b.flip()
    name = b.node("FusedMatMul", v.name, weight, domain=MS) if fused else b.node("MatMul", v.name, weight)
    return v.with_channels(b.node("Add", name, b.vector(outputs)) if b.flip() else name, outputs)


@step(MATRIX)
def gemm(b: Builder, v: Value) -> Value:
    outputs, turn = b.pick(4, 2, 6, 8), b.pick(0, 1)
    weight = b.weight(*((outputs, v.channels) if turn else (v.channels, outputs)))
    bias = [b.vector(outputs)] if b.flip() else []
    more: dict[str, Any] = {"transB": turn, "alpha": b.pick(1.0, 0.5)}
    if b.dtype == np.float32 and b.flip():
        more |= {"domain": MS, "activation": "Relu"}
        return v.with_channels(b.node("FusedGemm", v.name, weight, *bias, **more), outputs)
    return v.with_channels(b.node("Gemm", v.name, weight, *bias, **more), outputs)


@step(MATRIX)
def from_the_left(b: Builder, v: Value) -> Value:
    """W x with the weight on the left: by Gemm or MatMul on the transpose."""
    outputs = b.pick(4, 2, 6)
    there = b.node("Transpose", v.name, perm=[1, 0])
    op = b.pick("MatMul", "Gemm")
    return v.with_channels(b.node("Transpose", b.node(op, b.weight(outputs, v.channels), there), perm=[1, 0]), outputs)


@step(SEQUENCE)
def einsum(b: Builder, v: Value) -> Value:
    outputs = b.pick(4, 2, 6)
    if b.flip():
        return v.with_channels(b.node("Einsum", v.name, b.weight(v.channels, outputs), equation="bti,io->bto"), outputs)
    return v.with_channels(b.node("Einsum", b.weight(outputs, v.channels), v.name, equation="oi,bti->bto"), outputs)


@step(SEQUENCE)
def layer_norm(b: Builder, v: Value) -> Value:
    scale, bias = b.vector(v.channels), b.vector(v.channels)
    form = b.pick("LayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "LpNormalization")
    if b.dtype == np.float32 and form.startswith("Skip"):
        more = [] if "Simpl" in form else [bias]
        return v._replace(name=b.node(form, v.name, v.name, scale, *more, domain=MS))
    if form == "LpNormalization":
        return v._replace(name=b.node(form, v.name, axis=b.pick(-1, 1)))
    return v._replace(name=b.node("LayerNormalization", v.name, scale, bias))


@step(SEQUENCE)
def feed_forward(b: Builder, v: Value) -> Value:
    """SwiGLU or BiasGelu between two products, summed with what came."""
    hidden = b.pick(4, 6)
    if b.flip():
        gate, up = (b.node("MatMul", v.name, b.weight(v.channels, hidden)) for _ in range(2))
        inner = b.node("Mul", b.node("Sigmoid", gate), up)
    else:
        first = b.node("MatMul", v.name, b.weight(v.channels, hidden))
        fused = b.dtype == np.float32
        bias = b.vector(hidden)
        inner = b.node("BiasGelu", first, bias, domain=MS) if fused else b.node("Add", first, bias)
    return v._replace(name=b.node("Add", v.name, b.node("MatMul", inner, b.weight(hidden, v.channels))))


@step(SEQUENCE)
def attention(b: Builder, v: Value) -> Value:
    """Self-attention written out, by MultiHeadAttention, or with merged projections by Attention."""
    heads, size = b.pick(2, 1, 4), b.pick(2, 4)
    width = heads * size
    form = b.pick("written out", "MultiHeadAttention", "Attention")
    if form == "Attention" and b.dtype == np.float32:
        merged, bias = b.weight(v.channels, 3 * width), b.vector(3 * width)
        name = b.node("Attention", v.name, merged, bias, num_heads=heads, domain=MS)
        return v._replace(name=b.node("MatMul", name, b.weight(width, v.channels)))
    parts = [b.node("MatMul", v.name, b.weight(v.channels, width)) for _ in range(3)]
    if form == "MultiHeadAttention" and b.dtype == np.float32:
        name = b.node("MultiHeadAttention", *parts, num_heads=heads, domain=MS)
    else:
        split = b.ints(0, 0, heads, size)
        q, k, w = (b.node("Transpose", b.node("Reshape", p, split), perm=[0, 2, 1, 3]) for p in parts)
        scores = b.node("MatMul", q, b.node("Transpose", k, perm=[0, 1, 3, 2]))
        mixed = b.node("MatMul", b.node("Softmax", scores), w)
        name = b.node("Reshape", b.node("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, 0, width))
    return v._replace(name=b.node("MatMul", name, b.weight(width, v.channels)))


@step(SEQUENCE)
def recurrent(b: Builder, v: Value) -> Value:
    op, hidden = b.pick("LSTM", "GRU", "RNN"), b.pick(2, 3)
    directions = b.pick(1, 2)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    there = b.node("Transpose", v.name, perm=[1, 0, 2])
    given = [b.weight(directions, gates * hidden, size) for size in (v.channels, hidden)]
    bias = [b.store(b.numbers(directions, 2 * gates * hidden), "p")] if b.flip() else []
    more = {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else b.pick("forward", "reverse")}
    if op == "GRU":
        more["linear_before_reset"] = b.pick(0, 1)
    name = b.node(op, there, *given, *bias, **more)
    back = b.node("Transpose", name, perm=[2, 0, 1, 3])
    return v.with_channels(b.node("Reshape", back, b.ints(0, 0, directions * hidden)), directions * hidden)


@step(SEQUENCE)
def along_time(b: Builder, v: Value) -> Value:
    if b.flip():
        return v._replace(name=b.node("CumSum", v.name, b.store(np.int64(1))))
    return v._replace(name=b.node("Add", v.name, b.node("ReduceMean", v.name, b.ints(1))))


@step(SEQUENCE, MATRIX)
def quantised_product(b: Builder, v: Value) -> Value:
    """MatMulInteger, DynamicQuantizeMatMul, MatMulIntegerToFloat or QLinearMatMul."""
    if b.dtype != np.float32:
        return v
    b.rough = True
    outputs = b.pick(4, 2)
    op = b.pick("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul")
    kind = b.pick(np.int8, np.uint8)
    zeros = (b.rng.integers(100, 150, () if b.flip() else outputs) if kind is np.uint8 else np.zeros(())).astype(kind)
    codes = b.store((b.rng.integers(-90, 90, (v.channels, outputs)) + zeros).astype(kind), "w")
    zero = b.store(zeros)
    scale = b.store(np.full(zeros.shape, 0.01, np.float32))
    if op == "DynamicQuantizeMatMul":
        return v.with_channels(b.node(op, v.name, codes, scale, zero, domain=MS), outputs)
    if op == "QLinearMatMul":
        step_, at = b.store(np.float32(0.1)), b.store(np.uint8(10))
        made = b.node(op, b.node("QuantizeLinear", v.name, step_, at), step_, at, codes, scale, zero, step_, at)
        return v.with_channels(b.node("DequantizeLinear", made, step_, at), outputs)
    data = b.node("DynamicQuantizeLinear", v.name, outputs=3)
    if op == "MatMulIntegerToFloat":
        name = b.node(op, data, codes, f"{data}b", scale, f"{data}c", zero, domain=MS)
        return v.with_channels(name, outputs)
    whole = b.node("Cast", b.node(op, data, codes, f"{data}c", zero), to=TensorProto.FLOAT)
    return v.with_channels(b.node("Mul", whole, b.node("Mul", f"{data}b", scale)), outputs)


@step(SEQUENCE)
def sequence_to_matrix(b: Builder, v: Value) -> Value:
    if b.flip():
        return Value(b.node("ReduceMean", v.name, b.ints(1), keepdims=0), (v.shape[0], v.channels))
    return Value(b.node("Gather", v.name, b.store(np.int64(-1)), axis=1), (v.shape[0], v.channels))


@step(MATRIX)
def to_steps(b: Builder, v: Value) -> Value:
    """One step, or each channel group a step."""
    if v.channels % 2 or b.flip():
        return Value(b.node("Unsqueeze", v.name, b.ints(1)), (v.shape[0], 1, v.channels))
    return Value(b.node("Reshape", v.name, b.ints(-1, 2, v.channels // 2)), (v.shape[0], 2, v.channels // 2))
