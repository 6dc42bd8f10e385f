"""Operators that move, repeat or pick positions: labels move as the data do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxprune.structure.labels import Axis
from onnxprune.structure.site import Cut, NoRule, Rule, Site


def reshaped(site: Site, axes: Sequence[Axis], shape: Sequence[int]) -> tuple[list[Axis], list[list[int]]]:
    """The labels of axes after a reshape, and for each new axis the old ones it is made of."""
    result: list[Axis] = []
    origins: list[list[int]] = []
    for old, new in _blocks([axis.size for axis in axes], list(shape)):
        factors = [axes[i] for i in old]
        if len(old) == 1 and len(new) == 1:
            made = factors
        else:
            flat = site.labels.merge(factors, site.what) if factors else site.fixed(1, "adds it")
            sizes = [shape[j] for j in new]
            made = list(site.labels.split(flat, sizes, site.what)) if len(new) > 1 else [flat][: len(new)]
            if not new:
                site.pin(flat, "drops it")
        result += made
        origins += [old] * len(new)
    return result, origins


def _blocks(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes, in order, that hold equally many elements on both sides."""
    if math.prod(old) != math.prod(new) or 0 in old:
        raise NoRule(f"a shape {old} cannot become {new}")
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        a, b = (old[i] if left else 1), (new[j] if right else 1)
        while a != b:
            if a < b:
                left.append(left[-1] + 1 if left else i)
                a *= old[left[-1]]
            else:
                right.append(right[-1] + 1 if right else j)
                b *= new[right[-1]]
        i, j = i + len(left), j + len(right)
        blocks.append((left, right))
    return blocks


def moved_nulls(site: Site, origins: Sequence[Sequence[int]]) -> list[bool]:
    """Nulls of axes made of others: pruned positions hold 0 if they do along each old axis that has some."""
    axes, nulls = site.axes(), site.null(0)
    return [all(nulls[i] or axes[i].size == 1 or site.labels.is_fixed(axes[i]) for i in old) for old in origins]


def _reshape(site: Site) -> None:
    axes, origins = reshaped(site, site.axes(), site.result())
    site.give(axes, moved_nulls(site, origins))


def _resize_shape(site: Site, cut: Cut) -> None:
    """The target of a Reshape: numbers change, 0 and -1 stay where they still say the right thing."""
    axes = site.outputs[0]
    if not cut.touches([*axes, *site.axes()]):
        return
    given = site.attribute("shape")
    old = np.array(given) if given is not None else site.settled(1)
    before = site.axes()
    copies = not site.attribute("allowzero", 0)
    sizes: list[int | None] = []
    for i, (entry, axis) in enumerate(zip(old.tolist(), axes, strict=True)):
        same = entry == 0 and copies and i < len(before) and cut.count(before[i]) == cut.count(axis)
        if (cut.count(axis) == axis.size and (entry != 0 or same)) or entry == -1 or same:
            sizes.append(None)
        elif site.varies(i):
            if -1 in old:
                raise NoRule(f"{site.what} needs a size that varies from run to run")
            sizes.append(-1)
        else:
            sizes.append(cut.count(axis))
    if given is not None:
        cut.set_attribute(site, "shape", [int(o if s is None else s) for o, s in zip(old, sizes, strict=True)])
    elif any(size is not None for size in sizes):
        cut.set_sizes(site, 1, sizes)


def _transpose(site: Site) -> None:
    order = site.attribute("perm") or range(len(site.axes()))[::-1]
    site.give([site.axes()[i] for i in order], [site.null(0)[i] for i in order])


def _squeeze(site: Site) -> None:
    axes = site.axes()
    given = site.ints("axes", 1)
    gone = [i % len(axes) for i in given] if given is not None else [i for i, a in enumerate(axes) if a.size == 1]
    for i in gone:
        site.pin(axes[i], "drops it")
    site.give(
        [a for i, a in enumerate(axes) if i not in gone], [n for i, n in enumerate(site.null(0)) if i not in gone]
    )


def _unsqueeze(site: Site) -> None:
    axes, nulls = list(site.axes()), list(site.null(0))
    given = site.ints("axes", 1) or []
    rank = len(axes) + len(given)
    for i in sorted(i % rank for i in given):
        axes.insert(i, site.fixed(1, "adds it"))
        nulls.insert(i, False)
    site.give(axes, nulls)


def _concat(site: Site) -> None:
    operands = [i for i in range(len(site.node.input)) if site.has(i)]
    parts = [site.axes(i) for i in operands]
    axis = int(site.attribute("axis", 1)) % len(parts[0])
    result = []
    for i in range(len(parts[0])):
        if i == axis:
            result.append(np.concatenate([part[i] for part in parts]))
            continue
        for part in parts[1:]:
            site.labels.tie(parts[0][i], part[i])
        open_ = [part[i] for part in parts if not site.labels.is_fixed(part[i])]
        result.append((open_ or [parts[0][i]])[0])
    site.give(result, [all(site.null(o)[i] for o in operands) for i in range(len(result))])


def _split(site: Site) -> None:
    axes, axis = site.axes(), site.axis()
    start = 0
    for index, name in enumerate(site.node.output):
        size = site.facts.shapes[name][axis] if name else site.ints("split", 1)[index]  # type: ignore[index]
        part = axes[axis][start : start + size]
        site.give([part if i == axis else a for i, a in enumerate(axes)], site.null(0))
        start += size


def _resize_split(site: Site, cut: Cut) -> None:
    axis = site.axis()
    counts = [cut.count(axes[axis]) for axes in site.outputs]
    if not cut.touches([site.axes()[axis]]):
        return
    if site.attribute("split") is None and not site.has(1):
        if len(set(counts)) == 1:
            return
        if site.version >= 13:
            for attribute in [a for a in site.node.attribute if a.name == "num_outputs"]:
                site.node.attribute.remove(attribute)
            site.node.input.extend([""] * (2 - len(site.node.input)))
            site.node.input[1] = cut.store(np.array(counts, np.int64), f"{site.node.output[0]}_split")
            return
    cut.set_ints(site, "split", 1, counts)


def _bounds(site: Site) -> dict[int, slice]:
    """The slices of a Slice, axis -> what is taken."""
    rank = len(site.axes())
    starts, ends = site.ints("starts", 1) or [], site.ints("ends", 2) or []
    axes = site.ints("axes", 3) or list(range(len(starts)))
    steps = (site.ints("steps", 4) if site.has(4) else None) or [1] * len(starts)
    found = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = site.axes()[axis % rank].size
        low, high = (0, size) if step > 0 else (-1, size - 1)
        first = min(max(start + size if start < 0 else start, 0), size if step > 0 else size - 1)
        last = min(max(end + size if end < 0 else end, low), max(high, low))
        if step < 0 and end < -size:
            last = -1
        found[axis % rank] = slice(first, None if last < 0 else last, step)
    return found


def _slice(site: Site) -> None:
    axes = list(site.axes())
    try:
        bounds = _bounds(site)
    except NoRule:
        content = site.content(3)
        known = content is not None or site.attribute("axes") is not None or not site.has(3)
        if not known:
            raise
        cut = [int(i) % len(axes) for i in (site.ints("axes", 3) or range(site.facts.shapes[site.node.input[1]][0]))]
        for i in cut:
            site.pin(axes[i], "cuts it at bounds that are known at run time only")
        site.give(
            [
                site.fixed(s, "cuts it") if i in cut else a
                for i, (a, s) in enumerate(zip(axes, site.result(), strict=True))
            ],
            site.null(0),
        )
        return
    for axis, taken in bounds.items():
        axes[axis] = axes[axis][taken]
    site.give(axes, site.null(0))


def _resize_slice(site: Site, cut: Cut) -> None:
    bounds = {axis: taken for axis, taken in _bounds(site).items() if cut.touches([site.axes()[axis]])}
    if not bounds:
        return
    if any(taken.step != 1 for taken in bounds.values()):
        if len(_bounds(site)) > 1:
            raise NoRule(f"{site.what} takes every few positions of several axes")
        axis, taken = next(iter(bounds.items()))
        alive = cut.alive(site.axes()[axis])
        picked = np.arange(alive.size)[taken]
        places = (np.cumsum(alive) - 1)[picked[alive[picked]]]
        name = cut.store(places.astype(np.int64), f"{site.node.output[0]}_picked")
        data = site.node.input[0]
        del site.node.input[:]
        del site.node.attribute[:]
        site.node.op_type = "Gather"
        site.node.input.extend([data, name])
        cut.set_attribute(site, "axis", axis)
        return
    starts, ends = list(site.ints("starts", 1) or []), list(site.ints("ends", 2) or [])
    order = [i % len(site.axes()) for i in (site.ints("axes", 3) or range(len(starts)))]
    for axis, taken in bounds.items():
        alive = cut.alive(site.axes()[axis])
        index = order.index(axis)
        starts[index] = int(alive[: taken.start].sum())
        ends[index] = starts[index] + int(alive[taken].sum())
    cut.set_ints(site, "starts", 1, starts)
    cut.set_ints(site, "ends", 2, ends)


def _gather(site: Site) -> None:
    axes, nulls, axis = list(site.axes()), list(site.null(0)), site.axis()
    indices = site.content(1)
    if indices is None or indices.ndim > 1:
        site.pin(axes[axis], "looks entries up in it")
        middle = list(site.axes(1))
        site.give(
            [*axes[:axis], *middle, *axes[axis + 1 :]], [*nulls[:axis], *[False] * len(middle), *nulls[axis + 1 :]]
        )
        return
    places = indices % max(axes[axis].size, 1)
    if indices.ndim == 0:
        site.pin(axes[axis][[int(places)]], "picks one entry")
        site.give([a for i, a in enumerate(axes) if i != axis], [n for i, n in enumerate(nulls) if i != axis])
        return
    site.give([a[places] if i == axis else a for i, a in enumerate(axes)], nulls)


def _resize_gather(site: Site, cut: Cut) -> None:
    axis = site.axes()[site.axis()]
    indices = site.content(1)
    if indices is None or not cut.touches([axis]):
        return
    alive = cut.alive(axis)
    places = indices % axis.size
    if indices.ndim == 1:
        places = places[alive[places]]
    cut.set_operand(site, 1, (np.cumsum(alive) - 1)[places].astype(indices.dtype))


def _pads(site: Site) -> list[tuple[int, int]]:
    rank = len(site.axes())
    given = site.ints("pads", 1) or site.ints("paddings", 1) or []
    axes = [int(i) % rank for i in site.settled(3).reshape(-1)] if site.has(3) else list(range(rank))
    pads = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pads[axis] = (given[i], given[i + len(axes)])
    return pads


def _pad(site: Site) -> None:
    axes = list(site.axes())
    pads = _pads(site)
    nulls = list(site.null(0))
    for i, (begin, end) in enumerate(pads):
        if (begin, end) == (0, 0):
            continue
        if (
            site.attribute("mode", "constant") == "constant"
            and min(begin, end) >= 0
            and not site.labels.is_fixed(axes[i])
        ):
            axes[i] = np.concatenate([site.labels.fresh(begin), axes[i], site.labels.fresh(end)])
            nulls[i] = False
        else:
            site.pin(axes[i], f"pads axis {i}")
            axes[i] = site.fixed(site.result()[i], f"pads axis {i}")
    site.give(axes, nulls)


def _resize_pad(site: Site, cut: Cut) -> None:
    pads = _pads(site)
    changed = False
    for i, (begin, end) in enumerate(pads):
        axis = site.outputs[0][i]
        if begin >= 0 and end >= 0 and (begin or end) and cut.touches([axis]):
            alive = cut.alive(axis)
            pads[i] = (int(alive[:begin].sum()), int(alive[alive.size - end :].sum()))
            changed = True
    if changed:
        order = [int(i) % len(pads) for i in site.settled(3).reshape(-1)] if site.has(3) else list(range(len(pads)))
        name = "pads" if site.version >= 2 else "paddings"
        cut.set_ints(site, name, 1, [pads[i][0] for i in order] + [pads[i][1] for i in order])


def _tile(site: Site) -> None:
    repeats = site.settled(1).reshape(-1)
    site.give([np.tile(axis, int(r)) for axis, r in zip(site.axes(), repeats, strict=True)], site.null(0))


def _expand(site: Site) -> None:
    axes, nulls, shape = site.axes(), site.null(0), site.result()
    missing = len(shape) - len(axes)
    result, kept = [], []
    for i, size in enumerate(shape):
        if i >= missing and axes[i - missing].size == size:
            result.append(axes[i - missing])
            kept.append(nulls[i - missing])
        else:
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
    site.give([_new_axis(site, i, size) for i, size in enumerate(site.result())])


def _resize_constant_of_shape(site: Site, cut: Cut) -> None:
    axes = site.outputs[0]
    if cut.touches(axes):
        cut.set_sizes(site, 0, [cut.count(a) if cut.touches([a]) else None for a in axes])


def _depth_to_space(site: Site) -> None:
    n, c, h, w = site.axes()
    block = int(site.attribute("blocksize"))
    inner = c.size // block**2
    column_first = site.attribute("mode", "DCR") == "DCR"
    sizes = (block, block, inner) if column_first else (inner, block, block)
    factors = site.labels.split(c, sizes, site.what)
    kept = factors[2] if column_first else factors[0]
    for factor in factors:
        if factor is not kept:
            site.pin(factor, "moves it into space")
    site.pin(h, "moves channels into it")
    site.pin(w, "moves channels into it")
    shape = site.result()
    site.give(
        [n, kept, site.fixed(shape[2], "moves channels into it"), site.fixed(shape[3], "moves channels into it")],
        [site.null(0)[0], site.null(0)[1], False, False],
    )


def _space_to_depth(site: Site) -> None:
    n, c, h, w = site.axes()
    block = int(site.attribute("blocksize"))
    for axis in (h, w):
        site.pin(axis, "moves it into channels")
    depth = site.labels.merge(
        [site.fixed(block, "moves space into it"), site.fixed(block, "moves space into it"), c], site.what
    )
    shape = site.result()
    site.give(
        [n, depth, *(site.fixed(size, "moves it into channels") for size in shape[2:])],
        [site.null(0)[0], site.null(0)[1], False, False],
    )


def _resize_image(site: Site) -> None:
    axes, shape = site.axes(), site.result()
    if site.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise NoRule(f"{site.what} crops while it resizes")
    result = []
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if axis.size == size:
            result.append(axis)
        else:
            site.pin(axis, f"resizes axis {i}")
            result.append(site.fixed(size, f"resizes axis {i}"))
    site.give(result, site.null(0))


def _resize_sizes(site: Site, cut: Cut) -> None:
    axes = site.outputs[0]
    if not site.has(3) or not cut.touches(axes):
        return
    named = site.attribute("axes")
    order = [int(i) % len(axes) for i in named] if named is not None else range(len(axes))
    sizes = [cut.count(axes[i]) if cut.touches([axes[i]]) else None for i in order]
    if any(size is not None for size in sizes):
        cut.set_sizes(site, 3, sizes)


def _shape(site: Site) -> None:
    site.give_fixed("counts positions")


def _along(attribute: str, why: str, default: int = -1, operand: int | None = None) -> Rule:
    """Operators that work along one axis, which stays whole."""

    def tie(site: Site) -> None:
        axis = (
            int(site.settled(operand).reshape(-1)[0])
            if operand is not None
            else int(site.attribute(attribute, default))
        )
        axes = site.axes()
        site.pin(axes[axis], why)
        for index in range(len(site.node.output)):
            sizes = site.result(index)
            kept = [a if i != axis % len(axes) else site.fixed(sizes[i], why) for i, a in enumerate(axes)]
            site.give(kept)

    return Rule(tie)


def _trilu(site: Site) -> None:
    for axis in site.axes()[-2:]:
        site.pin(axis, "cuts a triangle along it")
    site.give(site.axes(), site.null(0))


RULES: dict[tuple[str, str], Rule] = {
    ("", "Reshape"): Rule(_reshape, _resize_shape),
    ("", "Flatten"): Rule(_reshape),
    ("", "Transpose"): Rule(_transpose),
    ("", "Squeeze"): Rule(_squeeze),
    ("", "Unsqueeze"): Rule(_unsqueeze),
    ("", "Concat"): Rule(_concat),
    ("", "Split"): Rule(_split, _resize_split),
    ("", "Slice"): Rule(_slice, _resize_slice),
    ("", "Gather"): Rule(_gather, _resize_gather),
    ("", "Pad"): Rule(_pad, _resize_pad),
    ("", "Tile"): Rule(_tile),
    ("", "Expand"): Rule(_expand, _resize_expand),
    ("", "ConstantOfShape"): Rule(_constant_of_shape, _resize_constant_of_shape),
    ("", "DepthToSpace"): Rule(_depth_to_space),
    ("", "SpaceToDepth"): Rule(_space_to_depth),
    ("", "Resize"): Rule(_resize_image, _resize_sizes),
    ("", "Upsample"): Rule(_resize_image),
    ("", "Shape"): Rule(_shape),
    ("", "Size"): Rule(_shape),
    ("", "CumSum"): _along("", "sums along it", operand=1),
    ("", "TopK"): _along("axis", "sorts along it"),
    ("", "Trilu"): Rule(_trilu),
}
