"""Recurrent layers: a hidden unit is one position, in every gate, both directions and the state."""

from __future__ import annotations

import numpy as np

from onnxprune.structure.labels import Axis
from onnxprune.structure.rules.products import contract
from onnxprune.structure.site import Cut, Rule, Site

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(site: Site) -> None:
    """LSTM, GRU, RNN."""
    gates = GATES[site.node.op_type]
    x, w, r = site.axes(0), site.axes(1), site.axes(2)
    units = site.labels.fresh(r[2].size)
    contract(site, (0, 2), (1, 2))
    site.labels.tie(r[2], units)
    for axis in (w[1], r[1]):
        site.labels.tie(axis, np.tile(units, gates))
    batch_first = int(site.attribute("layout", 0))
    time, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    site.pin(time, "runs along it")
    ways = site.fixed(w[0].size, "has one entry per direction")
    for operand, copies in ((3, 2 * gates), (7, 3)):  # biases, peepholes
        if site.has(operand):
            _directions(site, site.axes(operand)[0])
            site.labels.tie(site.axes(operand)[1], np.tile(units, copies))
    for axis in (w[0], r[0]):
        _directions(site, axis)
    if site.has(4):
        site.labels.tie(site.axes(4)[0], batch)
    states = [i for i in (5, 6) if site.has(i)]
    for i in states:
        state = site.axes(i)
        _directions(site, state[1 if batch_first else 0])
        site.labels.tie(state[0 if batch_first else 1], batch)
        site.labels.tie(state[2], units)
    # With the usual activations a unit without weights stays at 0, if it starts there.
    stays = not site.attribute("activations") and all(site.null(i)[2] for i in states)
    stored = [site.null(i)[1] for i in (1, 2, 3, 7) if site.has(i)]
    null = stays and all(stored)
    if not null and not site.null(2)[2]:
        site.pin(units, "sums over them, and what is pruned is not 0 there")
    steps = site.fixed(time.size, "runs along it")
    full = [batch, steps, ways, units] if batch_first else [steps, ways, batch, units]
    last = [batch, ways, units] if batch_first else [ways, batch, units]
    for name, axes in zip(site.node.output, (full, last, last), strict=False):
        if name:
            site.give(axes, [*[False] * (len(axes) - 1), null])
        else:
            site.give([])


def _directions(site: Site, axis: Axis) -> None:
    site.pin(axis, "has one entry per direction")


def resize_hidden(site: Site, cut: Cut) -> None:
    """The hidden size."""
    cut.set_attribute(site, "hidden_size", cut.count(site.axes(2)[2]))


RULES: dict[tuple[str, str], Rule] = {("", op): Rule(recurrent, resize_hidden) for op in GATES}
