"""Channels cut out of a live module: parameters, buffers, the sizes that modules record, and optimizers' state.

The graph says what goes along with what; the module is tried out at its new size, and put back as it was where its code
does not follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from onnxprune.errors import PruneError
from onnxprune.runtime.session import open_session
from onnxprune.structure import channels as decisions
from onnxprune.structure.channels import GroupRow

from ..channels import Channels
from ..deploy import difference, tolerance
from . import exporting, recorded
from .layers import Buffer, Site

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True)
class Shrunk:
    """What became of a module.

    Attributes:
        groups: its groups of channels, and how many are left of each.
        before: entries of its parameters.
        after: entries that are left.
        difference: from the masked module, and from the graph under onnxruntime, as a share of the outputs' scale.
        alive: initializer -> which positions were left along each axis, of those that became smaller.
    """

    groups: tuple[GroupRow, ...]
    before: int
    after: int
    difference: float
    alive: Mapping[str, Sequence[np.ndarray]] = field(repr=False)

    def __str__(self) -> str:
        """One line for a log."""
        left = self.after / self.before if self.before else 1.0
        return f"{self.after} of {self.before} parameters left ({left:.1%}), outputs within {self.difference:.1e}"


def shrink(
    module: nn.Module,
    example_inputs: Any,
    channels: Channels,
    sources: Mapping[str, Site | Buffer],
    optimizer: Optimizers = None,
) -> Shrunk:
    """Cut the dead channels out of a module in place. See `Binding.shrink`.

    Args:
        module: the module.
        example_inputs: what it was bound with.
        channels: its groups.
        sources: initializer -> where its parameter or buffer stands.
        optimizer: whose state is cut too.

    Raises:
        PruneError: it cannot be made smaller; it is as it was.
    """
    removed = channels.dead(lambda name: isinstance(sources[name], Site))
    alive = channels.alive(removed)
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    axes = {id(sources[key].value): stays for key, stays in alive.items()}
    for one in optimizers:
        _check_state(one, axes)
    before = exporting.outputs(module, example_inputs)
    small = channels.cut(removed).to_proto()
    size = sum(site.numel() for site in module.parameters())
    with _Change(module) as change:
        fresh = {}
        for key, stays in alive.items():
            source = sources[key]
            value = source.value
            if isinstance(source, Site):
                new = nn.Parameter(_kept(value.detach(), stays), value.requires_grad)
                if value.grad is not None:
                    new.grad = _kept(value.grad, stays)
                fresh[id(value)] = new
                for alias in source.aliases:
                    change.set(alias, new)
            else:
                change.set(source.name, _kept(value, stays))
        groups = _groups(small, {sources[key].name: key for key in alive})
        recorded.update(module, change.set, groups, change.old)
        with recorded.following(module, change.set):
            apart = _check(module, example_inputs, before, small, channels)
        for one in optimizers:
            _move_state(one, fresh, axes)
        change.keep()
    rows = decisions.rows(channels.coupling, removed)
    return Shrunk(rows, size, sum(p.numel() for p in module.parameters()), apart, alive)


class _Change:
    """Attributes of a module's parts, set one after another and, unless kept, put back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.old: dict[str, Any] = {}
        self._kept = False

    def __enter__(self) -> _Change:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            for name, value in reversed(self.old.items()):
                self._put(name, value)

    def keep(self) -> None:
        """Leave things as they are now."""
        self._kept = True

    def set(self, name: str, value: Any) -> None:
        """Set a parameter, buffer or attribute by its dotted name."""
        path, _, attribute = name.rpartition(".")
        self.old.setdefault(name, getattr(self.module.get_submodule(path), attribute))
        self._put(name, value)

    def _put(self, name: str, value: Any) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(self.module.get_submodule(path), attribute, value)


def _kept(tensor: torch.Tensor, stays: Sequence[np.ndarray]) -> torch.Tensor:
    """The entries of a tensor whose positions stay along every axis, in memory of their own."""
    for axis, positions in enumerate(stays):
        if not positions.all():
            index = torch.from_numpy(np.flatnonzero(positions)).to(tensor.device)
            tensor = tensor.index_select(axis, index)
    return tensor.clone()


def _groups(small: onnx.ModelProto, keys: Mapping[str, str]) -> dict[str, int]:
    """Parameter -> the groups of the convolution that reads it in the cut graph."""
    read = {key: name for name, key in keys.items()}
    found = {}
    for node in small.graph.node:
        if node.op_type in {"Conv", "ConvTranspose"} and node.input[1] in read:
            found[read[node.input[1]]] = next((a.i for a in node.attribute if a.name == "group"), 1)
    return found


def _check(
    module: nn.Module, example_inputs: Any, before: list[np.ndarray], small: onnx.ModelProto, channels: Channels
) -> float:
    """How far the module is from what it was, and from the cut graph.

    Raises:
        PruneError: it fails, or computes something else.
    """
    try:
        after = exporting.outputs(module, example_inputs)
    except PruneError as error:
        where = _failing(module, example_inputs)
        raise PruneError(
            f"{where} does not run with fewer channels, a size stands in its code: {error}. Nothing was changed. Take "
            "the size from the tensors there (x.flatten(1), x.shape[1], -1) or from a layer, or exclude the layers it "
            "works on; a file that pruner.export writes needs no such change"
        ) from error
    allowed = tolerance(exporting.type_names(module))
    worst = difference(before, after)
    feeds = exporting.feeds(channels.coupling.model, example_inputs)
    session = open_session(small, label="the cut graph")
    named = {value.name for value in session.inputs}
    worst = max(worst, difference(session.run({k: v for k, v in feeds.items() if k in named}), after))
    if not worst <= allowed:
        raise PruneError(
            f"the {type(module).__name__} without its pruned channels computes something else than with them at zero "
            f"(by {worst:.1e} of the outputs' scale, at most {allowed:.0e} is accepted). Nothing was changed. Its code "
            "has a number, or holds a tensor that is no parameter, which depends on how many channels there are: a "
            "mean over channels, a constant, a count of heads. Take it from the tensors, or exclude the layers around"
        )
    return worst


def _failing(module: nn.Module, example_inputs: Any) -> str:
    """The innermost module of the user's, or of another library, that fails on the inputs, for a message."""
    running: list[tuple[str, nn.Module]] = []
    handles = []
    for path, part in module.named_modules():

        def enter(part: nn.Module, args: Any, path: str = path) -> None:
            running.append((path, part))

        def leave(part: nn.Module, args: Any, result: Any) -> None:
            running.pop()

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        exporting.outputs(module, example_inputs)
    except PruneError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    own = [entry for entry in running if not type(entry[1]).__module__.startswith("torch.nn.")]
    path, part = (own or running or [("", module)])[-1]
    inner = f", where it calls '{running[-1][0]}'," if own and running[-1] != own[-1] else ""
    return (f"module '{path}' ({type(part).__name__})" if path else f"the {type(part).__name__}") + inner


# ------------------------------------------------------------ optimizers


def _check_state(optimizer: torch.optim.Optimizer, axes: Mapping[int, Sequence[np.ndarray]]) -> None:
    """Refuse state that is not laid out as its parameter is.

    Raises:
        PruneError: with what to do.
    """
    for parameter, state in optimizer.state.items():
        if state and (id(parameter) in axes or len(optimizer.state) == 1):
            for name, value in state.items():
                wrong = [t for t in _tensors(value) if t.numel() > 1 and t.shape != parameter.shape]
                if wrong and axes:
                    raise PruneError(
                        f"the state '{name}' of {type(optimizer).__name__} has the shape {list(wrong[0].shape)} for a "
                        f"parameter of {list(parameter.shape)} and cannot be cut along with it; shrink without "
                        "optimizer, and make a new one of the module's parameters afterwards"
                    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _move_state(
    optimizer: torch.optim.Optimizer,
    fresh: Mapping[int, nn.Parameter],
    axes: Mapping[int, Sequence[np.ndarray]],
) -> None:
    """Put the new parameters in the place of the old ones, and their state, cut, with them."""
    for group in optimizer.param_groups:
        group["params"][:] = [fresh.get(id(parameter), parameter) for parameter in group["params"]]
    for parameter in [p for p in optimizer.state if id(p) in fresh]:
        state, shape = optimizer.state.pop(parameter), parameter.shape
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == shape and value.numel() > 1:
                state[name] = _kept(value, axes[id(parameter)])
        optimizer.state[fresh[id(parameter)]] = state
