"""Which parameters of which torch modules are weights, and what role they get, without looking at a graph.

One row per leaf module, as its exported ONNX operator has it: the operators, and the parameter in role order
(output, input, *kernel). The order of the gates follows the operator, since ties go by position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from onnxprune.errors import PruneError
from onnxprune.graph.weights import Skipped, Weight, parameter

from .hold import Place

View = Callable[[np.ndarray], np.ndarray]
Parts = dict[nn.Module, list[str]]

FLOATS = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class Site:
    """A parameter of a model: one, however many names and modules share it.

    Attributes:
        name: the first of its dotted names, as `named_parameters` gives it.
        aliases: all of its dotted names.
        owners: the modules that hold it, each with its dotted name.
        place: where it stands.
    """

    name: str
    aliases: tuple[str, ...]
    owners: tuple[tuple[str, nn.Module], ...]
    place: Place

    @property
    def value(self) -> nn.Parameter:
        """The parameter as it is now.

        Raises:
            PruneError: its model is gone.
        """
        value = self.place.parameter()
        if value is None:
            raise PruneError(
                f"parameter '{self.name}' is no longer in the model: the model was deleted, or the parameter "
                "replaced by something else; call the pruner with the model again"
            )
        if value.is_meta:
            raise PruneError(
                f"parameter '{self.name}' {list(value.shape)} went to the meta device and has no values any more; load "
                "the model again, and call the pruner with it"
            )
        return value

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the owners' classes, and of the torch classes they derive from."""
        return tuple(dict.fromkeys(name for _, module in self.owners for name in type_names(module)))

    @property
    def names(self) -> frozenset[str]:
        """Every name an `op_names` pattern may match: of the parameter and of its modules."""
        return frozenset({*self.aliases, *(path for path, _ in self.owners)}) - {""}

    def read(self) -> np.ndarray:
        """The values, a view of the parameter's memory where that is the CPU's."""
        return array(self.value)

    def write(self, values: np.ndarray) -> None:
        """Set the values, in place."""
        with torch.no_grad():
            self.value.copy_(tensor(values))


@dataclass(frozen=True)
class Buffer:
    """A module's buffer: moves with the weights, but is none."""

    name: str
    place: Place

    def read(self) -> np.ndarray:
        """The values, a view of the buffer's memory where that is the CPU's."""
        return array(self.value)

    def write(self, values: np.ndarray) -> None:
        """Set the values, in place."""
        self.value.copy_(tensor(values))

    @property
    def value(self) -> torch.Tensor:
        """The buffer as it is now.

        Raises:
            PruneError: it is gone.
        """
        module = self.place.owner()
        value = None if module is None else module._buffers.get(self.name.rpartition(".")[2])
        if value is None:
            raise PruneError(f"buffer '{self.name}' is no longer in the model; bind again")
        return value


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values as numpy has them; no copy on the CPU."""
    plain = tensor.detach().cpu()
    if plain.dtype is torch.bfloat16:
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    values: np.ndarray = plain.numpy()
    return values


def tensor(values: np.ndarray) -> torch.Tensor:
    """A torch tensor of an array's values."""
    owned = np.array(values)
    if owned.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(owned.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(owned)


def type_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's class and its public bases below nn.Module: a subclass of Linear is a Linear."""
    bases = (c for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module)
    return tuple(c.__name__ for c in bases if not c.__name__.startswith("_") and c.__name__ != "RNNBase")


def sites(model: nn.Module) -> list[Site]:
    """All parameters of a model, in the order of their registration.

    Raises:
        PruneError: one has no values yet: a lazy module, or the meta device.
    """
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    found: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, value in module._parameters.items():
            if value is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            if isinstance(value, UninitializedParameter):
                raise PruneError(
                    f"parameter '{name}' of a {type(module).__name__} has no shape yet; run the model "
                    "once on example inputs first"
                )
            if value.is_meta:
                raise PruneError(
                    f"parameter '{name}' {list(value.shape)} is on the meta device and has no values; "
                    "load or initialise the model first"
                )
            found[id(value)] = value
            owners.setdefault(id(value), []).append((name, path, module))
    return [
        Site(
            held[0][0],
            tuple(name for name, _, _ in held),
            tuple((path, module) for _, path, module in held),
            Place.of(model, held[0][0]),
        )
        for held in owners.values()
    ]


def obstacle(value: torch.Tensor) -> str:
    """The reason why a parameter's entries cannot be pruned; empty where they can."""
    if type(value.data) is not torch.Tensor:
        return f"it is a {type(value.data).__name__}, not a plain tensor; prune before sharding or quantising"
    if value.layout is not torch.strided:
        return f"its layout is {value.layout}; only dense tensors can be pruned"
    if value.dtype not in FLOATS:
        return f"its type is {value.dtype}; float16, bfloat16, float32 and float64 can be pruned"
    return "it is empty" if value.numel() == 0 else ""


def weight(site: Site, op_types: tuple[str, ...], view: View, parts: Parts) -> Weight:
    """The weight that a parameter is."""
    types, names = labels(site, op_types, parts)
    shape, dtype = tuple(site.value.shape), np.dtype(FLOATS[site.value.dtype])
    groups = [module.groups for _, module in site.owners if isinstance(module, nn.modules.conv._ConvNd)]
    return parameter(site.name, types, site, shape, dtype, view, names, groups[0] if groups else 1)


def labels(site: Site, op_types: Iterable[str], parts: Parts) -> tuple[tuple[str, ...], frozenset[str]]:
    """What a configuration may call a weight: operators and classes, the first one giving its role; and names."""
    outer = [path for _, module in site.owners for path in parts.get(module, [])]
    types = (*op_types, *site.types, *(["MultiheadAttention"] if outer else []))
    return tuple(dict.fromkeys(types)), site.names | (frozenset(outer) - {""})


# ------------------------------------------------------------ one view per operator


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transposed_convolution(groups: int) -> View:
    """(in, out/groups, *k): a group's inputs lie along axis 0."""

    def view(x: np.ndarray) -> np.ndarray:
        split: np.ndarray = x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
        joined: np.ndarray = split.swapaxes(1, 2).reshape(groups * x.shape[1], -1, *x.shape[2:])
        return joined

    return view


def _gates(order: tuple[int, ...]) -> View:
    """(gates * hidden, in), the gates in the operator's order."""

    def view(x: np.ndarray) -> np.ndarray:
        gates = x.reshape(len(order), -1, x.shape[1])
        ordered: np.ndarray = gates[list(order)].reshape(x.shape)
        return ordered

    return view


def _bilinear(x: np.ndarray) -> np.ndarray:
    """(out, in1, in2), multiplied by the first input, as a matrix of in1 columns."""
    matrix: np.ndarray = x.transpose(0, 2, 1).reshape(-1, x.shape[1])
    return matrix


_LSTM = _gates((0, 3, 1, 2))
"""torch has input, forget, cell, output; ONNX input, output, forget, cell."""

_GRU = _gates((1, 0, 2))
"""torch has reset, update, new; ONNX update, reset, hidden."""


# ------------------------------------------------------------ one row per module

Row = tuple[str, tuple[str, ...], View]
"""Attribute, operators, view."""

_LINEAR = ("Gemm", "MatMul")
"""Which of the two a Linear becomes depends on its input's rank."""


def _convolution(module: nn.Module) -> list[Row]:
    return [("weight", ("Conv",), _same)]


def _convolution_transpose(module: nn.Module) -> list[Row]:
    assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return [("weight", ("ConvTranspose",), _transposed_convolution(module.groups))]


def _linear(module: nn.Module) -> list[Row]:
    return [("weight", _LINEAR, _same)]


def _recurrent(op_type: str, view: View) -> Callable[[nn.Module], list[Row]]:
    def rows(module: nn.Module) -> list[Row]:
        assert isinstance(module, nn.RNNBase)
        parts, ends = ("ih", "hh"), ("", "_reverse") if module.bidirectional else ("",)
        if op_type == "MatMul":  # one direction after the other; LSTM and GRU nodes take both at once
            order = [(part, end) for end in ends for part in parts]
        else:
            order = [(part, end) for part in parts for end in ends]
        return [(f"weight_{part}_l{k}{end}", (op_type,), view) for k in range(module.num_layers) for part, end in order]

    return rows


def _cell(module: nn.Module) -> list[Row]:
    return [("weight_ih", ("Gemm",), _same), ("weight_hh", ("Gemm",), _same)]


def _attention(module: nn.Module) -> list[Row]:
    return [(f"{part}_proj_weight", ("MatMul",), _same) for part in ("in", "q", "k", "v")]


ROWS: dict[type[nn.Module], Callable[[nn.Module], list[Row]]] = {
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _convolution_transpose,
    nn.ConvTranspose2d: _convolution_transpose,
    nn.ConvTranspose3d: _convolution_transpose,
    nn.Linear: _linear,
    nn.Bilinear: lambda module: [("weight", ("MatMul",), _bilinear)],
    nn.LSTM: _recurrent("LSTM", _LSTM),
    nn.GRU: _recurrent("GRU", _GRU),
    nn.RNN: _recurrent("MatMul", _same),  # exported step by step, as matrix products
    nn.LSTMCell: _cell,
    nn.GRUCell: _cell,
    nn.RNNCell: _cell,
    nn.MultiheadAttention: _attention,
    nn.Embedding: lambda module: [("weight", ("Embedding",), _same)],
    nn.EmbeddingBag: lambda module: [("weight", ("Embedding",), _same)],
}
"""Module -> its weights, for it and its subclasses."""


def rows(module: nn.Module) -> list[Row]:
    """The weights a module has by its class; empty where it has none."""
    return next((make(module) for kind, make in ROWS.items() if isinstance(module, kind)), [])


def attention_parts(model: nn.Module) -> Parts:
    """The output projections of attention modules, and the names of the modules they are part of."""
    parts: Parts = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            parts.setdefault(module.out_proj, []).append(path)
    return parts


def refusals(model: nn.Module) -> list[Skipped]:
    """Weights that are no plain parameter of their module, or have no operator, with the reason."""
    found = []
    for path, module in model.named_modules():
        for attribute, _, _ in rows(module):
            reason = _refusal(module, attribute)
            if reason:
                name = f"{path}.{attribute}" if path else attribute
                found.append(Skipped(name, type(module).__name__.removeprefix("Parametrized"), reason))
    return found


def _refusal(module: nn.Module, attribute: str) -> str:
    """The reason why a weight that a module has by its class is left alone; empty where it is a parameter or absent."""
    if attribute in module._parameters:
        projected = getattr(module, "proj_size", 0)
        return "ONNX's LSTM has no projection (proj_size), so it cannot be exported" if projected else ""
    if nn.utils.parametrize.is_parametrized(module, attribute):
        return (
            "it is parametrized, computed anew from other parameters; call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    sources = [name for name in module._parameters if re.fullmatch(rf"{attribute}_(orig|g|v|bar)", name)]
    if sources:
        return (
            f"it is computed anew from {' and '.join(sources)}; call torch.nn.utils.remove_weight_norm, "
            "remove_spectral_norm or prune.remove first"
        )
    return "it is no parameter of the module" if isinstance(getattr(module, attribute, None), torch.Tensor) else ""


def find(model: nn.Module) -> tuple[list[Weight], list[Skipped]]:
    """The weights of a model by the classes of its modules, in the order of their registration.

    Raises:
        PruneError: a parameter has no values (lazy modules, the meta device).
    """
    known = sites(model)
    site_of = {id(site.value): site for site in known}
    skipped = refusals(model)
    refused = {entry.name for entry in skipped}
    parts = attention_parts(model)
    uses: dict[int, list[Row]] = {}
    for _, module in model.named_modules():
        for row in rows(module):
            value = module._parameters.get(row[0])
            if value is not None and not refused & set(site_of[id(value)].aliases):
                uses.setdefault(id(value), []).append(row)
    weights = []
    for key, found in uses.items():
        site = site_of[key]
        reason = obstacle(site.value)
        if reason:
            skipped.append(Skipped(site.name, site.types[0], reason))
            continue
        found.sort(key=lambda row: row[1] == ("Embedding",))  # tied to another layer, it is that layer's weight
        op_types = tuple(dict.fromkeys(op for _, ops, _ in found for op in ops))
        weights.append(weight(site, op_types, found[0][2], parts))
    skipped += _without_rule(known, {w.name for w in weights} | {s.name for s in skipped})
    return weights, skipped


_UNKNOWN = "which operator reads it is not known without the graph; call the pruner with example_inputs"


def _without_rule(known: list[Site], seen: set[str]) -> Iterator[Skipped]:
    """Matrices of the user's own modules, which only a graph explains."""
    for site in known:
        own = [m for _, m in site.owners if not type(m).__module__.startswith("torch.nn.")]
        if own and site.value.ndim > 1 and not seen & set(site.aliases):
            yield Skipped(
                site.name,
                type(own[0]).__name__,
                _UNKNOWN,
            )
