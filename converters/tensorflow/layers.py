"""Keras layers as weights in roles, without a graph.

The table says which variable of which layer feeds which ONNX operator, and how the variable becomes the operand that
the exported operator sees; from there the core's own roles go on. Masks are therefore those of an exported file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import tensorflow as tf

from onnxprune.graph.roles import ROLES
from onnxprune.graph.weights import Skipped, Weight, parameter

Array = np.ndarray
Operand = Callable[[Array], Array]
"""Takes an array in a variable's layout, returns it as the ONNX operator's operand."""

FLOATS = {"float16", "bfloat16", "float32", "float64"}


def _same(x: Array) -> Array:
    """(inputs, outputs) or (vocabulary, features)."""
    return x


def _conv(x: Array) -> Array:
    """(*k, inputs, outputs) to Conv's, and (*k, outputs, inputs) to ConvTranspose's."""
    return _two_axes(np.moveaxis(x, (-1, -2), (0, 1)))


def _depthwise(x: Array) -> Array:
    """(*k, channels, multiplier) to (channels * multiplier, 1, *k)."""
    return _conv(x.reshape(*x.shape[:-2], 1, -1))


def _two_axes(x: Array) -> Array:
    """Convolutions over one axis are exported with an axis of length 1 before it."""
    return x[:, :, None] if x.ndim == 3 else x


def _einsum(layer: Any) -> Operand:
    """An einsum's kernel as the matrix (contracted axes, output axes), after axes that all three share."""
    left, output = layer.equation.replace(" ", "").split("->")
    data, kernel = left.split(",")
    shared = [axis for axis, letter in enumerate(kernel) if letter in data and letter in output]
    inputs = [axis for axis, letter in enumerate(kernel) if letter in data and letter not in output]
    outputs = [axis for axis, letter in enumerate(kernel) if letter not in data]

    def operand(x: Array) -> Array:
        moved = x.transpose(*shared, *inputs, *outputs)
        batch, rest = moved.shape[: len(shared)], moved.shape[len(shared) :]
        matrix: Array = moved.reshape(*batch, int(np.prod(rest[: len(inputs)])), int(np.prod(rest[len(inputs) :])))
        return matrix

    return operand


@dataclass(frozen=True)
class Rule:
    """One variable of a layer: the ONNX operator it feeds, and how."""

    op_type: str
    operand: Operand | None = None
    """None where the layer's equation says it."""


_L = keras.layers
_DENSE = {"kernel": Rule("MatMul", _same)}
_CONV = {"kernel": Rule("Conv", _conv)}
_CELL = {"kernel": Rule("MatMul", _same), "recurrent_kernel": Rule("MatMul", _same)}

RULES: list[tuple[tuple[type, ...], dict[str, Rule]]] = [
    ((_L.Dense,), _DENSE),
    ((_L.EinsumDense,), {"kernel": Rule("MatMul")}),
    ((_L.Conv1D, _L.Conv2D, _L.Conv3D), _CONV),
    ((_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose), {"kernel": Rule("ConvTranspose", _conv)}),
    ((_L.DepthwiseConv1D, _L.DepthwiseConv2D), {"kernel": Rule("Conv", _depthwise)}),
    (
        (_L.SeparableConv1D, _L.SeparableConv2D),
        {"depthwise_kernel": Rule("Conv", _depthwise), "pointwise_kernel": Rule("Conv", _conv)},
    ),
    ((_L.LSTMCell, _L.GRUCell, _L.SimpleRNNCell), _CELL),
    ((_L.Embedding,), {"embeddings": Rule("Gather", _same), "reverse_embeddings": Rule("MatMul", _same)}),
]
"""Layer classes and their weights; the first row whose class a layer is an instance of counts."""

_CONV_LSTM = {"kernel": Rule("Conv", _conv), "recurrent_kernel": Rule("Conv", _conv)}
_CELLS = {"LSTMCell": ("LSTM",), "GRUCell": ("GRU",), "SimpleRNNCell": ("SimpleRNN", "RNN")}


@dataclass(frozen=True, eq=False)
class VariableStorage:
    """A Keras variable as a weight's storage."""

    variable: Any

    def read(self) -> Array:
        """The values, not copied; they must not be written to."""
        array: Array = tf.convert_to_tensor(self.variable.value).__array__()
        return array


def layer_weights(model: Any) -> tuple[list[Weight], list[Skipped], dict[str, Any]]:
    """The weights of a built Keras model, each once, in the order of its layers.

    Returns:
        The weights, what is left alone with the reason, and weight name -> Keras variable.
    """
    names = variable_names(model)
    weights: list[Weight] = []
    skipped: list[Skipped] = []
    variables: dict[str, Any] = {}
    seen: set[int] = set()
    for layer, owners in walk(model):
        rules = _rules(layer)
        for variable in _own(layer):
            rule = rules.get(variable.name)
            if id(variable) in seen or (rule is None and not any(v is variable for v in layer._trainable_variables)):
                continue
            seen.add(id(variable))
            name = names[id(variable)]
            reason = _reason(layer, variable, rule)
            if reason:
                skipped.append(Skipped(name, type(layer).__name__, reason))
            elif rule is not None:
                variables[name] = variable
                weights.append(_weight(name, variable, layer, owners, rule))
    return weights, skipped, variables


def described(weight: Weight, model: Any, variable: Any) -> tuple[Weight, str]:
    """A weight found in an exported graph with Keras' names and storage; and why it is left alone, if it is."""
    storage = VariableStorage(variable)
    for layer, owners in walk(model):
        if any(v is variable for v in _own(layer)):
            types = () if weight.op_type == "Embedding" else _types(layer, owners)
            types = tuple(dict.fromkeys((*weight.op_types, *types)))
            names = weight.names | _names(weight.name, variable, layer)
            return replace(weight, op_types=types, names=names, storage=storage), _obstacle(layer, variable)
    return replace(weight, names=weight.names | _names(weight.name, variable, None), storage=storage), ""


def variable_names(model: Any) -> dict[int, str]:
    """id of each of a model's variables -> its path, made unique: two inner models may both have a 'dense/kernel'."""
    names: dict[int, str] = {}
    count: dict[str, int] = {}
    for variable in model.variables:
        if id(variable) not in names:
            path = variable.path
            count[path] = count.get(path, 0) + 1
            names[id(variable)] = path if count[path] == 1 else f"{path}__{count[path] - 1}"
    return names


def walk(model: Any) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every layer once, those inside others included, with the class names of the layers around it, innermost first."""
    seen: set[int] = set()

    def inside(layer: Any, owners: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield layer, owners
        around = owners if isinstance(layer, keras.Model) else (type(layer).__name__, *owners)
        for inner in layer._layers:
            yield from inside(inner, around)

    yield from inside(model, ())


def _own(layer: Any) -> list[Any]:
    """A layer's own variables: a frozen layer keeps its kernel among the first, a quantised one among the others."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _rules(layer: Any) -> dict[str, Rule]:
    if type(layer).__name__ == "ConvLSTMCell" and type(layer).__module__.startswith("keras."):  # has no public name
        return _CONV_LSTM
    return next((rules for classes, rules in RULES if isinstance(layer, classes)), {})


def _reason(layer: Any, variable: Any, rule: Rule | None) -> str:
    """Why a variable is left alone; empty where it is a weight, or nothing that anybody would prune."""
    own = type(layer).__module__.startswith("keras.")
    if rule is None:
        if own or len(variable.shape) < 2:
            return ""
        return (
            f"no rule says what the variable '{variable.name}' of a {type(layer).__name__} is; "
            "call the pruner with example inputs, and the exported graph says it"
        )
    if type(layer).__name__ == "ConvLSTMCell":
        return "only the exported graph knows the order of its gates; call the pruner with example inputs"
    if variable.name == "embeddings" and getattr(layer, "tie_weights", False):
        return "it may be read in reverse as well, which its graph knows; call the pruner with example inputs"
    return _obstacle(layer, variable)


def _obstacle(layer: Any, variable: Any) -> str:
    """Why a weight cannot be pruned; empty where it can."""
    if getattr(layer, "lora_enabled", False) and variable.name in {"kernel", "embeddings"}:
        return "LoRA adds to it whatever it is, so that its zeros are none in use; merge the adapter before pruning"
    if str(variable.dtype) not in FLOATS:
        return f"its type {variable.dtype} cannot be pruned (floats of 16 to 64 bits can); prune before quantising"
    return ""


def _weight(name: str, variable: Any, layer: Any, owners: tuple[str, ...], rule: Rule) -> Weight:
    operand = _einsum(layer) if rule.operand is None else rule.operand
    gather = rule.op_type == "Gather"
    types = ("Embedding",) if gather else (rule.op_type, *_types(layer, owners))
    view = partial(_role, operand, ROLES["", rule.op_type][0].view)
    dtype = np.dtype(variable.dtype)
    names = _names(name, variable, layer)
    groups = int(getattr(layer, "groups", 1)) if rule.op_type == "Conv" else 1
    return parameter(
        name, tuple(dict.fromkeys(types)), VariableStorage(variable), tuple(variable.shape), dtype, view, names, groups
    )


def _role(operand: Operand, view: Callable[[Array, dict[str, Any]], Array], x: Array) -> Array:
    return view(operand(x), {})


def _types(layer: Any, owners: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a layer's class and of those around it; a recurrent cell's is the layer's that it belongs to."""
    name = type(layer).__name__
    return (*_CELLS.get(name, (name,)), *owners)


def _names(name: str, variable: Any, layer: Any) -> frozenset[str]:
    """A variable's path, every path above it, and its layer's name."""
    parts = variable.path.split("/")
    above = {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return frozenset({name, *above} | ({layer.name} if layer is not None else set()))
