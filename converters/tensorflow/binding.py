"""Which initializer of an ONNX graph is which Keras variable: exported once, unfolded; then only weights move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import keras
import numpy as np
import onnx
import onnx_ir as ir
import tensorflow as tf
from onnx import numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import Model, ModelSource, graphs, load
from onnxprune.graph.weights import Skipped, Weight, find

from ..channels import Channels
from . import layers
from .convert import convert, rename
from .layers import VariableStorage, variable_names


@dataclass(frozen=True, eq=False)
class Binding:
    """The correspondence between a Keras model and its ONNX graph.

    Attributes:
        model: the unfolded graph: every variable an initializer under its path, in its own layout, with the values of
            the last `pull`.
        variables: initializer name -> Keras variable, of every variable that the graph reads.
        weights: the weights among them in the roles the graph gives them; their storages are the variables.
        skipped: what is left alone, with reasons.
        source: the Keras model.
        example_inputs: what it was called with, where that was given.
    """

    model: Model = field(repr=False)
    variables: Mapping[str, Any]
    weights: tuple[Weight, ...]
    skipped: tuple[Skipped, ...]
    source: Any = field(repr=False)
    example_inputs: Any = field(repr=False)

    @cached_property
    def channels(self) -> Channels:
        """The groups of channels of the graph; what is decided about them is decided with the variables' values.

        Raises:
            PruneError: no operator of the graph can be followed.
        """
        names = [value.name for value in self.model.proto.graph.input]
        example = self._example()
        shapes = {} if example is None else {n: a.shape for n, a in zip(names, example, strict=True)}
        path = {name: name for name in self.variables}
        return Channels.of(
            self.model, shapes, self.weights, path, lambda name: VariableStorage(self.variables[name]).read()
        )

    def shrink(self, model: Any = None) -> Any:
        """A new model without the channels whose variables are all zero, on which training goes on.

        The layers are rebuilt from their configurations with fewer units, filters, groups or heads, and get the weights
        that are left. What the new model computes is compared with the old one, and with the graph that is cut the same
        way, under onnxruntime. It is not compiled.

        Args:
            model: the model that is bound; for readability.

        Returns:
            The new model; the bound one is as it was.

        Raises:
            PruneError: another model is given, or it is neither functional nor Sequential; a layer cannot be rebuilt;
                the new model computes something else.
        """
        from .shrinking import shrink  # it needs this module's signature

        if model is not None and model is not self.source:
            raise PruneError(f"the binding is of another model, '{self.source.name}'; bind the model to be shrunk")
        specs = signature(self.source, self.example_inputs)
        return shrink(self.source, self.channels, self.variables, specs, self._example())

    def _example(self) -> list[np.ndarray] | None:
        if self.example_inputs is None:
            return None
        specs = tf.nest.flatten(signature(self.source, self.example_inputs))
        arrays = tf.nest.flatten(self.example_inputs)
        return [np.asarray(a, spec.dtype.as_numpy_dtype) for a, spec in zip(arrays, specs, strict=True)]

    def pull(self) -> onnx.ModelProto:
        """Refresh the graph's initializers from the variables, and give a copy of the model.

        Raises:
            PruneError: a variable changed its shape.
        """
        for name, tensor in self._initializers():
            current = VariableStorage(self.variables[name]).read()
            self._check(name, current, "the Keras model")
            self.model.edit(tensor, partial(_replaced, current))
        return self.model.to_proto()

    def push(self, source: ModelSource) -> Masks:
        """Write a model's weights back into the variables.

        Args:
            source: what `model` became after pruning, the same graph with other values.

        Returns:
            The masks by weight: what is not zero there is kept. `reimport` holds them.

        Raises:
            PruneError: it is another graph, so that names prove nothing, or a tensor has another shape or type, or
                holds NaN. The Keras model is unchanged.
        """
        theirs = load(source)
        if difference := self.difference(theirs):
            raise PruneError(
                f"the model is not the bound graph with other weights: {difference}. Names prove nothing there; use "
                "onnxprune.converters.tensorflow.reimport, which matches weights by their values"
            )
        new: dict[str, np.ndarray] = {}
        called = dict(zip(_structure(self.model)[1], _structure(theirs)[1], strict=True))
        for name, _ in self._initializers():
            value = theirs.graph.graph.initializers.get(called[name])
            if value is None or value.const_value is None:
                raise PruneError(f"the model has no initializer '{called[name]}'; push a model made from binding.model")
            new[name] = theirs.read(value.const_value)
            self._check(name, new[name], "the model pushed")
            if new[name].dtype.kind not in "biu" and np.isnan(new[name].astype(np.float32, copy=False)).any():
                raise PruneError(f"initializer '{name}' {list(new[name].shape)} holds NaN; nothing was written")
        for name, values in new.items():
            self.variables[name].assign(values)
        return Masks({weight.name: new[weight.name] != 0 for weight in self.weights})

    def difference(self, theirs: Model) -> str:
        """The first difference between a graph's nodes and the bound one's, names aside; empty where there is none."""
        mine, other = _structure(self.model)[0], _structure(theirs)[0]
        if len(mine) != len(other):
            return f"it has {len(other)} nodes, the bound one {len(mine)}"
        for index, (a, b) in enumerate(zip(mine, other, strict=True)):
            if a != b:
                return f"its node {index} is a {b[0]} that reads or writes other values than the bound graph's {a[0]}"
        return ""

    def _initializers(self) -> Iterator[tuple[str, ir.TensorProtocol]]:
        for name in self.variables:
            tensor = self.model.graph.graph.initializers[name].const_value
            assert tensor is not None
            yield name, tensor

    def _check(self, name: str, values: np.ndarray, what: str) -> None:
        bound = self.model.graph.graph.initializers[name].const_value
        assert bound is not None
        shape, dtype = tuple(bound.shape.numpy()), np.dtype(bound.dtype.numpy())
        if values.shape != shape or values.dtype != dtype:
            raise PruneError(
                f"variable '{name}' is bound as {dtype.name}{list(shape)}, but {what} has {values.dtype.name}"
                f"{list(values.shape)} for it; bind again after changing the model"
            )


def bind(model: Any, example_inputs: Any = None) -> Binding:
    """Export a Keras model once, unfolded, and say which initializer is which variable.

    Args:
        model: a Keras 3 model; Functional and Sequential models need no example.
        example_inputs: what the model is called with, for a subclassed model.

    Raises:
        PruneError: the model cannot be exported, or has never been built.
    """
    check_backend()
    specs = signature(model, example_inputs)
    proto, variables = _unfolded(model, specs)
    graph = load(proto)
    found, skipped = find(graph)
    weights = []
    for weight in found:
        if weight.name in variables:
            described, reason = layers.described(weight, model, variables[weight.name])
            if reason:
                skipped.append(Skipped(weight.name, weight.op_type, reason))
            else:
                weights.append(described)
        elif weight.op_type != "Embedding":
            skipped.append(Skipped(weight.name, weight.op_type, "it is a constant of the model, not a variable"))
    return Binding(graph, variables, tuple(weights), tuple(skipped), model, example_inputs)


def check_backend() -> None:
    """Refuse the backends whose models hold no TensorFlow variables."""
    if keras.backend.backend() != "tensorflow":
        backend = keras.backend.backend()
        raise PruneError(f"Keras runs on the {backend} backend; set KERAS_BACKEND=tensorflow before importing it")


def signature(model: Any, example_inputs: Any = None) -> Any:
    """What the model is called with: TensorSpecs in its structure of inputs, the batch of any size.

    Raises:
        PruneError: neither the model nor an example says it.
    """
    if example_inputs is not None:
        if not model.built:
            model(example_inputs)
        return tf.nest.map_structure(_spec, example_inputs)
    structure = getattr(model, "_inputs_struct", None)
    if structure is None:
        inputs = getattr(model, "inputs", None)
        if not inputs:
            raise PruneError(f"the model '{model.name}' does not say what it is called with; give example inputs")
        structure = inputs[0] if len(inputs) == 1 else inputs
    return tf.nest.map_structure(lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), structure)


def _spec(array: Any) -> Any:
    array = array if hasattr(array, "shape") and hasattr(array, "dtype") else np.asarray(array)
    if not len(array.shape):
        raise PruneError("an example input is a scalar; the first axis of every input is the batch")
    return tf.TensorSpec((None, *array.shape[1:]), tf.as_dtype(array.dtype))


def input_names(model: Any, count: int) -> list[str]:
    """Names of the graph's inputs: Keras' own where it has them."""
    inputs = getattr(model, "inputs", None) or []
    return _unique([t.name for t in inputs]) if len(inputs) == count else [f"input_{i}" for i in range(count)]


def output_names(model: Any, count: int) -> list[str]:
    """Names of the graph's outputs: Keras' own where it has them."""
    names = list(getattr(model, "output_names", None) or [])
    return _unique(names) if len(names) == count else [f"output_{i}" for i in range(count)]


def _unfolded(model: Any, specs: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model with its variables as inputs of the traced function, which become initializers afterwards."""
    flat = tf.nest.flatten(specs)
    unique = variable_names(model)
    variables = list({id(variable): variable for variable in model.variables}.values())

    def call(*args: Any) -> list[Any]:
        structured = tf.nest.pack_sequence_as(specs, list(args[: len(flat)]))
        with keras.StatelessScope(state_mapping=list(zip(variables, args[len(flat) :], strict=True))):
            outputs = model(structured, training=False)
        return [tf.identity(tensor) for tensor in tf.nest.flatten(outputs)]

    arguments = [tf.TensorSpec(spec.shape, spec.dtype, name=f"x{i}") for i, spec in enumerate(flat)]
    arguments += [tf.TensorSpec(v.shape, v.dtype, name=f"w{i}") for i, v in enumerate(variables)]
    proto = convert(call, arguments)
    graph = proto.graph
    paths = [unique[id(variable)] for variable in variables]
    table = {f"w{i}": path for i, path in enumerate(paths)}
    inputs = input_names(model, len(flat))
    table |= {f"x{i}": name for i, name in enumerate(inputs)}
    outputs = [output.name for output in graph.output]
    table |= dict(zip(outputs, _apart(output_names(model, len(outputs)), table), strict=True))
    rename(graph, table)
    used = {name for inner in graphs(proto) for node in inner.node for name in node.input}
    bound: dict[str, Any] = {}
    for path, variable in zip(paths, variables, strict=True):
        if path in used:
            graph.initializer.append(numpy_helper.from_array(variable.numpy(), path))
            bound[path] = variable
    kept = [value for value in graph.input if value.name in inputs]
    del graph.input[:]
    graph.input.extend(kept)
    onnx.checker.check_model(proto)
    return proto, bound


def _structure(model: Model) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """Every node with its values, numbered as they appear, and their names: Keras names a second model otherwise."""
    numbers: dict[str, int] = {}
    nodes = []
    for graph in graphs(model.proto):
        for node in graph.node:
            values = [numbers.setdefault(name, len(numbers)) for name in (*node.input, "", *node.output)]
            nodes.append((f"{node.domain}.{node.op_type}".lstrip("."), values))
    return nodes, list(numbers)


def _replaced(current: np.ndarray, values: np.ndarray) -> np.ndarray:
    return current


def _apart(names: list[str], table: Mapping[str, str]) -> list[str]:
    """Outputs named apart from inputs and variables."""
    taken = set(table.values())
    return [f"{name}__out" if name in taken else name for name in names]


def _unique(names: list[str]) -> list[str]:
    count: dict[str, int] = {}
    unique = []
    for name in names:
        count[name] = count.get(name, 0) + 1
        unique.append(name if count[name] == 1 else f"{name}__{count[name] - 1}")
    return unique
