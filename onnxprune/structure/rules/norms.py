"""Operators that average or normalise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxprune.structure.labels import Axis
from onnxprune.structure.rules.elementwise import finite, hold
from onnxprune.structure.site import Cut, NoRule, Rule, Site

SUMS = {"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
"""Reductions that zeros add nothing to."""


def _batch_norm(site: Site) -> None:
    axes = site.axes()
    if site.version < 9 and not site.attribute("spatial", 1):
        raise NoRule(f"{site.what} has statistics per place (spatial=0)")
    channels = axes[1] if len(axes) > 1 else site.fixed(1, "has one channel only")
    for operand in range(1, 5):
        site.labels.tie(channels, site.axes(operand)[0])
    if float(site.attribute("epsilon", 1e-5)) <= 0:
        finite(site, 4, "divides by the variance, and pruned positions would hold 0")
    if site.attribute("training_mode", 0) or len(site.node.output) > 1:
        for axis in axes[:1] + axes[2:]:
            site.average(axis, "averages over it")
    null = _affine(site, 1, 2)
    site.give(axes, [null if i == 1 else False for i in range(len(axes))])
    for name, statistics in zip(site.node.output[1:], (3, 4, 3, 4), strict=False):
        given = [channels] if name else []
        site.give(given, [site.null(0)[1] and site.null(statistics)[0]] * len(given))


def _affine(site: Site, *operands: int) -> bool:
    """Whether a scale and a bias make 0 of what is pruned."""
    return all(site.null(operand)[0] for operand in operands)


def _instance_norm(site: Site) -> None:
    axes = site.axes()
    for operand in (1, 2):
        site.labels.tie(axes[1], site.axes(operand)[0])
    for i, axis in enumerate(axes[2:], 2):
        site.average(axis, f"normalises over axis {i}")
    null = _affine(site, 1, 2)
    site.give(axes, [i == 1 and null for i in range(len(axes))])


def _group_norm(site: Site) -> None:
    axes = site.axes()
    count = int(site.attribute("num_groups"))
    groups, offsets = site.labels.split(axes[1], (count, axes[1].size // count), site.what)
    site.average(offsets, "normalises over the channels of a group")
    for i, axis in enumerate(axes[2:], 2):
        site.pin(axis, f"normalises over axis {i}")
    for operand in (1, 2):
        scale = site.axes(operand)[0]
        site.labels.tie(scale, axes[1] if scale.size == axes[1].size else groups)
    null = _affine(site, 1, 2) and site.axes(1)[0].size == axes[1].size
    site.give(axes, [i == 1 and null for i in range(len(axes))])


def _resize_group_norm(site: Site, cut: Cut) -> None:
    """Groups that have a channel left; where another average is accepted, that may be all."""
    alive = cut.alive(site.axes()[1]).reshape(int(site.attribute("num_groups")), -1)
    cut.set_attribute(site, "num_groups", int(alive.any(1).sum()))


def _layer_norm(site: Site) -> None:
    """LayerNormalization, RMSNormalization: from an axis on, axes stay whole, and so do the scale's and bias's.

    Where another average is accepted, they lose positions together.
    """
    axes, first = site.axes(), site.axis("axis", -1)
    for i in range(first, len(axes)):
        site.average(axes[i], f"normalises over axis {i}")
    for operand in range(1, len(site.node.input)):
        _against(site, axes, operand)
    biased = len(site.node.input) > 2 and site.has(2)
    site.give(axes, [n and i < first and not biased for i, n in enumerate(site.null(0))])
    for name in site.node.output[1:]:
        if name:
            site.give([a if i < first else site.fixed(1, "reduces it") for i, a in enumerate(axes)])
        else:
            site.give([])


def _against(site: Site, axes: Sequence[Axis], operand: int) -> None:
    """A parameter that is broadcast against axes, and gives the result none of its own."""
    own = site.axes(operand) if site.has(operand) else ()
    for axis, other in zip(axes[len(axes) - len(own) :], own, strict=True):
        if other.size == 1 != axis.size:
            site.pin(other, "repeats its only position")
        else:
            site.labels.tie(axis, other)


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
        site.pin(site.axes()[i], f"normalises over axis {i % len(site.axes())}")
    for axis in site.axes():
        site.pin(axis, "divides by a variance that is 0 for a pruned channel")
    site.give(site.axes())


def _reduce(site: Site) -> None:
    axes, nulls = site.axes(), site.null(0)
    given = site.ints("axes", 1)
    hold(site, 1, "reduces what it lists")
    if given or not site.attribute("noop_with_empty_axes", 0):
        gone = sorted(i % len(axes) for i in given) if given else list(range(len(axes)))
    else:
        gone = []
    for i in gone:
        if not (site.node.op_type in SUMS and nulls[i]):
            (site.average if site.node.op_type == "ReduceMean" else site.pin)(axes[i], f"reduces axis {i}")
    if site.node.op_type == "ReduceLogSum":
        finite(site, 0, "takes a logarithm, and pruned positions would hold 0")
    keeps = int(site.attribute("keepdims", 1))
    result = [(site.fixed(1, "reduces it"), False) if i in gone else (axes[i], nulls[i]) for i in range(len(axes))]
    result = [pair for i, pair in enumerate(result) if keeps or i not in gone]
    keeps_zero = site.node.op_type not in {"ReduceLogSum", "ReduceLogSumExp"}
    site.give([a for a, _ in result], [n and keeps_zero for _, n in result])


def _arg(site: Site) -> None:
    axes = site.axes()
    axis = site.axis("axis", 0)
    site.pin(axes[axis], f"looks for the largest along axis {axis}")
    keeps = int(site.attribute("keepdims", 1))
    site.give([site.fixed(1, "reduces it") if i == axis else a for i, a in enumerate(axes) if keeps or i != axis])


def _det(site: Site) -> None:
    axes = site.axes()
    for axis in axes[-2:]:
        site.pin(axis, "mixes the last two axes")
    site.give(axes[:-2], site.null(0)[:-2])


def _stft(site: Site) -> None:
    """Windows along time, each one transformed: signals apart from each other."""
    for axis in site.axes()[1:]:
        site.pin(axis, "mixes the samples of a window")
    for operand in (1, 2, 3):
        hold(site, operand, "takes windows by it")
    made = [site.fixed(size, "mixes the samples of a window") for size in site.result()[1:]]
    site.give([site.axes()[0], *made], [site.null(0)[0], *[False] * len(made)])


def _dft(site: Site) -> None:
    """The last axis holds real and imaginary parts."""
    axes = list(site.axes())
    for operand in (1, 2):
        hold(site, operand, "takes sizes from it")
    along = site.attribute("axis", 1) if site.version < 20 else site.settled(2) if site.has(2) else -2
    for i in (int(along) % len(axes), len(axes) - 1):
        site.pin(axes[i], f"mixes axis {i}")
        axes[i] = site.fixed(site.result()[i], f"mixes axis {i}")
    site.give(axes, site.null(0))


REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]

RULES: dict[tuple[str, str], Rule] = {
    ("", "BatchNormalization"): Rule(_batch_norm),
    ("", "InstanceNormalization"): Rule(_instance_norm),
    ("", "GroupNormalization"): Rule(_group_norm, _resize_group_norm),
    ("", "LayerNormalization"): Rule(_layer_norm),
    ("", "RMSNormalization"): Rule(_layer_norm),
    ("", "SimplifiedLayerNormalization"): Rule(_layer_norm),
    ("", "DFT"): Rule(_dft),
    ("", "STFT"): Rule(_stft),
    ("", "Det"): Rule(_det),
    ("", "LRN"): Rule(_lrn),
    ("", "MeanVarianceNormalization"): Rule(_mean_variance),
    ("", "LpNormalization"): Rule(_one_axis("normalises over", -1)),
    **{("", op): Rule(_softmax) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{("", op): Rule(_arg) for op in ("ArgMax", "ArgMin")},
    **{("", f"Reduce{op}"): Rule(_reduce) for op in REDUCTIONS},
}
