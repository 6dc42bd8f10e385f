"""Sizes as numbers: what a model computes from the sizes of its values must not change when they do.

A scale of 1 / sqrt(size of a head), for instance, may be computed from a Shape. Targets of Reshape and the like are
corrected by their rules; any other number that comes out different holds the axes whose sizes it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from onnxprune.structure.cutting import keep
from onnxprune.structure.facts import Facts
from onnxprune.structure.flow import Flow
from onnxprune.structure.labels import Axis, Solution
from onnxprune.structure.site import Site

SIZES = {"Shape", "Size"}

TARGETS = {
    "Reshape": {1},
    "Expand": {1},
    "ConstantOfShape": {0},
    "Resize": {1, 2, 3},
    "Upsample": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Tile": {1},
    "Pad": {1},
    "CenterCropPad": {1},
    "Gather": {1},
}
"""Operands that rules correct, or whose results' shapes tell."""


def changed(flow: Flow, solution: Solution, dead: np.ndarray, seen: Facts) -> tuple[list[Axis], str] | None:
    """The first node of a cut graph that computes with a number that is not what it was.

    Args:
        flow: the labels of the original.
        solution: their classes.
        dead: class -> whether it has gone.
        seen: the facts of the cut graph.

    Returns:
        The axes whose sizes it is made of, and a reason.
    """
    sites = [*flow.sites, *flow.refused]
    contents = flow.facts.contents
    made = {name: site for site in sites for name in site.node.output if name}
    behind = {name for name, site in made.items() if site.node.op_type in SIZES and name in contents}
    for site in sites:
        if not behind.isdisjoint(site.node.input):
            behind.update(name for name in site.node.output if name in contents)
    places: list[tuple[str, str]] = [(value.name, f"graph output '{value.name}'") for value in flow.source.output]
    for site in sites:
        if any(name not in contents for name in site.node.output if name):
            targets = TARGETS.get(site.node.op_type, ())
            places += [(name, site.what) for i, name in enumerate(site.node.input) if i not in targets]
    for name, what in places:
        if name not in behind:
            continue
        alive = [solution.pinned[root] | ~dead[root] for root in (solution.root[a] for a in flow.axes[name] or ())]
        now = seen.contents.get(name)
        if now is None or not np.array_equal(now, keep(contents[name], alive)):
            read = [site.inputs[0] or () for site in _before(made, name) if site.node.op_type in SIZES]
            return [axis for axes in read for axis in axes], f"{what} computes with its size"
    return None


def sizes_behind(flow: Flow, site: Site) -> list[Axis]:
    """The axes whose sizes a node's operands are made of."""
    made = {name: other for other in [*flow.sites, *flow.refused] for name in other.node.output if name}
    before = (other for operand in site.node.input for other in _before(made, operand))
    return [axis for other in before if other.node.op_type in SIZES for axis in other.inputs[0] or ()]


def _before(made: Mapping[str, Site], name: str) -> Iterator[Site]:
    """The nodes that a value is computed by, up to where sizes are read."""
    waiting, found = [name], set()
    while waiting:
        site = made.get(waiting.pop())
        if site is not None and id(site) not in found:
            found.add(id(site))
            yield site
            if site.node.op_type not in SIZES:
                waiting.extend(site.node.input)
