"""torch's own exporter, quietly: a module as an ONNX model, left as it was."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx_ir.passes import common
from torch import nn
from torch.utils import _pytree

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, load
from onnxprune.graph.weights import Weight

from ..deploy import Candidate, tolerance
from .layers import array


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel and torch.compile's wrappers.

    Raises:
        PruneError: it is no module.
    """
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
    raise PruneError(
        f"a torch pruner is called with a torch.nn.Module, not {type(model).__name__}; ONNX models go to "
        "onnxprune.prune"
    )


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the module is called with: a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    raise PruneError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of the module's arguments, or a "
        "mapping of its keyword arguments"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without warnings and log lines; every module goes back to the mode it was in.

    The flags are set one by one: `train()` and `eval()` may be overridden to change more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for module, _ in modes:
            module.training = False
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module, training in modes:
            module.training = training


STATIC: dict[str, Any] = {}
"""As dynamic shapes: all sizes are the examples'."""


def export(model: nn.Module, example_inputs: Any, *, optimize: bool, dynamic_shapes: Any = None) -> Model:
    """A module as an ONNX model, without what torch notes about itself (stack traces, paths of this machine).

    Args:
        model: left as it is: modes, values, gradients.
        example_inputs: see `arguments`.
        optimize: fold constants and fuse; without, every parameter keeps its name and layout.
        dynamic_shapes: as torch.onnx.export takes them. By default the first axis of the tensors that share its
            size is the batch, of any size, where the exporter can do that; else all sizes are the examples'.

    Raises:
        PruneError: the exporter fails; with its reason.
    """
    args, kwargs = arguments(example_inputs)
    shapes = [batched(args, kwargs), None] if dynamic_shapes is None else [dynamic_shapes or None]
    with evaluating(model):
        for attempt in shapes:
            try:
                program = torch.onnx.export(
                    model, args, kwargs=kwargs, dynamo=True, optimize=optimize, verbose=False, dynamic_shapes=attempt
                )
                break
            except Exception as error:  # the exporter raises many kinds
                failure = error
        else:
            raise PruneError(
                f"torch.onnx.export cannot export the {type(model).__name__}: {_reason(failure)}"
            ) from failure
    assert program is not None
    common.ClearMetadataAndDocStringPass()(program.model)
    for graph in program.model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
    return load(program.model)


def batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes whose first axes are the batch, for the tensors that agree about its size with the first one."""
    tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    size = next((t.shape[0] for t in tensors if t.ndim), None)

    def axes(leaf: Any) -> Any:
        return {0: "batch"} if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == size else None

    if kwargs:
        return _pytree.tree_map(axes, kwargs)
    return _pytree.tree_map(axes, args)


def feeds(model: Model, example_inputs: Any) -> dict[str, np.ndarray]:
    """The example inputs by the names of an exported model's inputs."""
    args, kwargs = arguments(example_inputs)
    names = [str(value.name) for value in model.graph.graph.inputs]
    tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if kwargs and set(names) <= {k for k, v in kwargs.items() if isinstance(v, torch.Tensor)}:
        return {name: array(kwargs[name]) for name in names}
    if len(tensors) != len(names):
        raise PruneError(
            f"the exported model has the inputs {names}, but the example inputs hold {len(tensors)} "
            "tensors; give exactly those"
        )
    return {name: array(t) for name, t in zip(names, tensors, strict=True)}


def outputs(model: nn.Module, example_inputs: Any) -> list[np.ndarray]:
    """What a module returns in evaluation mode, as a flat list of arrays.

    Raises:
        PruneError: it fails on the inputs.
    """
    args, kwargs = arguments(example_inputs)
    with evaluating(model), torch.no_grad():
        try:
            returned = model(*args, **kwargs)
        except Exception as error:
            raise PruneError(f"the {type(model).__name__} fails on the example inputs: {_reason(error)}") from error
    return [array(leaf) for leaf in _pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]


def candidate(
    model: nn.Module,
    example_inputs: Any,
    weights: Sequence[Weight],
    kept: Mapping[str, np.ndarray],
    dynamic_shapes: Any = None,
) -> Candidate:
    """A module as torch's exporter makes it when it folds and fuses, with the module's own outputs beside it.

    Args:
        model: the module.
        example_inputs: see `arguments`.
        weights: the module's weights.
        kept: the masks of those that are pruned.
        dynamic_shapes: see `export`.
    """
    expected = outputs(model, example_inputs)
    exported = export(model, example_inputs, optimize=True, dynamic_shapes=dynamic_shapes)
    given = feeds(exported, example_inputs)
    return Candidate(exported, weights, kept, given, expected, tolerance(type_names(model)))


def type_names(model: nn.Module) -> set[str]:
    """Names of the types of a module's parameters."""
    return {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}


def _reason(error: BaseException) -> str:
    """The innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:500] or type(error).__name__
