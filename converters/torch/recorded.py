"""The sizes that torch's modules record as attributes, set to what their parameters have become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from onnxprune.errors import PruneError

Set = Callable[[str, Any], None]
"""Sets an attribute by its dotted name."""

QUERY = {"q", "query", "q_proj", "q_lin", "to_q", "query_proj", "qkv", "qkv_proj", "c_attn", "Wqkv", "query_key_value"}
"""Names by which attention modules call the projection whose outputs are the query heads, alone or in front."""

KEY = {"k", "key", "k_proj", "k_lin", "to_k", "key_proj"}

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
REPEATS = ("num_key_value_groups", "n_rep", "num_groups")
WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim", "dim", "hidden_size")
"""Sizes of all heads together, where they were that."""


def update(model: nn.Module, set_: Set, groups: Mapping[str, int], old: Mapping[str, Any]) -> None:
    """Correct the attributes of every module whose parameters or buffers were replaced.

    Args:
        model: the model, with its new parameters.
        set_: sets an attribute by its dotted name.
        groups: weight -> groups of the convolution that it is now.
        old: what was replaced, by its dotted name.

    Raises:
        PruneError: a class cannot have such sizes.
    """
    touched = {name.rpartition(".")[0] for name in old}
    replaced = dict(old)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if path in touched:
            for attribute, value in _sizes(prefix, module, groups, replaced).items():
                if hasattr(module, attribute) and getattr(module, attribute) != value:
                    set_(prefix + attribute, value)
        for attribute, value in _heads(prefix, module, replaced).items():
            set_(prefix + attribute, value)


@contextmanager
def following(model: nn.Module, set_: Set) -> Iterator[None]:
    """While open, norms without any parameter take their size from what reaches them."""
    handles = []
    for path, module in model.named_modules():
        bare = not any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if bare and isinstance(module, (_NormBase, nn.GroupNorm)):

            def see(module: nn.Module, inputs: Any, path: str = path) -> None:
                count = inputs[0].shape[1] if inputs else 0
                if isinstance(module, nn.GroupNorm) and count and count != module.num_channels:
                    set_(f"{path}.num_groups", module.num_groups * count // module.num_channels)
                    set_(f"{path}.num_channels", count)
                elif isinstance(module, _NormBase) and count and count != module.num_features:
                    set_(f"{path}.num_features", count)

            handles.append(module.register_forward_pre_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sizes(prefix: str, module: nn.Module, groups: Mapping[str, int], old: Mapping[str, Any]) -> dict[str, Any]:
    """Attribute -> value for torch's own layers, and the ones derived from them."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, nn.modules.conv._ConvNd):
        count = groups.get(f"{prefix}weight", module.groups)
        wide = shape[1] * count
        ends = (shape[0], wide) if module.transposed else (wide, shape[0])
        return {"in_channels": ends[0], "out_channels": ends[1], "groups": count}
    if isinstance(module, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(module, nn.Bilinear):
        return {"out_features": shape[0], "in1_features": shape[1], "in2_features": shape[2]}
    if isinstance(module, _NormBase):
        vector = weight if weight is not None else module.running_mean
        return {} if vector is None else {"num_features": int(vector.numel())}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0], "num_groups": module.num_groups * shape[0] // module.num_channels}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": shape}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.RNNBase):
        return _recurrent(prefix, module)
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, nn.MultiheadAttention):
        if any(name.startswith(prefix) and name.endswith(("proj_weight", "in_proj_bias")) for name in old):
            raise PruneError(
                f"module '{prefix[:-1]}' (MultiheadAttention) cannot do with fewer heads or inputs: its code takes the "
                "width of the heads and of its input to be one, embed_dim. Nothing was changed. Exclude it "
                f"({{'op_names': ['{prefix[:-1]}'], 'exclude': True}}), or write the attention with "
                "scaled_dot_product_attention and separate projections; a file that pruner.export writes is smaller "
                "all the same"
            )
        return {}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # a Linear whose weight is (in, out)
        return {"nx": shape[0], "nf": shape[1]}
    return {}


def _recurrent(prefix: str, module: nn.RNNBase) -> dict[str, Any]:
    """The sizes of a recurrent layer; all its layers and directions have to be of one.

    Raises:
        PruneError: they are not.
    """
    first = module.get_parameter("weight_ih_l0")
    hidden = {part.shape[1] for name, part in module.named_parameters() if name.startswith("weight_hh")}
    if len(hidden) > 1:
        raise PruneError(
            f"module '{prefix[:-1]}' ({type(module).__name__}) has one hidden_size for all its layers, but "
            f"{sorted(hidden)} are left of them. Nothing was changed. Prune them alike (allocation 'uniform'), or use "
            "one module for each layer"
        )
    return {"input_size": first.shape[1], "hidden_size": hidden.pop()}


def _heads(prefix: str, module: nn.Module, old: Mapping[str, Any]) -> dict[str, Any]:
    """Attribute -> value for a module that has attention heads by the names of its attributes and its parts."""
    count = next((name for name in HEADS if type(getattr(module, name, None)) is int), None)
    if count is None:
        return {}
    query, key = _share(prefix, module, QUERY, old), _share(prefix, module, KEY, old)
    if query is None:
        return {}
    (before, after), found = query, {}
    heads = getattr(module, count)
    if heads * after % before:
        return {}
    for name in HEADS:
        if getattr(module, name, None) == heads:
            found[name] = heads * after // before
    held = next((getattr(module, n) for n in KEY_HEADS if type(getattr(module, n, None)) is int), heads)
    shared = held if key is None else held * key[1] // key[0]
    for name in KEY_HEADS:
        if type(getattr(module, name, None)) is int:
            found[name] = shared
    for name in REPEATS:
        if type(getattr(module, name, None)) is int and getattr(module, name) == heads // held:
            found[name] = found[count] // max(shared, 1)
    for name in WIDTHS:
        if getattr(module, name, None) == before:
            found[name] = after
    return {name: value for name, value in found.items() if getattr(module, name) != value}


def _share(prefix: str, module: nn.Module, names: set[str], old: Mapping[str, Any]) -> tuple[int, int] | None:
    """Outputs of a projection before and after; of the queries alone, where it makes keys and values as well."""
    for name, part in module.named_children():
        before = old.get(f"{prefix}{name}.weight")
        if name in names and before is not None:
            axis = 1 if type(part).__name__ == "Conv1D" else 0
            after = part.get_parameter("weight")
            ends = (int(before.shape[axis]), int(after.shape[axis]))
            third = name in {"qkv", "qkv_proj", "c_attn", "Wqkv", "query_key_value"} and not math.fmod(ends[0], 3)
            return (ends[0] // 3, ends[1] // 3) if third else ends
    return None
