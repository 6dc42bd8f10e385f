"""Operators of onnxruntime that its optimiser fuses from standard ones, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable

from onnxprune.structure.rules.products import matmul, resize_group
from onnxprune.structure.rules.standin import alike, stand_in, take
from onnxprune.structure.site import Cut, NoRule, Rule, Site

CONTRIB = "com.microsoft"
NCHWC = "com.microsoft.nchwc"
LAYER = "normalises over the last axis"

KEEP_ZERO = {"", "Relu", "LeakyRelu", "Tanh"}
"""Fused activations that take 0 to 0."""


def _activated(site: Site) -> bool:
    """Whether the activation fused into a node takes 0 to 0."""
    name = str(site.attribute("activation", ""))
    if name == "Clip":
        low, high = site.attribute("activation_params", (0.0, 0.0))
        return bool(low <= 0 <= high)
    return name in KEEP_ZERO


def _keep_nulls(site: Site, keep: bool) -> None:
    if not keep:
        site.null_outputs[-1] = (False,) * len(site.outputs[-1])


def _conv(site: Site) -> None:
    """FusedConv: a convolution, then a sum with the fourth operand, then an activation."""
    alike(site, "Conv", (0, 1, 2))
    if site.has(3):
        for axis, other in zip(site.outputs[0], site.axes(3), strict=True):
            site.labels.tie(axis, other)
        site.null_outputs[0] = tuple(a and b for a, b in zip(site.null_outputs[0], site.null(3), strict=True))
    _keep_nulls(site, _activated(site))


def _resize_conv(site: Site, cut: Cut) -> None:
    resize_group(site, cut)


def _gemm(site: Site) -> None:
    alike(site, "Gemm", (0, 1, 2))
    _keep_nulls(site, _activated(site))


def _matmul(site: Site) -> None:
    """FusedMatMul: each operand's last two axes may be swapped, and its rows may come before its batches."""
    seen = stand_in(site, "MatMul", (0, 1))
    for operand, letter in enumerate("AB"):
        order = list(range(len(site.axes(operand))))
        if site.attribute(f"transBatch{letter}", 0) and len(order) > 2:
            order.insert(len(order) - 2, order.pop(0))
        if site.attribute(f"trans{letter}", 0) and len(order) > 1:
            order[-2:] = order[:-3:-1]
        seen.inputs[operand] = tuple(site.axes(operand)[i] for i in order)
        seen.nulls[operand] = tuple(site.null(operand)[i] for i in order)
    matmul(seen)
    take(site, seen, (0, 1))


def _sum(*operands: int) -> Callable[[Site], None]:
    """A sum of operands, and then a function that takes 0 to 0."""

    def tie(site: Site) -> None:
        alike(site, "Sum", tuple(i for i in operands if site.has(i)))

    return tie


def _split_gelu(site: Site) -> None:
    """BiasSplitGelu: the first half of the sum, times the GELU of the second one."""
    alike(site, "Sum", (0, 1))
    axes, nulls = site.outputs.pop(), site.null_outputs.pop()
    half = axes[-1].size // 2
    site.labels.tie(axes[-1][:half], axes[-1][half:])
    site.give([*axes[:-1], axes[-1][:half]], nulls)


def _skip_norm(site: Site) -> None:
    """SkipLayerNormalization: a sum with the second operand and a bias, normalised over its last axis."""
    axes, skip = site.axes(), site.axes(1)
    for back in range(2, len(skip) + 1):
        if skip[-back].size == axes[-back].size:  # else it is of one batch, which repeats
            site.labels.tie(axes[-back], skip[-back])
    for operand in range(1, len(site.node.input)):
        if site.has(operand):
            site.labels.tie(axes[-1], site.axes(operand)[-1])
    site.average(axes[-1], LAYER)
    for index in range(len(site.node.output)):
        moments = index in (1, 2)
        site.give([*axes[:-1], site.fixed(1, "reduces it") if moments else axes[-1]])


def _embedded(site: Site) -> None:
    """EmbedLayerNormalization: rows of three tables, summed and normalised over their last axis."""
    batch, sequence = site.axes(0)
    width = site.axes(2)[1]
    for operand in (2, 3, 4, 5, 6):
        if site.has(operand):
            *table, last = site.axes(operand)
            site.labels.tie(width, last)
            for axis in table:
                site.pin(axis, "looks entries up in it")
    site.average(width, LAYER)
    for index in range(len(site.node.output)):
        site.give([batch] if index == 1 else [batch, sequence, width])


def _refuse(why: str) -> Rule:
    def tie(site: Site) -> None:
        raise NoRule(f"{site.what} {why}")

    return Rule(tie)


BLOCKED = "keeps channels in blocks made for one machine; prune before onnxruntime optimises for the machine"
LAST = "keeps channels last, as made for one machine; prune before onnxruntime optimises for the machine"
PACKED = "works on sequences packed without their padding; prune before they are packed"
CACHED = "works on a cache that is shared between steps; prune the model without it"

REFUSED: dict[tuple[str, str], str] = {
    **{
        (NCHWC, op): BLOCKED
        for op in ("Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "Upsample")
    },
    **{(NCHWC, op): BLOCKED for op in ("ReorderInput", "ReorderOutput")},
    **{(CONTRIB, op): LAST for op in ("NhwcConv", "NhwcFusedConv", "NhwcMaxPool", "GroupNorm", "SkipGroupNorm")},
    **{(CONTRIB, op): PACKED for op in ("PackedAttention", "PackedMultiHeadAttention", "RemovePadding")},
    **{(CONTRIB, op): PACKED for op in ("RestorePadding", "PagedAttention")},
    **{(CONTRIB, op): CACHED for op in ("DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention")},
}
"""Operators for which a rule would be a guess, or of no use."""

RULES: dict[tuple[str, str], Rule] = {
    (CONTRIB, "FusedConv"): Rule(_conv, _resize_conv),
    (CONTRIB, "FusedGemm"): Rule(_gemm),
    (CONTRIB, "FusedMatMul"): Rule(_matmul),
    (CONTRIB, "TransposeMatMul"): Rule(_matmul),
    **{(CONTRIB, op): Rule(_sum(0)) for op in ("Gelu", "QuickGelu")},
    **{(CONTRIB, op): Rule(_sum(0, 1)) for op in ("FastGelu", "BiasGelu")},
    (CONTRIB, "BiasAdd"): Rule(_sum(0, 1, 2)),
    (CONTRIB, "BiasSplitGelu"): Rule(_split_gelu),
    (CONTRIB, "SkipLayerNormalization"): Rule(_skip_norm),
    (CONTRIB, "SkipSimplifiedLayerNormalization"): Rule(_skip_norm),
    **{(CONTRIB, op): Rule(_embedded) for op in ("EmbedLayerNormalization", "QEmbedLayerNormalization")},
    **{key: _refuse(why) for key, why in REFUSED.items()},
}
"""Operators that onnxruntime fuses. Those of attention and of quantised models have modules of their own."""
