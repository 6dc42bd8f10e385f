"""Recurrent layers: a hidden unit is one position, in every gate, both directions and the state."""

from __future__ import annotations

import numpy as np

from onnxprune.structure.rules.products import contract
from onnxprune.structure.site import Cut, Rule, Site

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(site: Site) -> None:
    """LSTM, GRU, RNN."""
    gates = GATES[site.node.op_type]
    x, w, r = site.axes(0), site.axes(1), site.axes(2)
    units = site.labels.fresh(int(site.attribute("hidden_size")))
    contract(site, (0, 2), (1, 2))
    site.labels.tie(r[2], units)
    for axis in (w[1], r[1]):
        site.labels.tie(axis, np.tile(units, gates))
    for axis in (w[0], r[0]):
        site.pin(axis, "has one entry per direction")
    if site.has(3):
        site.labels.tie(site.axes(3)[1], np.tile(units, 2 * gates))
        site.zeroed.append(3)
    states = [i for i in (5, 6) if site.has(i)]
    for i in states:
        site.labels.tie(site.axes(i)[2], units)
    if site.has(7):
        site.labels.tie(site.axes(7)[1], np.tile(units, 3))
        site.zeroed.append(7)
    batch_first = int(site.attribute("layout", 0))
    time, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    site.pin(time, "runs along it")
    steps = site.fixed(time.size, "runs along it")
    ways = site.fixed(w[0].size, "has one entry per direction")
    # With the usual activations a unit without weights stays at 0, if it starts there.
    null = site.attribute("activations") is None and all(site.constant[i] or site.null(i)[2] for i in states)
    site.zeroed += states
    full = [batch, steps, ways, units] if batch_first else [steps, ways, batch, units]
    last = [batch, ways, units] if batch_first else [ways, batch, units]
    for name, axes in zip(site.node.output, (full, last, last), strict=False):
        if name:
            site.give(axes, [*[False] * (len(axes) - 1), null])
        else:
            site.give([])


def resize_hidden(site: Site, cut: Cut) -> None:
    """The hidden size."""
    cut.set_attribute(site, "hidden_size", cut.count(site.axes(2)[2]))


RULES: dict[tuple[str, str], Rule] = {("", op): Rule(recurrent, resize_hidden) for op in GATES}
