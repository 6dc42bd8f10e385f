"""Masks held on the parameters of a torch module: a pruned entry stays exactly 0.0, whatever the training loop does.

Two kinds of hooks do it, neither of which changes the module tree, a state_dict key or what is pickled and copied. A
global one runs after every optimizer's step and zeroes the weights. One on each parameter runs when its gradient
is complete and zeroes that, so that norms (clipping, LAMB) and search directions (LBFGS) are the pruned net's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from onnxprune.errors import PruneError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_HOLDERS: weakref.WeakKeyDictionary[nn.Module, list[Holder]] = weakref.WeakKeyDictionary()
"""Masks live as long as the model they are on, even where nobody keeps the pruner; they do not keep the model alive."""


@dataclass(frozen=True)
class Place:
    """Where a parameter stands, as a model and a dotted name: what stands there may be replaced, its place stays."""

    model: weakref.ref[nn.Module]
    name: str

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Place:
        """The place of a model's parameter, by its dotted name."""
        return cls(weakref.ref(model), name)

    def owner(self) -> nn.Module | None:
        """The module that holds it now; None where that, or the model, is gone."""
        module = self.model()
        for part in self.name.split(".")[:-1]:
            module = None if module is None else module._modules.get(part)
        return module

    def parameter(self) -> nn.Parameter | None:
        """The parameter that stands there now; None where there is none."""
        module = self.owner()
        return None if module is None else module._parameters.get(self.name.rpartition(".")[2])


def zero(values: torch.Tensor, keep: torch.Tensor) -> None:
    """Zero a tensor in place where `keep`, integers as wide as its entries, is 0; leave its bits where it is 1.

    On the bits, because w * 0.0 is -0.0 for a negative w and NaN for a NaN; it is also the fastest of all ways.
    """
    values.view(_INTEGERS[values.element_size()]).mul_(keep)


class _Slot:
    """One parameter's mask, and the hook on the parameter that stood in its place when we last looked."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.keep: torch.Tensor | None = None
        self.hooked: weakref.ref[nn.Parameter] | None = None
        self.hook: Any = None

    def set(self, mask: np.ndarray) -> None:
        parameter = self.place.parameter()
        if parameter is None:
            return
        if self.keep is None or self.keep.shape != parameter.shape:
            kind = _INTEGERS[parameter.element_size()]
            self.keep = torch.empty_like(parameter, dtype=kind, requires_grad=False)
        self.keep.copy_(torch.from_numpy(mask))

    def apply(self, parameter: nn.Parameter) -> None:
        if self.keep is None:
            return
        if self.hooked is None or self.hooked() is not parameter or (self.hook is None and parameter.requires_grad):
            self._hook(parameter)
        zero(parameter.detach(), self._fitting(parameter))

    def release(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = self.hooked = None

    def _hook(self, parameter: nn.Parameter) -> None:
        self.release()
        self.hooked = weakref.ref(parameter)
        if not parameter.requires_grad:
            return
        this = weakref.ref(self)

        def zero_gradient(parameter: torch.Tensor) -> None:
            slot, gradient = this(), parameter.grad
            if slot is not None and gradient is not None and gradient.layout is torch.strided:
                zero(gradient.detach(), slot._fitting(gradient))

        self.hook = parameter.register_post_accumulate_grad_hook(zero_gradient)  # type: ignore[no-untyped-call]

    def _fitting(self, values: torch.Tensor) -> torch.Tensor:
        """The mask on the device and in the width of a tensor, after `module.to(...)`."""
        assert self.keep is not None
        if self.keep.shape != values.shape:
            raise PruneError(
                f"the mask of parameter '{self.place.name}' has the shape {list(self.keep.shape)}, the parameter now "
                f"{list(values.shape)}; call the pruner with the model again after changing it, or pruner.remove()"
            )
        kind = _INTEGERS[values.element_size()]
        if self.keep.device != values.device or self.keep.dtype != kind:
            self.keep = self.keep.to(values.device, kind)
        return self.keep


class Holder:
    """Holds masks on the parameters of one model until it is removed or the model is gone."""

    def __init__(self, model: nn.Module) -> None:
        """Hold nothing yet."""
        self._slots: dict[Place, _Slot] = {}
        self._model = weakref.ref(model)
        this = weakref.ref(self)

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            holder = this()
            if holder is not None:
                owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
                holder._apply(owned=owned)

        handle = register_optimizer_step_post_hook(after_step)
        self._finalizer = weakref.finalize(self, handle.remove)
        _HOLDERS.setdefault(model, []).append(self)

    def hold(self, masks: Mapping[Place, np.ndarray]) -> None:
        """Zero what masks (True is kept) remove, now and after every step; parameters without a mask are let go."""
        for place in self._slots.keys() - masks.keys():
            self._slots.pop(place).release()
        for place, mask in masks.items():
            slot = self._slots.setdefault(place, _Slot(place))
            slot.set(mask)
            self._apply([slot])  # while its mask is in cache

    def apply(self) -> None:
        """Zero the pruned entries now, for example after `load_state_dict` brought dense weights."""
        self._apply()

    def remove(self) -> None:
        """Stop holding; the zeros stay."""
        self._finalizer()
        for slot in self._slots.values():
            slot.release()
        self._slots.clear()
        model = self._model()
        if model is not None and self in _HOLDERS.get(model, []):
            _HOLDERS[model].remove(self)

    @torch.no_grad()
    def _apply(self, slots: Iterable[_Slot] | None = None, owned: set[int] | None = None) -> None:
        for slot in self._slots.values() if slots is None else slots:
            parameter = slot.place.parameter()
            if parameter is not None and (owned is None or id(parameter) in owned):
                slot.apply(parameter)
