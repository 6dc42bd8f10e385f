"""What random graphs are built with: values, nodes, and weights stored in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

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
