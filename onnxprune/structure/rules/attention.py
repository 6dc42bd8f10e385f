"""Attention, rotary positions and stateful convolutions, as ai.onnx has them since operator set 23."""

from __future__ import annotations

from onnxprune.structure.labels import Axis
from onnxprune.structure.rules.elementwise import hold
from onnxprune.structure.site import Cut, NoRule, Rule, Site

ALONG = "attends along it"
INNER = "takes products of queries and keys over it"


def _attention(site: Site) -> None:
    """A head of keys and values goes with its queries; where none may go, each can lose as many of its queries."""
    merged = len(site.axes(0)) == 3
    query, key, value = (site.axes(i) for i in range(3))
    if merged:
        keys = int(site.attribute("kv_num_heads"))
        share = int(site.attribute("q_num_heads")) // keys
        width, depth = key[2].size // keys, value[2].size // keys
    else:
        keys, share, width, depth = key[1].size, query[1].size // key[1].size, key[3].size, value[3].size
    heads, sharing, columns = site.labels.fresh(keys), site.labels.fresh(share), site.labels.fresh(depth)
    site.labels.prefer(heads)
    site.labels.prefer(sharing)
    site.labels.avoid(sharing)
    inner = site.fixed(width, INNER)
    for other in (key[0], value[0]):
        site.labels.tie(query[0], other)
    length = query[1] if merged else query[2]
    for axis in (key[1], value[1]) if merged else (key[2], value[2]):
        site.pin(axis, ALONG)
    if site.attribute("is_causal", 0) or site.version > 24:  # since then, windows
        site.pin(length, ALONG)
    if merged:
        every = site.labels.merge([heads, sharing], site.what)
        site.labels.relate(query[2], [heads, sharing, inner], site.what)
        site.labels.relate(key[2], [heads, inner], site.what)
        site.labels.relate(value[2], [heads, columns], site.what)
        made = site.labels.merge([heads, sharing, columns], site.what)
        site.give([query[0], length, made], [False, False, share == 1 and site.null(2)[2]])
    else:
        every = query[1]
        site.labels.relate(every, [heads, sharing], site.what)
        for axis, other in (
            (key[1], heads),
            (value[1], heads),
            (value[3], columns),
            (query[3], inner),
            (key[3], inner),
        ):
            site.labels.tie(axis, other)
        site.give([*query[:3], columns], [False, share == 1 and site.null(2)[1], False, site.null(2)[3]])
    _mask(site, (query[0], every, length))
    for operand, last in ((4, inner), (5, columns)):
        if site.has(operand):
            batch, head, sequence, size = site.axes(operand)
            for axis, other in ((batch, query[0]), (head, heads), (size, last)):
                site.labels.tie(axis, other)
            site.pin(sequence, ALONG)
    if site.has(6):
        site.labels.tie(site.axes(6)[0], query[0])
    for index in range(1, len(site.node.output)):
        if not site.node.output[index]:
            site.give([])
        elif index == 3:
            site.give([query[0], every, length, site.fixed(site.result(index)[3], ALONG)])
        else:
            sequence = site.fixed(site.result(index)[2], ALONG)
            site.give([query[0], heads, sequence, inner if index == 1 else columns])


def _mask(site: Site, full: tuple[Axis, Axis, Axis]) -> None:
    """(batch, heads, queries, keys), broadcast."""
    if not site.has(3):
        return
    *others, keys = site.axes(3)
    site.pin(keys, ALONG)
    for axis, other in zip(others, full[3 - len(others) :], strict=True):
        if axis.size == 1 != other.size:
            site.pin(axis, "repeats its only position")
        else:
            site.labels.tie(axis, other)


def _resize_heads(site: Site, cut: Cut) -> None:
    if len(site.axes(0)) == 3:
        for name, operand in (("q_num_heads", 0), ("kv_num_heads", 1)):
            axis = site.axes(operand)[2]
            cut.set_attribute(site, name, int(site.attribute(name)) * cut.count(axis) // axis.size)


def _linear_attention(site: Site) -> None:
    """Heads of keys and values, each with its queries and its state of (key positions, value positions)."""
    (batch, length, query), key, value = (site.axes(i) for i in range(3))
    count = int(site.attribute("kv_num_heads"))
    heads = site.labels.fresh(count)
    site.labels.prefer(heads)
    sharing = site.fixed(int(site.attribute("q_num_heads")) // count, "has queries for each head of keys")
    inner = site.fixed(key[2].size // count, INNER)
    columns = site.fixed(value[2].size // count, "keeps whole heads")
    for operand in range(6):
        if site.has(operand):
            site.labels.tie(batch, site.axes(operand)[0])
            if operand != 3:
                site.pin(site.axes(operand)[1], "runs along it")
    site.labels.relate(query, [heads, sharing, inner], site.what)
    site.labels.relate(key[2], [heads, inner], site.what)
    site.labels.relate(value[2], [heads, columns], site.what)
    if site.has(3):
        for axis, other in zip(site.axes(3)[1:], (heads, inner, columns), strict=True):
            site.labels.tie(axis, other)
    for operand in (4, 5):  # decay and beta: for each position, for each head, or for all
        if site.has(operand):
            axis = site.axes(operand)[2]
            each = axis.size // count
            if each:
                site.labels.relate(axis, [heads, site.fixed(each, "keeps whole heads")], site.what)
            else:
                site.pin(axis, "is for all heads")
    made = site.labels.merge([heads, sharing, columns], site.what)
    site.give([batch, site.fixed(length.size, "runs along it"), made])
    if len(site.node.output) > 1:
        site.give([batch, heads, inner, columns])


def _rotary(site: Site) -> None:
    """(batch, heads, sequence, positions) or (batch, sequence, heads and positions)."""
    axes = site.axes()
    for operand in (1, 2, 3):
        hold(site, operand, "looks angles up in it")
    site.pin(axes[2 if len(axes) == 4 else 1], "turns by the place along it")
    if len(axes) == 4:
        site.pin(axes[3], "turns pairs along it")
    else:
        count = int(site.attribute("num_heads", 0))
        if not count:
            raise NoRule(f"{site.what} has no num_heads for an operand of three axes")
        heads = site.labels.fresh(count)
        site.labels.prefer(heads)
        inner = site.fixed(axes[2].size // count, "turns pairs along it")
        site.labels.relate(axes[2], [heads, inner], site.what)
    site.give(axes, site.null(0))


def _resize_rotary(site: Site, cut: Cut) -> None:
    axes, count = site.axes(), int(site.attribute("num_heads", 0))
    if count:
        axis = axes[1 if len(axes) == 4 else 2]
        cut.set_attribute(site, "num_heads", count * cut.count(axis) // axis.size)


def _causal_conv(site: Site) -> None:
    """A depthwise convolution along the last axis that carries what came before it."""
    batch, channels, length = site.axes()
    weight = site.axes(1)
    site.pin(length, "runs along it")
    for axis in weight[1:]:
        site.pin(axis, "has a kernel along it")
    site.labels.tie(channels, weight[0])
    null = site.null(1)[0]
    if site.has(2):
        site.labels.tie(channels, site.axes(2)[0])
        null = null and site.null(2)[0]
    past = True
    if site.has(3):
        earlier = site.axes(3)
        site.labels.tie(batch, earlier[0])
        site.labels.tie(channels, earlier[1])
        site.pin(earlier[2], "runs along it")
        past = site.null(3)[1]
    site.give([batch, channels, site.fixed(length.size, "runs along it")], [False, null, False])
    for index, name in enumerate(site.node.output[1:], 1):
        state = site.fixed(site.result(index)[2], "runs along it") if name else length
        site.give([batch, channels, state], [False, site.null(0)[1] and past, False])


RULES: dict[tuple[str, str], Rule] = {
    ("", "Attention"): Rule(_attention, _resize_heads),
    ("", "LinearAttention"): Rule(_linear_attention, _resize_heads),
    ("", "RotaryEmbedding"): Rule(_rotary, _resize_rotary),
    ("", "CausalConvWithState"): Rule(_causal_conv),
}
