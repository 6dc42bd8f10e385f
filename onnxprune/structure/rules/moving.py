"""Operators that move positions: labels move as the data do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxprune.structure.labels import Axis
from onnxprune.structure.rules.elementwise import hold, meet
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
    hold(site, 1, "takes sizes from it")
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
            now = cut.follows(site, 1) if -1 in old else np.full(old.shape, -1)
            if now is None or now[i] not in (-1, cut.count(axis)):
                raise NoRule(f"{site.what} needs a size that varies from run to run")
            sizes.append(-1 if now[i] == -1 else None)
        else:
            sizes.append(cut.count(axis))
    if given is not None:
        cut.set_attribute(site, "shape", [int(o if s is None else s) for o, s in zip(old, sizes, strict=True)])
    elif any(size is not None for size in sizes):
        cut.set_sizes(site, 1, sizes)


def _transpose(site: Site) -> None:
    order = site.attribute("perm") or range(len(site.axes()))[::-1]
    site.give([site.axes()[i] for i in order], [site.null(0)[i] for i in order])


def _squeezed(site: Site) -> list[int]:
    axes = site.axes()
    given = site.ints("axes", 1)
    return [i for i, a in enumerate(axes) if a.size == 1] if given is None else [i % len(axes) for i in given]


def _squeeze(site: Site) -> None:
    axes, gone = site.axes(), _squeezed(site)
    for i in gone:
        site.pin(axes[i], "drops it")
    hold(site, 1, "drops what it lists")
    kept = [i for i in range(len(axes)) if i not in gone]
    site.give([axes[i] for i in kept], [site.null(0)[i] for i in kept])


def _resize_squeeze(site: Site, cut: Cut) -> None:
    """Without axes every axis of one position is dropped: one that is left with one must not be."""
    if site.attribute("axes") is not None or site.has(1):
        return
    if site.version < 13:
        cut.set_attribute(site, "axes", _squeezed(site))
        return
    del site.node.input[1:]
    site.node.input.append(cut.store(np.array(_squeezed(site), np.int64), f"{site.node.output[0]}_axes"))


def _unsqueeze(site: Site) -> None:
    axes, nulls = list(site.axes()), list(site.null(0))
    given = site.ints("axes", 1) or []
    rank = len(axes) + len(given)
    for i in sorted(i % rank for i in given):
        axes.insert(i, site.fixed(1, "adds it"))
        nulls.insert(i, False)
    hold(site, 1, "adds what it lists")
    site.give(axes, nulls)


def _concat(site: Site) -> None:
    operands = [i for i in range(len(site.node.input)) if site.has(i)]
    parts = [site.axes(i) for i in operands]
    axis = int(site.attribute("axis", 1)) % len(parts[0])
    result = [
        np.concatenate([part[i] for part in parts]) if i == axis else meet(site, [part[i] for part in parts])
        for i in range(len(parts[0]))
    ]
    site.give(result, [all(site.null(o)[i] for o in operands) for i in range(len(result))])


def _parts(site: Site) -> list[int]:
    """How many positions each result of a Split has."""
    size = site.axes()[site.axis()].size
    given = site.ints("split", 1)
    if given:
        return given
    count = len(site.node.output)
    each = -(-size // count)
    return [min(each, size - i * each) for i in range(count)]


def _split(site: Site) -> None:
    axes, axis = site.axes(), site.axis()
    given = site.has(1) and site.content_varies(1).any()
    hold(site, 1, "takes sizes from it")
    start = 0
    if given:
        site.pin(axes[axis], "splits it at places that vary from run to run")
    for size in _parts(site):
        part = site.fixed(size, "splits it") if given else axes[axis][start : start + size]
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
    blocks = [site.fixed(block, "moves space into it"), site.fixed(block, "moves space into it")]
    depth = site.labels.merge([c, *blocks] if site.attribute("mode", "DCR") == "CRD" else [*blocks, c], site.what)
    shape = site.result()
    site.give(
        [n, depth, *(site.fixed(size, "moves it into channels") for size in shape[2:])],
        [site.null(0)[0], site.null(0)[1], False, False],
    )


def _reverse_sequence(site: Site) -> None:
    """The axes of time and batch; each sequence has a length."""
    axes = site.axes()
    time, batch = int(site.attribute("time_axis", 0)), int(site.attribute("batch_axis", 1))
    site.pin(axes[time], "turns it round")
    site.labels.tie(axes[batch], site.axes(1)[0])
    site.give(axes, site.null(0))


def _trilu(site: Site) -> None:
    for axis in site.axes()[-2:]:
        site.pin(axis, "cuts a triangle along it")
    hold(site, 1, "cuts a triangle")
    site.give(site.axes(), site.null(0))


def _shape(site: Site) -> None:
    site.give_fixed("counts positions")


RULES: dict[tuple[str, str], Rule] = {
    ("", "Reshape"): Rule(_reshape, _resize_shape),
    ("", "Flatten"): Rule(_reshape),
    ("", "Transpose"): Rule(_transpose),
    ("", "Squeeze"): Rule(_squeeze, _resize_squeeze),
    ("", "Unsqueeze"): Rule(_unsqueeze),
    ("", "Concat"): Rule(_concat),
    ("", "Split"): Rule(_split, _resize_split),
    ("", "DepthToSpace"): Rule(_depth_to_space),
    ("", "SpaceToDepth"): Rule(_space_to_depth),
    ("", "ReverseSequence"): Rule(_reverse_sequence),
    ("", "Trilu"): Rule(_trilu),
    ("", "Shape"): Rule(_shape),
    ("", "Size"): Rule(_shape),
}
