"""Random valid ONNX graphs for hypothesis: chains of steps over images, sequences and matrices, and ONNX's own cases.

A step takes a value to another one by one or several nodes, with weights of its own. Steps are put into branches,
loops and functions as they are; weights are stored in many ways. Everything is tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, defs, helper, numpy_helper

MS = "com.microsoft"
OPSET = 21
BATCH = 2
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


class Value(NamedTuple):
    """A value of a graph: its name, and its shape for one choice of open dims."""

    name: str
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The axis of its channels: the last one of sequences and matrices."""
        return 1 if len(self.shape) > 3 else len(self.shape) - 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    def with_channels(self, name: str, count: int) -> Value:
        shape = list(self.shape)
        shape[self.axis] = count
        return Value(name, tuple(shape))


@dataclass(frozen=True, eq=False)
class Graph:
    """A model with what it is fed.

    Attributes:
        model: the model.
        feed: its inputs.
        steps: what it is made of.
        rough: whether it rounds to integers somewhere: the last place of a sum may then decide about a step.
    """

    model: onnx.ModelProto
    feed: dict[str, np.ndarray]
    steps: tuple[str, ...]
    rough: bool

    def __repr__(self) -> str:
        return f"Graph({' '.join(self.steps)})\n{onnx.printer.to_text(self.model)[:4000]}"


@dataclass(eq=False)
class Builder:
    """A graph in the making."""

    draw: Callable[[Any], Any]
    dtype: np.dtype
    rng: np.random.Generator
    open: frozenset[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: list[TensorProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    shared: dict[tuple[int, ...], str] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    seen: list[Value] = field(default_factory=list)
    count: int = 0
    nested: int = 0
    rough: bool = False

    def pick(self, *options: Any) -> Any:
        """One of some options; the first is the simplest."""
        return self.draw(st.sampled_from(options))

    def flip(self) -> bool:
        return bool(self.draw(st.booleans()))

    def fresh(self, what: str = "v") -> str:
        self.count += 1
        return f"{what}{self.count}"

    def node(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """A node; the name of its first result, the others have 'b', 'c', ... behind it."""
        name = self.fresh(op.lower())
        names = [name, *(f"{name}{'bcdefgh'[i]}" for i in range(outputs - 1))]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n_{name}", domain=domain, **attributes))
        return name

    def store(self, array: Any, what: str = "c") -> str:
        name = self.fresh(what)
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def numbers(self, *shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
        return self.rng.uniform(low, high, shape).astype(self.dtype)

    def vector(self, size: int, low: float = 0.2, high: float = 1.0) -> str:
        return self.store(self.numbers(size, low=low, high=high), "p")

    def ints(self, *values: int) -> str:
        return self.store(np.array(values, np.int64), "i")

    def weight(self, *shape: int) -> str:
        """A weight: stored as it is, turned, in another type, quantised, as a Constant, behind Identity, or shared."""
        form = self.pick("plain", "plain", "turned", "shared", "constant", "identity", "int8", "half", "brain", "part")
        scale = (2.0 / max(1, int(np.prod(shape[1:])))) ** 0.5
        array = (self.numbers(*shape) * scale).astype(self.dtype)
        if form == "shared" and shape in self.shared:
            return self.shared[shape]
        if form == "turned" and len(shape) > 1:
            order = list(range(len(shape)))[::-1]
            return self.node("Transpose", self.store(array.transpose(order), "w"), perm=order)
        if form == "constant":
            return self.node("Constant", value=numpy_helper.from_array(array))
        if form == "identity":
            return self.node("Identity", self.store(array, "w"))
        if form == "int8" and self.dtype != np.float64:
            codes = self.store(np.clip(np.round(array / scale * 100), -127, 127).astype(np.int8), "w")
            axis = self.pick(None, 0, len(shape) - 1)
            size = () if axis is None else (shape[axis],)
            steps = self.store((self.numbers(*size, low=0.5) * scale / 100).astype(self.dtype))
            zero = [self.store(np.zeros(size, np.int8))] if self.flip() else []
            return self.node("DequantizeLinear", codes, steps, *zero, axis=axis or 0)
        if form in ("half", "brain"):
            kind = np.float16 if form == "half" else ml_dtypes.bfloat16
            return self.node("Cast", self.store(array.astype(kind), "w"), to=TYPES[self.dtype.name])
        if form == "part" and shape[0] > 1:
            both = np.concatenate([array, array * self.dtype.type(0.5)])
            return self.node("Split", self.store(both, "w"), outputs=2, axis=0, num_outputs=2)
        name = self.store(array, "w")
        self.shared.setdefault(shape, name)
        return name


Step = Callable[[Builder, Value], Value]

IMAGE: dict[str, Step] = {}
SEQUENCE: dict[str, Step] = {}
MATRIX: dict[str, Step] = {}


def step(*tables: dict[str, Step]) -> Callable[[Step], Step]:
    def put(function: Step) -> Step:
        for table in tables:
            table[function.__name__] = function
        return function

    return put


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
    outputs = groups * b.pick(*(n for n in (1, 2, 3, 6) if groups * n <= 12) or (1,))
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
        return v.with_channels(b.node("FusedGemm", v.name, weight, *bias, domain=MS, activation="Relu", **more), outputs)
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


# ------------------------------------------------------------------ steps inside of others


def _inside(b: Builder, v: Value, table: dict[str, Step]) -> tuple[Value, list[onnx.NodeProto], list[TensorProto]]:
    """A step that is put elsewhere: its result, its nodes, and what it stores."""
    nodes, stored, seen = b.nodes, b.stored, b.seen
    b.nodes, b.stored, b.seen, b.nested = [], [], [v], b.nested + 1
    shared, b.shared = b.shared, {}
    done = _take(b, v, table)
    made = done, b.nodes, b.stored
    b.nodes, b.stored, b.seen, b.nested, b.shared = nodes, stored, seen, b.nested - 1, shared
    return made


def _info(b: Builder, v: Value) -> onnx.ValueInfoProto:
    """A value of known rank."""
    return helper.make_tensor_value_info(v.name, TYPES[b.dtype.name], [None] * len(v.shape))


def _body(b: Builder, v: Value, done: Value, nodes: list[onnx.NodeProto], stored: list[TensorProto]) -> onnx.GraphProto:
    """A graph of one output; what it stores is kept inside, or captured."""
    out = b.fresh("out")
    nodes = [*nodes, helper.make_node("Identity", [done.name], [out])]
    within = b.flip()
    if not within:
        b.stored.extend(stored)
    return helper.make_graph(
        nodes, b.fresh("body"), [], [_info(b, done._replace(name=out))], stored * within
    )


@step(IMAGE, SEQUENCE, MATRIX)
def branch(b: Builder, v: Value) -> Value:
    """If: a step, or the identity or another one of the same shape."""
    if b.nested:
        return v
    then = _inside(b, v, _table(v))
    other = _inside(b, v, _table(v))
    if other[0].shape != then[0].shape:
        other = then if then[0].shape != v.shape else (v, [], [])
        if then[0].shape != v.shape:
            return _outside(b, then)
    graphs = [_body(b, v, *part) for part in (then, other)]
    condition = b.store(np.array(b.flip())) if b.flip() else "flag"
    return then[0]._replace(name=b.node("If", condition, then_branch=graphs[0], else_branch=graphs[1]))


def _outside(b: Builder, part: tuple[Value, list[onnx.NodeProto], list[TensorProto]]) -> Value:
    b.nodes.extend(part[1])
    b.stored.extend(part[2])
    return part[0]


@step(IMAGE, SEQUENCE, MATRIX)
def loop(b: Builder, v: Value) -> Value:
    """Loop: a step that keeps the shape, twice."""
    if b.nested:
        return v
    state = v._replace(name=b.fresh("state"))
    part = _inside(b, state, _table(v))
    if part[0].shape != v.shape:
        part = (v._replace(name=state.name), [], [])
    body = _body(b, state, *part)
    go = b.fresh("go")
    body.node.append(helper.make_node("Identity", [f"{go}_in"], [go]))
    given = [(f"{go}_i", TensorProto.INT64, ()), (f"{go}_in", TensorProto.BOOL, ())]
    body.input.extend(helper.make_tensor_value_info(*one) for one in given)
    body.input.append(_info(b, state))
    body.output.insert(0, helper.make_tensor_value_info(go, TensorProto.BOOL, ()))
    return v._replace(name=b.node("Loop", b.store(np.int64(2)), b.store(np.array(True)), v.name, body=body))


@step(SEQUENCE)
def scan(b: Builder, v: Value) -> Value:
    """Scan: a product at each step of the sequence, and a state that sums up."""
    if b.nested:
        return v
    now, state = b.fresh("now"), b.fresh("state")
    part = _inside(b, Value(now, (v.shape[0], v.channels)), {"gemm": gemm, "matmul": matmul, "activation": activation})
    body = _body(b, v, *part)
    more = b.fresh("more")
    body.node.append(helper.make_node("Add", [state, body.output[0].name], [more]))
    body.input.extend(_info(b, v._replace(name=name, shape=(0, 0))) for name in (state, now))
    body.output.insert(0, _info(b, Value(more, (0, 0))))
    width = part[0].channels
    first = b.node(
        "Expand",
        b.store(np.zeros((1, width), b.dtype)),
        b.node("Concat", b.node("Shape", v.name, end=1), b.ints(width), axis=0),
    )
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    name = b.node("Scan", first, v.name, outputs=2, body=body, num_scan_inputs=1, **axes)
    return v.with_channels(f"{name}b", width)


@step(IMAGE, SEQUENCE, MATRIX)
def function(b: Builder, v: Value) -> Value:
    """A step in a model-local function, called once or twice."""
    if b.nested:
        return v
    formal = v._replace(name=b.fresh("formal"))
    done, nodes, stored = _inside(b, formal, _table(v))
    if any(node.op_type in {"If", "Loop", "Scan"} for node in nodes) or done.name == formal.name:
        return v
    free = {name for node in nodes for name in node.input if name}
    names = [tensor.name for tensor in stored if tensor.name in free]
    constants = [t for t in stored if t.data_type == TensorProto.INT64]
    names = [name for name in names if name not in {t.name for t in constants}]
    held = [helper.make_node("Constant", [], [t.name], value=t) for t in constants]
    called = b.fresh("Step")
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
    b.functions.append(
        helper.make_function("own", called, [formal.name, *names], [done.name], [*held, *nodes], opsets)
    )
    b.stored.extend(t for t in stored if t.name in names)
    name = b.node(called, v.name, *names, domain="own")
    if done.shape == v.shape and b.flip():
        name = b.node(called, name, *names, domain="own")
    return done._replace(name=name)


# ------------------------------------------------------------------ whole graphs


def _table(v: Value) -> dict[str, Step]:
    return IMAGE if len(v.shape) > 3 else SEQUENCE if len(v.shape) == 3 else MATRIX


def _take(b: Builder, v: Value, table: dict[str, Step]) -> Value:
    name = b.pick(*table)
    b.steps.append(name)
    done = table[name](b, v)
    b.seen.append(done)
    return done


HEAVY = {
    id(IMAGE): ("conv", "conv", "conv", "batch_norm", "conv_transpose", "squeeze_excite"),
    id(SEQUENCE): ("matmul", "matmul", "attention", "recurrent", "feed_forward"),
    id(MATRIX): ("gemm", "gemm", "matmul"),
}
"""Steps with weights: every other step is one of them."""


@st.composite
def chains(draw: Callable[[Any], Any], longest: int = 7) -> Graph:
    """A chain of steps, its last value an output, and sometimes one on the way, too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["float32", "float32", "float32", "float16", "float64"]))
    images = ["image"] * 2 * (kind != "float64")  # onnxruntime has no kernels
    family = draw(st.sampled_from(["matrix", "sequence", *images]))
    choices: list[frozenset[str]] = [frozenset(), frozenset({"batch"}), frozenset({"batch", "size"})]
    b = Builder(draw, np.dtype(kind), rng, draw(st.sampled_from(choices)))
    shape = {"image": (BATCH, 3, 4, 4), "sequence": (BATCH, 5, 4), "matrix": (BATCH, 6)}[family]
    dims: list[Any] = list(shape)
    if "batch" in b.open:
        dims[0] = "N"
    if "size" in b.open and family != "matrix":
        dims[2 if family == "image" else 1] = "L"
    v = Value("x", shape)
    b.seen.append(v)
    for index in range(draw(st.integers(2, longest))):
        table = _table(v)
        heavy = {name: table[name] for name in HEAVY[id(table)]}
        v = _take(b, v, heavy if index % 2 == 0 else table)
    outputs = [v]
    if len(b.seen) > 3 and draw(st.booleans()):
        outputs.append(b.pick(*b.seen[1:]))
    inputs = [helper.make_tensor_value_info("x", TYPES[kind], dims)]
    feed = {"x": rng.normal(size=shape).astype(kind)}
    if any("flag" in node.input for node in b.nodes):
        inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, ()))
        feed["flag"] = np.array(bool(draw(st.booleans())))
    outputs = [u for u in dict.fromkeys(outputs) if u.name != "x"] or [v._replace(name=b.node("Identity", "x"))]
    infos = [_info(b, u) for u in outputs]
    graph = helper.make_graph(b.nodes, "g", inputs, infos, b.stored)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
    opsets += [helper.make_opsetid("own", 1)] * bool(b.functions)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=b.functions)
    return Graph(model, feed, (kind, *sorted(b.open), *b.steps), b.rough)


@cache
def atoms() -> dict[str, list[tuple[onnx.ModelProto, list[np.ndarray]]]]:
    """ONNX's own cases of one node whose first operand is a tensor of real numbers, by operator."""
    from test_backend_cases import cases

    found: dict[str, list[tuple[onnx.ModelProto, list[np.ndarray]]]] = {}
    for model, inputs, _ in cases().values():
        arrays = all(isinstance(value, (np.ndarray, np.generic)) for value in inputs)
        if len(model.graph.node) != 1 or not arrays or not inputs or len(model.graph.input) != len(inputs):
            continue
        if model.graph.node[0].op_type in {"Scan", "Upsample"}:  # of old operator sets only
            continue
        first = np.asarray(inputs[0])
        if first.dtype == np.float32 and 2 <= first.ndim <= 5 and 0 < first.size < 4000 and first.shape[-1] > 1:
            found.setdefault(model.graph.node[0].op_type, []).append((model, [np.asarray(i) for i in inputs]))
    return found


@st.composite
def sandwiches(draw: Callable[[Any], Any]) -> Graph:
    """One of ONNX's cases between two products or two convolutions, all its operands but the first stored."""
    table = atoms()
    op = draw(st.sampled_from(sorted(table)))
    model, inputs = draw(st.sampled_from(table[op]))
    return sandwich(model, inputs, np.random.default_rng(draw(st.integers(0, 2**16))), draw(st.sampled_from("12")))


def sandwich(model: onnx.ModelProto, inputs: Sequence[np.ndarray], rng: np.random.Generator, along: str) -> Graph:
    """A case of one node with a layer before and one behind: along the last axis, or by convolutions."""
    node, first = model.graph.node[0], inputs[0]
    convolve = along == "2" and first.ndim >= 3
    axis = 1 if convolve else first.ndim - 1
    given = list(first.shape)
    given[axis] = 3
    ones = [1] * (first.ndim - 2)
    size = first.shape[axis]
    weight = rng.uniform(-1, 1, (size, 3, *ones) if convolve else (3, size)).astype(np.float32)
    op = "Conv" if convolve else "MatMul"
    name = model.graph.input[0].name
    nodes = [helper.make_node(op, ["before", "w_before"], [name]), node]
    stored = [numpy_helper.from_array(weight, "w_before")]
    stored += [numpy_helper.from_array(a, v.name) for v, a in zip(model.graph.input[1:], inputs[1:], strict=True)]
    outputs = list(model.graph.output)
    kind = outputs[0].type.tensor_type
    sizes = [d.dim_value for d in kind.shape.dim]
    if kind.elem_type == TensorProto.FLOAT and len(sizes) >= (3 if convolve else 2) and all(sizes):
        behind = sizes[1] if convolve else sizes[-1]
        shape = (2, behind, *[1] * (len(sizes) - 2)) if convolve else (behind, 2)
        stored.append(numpy_helper.from_array(rng.uniform(-1, 1, shape).astype(np.float32), "w_behind"))
        nodes.append(helper.make_node(op, [outputs[0].name, "w_behind"], ["result"]))
        outputs[0] = helper.make_tensor_value_info("result", TensorProto.FLOAT, [None] * len(sizes))
    info = [helper.make_tensor_value_info("before", TensorProto.FLOAT, given)]
    graph = helper.make_graph(nodes, "g", info, outputs, stored)
    opsets = {o.domain: o.version for o in model.opset_import}
    since = defs.get_schema(node.op_type, opsets.get("", OPSET), node.domain).since_version if not node.domain else 0
    opsets[""] = max(since, OPSET)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, n) for d, n in opsets.items()], ir_version=10)
    feed = {"before": rng.uniform(0.1, 1, given).astype(np.float32)}
    return Graph(made, feed, (op, node.op_type), True)


def graphs() -> st.SearchStrategy[Graph]:
    """Three chains for each sandwich."""
    return st.one_of(chains(), chains(), chains(), sandwiches())
