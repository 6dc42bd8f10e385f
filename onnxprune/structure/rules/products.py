"""Operators that multiply by weights: convolutions and matrix products."""

from __future__ import annotations

from onnxprune.structure.labels import Axis
from onnxprune.structure.rules.elementwise import meet
from onnxprune.structure.site import Cut, NoRule, Rule, Site


def contract(site: Site, *places: tuple[int, int]) -> None:
    """Sum over an axis that operands share: what is pruned has to be 0 in one of them.

    Args:
        site: the node.
        places: operand and axis.
    """
    axes = [site.axes(operand)[axis] for operand, axis in places]
    for other in axes[1:]:
        site.labels.tie(axes[0], other)
    if not any(site.null(operand)[axis] for operand, axis in places):
        site.pin(axes[0], "sums over it, and what is pruned is not 0 there")


def _spatial(site: Site) -> list[Axis]:
    """The axes a kernel runs over: they stay, and so do those of the result."""
    for i, axis in enumerate(site.axes()[2:], 2):
        site.pin(axis, f"runs over axis {i}")
    return [site.fixed(size, f"runs over axis {i}") for i, size in enumerate(site.result()[2:], 2)]


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
        if not site.null(data)[1] and not site.null(weight)[1]:
            site.pin(w[1], "sums over it, and what is pruned is not 0 there")
        offsets = site.labels.split(w[0], (group, w[0].size // group), site.what)
        site.labels.tie(groups, offsets[0])
    null = site.null(weight)[0]
    if site.has(bias):
        site.labels.tie(w[0], site.axes(bias)[0])
        null = null and site.null(bias)[0]
    site.give([x[0], w[0], *_spatial(site)], [False, null, *[False] * (len(x) - 2)])


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


def _deform_conv(site: Site) -> None:
    """Offsets and masks are for all channels, or for groups of them, which stay then."""
    convolution(site, bias=3)
    for operand in (2, 4):
        if site.has(operand):
            batch, *others = site.axes(operand)
            site.labels.tie(site.axes()[0], batch)
            for axis in others:
                site.pin(axis, "moves its kernel by it")
    if int(site.attribute("offset_group", 1)) > 1:
        site.pin(site.axes()[1], "moves its kernel for each group of channels")


def _conv_transpose(site: Site) -> None:
    x, w = site.axes(0), site.axes(1)
    group = int(site.attribute("group", 1))
    for i, axis in enumerate(w[2:], 2):
        site.pin(axis, f"has a kernel along axis {i}")
    contract(site, (0, 1), (1, 0))
    if group == 1:
        outputs = w[1]
    else:
        factors = site.labels.split(w[0], (group, w[0].size // group), site.what)
        outputs = site.labels.fresh(group * w[1].size)
        site.labels.relate(outputs, [factors[0], w[1]], f"{site.what} (group={group})")
    null = site.null(1)[1] and (group == 1 or site.null(1)[0])
    if site.has(2):
        site.labels.tie(outputs, site.axes(2)[0])
        null = null and site.null(2)[0]
    site.give([x[0], outputs, *_spatial(site)], [False, null, *[False] * (len(x) - 2)])


def _resize_conv_transpose(site: Site, cut: Cut) -> None:
    if int(site.attribute("group", 1)) > 1:
        outputs, offsets = cut.count(site.outputs[0][1]), cut.count(site.axes(1)[1])
        if outputs % offsets:
            raise NoRule(f"{site.what} would be left with groups of unequal size")
        cut.set_attribute(site, "group", outputs // offsets)


def _gemm(site: Site) -> None:
    a, b = site.axes(0), site.axes(1)
    left, right = int(site.attribute("transA", 0)), int(site.attribute("transB", 0))
    contract(site, (0, 0 if left else 1), (1, 1 if right else 0))
    result = [a[1 if left else 0], b[0 if right else 1]]
    along = [site.null(0)[1 if left else 0], site.null(1)[0 if right else 1]]
    if site.has(2):
        bias = site.axes(2)
        missing = 2 - len(bias)
        for i in range(2):
            met = [result[i], *bias[i - missing : i - missing + 1]] if i >= missing else [result[i]]
            whole = len(met) > 1 and met[1].size == met[0].size
            along[i] = along[i] and whole and site.null(2)[i - missing]
            result[i] = meet(site, met)
    site.give(result, along)


def matmul(site: Site, left: int = 0, right: int = 1) -> None:
    """MatMul: batch axes meet as in numpy, the inner axes are summed over."""
    a, b = site.axes(left), site.axes(right)
    if not a or not b:
        raise NoRule(f"{site.what} has a scalar operand")
    contract(site, (left, len(a) - 1), (right, max(len(b) - 2, 0)))
    wide = max(len(a), len(b)) - 2
    result, nulls = [], []
    for back in range(wide + 2, 2, -1):
        meeting = [(axes[-back], site.null(o)[-back]) for o, axes in ((left, a), (right, b)) if len(axes) >= back]
        axis = meet(site, [m for m, _ in meeting])
        result.append(axis)
        nulls.append(any(null and m.size == axis.size for m, null in meeting))
        if not site.constant[left] and not site.constant[right]:
            site.labels.prefer(axis)
    ends = [(a[-2], site.null(left)[-2])] if len(a) > 1 else []
    ends += [(b[-1], site.null(right)[-1])] if len(b) > 1 else []
    site.give([*result, *(axis for axis, _ in ends)], [*nulls, *(null for _, null in ends)])


def _matmul(site: Site) -> None:
    matmul(site)


def _terms(site: Site) -> tuple[list[list[str]], list[str]]:
    """An Einsum's letters, operand by operand, and its result's; the axes of an ellipsis are called '0', '1', ..."""
    equation = str(site.attribute("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    texts = left.split(",")
    spans = [len(site.axes(i)) - len(t.replace("...", "")) if "..." in t else 0 for i, t in enumerate(texts)]
    most = max(spans)

    def letters(text: str, span: int) -> list[str]:
        before, dots, after = text.partition("...")
        return [*before, *([str(i) for i in range(most - span, most)] if dots else []), *after]

    terms = [letters(text, span) for text, span in zip(texts, spans, strict=True)]
    if arrow:
        return terms, letters(right, most)
    every = [letter for term in terms for letter in term]
    once = sorted(letter for letter in set(every) if every.count(letter) == 1 and letter.isalpha())
    return terms, [*(str(i) for i in range(most)), *once]


def _einsum(site: Site) -> None:
    terms, right = _terms(site)
    seen: dict[str, list[tuple[int, int]]] = {}
    for operand, term in enumerate(terms):
        if len(term) != len(site.axes(operand)):
            raise NoRule(f"{site.what} names {len(term)} axes of an operand with {len(site.axes(operand))}")
        for place, letter in enumerate(term):
            seen.setdefault(letter, []).append((operand, place))
    made: dict[str, tuple[Axis, bool]] = {}
    for letter, places in seen.items():
        axis = meet(site, [site.axes(operand)[place] for operand, place in places])
        null = any(site.null(o)[p] and site.axes(o)[p].size == axis.size for o, p in places)
        made[letter] = axis, null
        if letter not in right and not null:
            site.pin(axis, "sums over it, and what is pruned is not 0 there")
        if len({operand for operand, _ in places}) < len(places):
            site.pin(axis, "takes a diagonal of it")
        if letter in right and len(places) > 1 and not any(site.constant[operand] for operand, _ in places):
            site.labels.prefer(axis)
    site.give([made[letter][0] for letter in right], [made[letter][1] for letter in right])


RULES: dict[tuple[str, str], Rule] = {
    ("", "Conv"): Rule(_conv, _resize_conv),
    ("", "DeformConv"): Rule(_deform_conv, _resize_conv),
    ("", "ConvTranspose"): Rule(_conv_transpose, _resize_conv_transpose),
    ("", "Gemm"): Rule(_gemm),
    ("", "MatMul"): Rule(_matmul),
    ("", "Einsum"): Rule(_einsum),
}
