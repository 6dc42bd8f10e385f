"""A torch module and its ONNX graph, bound: which initializer is which parameter.

The graph is exported once, unfolded, so that every parameter is an initializer in its own layout; after that
only weights move.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import PROTOBUF_LIMIT, Model, ModelSource, load
from onnxprune.graph.weights import Skipped, Weight
from onnxprune.graph.weights import find as find_weights

from ..channels import Channels
from . import exporting, layers
from .hold import Place
from .layers import Buffer, Site
from .shrinking import Optimizers, Shrunk, shrink


@dataclass(frozen=True, eq=False)
class Binding:
    """The correspondence between a module and its graph.

    Attributes:
        model: the graph, unfolded; its initializers have the values of the last `pull`.
        weights: the module's weights in the roles that the graph gives them; named and stored as the parameters are.
        skipped: weights of the graph or the module that are left alone, with the reason.
        names: initializer -> parameter or buffer (the first of its dotted names).
        unbound: parameters that the graph does not read.
        module: the module.
        example_inputs: what it was traced with.
        sources: initializer -> where its parameter or buffer stands.
    """

    model: Model = field(repr=False)
    weights: tuple[Weight, ...] = field(repr=False)
    skipped: tuple[Skipped, ...]
    names: dict[str, str]
    unbound: tuple[str, ...]
    module: nn.Module = field(repr=False)
    example_inputs: Any = field(repr=False)
    sources: dict[str, Site | Buffer] = field(repr=False)

    @cached_property
    def channels(self) -> Channels:
        """The groups of channels of the graph; what is decided about them is decided with the module's values.

        Raises:
            PruneError: no operator of the graph can be followed.
        """
        feeds = exporting.feeds(self.model, self.example_inputs)
        shapes = {name: array.shape for name, array in feeds.items()}
        return Channels.of(self.model, shapes, self.weights, self.names, lambda name: self.sources[name].read())

    def shrink(self, model: nn.Module | None = None, optimizer: Optimizers = None) -> Shrunk:
        """Cut the channels out of the live module whose parameters are all zero, so that training goes on smaller.

        Parameters, buffers, the attributes that record their sizes and the optimizer's state become smaller; modules
        and the keys of the state_dict stay. What the module computes is compared with what it computed before, and with
        the graph that is cut the same way, under onnxruntime. Afterwards the binding is of no more use: bind again.

        Args:
            model: the module that is bound; for readability.
            optimizer: one or several, whose momenta and averages are cut too.

        Returns:
            The groups and how much smaller the module is.

        Raises:
            PruneError: another module is given; an optimizer's state cannot be cut; the module's code or its class
                hard-wires a size. The module is as it was.
        """
        if model is not None and exporting.unwrap(model) is not self.module:
            raise PruneError(f"the binding is of another {type(self.module).__name__}; bind the module to be shrunk")
        return shrink(self.module, self.example_inputs, self.channels, self.sources, optimizer)

    def pull(self) -> onnx.ModelProto:
        """Refresh the graph's initializers from the module, and give a copy of the model.

        Raises:
            PruneError: a parameter changed its shape or type.
        """
        for name, value in self._initializers():
            current = self.sources[name].read()
            self._check(name, current)
            self.model.edit(value, partial(_replaced, current))
        return self.model.to_proto()

    def push(self, source: ModelSource) -> Masks:
        """Write a model's weights back into the module.

        Args:
            source: what `model` became after pruning, the same graph with other values: a path, an onnx.ModelProto
                or an onnx_ir.Model.

        Returns:
            The masks by parameter name: what is not zero there is kept.

        Raises:
            PruneError: it is another graph, so that names and layouts prove nothing; or a tensor has another shape or
                type, or holds NaN. The module is unchanged.
        """
        theirs = load(source)
        what = f"'{os.fspath(source)}'" if isinstance(source, (str, os.PathLike)) else "the model"
        difference = _structure(self.model.graph, theirs.graph)
        if difference:
            raise PruneError(
                f"{what} is not the bound graph with other weights: {difference}. Names prove nothing there; use "
                "onnxprune.converters.torch.reimport, which matches weights by their values"
            )
        new: dict[str, np.ndarray] = {}
        for name, _ in self._initializers():
            value = theirs.graph.graph.initializers.get(name)
            if value is None or value.const_value is None:
                raise PruneError(
                    f"{what} has no initializer '{name}', which is the parameter '{self.names[name]}'; push a "
                    "model made from binding.model"
                )
            values = theirs.read(value.const_value)
            self._check(name, values, what)
            if values.dtype.kind not in "biu" and np.isnan(values.astype(np.float32, copy=False)).any():
                raise PruneError(f"initializer '{name}' {list(values.shape)} of {what} holds NaN; nothing was written")
            new[name] = values
        with torch.no_grad():
            for name, values in new.items():
                self.sources[name].write(values)
        pruned = {self.names[name]: values != 0 for name, values in new.items()}
        return Masks({weight.name: pruned[weight.name] for weight in self.weights})

    def _initializers(self) -> Iterator[tuple[str, ir.TensorProtocol]]:
        for name in self.names:
            value = self.model.graph.graph.initializers[name].const_value
            assert value is not None
            yield name, value

    def _check(self, name: str, values: np.ndarray, what: str = "the module") -> None:
        bound = self.model.graph.graph.initializers[name].const_value
        assert bound is not None
        shape, dtype = tuple(bound.shape.numpy()), np.dtype(bound.dtype.numpy())
        if values.shape != shape or values.dtype != dtype:
            raise PruneError(
                f"initializer '{name}' is {dtype.name}{list(shape)}, but {what} has "
                f"{values.dtype.name}{list(values.shape)} for it (parameter '{self.names[name]}'); bind "
                "again after changing the module"
            )


_STATIC = (nn.RNNBase, nn.Bilinear)
"""Modules whose weights an exported graph cuts and reshapes by the sizes of its inputs: those have to be known."""


def bind(model: nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None) -> Binding:
    """Bind a module to its graph.

    Args:
        model: in any mode, wrapped or not; unchanged.
        example_inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        dynamic_shapes: as torch.onnx.export takes them; by default the batch has any size, where that can be had
            (and the weights still be followed to their operators: not with recurrent layers).

    Raises:
        PruneError: it cannot be exported; a parameter has no values; the model is larger than 2 GB.
    """
    module = exporting.unwrap(model)
    known = layers.sites(module)
    total = sum(site.value.numel() * site.value.element_size() for site in known)
    if total > PROTOBUF_LIMIT:
        raise PruneError(
            f"the {type(module).__name__} has {total / 2**30:.1f} GB of parameters, and a graph in memory "
            "holds 2; call the pruner without example_inputs"
        )
    if dynamic_shapes is None and any(isinstance(m, _STATIC) for m in module.modules()):
        dynamic_shapes = exporting.STATIC
    graph = exporting.export(module, example_inputs, optimize=False, dynamic_shapes=dynamic_shapes)
    found, untraced = find_weights(graph)
    seen = {weight.name for weight in found}
    hidden = any(not seen & weight.names for weight in layers.find(module)[0])
    if dynamic_shapes is None and (
        hidden or untraced
    ):  # a batch of any size may stand between a weight and its operator
        static = exporting.export(module, example_inputs, optimize=False, dynamic_shapes=exporting.STATIC)
        more, rest = find_weights(static)
        if len(more) > len(found):
            graph, found, untraced = static, more, rest
    sources: dict[str, Site | Buffer] = {alias: site for site in known for alias in site.aliases}
    for path, owner in module.named_modules():
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                name = f"{path}.{attribute}" if path else attribute
                sources[name] = Buffer(name, Place.of(module, name))
    names: dict[str, str] = {}
    for name, value in graph.graph.graph.initializers.items():
        if name in sources and value.const_value is not None:
            if not _same(sources[name].read(), graph.read(value.const_value)):
                raise PruneError(
                    f"the exporter gave initializer '{name}' other values than the parameter of that name has; "
                    "the module cannot be bound. Does its forward change its parameters?"
                )
            names[name] = sources[name].name
    bound = set(names.values())
    unbound = tuple(site.name for site in known if site.name not in bound)
    weights, skipped = _roles(module, found, untraced, names, {s.name: s for s in known})
    return Binding(
        graph,
        tuple(weights),
        tuple(skipped),
        names,
        unbound,
        module,
        example_inputs,
        {name: sources[name] for name in names},
    )


def _roles(
    module: nn.Module, found: list[Weight], untraced: list[Skipped], names: dict[str, str], known: dict[str, Site]
) -> tuple[list[Weight], list[Skipped]]:
    """The graph's weights, stored in the module from now on, and with the names that the module gives them."""
    skipped = [replace(entry, name=names.get(entry.name, entry.name)) for entry in untraced]
    refused = {entry.name: entry for entry in layers.refusals(module)}
    parts = layers.attention_parts(module)
    weights: list[Weight] = []
    for weight in found:
        site = known.get(names.get(weight.name, ""))
        if site is None:
            if weight.op_type != "Embedding":
                reason = "it is a buffer or a constant of the module, not a parameter"
                skipped.append(Skipped(names.get(weight.name, weight.name), weight.op_type, reason))
            continue
        reason = next((refused[alias].reason for alias in site.aliases if alias in refused), "")
        reason = reason or layers.obstacle(site.value)
        if reason:
            skipped.append(Skipped(site.name, weight.op_type, reason))
            continue
        types, labels = layers.labels(site, weight.op_types, parts)
        weights.append(replace(weight, name=site.name, op_types=types, names=weight.names | labels, storage=site))
    said = {w.name for w in weights} | {s.name for s in skipped}
    skipped += [entry for name, entry in refused.items() if name not in said]
    said |= set(refused)
    for weight in layers.find(module)[0]:
        if not said & set(known[weight.name].aliases):
            reason = "the exported graph does not read it for the example inputs"
            skipped.append(Skipped(weight.name, weight.op_type, reason))
    return weights, skipped


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal to the bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(
        np.ascontiguousarray(a).reshape(-1).view(np.uint8), np.ascontiguousarray(b).reshape(-1).view(np.uint8)
    )


def _replaced(current: np.ndarray, values: np.ndarray) -> np.ndarray:
    return current


def _structure(ours: ir.Model, theirs: ir.Model) -> str:
    """The first difference between two graphs' nodes, attributes aside from their names; empty where there is none."""
    mine, other = list(ours.graph), list(theirs.graph)
    if len(mine) != len(other):
        return f"it has {len(other)} nodes, the bound one {len(mine)}"
    for a, b in zip(mine, other, strict=True):
        same = (a.domain, a.op_type) == (b.domain, b.op_type) and _values(a) == _values(b)
        if not same or not _attributes_equal(a, b):
            return f"node '{b.name}' ({b.op_type}) stands where the bound one has '{a.name}' ({a.op_type})"
    return ""


def _values(node: ir.Node) -> list[str | None]:
    return [None if v is None else v.name for v in (*node.inputs, *node.outputs)]


def _attributes_equal(a: ir.Node, b: ir.Node) -> bool:
    if a.attributes.keys() != b.attributes.keys():
        return False
    for key, attribute in a.attributes.items():
        simple = attribute.type not in (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        if simple and attribute.value != b.attributes[key].value:
            return False
    return True


__all__ = ["Binding", "bind"]
