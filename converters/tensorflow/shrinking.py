"""A Keras model rebuilt without its dead channels: the same layers, smaller, with the weights that are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from onnxprune.errors import PruneError
from onnxprune.runtime.feeds import random_feeds
from onnxprune.runtime.session import open_session
from onnxprune.structure.cutting import keep

from ..channels import Channels
from ..deploy import difference, tolerance
from . import export, layers

Shape = tuple[int, ...]


def shrink(model: Any, channels: Channels, variables: Mapping[str, Any], specs: Any, example: Any) -> Any:
    """Rebuild a model without the channels whose variables are all zero. See `Binding.shrink`.

    Args:
        model: a functional or Sequential model; it is not changed.
        channels: its groups.
        variables: initializer -> variable.
        specs: the signature of the model.
        example: arrays for its inputs, flat; random where None.

    Raises:
        PruneError: it is a model of another kind; a layer cannot be rebuilt; the new model computes something else.
    """
    if not _layered(model):
        raise PruneError(
            f"the model '{model.name}' is a {type(model).__name__}, whose code makes its layers and their sizes. Only "
            "functional and Sequential models can be rebuilt; the file that pruner.export writes is smaller all the "
            "same"
        )
    stated = {id(v) for layer, _ in layers.walk(model) for v in layer._non_trainable_variables}  # moving averages
    removed = channels.dead(lambda key: id(variables[key]) not in stated)
    alive = {id(variables[key]): axes for key, axes in channels.alive(removed).items()}

    def size(variable: Any) -> Shape:
        axes = alive.get(id(variable))
        return tuple(variable.shape) if axes is None else tuple(int(stays.sum()) for stays in axes)

    smaller = _clone(model, size)
    for old, new in zip(model.variables, smaller.variables, strict=True):
        if tuple(new.shape) != size(old):
            _refuse(model, old, tuple(new.shape), size(old))
        new.assign(keep(np.asarray(old), list(alive.get(id(old), ()))))
    _check(model, smaller, channels, removed, specs, example)
    return smaller


def _layered(layer: Any) -> bool:
    """Whether it is a model that is nothing but layers: functional ones have no public class."""
    return isinstance(layer, keras.Sequential) or (isinstance(layer, keras.Model) and hasattr(layer, "operations"))


def _clone(model: Any, size: Callable[[Any], Shape]) -> Any:
    """The model with smaller layers, their weights as they are initialised.

    Raises:
        PruneError: a layer does not fit the smaller ones before it.
    """
    reached: list[Any] = []

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        reached.append(layer)
        return layer(*args, **kwargs)

    options = {} if isinstance(model, keras.Sequential) else {"call_function": call}
    try:
        smaller = keras.models.clone_model(model, clone_function=lambda layer: _rebuilt(layer, size), **options)
        if not smaller.built:
            smaller.build(model.input_shape)
    except PruneError:
        raise
    except Exception as error:
        where = f"layer '{reached[-1].name}' ({type(reached[-1]).__name__})" if reached else f"model '{model.name}'"
        reason = " ".join(str(error).split())[:300]
        raise PruneError(
            f"{where} cannot be rebuilt with fewer channels: {reason}. Write -1 for the size that depends on them, or "
            "exclude the layers around it"
        ) from error
    return smaller


def _rebuilt(layer: Any, size: Callable[[Any], Shape]) -> Any:
    """A layer of the same configuration but for its sizes."""
    if _layered(layer):
        return _clone(layer, size)
    config = layer.get_config()
    inner = {"layer": "layer"} if isinstance(layer, keras.layers.TimeDistributed) else {}
    if isinstance(layer, keras.layers.Bidirectional):
        inner = {"layer": "forward_layer", "backward_layer": "backward_layer"}
    for key, attribute in inner.items():
        if config.get(key) is not None:
            config[key]["config"].update(sizes(getattr(layer, attribute), size))
    return type(layer).from_config({**config, **sizes(layer, size)})


def sizes(layer: Any, size: Callable[[Any], Shape]) -> dict[str, Any]:
    """What a layer's configuration says of sizes, as it is to be.

    Args:
        layer: as it is.
        size: variable -> its new shape.
    """
    kinds = keras.layers
    if isinstance(layer, kinds.Dense):
        return {"units": size(layer.kernel)[-1]}
    if isinstance(layer, (kinds.SeparableConv1D, kinds.SeparableConv2D)):
        return {"filters": size(layer.pointwise_kernel)[-1]}
    if isinstance(layer, (kinds.DepthwiseConv1D, kinds.DepthwiseConv2D)):
        return {}
    if isinstance(layer, (kinds.Conv1DTranspose, kinds.Conv2DTranspose, kinds.Conv3DTranspose)):
        return {"filters": size(layer.kernel)[-2]}
    if isinstance(layer, (kinds.Conv1D, kinds.Conv2D, kinds.Conv3D)):
        filters, before = size(layer.kernel)[-1], layer.kernel.shape[-1]
        # Groups go as a whole, or each becomes smaller.
        whole = layer.groups > 1 and size(layer.kernel)[-2] == layer.kernel.shape[-2]
        return {"filters": filters, "groups": layer.groups * filters // before if whole else layer.groups}
    if isinstance(layer, kinds.Embedding):
        return {"input_dim": size(layer.embeddings)[0], "output_dim": size(layer.embeddings)[1]}
    if isinstance(layer, (kinds.LSTM, kinds.GRU, kinds.SimpleRNN)):
        return {"units": size(layer.cell.recurrent_kernel)[0]}
    if isinstance(layer, kinds.GroupNormalization):
        scale = layer.gamma if layer.scale else layer.beta
        return {} if scale is None else {"groups": layer.groups * size(scale)[0] // scale.shape[0]}
    if isinstance(layer, kinds.GroupQueryAttention):
        query, key = size(layer._query_dense.kernel), size(layer._key_dense.kernel)
        return {"head_dim": query[2], "num_query_heads": query[1], "num_key_value_heads": key[1]}
    if isinstance(layer, kinds.MultiHeadAttention):
        return _attention(layer, size)
    if isinstance(layer, kinds.EinsumDense):
        return {"output_shape": _einsum(layer, size(layer.kernel))}
    return {}


def _attention(layer: Any, size: Callable[[Any], Shape]) -> dict[str, Any]:
    """Heads, and their widths, from kernels (inputs, heads, width); the last one is (heads, width, outputs)."""
    query, value, outputs = (d.kernel for d in (layer._query_dense, layer._value_dense, layer._output_dense))
    found: dict[str, Any] = {"num_heads": size(query)[1], "key_dim": size(query)[2], "value_dim": size(value)[2]}
    if size(outputs)[2] != outputs.shape[2]:
        found["output_shape"] = size(outputs)[2]
    return found


def _einsum(layer: Any, kernel: Shape) -> tuple[int | None, ...]:
    """The output's shape, the batch left out, with the sizes of the kernel's letters."""
    left, output = layer.equation.replace(" ", "").split("->")
    letters = dict(zip(left.split(",")[1], kernel, strict=True))
    given = layer.get_config()["output_shape"]
    given = (given,) if isinstance(given, int) else tuple(given)
    last = output.replace("...", "")[-len(given) :]
    return tuple(old if old is None else letters.get(axis, old) for axis, old in zip(last, given, strict=True))


def _refuse(model: Any, variable: Any, found: Shape, wanted: Shape) -> None:
    """Say which layer does not become as small as it should."""
    for layer, owners in layers.walk(model):
        if any(v is variable for v in (*layer._trainable_variables, *layer._non_trainable_variables)):
            inside = f", in a {owners[0]}," if owners else ""
            raise PruneError(
                f"layer '{layer.name}' ({type(layer).__name__}){inside} cannot be rebuilt: its '{variable.name}' would "
                f"be {list(found)} where {list(wanted)} is needed, and which key of its configuration says so is not "
                f"known. Exclude it ({{'op_names': ['{layer.name}'], 'exclude': True}}); the file that pruner.export "
                "writes is smaller all the same"
            )


def _check(
    model: Any, smaller: Any, channels: Channels, removed: Mapping[str, np.ndarray], specs: Any, example: Any
) -> None:
    """Hold the new model against the old one, and against the graph that is cut the same way.

    Raises:
        PruneError: it computes something else.
    """
    graph = channels.coupling.model.proto
    names = [value.name for value in graph.graph.input]
    if example is None:
        feeds = random_feeds(graph, seed=0)[0]
        example = [feeds[name] for name in names]
    feeds = dict(zip(names, example, strict=True))
    before = export.outputs(model, specs, example)
    after = export.outputs(smaller, specs, example)
    small = channels.cut(removed).to_proto()
    apart = max(difference(before, after), difference(open_session(small, label="the cut graph").run(feeds), after))
    allowed = tolerance(export.type_names(model))
    if not apart <= allowed:
        raise PruneError(
            f"the model '{model.name}' without its pruned channels computes something else than with them at zero "
            f"(by {apart:.1e} of its outputs' scale, at most {allowed:.0e} is accepted). A layer averages over them "
            "or has a number in its code that depends on how many there are: exclude the layers around it"
        )
