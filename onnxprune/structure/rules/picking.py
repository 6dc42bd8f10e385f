"""Operators that pick, repeat, pad or make positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import helper

from onnxprune.structure.labels import Axis
from onnxprune.structure.rules.elementwise import hold
from onnxprune.structure.site import Cut, NoRule, Rule, Site


def _varying(site: Site, operands: Sequence[int], count: int) -> np.ndarray:
    """Which of the entries that some operands have in common differ from run to run."""
    varies = np.zeros(count, np.bool_)
    for operand in operands:
        if site.has(operand):
            varies |= site.content_varies(operand).reshape(-1)
    return varies


def _listed(site: Site) -> list[int]:
    """The axes that a Slice cuts, in order."""
    given = site.ints("axes", 3)
    if given is None:
        given = list(range(len(site.attribute("starts") or site.axes(1)[0])))
    return [i % len(site.axes()) for i in given]


def _slices(site: Site) -> dict[int, slice]:
    """What a Slice takes, axis -> positions; None for bounds that are not known before the model runs."""
    order = _listed(site)
    starts, ends = site.ints("starts", 1) or [], site.ints("ends", 2) or []
    steps = (site.ints("steps", 4) if site.has(4) else None) or [1] * len(starts)
    found = {}
    for axis, start, end, step in zip(order, starts, ends, steps, strict=True):
        size = site.axes()[axis].size
        low, high = (0, size) if step > 0 else (-1, size - 1)
        first = min(max(start + size if start < 0 else start, 0), high)
        last = min(max(end + size if end < 0 else end, low), high)
        found[axis] = slice(first, None if last < 0 else last, step)
    return found


def _slice(site: Site) -> None:
    axes, order = list(site.axes()), _listed(site)
    for operand in (1, 2, 3, 4):
        hold(site, operand, "takes bounds from it")
    loose = set(order)
    if all(site.content(operand) is not None for operand in (1, 2, 4) if site.has(operand)):
        varies = _varying(site, (1, 2, 4), len(order))
        loose = {axis for axis, differs in zip(order, varies, strict=True) if differs}
        for axis, taken in _slices(site).items():
            if axis not in loose:
                axes[axis] = axes[axis][taken]
    for axis in loose:
        site.pin(axes[axis], "cuts it at bounds that are known when the model runs")
        axes[axis] = site.fixed(site.result()[axis], "cuts it at bounds that are known when the model runs")
    site.give(axes, site.null(0))


def _resize_slice(site: Site, cut: Cut) -> None:
    order = _listed(site)
    bounds = {axis: taken for axis, taken in _slices(site).items() if cut.touches([site.axes()[axis]])}
    if not bounds:
        return
    starts: list[int | None] = [None] * len(order)
    ends, steps = list(starts), list(starts)
    for axis, taken in bounds.items():
        alive, index = cut.alive(site.axes()[axis]), order.index(axis)
        if taken.step == 1:
            starts[index] = int(alive[: taken.start].sum())
            ends[index] = int(alive[: taken.start].sum()) + int(alive[taken].sum())
            continue
        # What is left of every second position is not every second of what is left: each is named.
        picked = np.arange(alive.size)[taken]
        places = (np.cumsum(alive) - 1)[picked[alive[picked]]]
        near = site.node.output[0]
        made, named = cut.name(f"{near}_picked"), cut.store(places.astype(np.int64), f"{near}_places")
        cut.before.append(helper.make_node("Gather", [site.node.input[0], named], [made], name=made, axis=axis))
        site.node.input[0] = made
        starts[index], ends[index], steps[index] = 0, int(places.size), 1
    for name, operand, values in (("starts", 1, starts), ("ends", 2, ends), ("steps", 4, steps)):
        if any(value is not None for value in values):
            if site.attribute(name) is not None:
                old = site.attribute(name)
                cut.set_attribute(site, name, [o if v is None else v for o, v in zip(old, values, strict=True)])
            else:
                cut.set_sizes(site, operand, values)


def _places(site: Site, operand: int) -> np.ndarray | None:
    """An operand that holds positions, where it is the same at every run."""
    found = site.content(operand)
    return None if found is None or site.content_varies(operand).any() else found


def _gather(site: Site) -> None:
    axes, nulls, axis = list(site.axes()), list(site.null(0)), site.axis()
    indices = _places(site, 1)
    if indices is None or indices.ndim > 1:
        site.pin(axes[axis], "looks entries up in it")
        middle, inner = list(site.axes(1)), [False] * len(site.axes(1))
        site.give([*axes[:axis], *middle, *axes[axis + 1 :]], [*nulls[:axis], *inner, *nulls[axis + 1 :]])
        return
    hold(site, 1, "looks entries up by it")
    places = indices % max(axes[axis].size, 1)
    if indices.ndim == 0:
        site.pin(axes[axis][[int(places)]], "picks one entry")
        site.give([a for i, a in enumerate(axes) if i != axis], [n for i, n in enumerate(nulls) if i != axis])
        return
    site.give([a[places] if i == axis else a for i, a in enumerate(axes)], nulls)


def _resize_gather(site: Site, cut: Cut) -> None:
    axis = site.axes()[site.axis()]
    indices = _places(site, 1)
    if indices is None or not cut.touches([axis]):
        return
    alive = cut.alive(axis)
    places = indices % axis.size
    if indices.ndim == 1:
        places = places[alive[places]]
    cut.set_operand(site, 1, (np.cumsum(alive) - 1)[places].astype(indices.dtype))


def _compress(site: Site) -> None:
    """A Gather of the places where a condition holds, which has to be settled."""
    axes, kept = site.axes(), np.flatnonzero(site.settled(1))
    if site.content_varies(1).any():
        raise NoRule(f"{site.what} picks by a condition that varies from run to run")
    hold(site, 1, "picks by it")
    if site.attribute("axis") is None:
        for axis in axes:
            site.pin(axis, "picks from all axes as if they were one")
        site.give_fixed("picks from all axes as if they were one")
        return
    along = site.axis()
    site.give([a[kept] if i == along else a for i, a in enumerate(axes)], site.null(0))


def _resize_compress(site: Site, cut: Cut) -> None:
    if site.attribute("axis") is None:
        return
    axis, condition = site.axes()[site.axis()], site.settled(1).reshape(-1)
    if cut.touches([axis]):
        whole = np.zeros(axis.size, np.bool_)  # what a condition does not reach is left out
        whole[: condition.size] = condition
        cut.set_operand(site, 1, whole[cut.alive(axis)])


def _beside(site: Site, axis: int, *operands: int) -> None:
    """Operands of the first one's rank: along one axis they hold places, along the others they lie beside it."""
    axes = site.axes()
    site.pin(axes[axis], "looks entries up in it")
    for operand in operands:
        for i, (long, other) in enumerate(zip(axes, site.axes(operand), strict=True)):
            if i == axis:
                site.labels.tie(other, site.axes(operands[0])[axis])
            elif long.size == other.size:
                site.labels.tie(long, other)
            else:
                site.pin(long, f"takes only some of axis {i}")
                site.pin(other, f"takes only some of axis {i}")


def _gather_elements(site: Site) -> None:
    axis = site.axis()
    _beside(site, axis, 1)
    site.give(site.axes(1), [n and i != axis for i, n in enumerate(site.null(0))])


def _scatter_elements(site: Site) -> None:
    axis = site.axis()
    _beside(site, axis, 1, 2)
    for operand in (1, 2):
        site.pin(site.axes(operand)[axis], "puts entries by it")
    both = zip(site.null(0), site.null(2), strict=True)
    site.give(site.axes(), [a and b and i != axis for i, (a, b) in enumerate(both)])


def _gather_nd(site: Site) -> None:
    axes, places = site.axes(), site.axes(1)
    batch = int(site.attribute("batch_dims", 0))
    picked = batch + places[-1].size
    for i in range(batch):
        site.labels.tie(axes[i], places[i])
    for axis in (*axes[batch:picked], places[-1]):
        site.pin(axis, "looks entries up in it")
    rest = axes[picked:]
    site.give([*places[:-1], *rest], [*[False] * (len(places) - 1), *site.null(0)[picked:]])


def _scatter_nd(site: Site) -> None:
    axes, places, updates = site.axes(), site.axes(1), site.axes(2)
    picked = places[-1].size
    for axis in (*axes[:picked], places[-1]):
        site.pin(axis, "puts entries by it")
    for axis, other in zip((*places[:-1], *axes[picked:]), updates, strict=True):
        site.labels.tie(axis, other)
    after = zip(site.null(0)[picked:], site.null(2)[len(places) - 1 :], strict=True)
    site.give(axes, [*[False] * picked, *[a and b for a, b in after]])


def _tensor_scatter(site: Site) -> None:
    axes, axis = site.axes(), site.axis("axis", -2)
    for i, (old, new) in enumerate(zip(axes, site.axes(1), strict=True)):
        if i == axis:
            site.pin(old, "puts entries by their place")
            site.pin(new, "puts entries by their place")
        else:
            site.labels.tie(old, new)
    if site.has(2):
        site.labels.tie(axes[0], site.axes(2)[0])
    both = zip(site.null(0), site.null(1), strict=True)
    site.give(axes, [a and b and i != axis for i, (a, b) in enumerate(both)])


def _pads(site: Site) -> tuple[list[tuple[int, int]], list[int]]:
    """What a Pad adds before and after each axis, and the axes in the order in which they are named."""
    rank = len(site.axes())
    given = site.ints("paddings" if site.version < 2 else "pads", 1) or []
    axes = [int(i) % rank for i in site.settled(3).reshape(-1)] if site.has(3) else list(range(rank))
    pads = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pads[axis] = (given[i], given[i + len(axes)])
    return pads, axes


def _pad(site: Site) -> None:
    axes, nulls = list(site.axes()), list(site.null(0))
    pads, order = _pads(site)
    varies = _varying(site, (1,), 2 * len(order)) if site.version >= 11 else np.zeros(2 * len(order), np.bool_)
    loose = {axis for i, axis in enumerate(order) if varies[i] or varies[i + len(order)]}
    for operand in (1, 2, 3):
        hold(site, operand, "takes sizes from it")
    constant = site.attribute("mode", "constant") == "constant"
    padded = [i for i, ends in enumerate(pads) if ends != (0, 0) or i in loose]
    for i in padded:
        begin, end = pads[i]
        if constant and min(begin, end) >= 0 and i not in loose and not site.labels.is_fixed(axes[i]):
            axes[i] = np.concatenate([site.labels.fresh(begin), axes[i], site.labels.fresh(end)])
        else:
            site.pin(axes[i], f"pads axis {i}")
            axes[i] = site.fixed(site.result()[i], f"pads axis {i}")
    value = site.content(2) if site.has(2) else np.array(site.attribute("value", 0.0))
    nought = not constant or (value is not None and not np.any(value))
    site.give(axes, nulls if nought or not padded else [False] * len(axes))


def _resize_pad(site: Site, cut: Cut) -> None:
    pads, order = _pads(site)
    begins: list[int | None] = [None] * len(order)
    ends = list(begins)
    for index, i in enumerate(order):
        alive = cut.alive(site.outputs[0][i])
        if not alive.all():
            begin, end = pads[i]
            begins[index], ends[index] = int(alive[:begin].sum()), int(alive[alive.size - end :].sum())
    name = "paddings" if site.version < 2 else "pads"
    old = site.attribute(name)
    if old is not None:
        cut.set_attribute(site, name, [o if v is None else v for o, v in zip(old, [*begins, *ends], strict=True)])
    elif any(value is not None for value in begins):
        cut.set_sizes(site, 1, [*begins, *ends])


def _tile(site: Site) -> None:
    axes = list(site.axes())
    repeats = site.settled(1).reshape(-1)
    varies = site.content_varies(1).reshape(-1)
    if site.version < 6:
        axis = int(site.settled(2).reshape(-1)[0])
        times, differs = int(repeats[0]), bool(varies[0])
        repeats, varies = np.ones(len(axes), np.int64), np.zeros(len(axes), np.bool_)
        repeats[axis], varies[axis] = times, differs
    for operand in (1, 2):
        hold(site, operand, "takes sizes from it")
    for i, (times, differs) in enumerate(zip(repeats.tolist(), varies.tolist(), strict=True)):
        if differs:
            site.pin(axes[i], "repeats it as often as varies from run to run")
            axes[i] = site.fixed(site.result()[i], "repeats it as often as varies from run to run")
        else:
            axes[i] = np.tile(axes[i], times)
    site.give(axes, site.null(0))


def _expand(site: Site) -> None:
    axes, nulls, shape = site.axes(), site.null(0), site.result()
    missing = len(shape) - len(axes)
    hold(site, 1, "takes sizes from it")
    result, kept = [], []
    for i, size in enumerate(shape):
        if i >= missing and axes[i - missing].size == size:
            result.append(axes[i - missing])
            kept.append(nulls[i - missing])
        else:
            if i >= missing:
                site.pin(axes[i - missing], "repeats its only position")
            result.append(_new_axis(site, i, size))
            kept.append(False)
    site.give(result, kept)


def _new_axis(site: Site, index: int, size: int) -> Axis:
    """An axis whose positions are all made of the same: any number of them would do."""
    if size == 1 or site.varies(index):
        return site.fixed(size, "makes it")
    axis = site.labels.fresh(size)
    site.labels.avoid(axis)
    return axis


def _resize_expand(site: Site, cut: Cut) -> None:
    axes = site.outputs[0]
    if not cut.touches(axes):
        return
    entries = site.settled(1).reshape(-1).tolist()
    missing = len(axes) - len(entries)
    sizes = [
        cut.count(axes[missing + i]) if entry == axes[missing + i].size and cut.touches([axes[missing + i]]) else None
        for i, entry in enumerate(entries)
    ]
    if any(size is not None for size in sizes):
        cut.set_sizes(site, 1, sizes)


def _constant_of_shape(site: Site) -> None:
    hold(site, 0, "takes sizes from it")
    site.give([_new_axis(site, i, size) for i, size in enumerate(site.result())])


def _resize_constant_of_shape(site: Site, cut: Cut) -> None:
    axes = site.outputs[0]
    if cut.touches(axes):
        cut.set_sizes(site, 0, [cut.count(a) if cut.touches([a]) else None for a in axes])


def _made(site: Site) -> None:
    for operand in range(len(site.node.input)):
        hold(site, operand, "makes its result from it")
    for name in site.node.output:
        if name:
            site.give_fixed("makes it")


def _one_hot(site: Site) -> None:
    """The new axis stays: its positions are what the indices count."""
    places = list(site.axes())
    for operand in (1, 2):
        hold(site, operand, "makes its result from it")
    axis = int(site.attribute("axis", -1)) % (len(places) + 1)
    places.insert(axis, site.fixed(site.result()[axis], "counts along it"))
    site.give(places)


def _along(attribute: str, why: str, operand: int | None = None, keeps: bool = True) -> Rule:
    """Operators that work along one axis, the last one by default, which stays whole."""

    def tie(site: Site) -> None:
        axes = site.axes()
        at = int(site.attribute(attribute, -1) if operand is None else site.settled(operand).reshape(-1)[0])
        axis = at % len(axes)
        site.pin(axes[axis], why)
        for other in range(1, len(site.node.input)):
            hold(site, other, why)
        for index, name in enumerate(site.node.output):
            if name:
                size = site.result(index)[axis]
                kept = [site.fixed(size, why) if i == axis else a for i, a in enumerate(axes)]
                site.give(kept, [keeps and index == 0 and n and i != axis for i, n in enumerate(site.null(0))])
            else:
                site.give([])

    return Rule(tie)


RULES: dict[tuple[str, str], Rule] = {
    ("", "Slice"): Rule(_slice, _resize_slice),
    ("", "Gather"): Rule(_gather, _resize_gather),
    ("", "Compress"): Rule(_compress, _resize_compress),
    ("", "GatherElements"): Rule(_gather_elements),
    ("", "GatherND"): Rule(_gather_nd),
    **{("", op): Rule(_scatter_elements) for op in ("Scatter", "ScatterElements")},
    ("", "ScatterND"): Rule(_scatter_nd),
    ("", "TensorScatter"): Rule(_tensor_scatter),
    ("", "Pad"): Rule(_pad, _resize_pad),
    ("", "Tile"): Rule(_tile),
    ("", "Expand"): Rule(_expand, _resize_expand),
    ("", "ConstantOfShape"): Rule(_constant_of_shape, _resize_constant_of_shape),
    **{("", op): Rule(_made) for op in ("Constant", "EyeLike", "Range", "MelWeightMatrix")},
    **{("", f"{name}Window"): Rule(_made) for name in ("Blackman", "Hamming", "Hann")},
    ("", "OneHot"): Rule(_one_hot),
    ("", "CumSum"): _along("", "sums along it", operand=1),
    ("", "CumProd"): _along("", "multiplies along it", operand=1, keeps=False),
    ("", "TopK"): _along("axis", "sorts along it"),
}
