"""Operators that multiply by weights: convolutions and matrix products."""

from __future__ import annotations

from onnxprune.structure.labels import Axis
from onnxprune.structure.site import Cut, NoRule, Rule, Site


def contract(site: Site, left: tuple[int, int], right: tuple[int, int]) -> None:
    """Sum over an axis of two operands: what is pruned has to be 0 on one side.

    Args:
        site: the node.
        left: operand and axis.
        right: operand and axis.
    """
    a, b = site.axes(left[0])[left[1]], site.axes(right[0])[right[1]]
    site.labels.tie(a, b)
    weighted = site.constant[left[0]] or site.constant[right[0]]
    if not weighted and not site.null(left[0])[left[1]] and not site.null(right[0])[right[1]]:
        site.pin(a, "sums over it, and what is pruned is not 0 there")


def _spatial(site: Site, first: int = 2) -> list[Axis]:
    """The axes a kernel runs over: they stay, and so do those of the result."""
    for i, axis in enumerate(site.axes()[first:], first):
        site.pin(axis, f"runs over axis {i}")
    return [site.fixed(size, f"runs over axis {i}") for i, size in enumerate(site.result()[first:], first)]


def convolution(site: Site, data: int = 0, weight: int = 1, bias: int = 2) -> None:
    """Conv: outputs and inputs are (group, offset); a group's offsets are alike in all groups."""
    x, w = site.axes(data), site.axes(weight)
    group = int(site.attribute("group", 1))
    for i, axis in enumerate(w[2:], 2):
        site.pin(axis, f"has a kernel along axis {i}")
    if group == 1:
        contract(site, (data, 1), (weight, 1))
    else:
        groups = site.labels.fresh(group)
        site.labels.relate(x[1], [groups, w[1]], f"{site.what} (group={group})")
        offsets = site.labels.split(w[0], (group, w[0].size // group), site.what)
        site.labels.tie(groups, offsets[0])
    site.give([x[0], w[0], *_spatial(site, 2)], [False, site.constant[weight], *[False] * (len(x) - 2)])
    if site.has(bias):
        site.labels.tie(w[0], site.axes(bias)[0])
        site.zeroed.append(bias)


def resize_group(site: Site, cut: Cut, data: int = 0, weight: int = 1) -> None:
    """The number of groups, where whole groups went."""
    group = int(site.attribute("group", 1))
    if group > 1:
        inputs, offsets = cut.count(site.axes(data)[1]), cut.count(site.axes(weight)[1])
        if inputs % offsets:
            raise NoRule(f"{site.what} would be left with groups of unequal size")
        cut.set_attribute(site, "group", inputs // offsets)


def _conv(site: Site) -> None:
    convolution(site)


def _resize_conv(site: Site, cut: Cut) -> None:
    resize_group(site, cut)


def _conv_transpose(site: Site) -> None:
    x, w = site.axes(0), site.axes(1)
    group = int(site.attribute("group", 1))
    for i, axis in enumerate(w[2:], 2):
        site.pin(axis, f"has a kernel along axis {i}")
    site.labels.tie(x[1], w[0])
    if group == 1:
        outputs = w[1]
    else:
        factors = site.labels.split(w[0], (group, w[0].size // group), site.what)
        outputs = site.labels.fresh(group * w[1].size)
        site.labels.relate(outputs, [factors[0], w[1]], f"{site.what} (group={group})")
    site.give([x[0], outputs, *_spatial(site)], [False, site.constant[1], *[False] * (len(x) - 2)])
    if site.has(2):
        site.labels.tie(outputs, site.axes(2)[0])
        site.zeroed.append(2)


def _resize_conv_transpose(site: Site, cut: Cut) -> None:
    if int(site.attribute("group", 1)) > 1:
        outputs, offsets = cut.count(site.outputs[0][1]), cut.count(site.axes(1)[1])
        if outputs % offsets:
            raise NoRule(f"{site.what} would be left with groups of unequal size")
        cut.set_attribute(site, "group", outputs // offsets)
    given = site.attribute("output_shape")
    if given and len(given) == len(site.outputs[0]):
        cut.set_attribute(site, "output_shape", [given[0], cut.count(site.outputs[0][1]), *given[2:]])


def _gemm(site: Site) -> None:
    a, b = site.axes(0), site.axes(1)
    left, right = int(site.attribute("transA", 0)), int(site.attribute("transB", 0))
    contract(site, (0, 0 if left else 1), (1, 1 if right else 0))
    rows, columns = a[1 if left else 0], b[0 if right else 1]
    along = site.null(0)[1 if left else 0], site.null(1)[0 if right else 1]
    if site.has(2):
        bias = site.axes(2)
        site.zeroed.append(2)
        if bias and bias[-1].size != 1:
            site.labels.tie(bias[-1], columns)
        if len(bias) == 2 and bias[0].size != 1:
            site.labels.tie(bias[0], rows)
        full = bool(bias) and bias[-1].size == columns.size
        along = along[0] and len(bias) == 2 and bias[0].size == rows.size, along[1] and full
    site.give([rows, columns], along)


def matmul(site: Site, left: int = 0, right: int = 1) -> None:
    """MatMul: batch axes meet as in numpy, the inner axes are summed over."""
    a, b = site.axes(left), site.axes(right)
    if not a or not b:
        raise NoRule(f"{site.what} has a scalar operand")
    contract(site, (left, len(a) - 1), (right, max(len(b) - 2, 0)))
    batch, nulls = [], []
    wide = max(len(a), len(b)) - 2
    for i in range(wide):
        meeting = []
        for operand, axes in ((left, a), (right, b)):
            place = i - (wide - (len(axes) - 2))
            if len(axes) > 2 and place >= 0:
                meeting.append((axes[place], site.null(operand)[place]))
        long = [m for m in meeting if m[0].size != 1] or meeting[:1]
        for other in long[1:]:
            site.labels.tie(long[0][0], other[0])
        open_ = [m for m in long if not site.labels.is_fixed(m[0])]
        batch.append((open_ or long)[0][0])
        nulls.append(any(null for _, null in long))
        if not site.constant[left] and not site.constant[right]:
            site.labels.prefer(batch[-1])
    rows = [(a[-2], site.null(left)[-2])] if len(a) > 1 else []
    columns = [(b[-1], site.null(right)[-1])] if len(b) > 1 else []
    ends = [*rows, *columns]
    site.give([*batch, *(axis for axis, _ in ends)], [*nulls, *(null for _, null in ends)])


def _matmul(site: Site) -> None:
    matmul(site)


def _einsum(site: Site) -> None:
    equation = str(site.attribute("equation")).replace(" ", "")
    if "." in equation:
        raise NoRule(f"{site.what} has an ellipsis in its equation")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    seen: dict[str, list[tuple[int, int]]] = {}
    for operand, term in enumerate(terms):
        for place, letter in enumerate(term):
            seen.setdefault(letter, []).append((operand, place))
    for letter, places in seen.items():
        axes = [site.axes(operand)[place] for operand, place in places]
        for other in axes[1:]:
            site.labels.tie(axes[0], other)
        weighted = any(site.constant[operand] or site.null(operand)[place] for operand, place in places)
        if letter not in right and not weighted:
            site.pin(axes[0], "sums over it, and what is pruned is not 0 there")
        if len({operand for operand, _ in places}) < len(places):
            site.pin(axes[0], "takes a diagonal of it")
        if letter in right and len(places) > 1 and not any(site.constant[operand] for operand, _ in places):
            site.labels.prefer(axes[0])
    nulls = [any(site.null(operand)[place] for operand, place in seen[letter]) for letter in right]
    site.give([site.axes(seen[letter][0][0])[seen[letter][0][1]] for letter in right], nulls)


RULES: dict[tuple[str, str], Rule] = {
    ("", "Conv"): Rule(_conv, _resize_conv),
    ("", "ConvTranspose"): Rule(_conv_transpose, _resize_conv_transpose),
    ("", "Gemm"): Rule(_gemm),
    ("", "MatMul"): Rule(_matmul),
    ("", "Einsum"): Rule(_einsum),
}
