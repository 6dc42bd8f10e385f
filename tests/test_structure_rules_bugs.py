"""Bugs seeded into the rules: each is caught by the nets' stated groups and pins, or by shrunk against masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import test_structure_rules_control as control_nets
import test_structure_rules_images as images_nets
import test_structure_rules_matrices as matrices_nets
from structure_oracle import check

from onnxprune.errors import PruneError
from onnxprune.structure import control
from onnxprune.structure.rules import RULES, attention, elementwise, norms, products, recurrent
from onnxprune.structure.site import Site

NETS = {net.name: net for net in (*images_nets.NETS, *matrices_nets.NETS, *matrices_nets.ATTENTION, *control_nets.NETS)}

Tie = Callable[[Site], None]


def nothing(*args: object) -> None:
    """Done instead of a tie or a pin."""


def without(what: str) -> Callable[[Tie], Tie]:
    """A rule that ties, relates or pins nothing."""

    def seed(tie: Tie) -> Tie:
        def wrong(site: Site) -> None:
            place = site if what == "pin" else site.labels
            setattr(place, what, nothing)
            try:
                tie(site)
            finally:
                delattr(place, what)

        return wrong

    return seed


def moved(change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Callable[[Tie], Tie]:
    """A rule whose results' labels are other than they should be."""

    def seed(tie: Tie) -> Tie:
        def wrong(site: Site) -> None:
            tie(site)
            site.outputs[:] = [tuple(change(list(axes))) for axes in site.outputs]

        return wrong

    return seed


def rolled(axis: int) -> Callable[[Tie], Tie]:
    return moved(lambda axes: [np.roll(a, 1) if i == axis else a for i, a in enumerate(axes)])


TIES = {
    "Add does not tie": ("Add", without("tie"), "residual"),
    "Sum pins all": ("Sum", lambda tie: lambda site: (site.pin_all("sums"), tie(site)), "three in a sum"),
    "Mul with a scale does not tie": ("Mul", without("tie"), "scale and shift"),
    "PRelu does not tie its slopes": ("PRelu", without("tie"), "prelu"),
    "a bias is not tied": ("Conv", without("tie"), "chain"),
    "BatchNormalization does not tie": ("BatchNormalization", without("tie"), "batch norm"),
    "Concat is off by one": ("Concat", rolled(1), "dense"),
    "Concat has its operands in another order": (
        "Concat",
        moved(lambda axes: [a if i != 1 else np.concatenate([a[8:], a[:8]]) for i, a in enumerate(axes)]),
        "dense",
    ),
    "Split is off by one": ("Split", rolled(1), "split"),
    "Split gives its parts in another order": (
        "Split",
        lambda tie: lambda site: (tie(site), site.outputs.reverse()),
        "split",
    ),
    "Slice is off by one": ("Slice", rolled(1), "slice"),
    "Gather is off by one": ("Gather", rolled(1), "gather"),
    "Pad is off by one": ("Pad", rolled(1), "pad"),
    "Tile repeats each entry": (
        "Tile",
        moved(lambda axes: [np.repeat(a[: a.size // 2], 2) if i == 1 else a for i, a in enumerate(axes)]),
        "tile",
    ),
    "Transpose does not move": (
        "Transpose",
        lambda tie: lambda site: site.give(site.axes(), site.null(0)),
        "transposes",
    ),
    "Reshape runs the other way": (
        "Reshape",
        moved(lambda axes: [a.reshape(2, -1).T.reshape(-1) if a.size == 8 else a for a in axes]),
        "reshaped and back",
    ),
    "Softmax does not pin": ("Softmax", without("pin"), "softmax over channels"),
    "LayerNormalization does not pin": ("LayerNormalization", without("pin"), "layer norm pins"),
    "ReduceMean does not pin": ("ReduceMean", without("pin"), "layer norm spelt out"),
    "GroupNormalization splits a group": ("GroupNormalization", without("pin"), "group norm of two"),
    "DepthToSpace moves whole channels": ("DepthToSpace", rolled(1), "depth to space CRD"),
    "Gemm does not tie its bias": ("Gemm", without("tie"), "flatten of images"),
    "Einsum does not tie": ("Einsum", without("tie"), "einsum"),
    "LSTM ties gate by gate": (
        "LSTM",
        lambda tie: lambda site: (tie(site), site.labels.tie(site.axes(1)[1][1:], site.axes(1)[1][:-1])),
        "LSTM, forward",
    ),
    "GRU does not tie": ("GRU", without("tie"), "GRU, bidirectional"),
    "Attention does not tie": ("Attention", without("relate"), "attention of 3 axes"),
    "MaxPool does not pin its places": ("MaxPool", without("pin"), "max pool with places"),
    "Log does not look at 0": ("Log", without("pin"), "log of what may be 0"),
}


@pytest.mark.parametrize("bug", TIES)
def test_ties(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, seed, net = TIES[bug]
    rule = RULES["", operator]
    monkeypatch.setitem(RULES, ("", operator), replace(rule, tie=seed(rule.tie)))
    with pytest.raises((AssertionError, PruneError)):
        check(NETS[net])


SIZES = {
    "Conv": "depthwise",
    "ConvTranspose": "transposed and depthwise",
    "GroupNormalization": "group norm",
    "Split": "uneven split",
    "Slice": "slice",
    "Gather": "gather",
    "Pad": "pad beside a wider one",
    "Squeeze": "squeeze of all there is",
    "Reshape": "reshaped and back",
    "Resize": "resize by sizes",
    "LSTM": "LSTM, forward",
    "Attention": "attention of 3 axes",
    "RotaryEmbedding": "rotary positions",
}


@pytest.mark.parametrize("operator", SIZES)
def test_sizes_that_stay(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attributes and operands that name sizes are left as they were."""
    monkeypatch.setitem(RULES, ("", operator), replace(RULES["", operator], resize=None))
    with pytest.raises((AssertionError, PruneError)):
        check(NETS[SIZES[operator]])


HELPERS = {
    "the order of gates": (recurrent.np, "tile", np.repeat, "LSTM, bidirectional"),
    "axes that meet": (elementwise, "meet", lambda site, axes: max(axes, key=len), "scale and shift"),
    "operands that must not be 0": (elementwise, "finite", nothing, "a divisor that is a factor as well"),
    "sums over what is not 0": (
        products,
        "contract",
        lambda site, a, b: site.labels.tie(site.axes(a[0])[a[1]], site.axes(b[0])[b[1]]),
        "products that are not 0 where pruned",
    ),
    "sums of reductions": (norms, "SUMS", {*norms.SUMS, "ReduceMean"}, "a mean over what is 0"),
    "the states of loops": (
        control,
        "_join",
        lambda flow, site, name, ends: (flow.fix(name, ""), site.give(flow.axes[name])),
        "a loop over a state",
    ),
    "the mask of attention": (attention, "_mask", nothing, "attention with shared keys"),
}


@pytest.mark.parametrize("bug", HELPERS)
def test_helpers(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong, net = HELPERS[bug]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((AssertionError, PruneError)):
        check(NETS[net])
