"""Attention as one operator of onnxruntime: heads go as a whole, and the attributes that count them follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.structure.labels import Axes, Axis
from onnxprune.structure.rules.products import contract
from onnxprune.structure.site import Cut, NoRule, Rule, Site

SIZE = "works on whole heads"
ALONG = "attends along it"
ONLY = "has only one head"


def _new_heads(site: Site, count: int) -> Axis:
    if count == 1:
        return site.fixed(1, ONLY)
    heads = site.labels.fresh(count)
    site.labels.prefer(heads)
    return heads


def _merged(site: Site, axis: Axis, heads: Axis) -> None:
    """An axis that runs over (heads, positions of a head)."""
    size, rest = divmod(axis.size, heads.size)
    if rest:
        raise NoRule(f"{site.what} has {heads.size} heads on an axis of {axis.size} positions")
    if heads.size == 1:
        site.pin(axis, ONLY)
    else:
        site.labels.relate(axis, [heads, site.fixed(size, SIZE)], site.what)


def _headed(site: Site, axes: Axes, heads: Axis) -> tuple[Axis, int]:
    """Tie the heads of a query, key or value.

    Its axes are (batch, sequence, heads and positions), (batch, heads, sequence, positions) or
    (batch, sequence, heads, parts, positions).

    Returns:
        The labels of all heads' positions as one axis, and which of its axes has the heads.
    """
    where = {3: 2, 4: 1, 5: 2}[len(axes)]
    for i, axis in enumerate(axes[1:], 1):
        if i != where:
            site.pin(axis, ALONG if i == {3: 1, 4: 2, 5: 1}[len(axes)] else SIZE)
    if len(axes) == 3:
        _merged(site, axes[2], heads)
        return axes[2], where
    site.labels.tie(axes[where], heads)
    return site.labels.merge([heads, site.fixed(axes[-1].size, SIZE)], site.what), where


def _masks(site: Site, operands: Sequence[int]) -> None:
    """Operands with nothing of the heads in them."""
    for operand in operands:
        if site.has(operand):
            for axis in site.axes(operand):
                site.pin(axis, "reads it as a whole")


def _bias_of_scores(site: Site, operand: int, heads: Axis) -> None:
    """(batch or 1, heads or 1, sequence, all sequence)."""
    if not site.has(operand):
        return
    for i, axis in enumerate(site.axes(operand)):
        if i == 1 and axis.size == heads.size != 1:
            site.labels.tie(axis, heads)
        elif i:
            site.pin(axis, ALONG)


def _results(site: Site, heads: Axis) -> None:
    """Further results: caches (batch, heads, sequence, positions), and scores of that form."""
    for index in range(1, len(site.node.output)):
        if not site.node.output[index]:
            site.give([])
        elif site.node.output[index] not in site.facts.shapes:
            raise NoRule(f"{site.what} has a result of unknown shape")
        else:
            batch, _, sequence, width = site.result(index)[-4:]
            pair = [site.fixed(2, SIZE)] if len(site.result(index)) == 5 else []
            rest = [site.fixed(sequence, ALONG), site.fixed(width, SIZE)]
            same = batch == site.axes()[0].size
            site.give([*pair, site.axes()[0] if same else site.fixed(batch, SIZE), heads, *rest])


def attention(site: Site, parameters: dict[str, int], past: int) -> None:
    """Attention and QAttention: one weight makes queries, keys and values.

    Args:
        site: the node.
        parameters: operands by what they hold: 'mask', 'scores' (added to the scores).
        past: the operand that holds earlier keys and values.
    """
    x, w = site.axes(0), site.axes(1)
    parts = _parts(site, w[1])
    heads = _new_heads(site, int(site.attribute("num_heads")))
    contract(site, (0, 2), (1, 0))
    for part in parts:
        _merged(site, part, heads)
    null = site.constant[1]
    if site.has(2):
        site.labels.tie(site.axes(2)[0], w[1])
        null = null and site.constant[2]
    site.pin(x[1], ALONG)
    _masks(site, [parameters["mask"]])
    if "scores" in parameters:
        _bias_of_scores(site, parameters["scores"], heads)
    if site.has(past):
        pair, _, head, sequence, width = site.axes(past)
        site.labels.tie(head, heads)
        for axis, why in ((pair, SIZE), (sequence, ALONG), (width, SIZE)):
            site.pin(axis, why)
        null = null and site.null(past)[2]
    site.give([x[0], x[1], parts[2]], [site.null(0)[0], False, null])
    _results(site, heads)


def _parts(site: Site, axis: Axis) -> list[Axis]:
    """Queries, keys and values on the merged axis."""
    given = site.attribute("qkv_hidden_sizes")
    sizes = [int(i) for i in given] if given else [axis.size // 3] * 3
    if sum(sizes) != axis.size:
        raise NoRule(f"{site.what} has queries, keys and values of {sizes} positions on an axis of {axis.size}")
    return np.split(axis, np.cumsum(sizes)[:-1])


def _attention(site: Site) -> None:
    attention(site, {"mask": 3, "scores": 5}, 4)


def resize_heads(site: Site, cut: Cut) -> None:
    """The number of heads of Attention and QAttention, and the sizes of queries, keys and values."""
    parts = _parts(site, site.axes(1)[1])
    sizes = [cut.count(part) for part in parts]
    _scale(site, cut, "num_heads", parts[0])
    if site.attribute("qkv_hidden_sizes"):
        cut.set_attribute(site, "qkv_hidden_sizes", sizes)


def _scale(site: Site, cut: Cut, name: str, axis: Axis) -> None:
    """An attribute that counts what lies on an axis of equal parts."""
    cut.set_attribute(site, name, int(site.attribute(name)) * cut.count(axis) // axis.size)


def _multi_head(site: Site) -> None:
    query = site.axes(0)
    heads = _new_heads(site, int(site.attribute("num_heads")))
    given = [i for i in (0, 1, 2) if site.has(i)]
    last = given[-1]  # queries, keys and values may come in one operand, keys and values in one
    parts = [_headed(site, site.axes(operand), heads) for operand in given]
    made, where = parts[-1]
    null = site.null(last)[where]
    if site.has(3):
        bias = site.axes(3)[0]
        sizes = [query[2].size if len(query) == 3 else made.size] * 2
        start = 0
        for size in (*sizes, bias.size - sum(sizes)):
            _merged(site, bias[start : start + size], heads)
            start += size
        null = null and site.constant[3]
    _masks(site, [4, 8, 9])
    _bias_of_scores(site, 5, heads)
    for operand in (6, 7):
        if site.has(operand):
            _headed(site, site.axes(operand), heads)
    null = null and (not site.has(7) or site.null(7)[1])
    site.give([query[0], query[1], made], [site.null(0)[0], False, null])
    _results(site, heads)


def _resize_multi_head(site: Site, cut: Cut) -> None:
    axes = site.axes(0)
    _scale(site, cut, "num_heads", axes[2])


def _query_parts(site: Site) -> tuple[Axis, Axis, Axis]:
    """Queries, keys and values of a GroupQueryAttention."""
    query = site.axes(0)[2]
    if site.has(1):
        return query, site.axes(1)[2], site.axes(2)[2]
    heads, keys = int(site.attribute("num_heads")), int(site.attribute("kv_num_heads"))
    width = query.size // (heads + 2 * keys)
    first, second = heads * width, (heads + keys) * width
    return query[:first], query[first:second], query[second:]


def _group_query(site: Site) -> None:
    """A head of keys and values goes with its queries; where none may go, each can lose as many of its queries."""
    count, keys = int(site.attribute("num_heads")), int(site.attribute("kv_num_heads"))
    query, key, value = _query_parts(site)
    width, share = query.size // count, count // keys
    if any(site.has(i) for i in (12, 13)):
        raise NoRule(f"{site.what} reads a quantised cache")
    heads = _new_heads(site, keys)
    sharing = _new_heads(site, share)
    site.labels.avoid(sharing)
    site.labels.relate(query, [heads, sharing, site.fixed(width, SIZE)], site.what)
    for part in (key, value):
        _merged(site, part, heads)
    for operand in (3, 4):
        if site.has(operand):
            _headed(site, site.axes(operand), heads)
    for operand, where in ((10, 1), (11, 0)):
        if site.has(operand) and site.axes(operand)[where].size == count != 1:
            site.labels.relate(site.axes(operand)[where], [heads, sharing], site.what)
    _masks(site, [5, 6, 7, 8, 9, 14, 15, 16])
    if site.has(10):
        for i in (2, 3):
            site.pin(site.axes(10)[i], ALONG)
    for operand in (0, 1, 2):
        if site.has(operand):
            site.pin(site.axes(operand)[1], ALONG)
    made = query if site.has(1) else site.labels.merge([heads, sharing, site.fixed(width, SIZE)], site.what)
    site.give([*site.axes(0)[:2], made])
    for index in range(1, len(site.node.output)):
        if index > 2 and site.node.output[index]:
            raise NoRule(f"{site.what} gives out its scores")
        shape = site.facts.shapes.get(site.node.output[index], (0, 0, 0, 0))
        site.give([site.axes(0)[0], heads, site.fixed(shape[2], ALONG), site.fixed(width, SIZE)])


def _resize_group_query(site: Site, cut: Cut) -> None:
    query, key, _ = _query_parts(site)
    count, keys = int(site.attribute("num_heads")), int(site.attribute("kv_num_heads"))
    cut.set_attribute(site, "num_heads", count * cut.count(query) // query.size)
    cut.set_attribute(site, "kv_num_heads", keys * cut.count(key) // key.size)


def _rotary(site: Site) -> None:
    axes = site.axes(0)
    _masks(site, [1, 2, 3])
    if len(axes) == 4:
        site.pin(axes[2], "turns by the position along it")
        site.pin(axes[3], SIZE)
    else:
        heads = int(site.attribute("num_heads", 0)) or axes[2].size // (2 * site.axes(2)[1].size)
        site.pin(axes[1], "turns by the position along it")
        _merged(site, axes[2], _new_heads(site, heads))
    site.give(axes, site.null(0))


def _resize_rotary(site: Site, cut: Cut) -> None:
    axes = site.axes(0)
    if int(site.attribute("num_heads", 0)):
        _scale(site, cut, "num_heads", axes[1 if len(axes) == 4 else 2])


CONTRIB = "com.microsoft"

RULES: dict[tuple[str, str], Rule] = {
    (CONTRIB, "Attention"): Rule(_attention, resize_heads),
    (CONTRIB, "MultiHeadAttention"): Rule(_multi_head, _resize_multi_head),
    (CONTRIB, "GroupQueryAttention"): Rule(_group_query, _resize_group_query),
    (CONTRIB, "RotaryEmbedding"): Rule(_rotary, _resize_rotary),
}
"""Operators in which onnxruntime fuses attention."""
