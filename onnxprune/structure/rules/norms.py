"""Operators that average, normalise or pool."""

from __future__ import annotations

from collections.abc import Callable

from onnxprune.structure.site import Cut, Rule, Site

SUMS = {"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
"""Reductions that zeros add nothing to."""


def _batch_norm(site: Site) -> None:
    axes = site.axes()
    channels = axes[1] if len(axes) > 1 else axes[0]
    for operand in range(1, 5):
        site.labels.tie(channels, site.axes(operand)[0])
    site.zeroed += [1, 2]
    site.solid += [3, 4]
    null = site.constant[1] and site.constant[2]
    site.give(axes, [null if i == 1 else n for i, n in enumerate([False] * len(axes))])
    for index in range(1, len(site.node.output)):
        if site.node.output[index]:
            site.give([channels])


def _instance_norm(site: Site) -> None:
    axes = site.axes()
    for operand in (1, 2):
        site.labels.tie(axes[1], site.axes(operand)[0])
    for i, axis in enumerate(axes[2:], 2):
        site.pin(axis, f"normalises over axis {i}")
    site.zeroed += [1, 2]
    site.give(axes, [i == 1 and site.constant[1] and site.constant[2] for i in range(len(axes))])


def _group_norm(site: Site) -> None:
    axes = site.axes()
    count = int(site.attribute("num_groups"))
    groups, offsets = site.labels.split(axes[1], (count, axes[1].size // count), site.what)
    site.pin(offsets, "normalises over the channels of a group")
    for i, axis in enumerate(axes[2:], 2):
        site.pin(axis, f"normalises over axis {i}")
    for operand in (1, 2):
        scale = site.axes(operand)[0]
        site.labels.tie(scale, axes[1] if scale.size == axes[1].size else groups)
    site.zeroed += [1, 2]
    site.give(axes, [i == 1 and site.constant[1] and site.constant[2] for i in range(len(axes))])


def _resize_group_norm(site: Site, cut: Cut) -> None:
    old = site.axes()[1].size
    cut.set_attribute(site, "num_groups", int(site.attribute("num_groups")) * cut.count(site.axes()[1]) // old)


def last_axes(site: Site, first: int, why: str) -> None:
    """Results like the first operand, whose axes from one on stay whole, and so do those of all parameters."""
    axes = site.axes()
    for i in range(first, len(axes)):
        site.pin(axes[i], f"{why} axis {i}")
    for operand in range(1, len(site.node.input)):
        for axis in (site.inputs[operand] if site.has(operand) else None) or ():
            site.pin(axis, f"{why} it")
    site.give(axes, [n and i < first for i, n in enumerate(site.null(0))])


def _layer_norm(site: Site) -> None:
    first = site.axis("axis", -1)
    last_axes(site, first, "normalises over")
    for index in range(1, len(site.node.output)):
        if site.node.output[index]:
            site.give([a if i < first else site.fixed(1, "reduces it") for i, a in enumerate(site.axes())])


def _softmax(site: Site) -> None:
    old = site.version < 13
    first = site.axis("axis", 1 if old else -1)
    axes = site.axes()
    mixed = range(first, len(axes)) if old else [first]
    for i in mixed:
        site.pin(axes[i], f"mixes axis {i}")
    site.give(axes)


def _one_axis(why: str, default: int) -> Callable[[Site], None]:
    def tie(site: Site) -> None:
        first = site.axis("axis", default)
        site.pin(site.axes()[first], f"{why} axis {first}")
        site.give(site.axes())

    return tie


def _lrn(site: Site) -> None:
    site.pin(site.axes()[1], "mixes neighbouring channels")
    site.give(site.axes(), site.null(0))


def _mean_variance(site: Site) -> None:
    for i in site.attribute("axes") or (0, 2, 3):
        site.pin(site.axes()[i], f"normalises over axis {i}")
    site.give(site.axes())


def _reduce(site: Site) -> None:
    axes, nulls = site.axes(), site.null(0)
    given = site.ints("axes", 1)
    if not given and site.attribute("noop_with_empty_axes", 0):
        site.give(axes, nulls)
        return
    gone = sorted(i % len(axes) for i in given) if given else list(range(len(axes)))
    for i in gone:
        if not (site.node.op_type in SUMS and nulls[i]):
            site.pin(axes[i], f"reduces axis {i}")
    keeps = int(site.attribute("keepdims", 1))
    result = [(site.fixed(1, "reduces it"), False) if i in gone else (axes[i], nulls[i]) for i in range(len(axes))]
    result = [pair for i, pair in enumerate(result) if keeps or i not in gone]
    keeps_zero = site.node.op_type not in {"ReduceLogSum", "ReduceLogSumExp", "ReduceProd"}
    site.give([a for a, _ in result], [n and keeps_zero for _, n in result])


def _arg(site: Site) -> None:
    axes = site.axes()
    axis = site.axis("axis", 0)
    site.pin(axes[axis], f"looks for the largest along axis {axis}")
    keeps = int(site.attribute("keepdims", 1))
    site.give([site.fixed(1, "reduces it") if i == axis else a for i, a in enumerate(axes) if keeps or i != axis])


def _pool(site: Site) -> None:
    axes = site.axes()
    for i, axis in enumerate(axes[2:], 2):
        site.pin(axis, f"pools axis {i}")
    for index, name in enumerate(site.node.output):
        if name:
            pooled = [site.fixed(size, "pools it") for size in site.result(index)[2:]]
            site.give([*axes[:2], *pooled], [*site.null(0)[:2], *[False] * len(pooled)])


POOLS = ["MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"]
REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]

RULES: dict[tuple[str, str], Rule] = {
    ("", "BatchNormalization"): Rule(_batch_norm),
    ("", "InstanceNormalization"): Rule(_instance_norm),
    ("", "GroupNormalization"): Rule(_group_norm, _resize_group_norm),
    ("", "LayerNormalization"): Rule(_layer_norm),
    ("", "RMSNormalization"): Rule(_layer_norm),
    ("", "SimplifiedLayerNormalization"): Rule(_layer_norm),
    ("", "LRN"): Rule(_lrn),
    ("", "MeanVarianceNormalization"): Rule(_mean_variance),
    ("", "LpNormalization"): Rule(_one_axis("normalises over", -1)),
    **{("", op): Rule(_softmax) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{("", op): Rule(_arg) for op in ("ArgMax", "ArgMin")},
    **{("", op): Rule(_pool) for op in POOLS},
    **{("", f"Reduce{op}"): Rule(_reduce) for op in REDUCTIONS},
}
