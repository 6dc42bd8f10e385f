"""Quantisation: scales and zero points go along the axis they belong to."""

from __future__ import annotations

from onnxprune.structure.site import NoRule, Rule, Site


def per_axis(site: Site, operand: int, axis: int) -> None:
    """A scale or zero point of `operand`s beside the first operand's axis."""
    for i in (operand, operand + 1):
        if not site.has(i):
            continue
        site.solid.append(i)
        parameter = site.axes(i)
        if len(parameter) == 1 and parameter[0].size == site.axes()[axis].size and parameter[0].size != 1:
            site.labels.tie(parameter[0], site.axes()[axis])
        elif len(parameter) > 1 or (parameter and parameter[0].size > 1):
            raise NoRule(f"{site.what} has a scale per block")


def _linear(site: Site) -> None:
    axes = site.axes()
    if site.attribute("block_size", 0):
        raise NoRule(f"{site.what} has a scale per block")
    axis = site.axis("axis", 1) if len(axes) > 1 else 0
    if axes:
        per_axis(site, 1, axis)
    site.give(axes, site.null(0))


def _dynamic(site: Site) -> None:
    for i, axis in enumerate(site.axes()):
        site.pin(axis, f"takes its scale from the largest entry, and so mixes axis {i}")
    site.give(site.axes())
    site.give([])
    site.give([])


RULES: dict[tuple[str, str], Rule] = {
    ("", "QuantizeLinear"): Rule(_linear),
    ("", "DequantizeLinear"): Rule(_linear),
    ("", "DynamicQuantizeLinear"): Rule(_dynamic),
}
