"""Operators on images: channels pass, and rows and columns stay."""

from __future__ import annotations

import numpy as np

from onnxprune.structure.rules.elementwise import hold
from onnxprune.structure.site import Cut, NoRule, Rule, Site


def _scales(site: Site) -> np.ndarray | None:
    """By how much each axis grows; None where sizes say it."""
    if site.node.op_type == "Upsample" and site.version < 9:
        if site.version < 7:
            return np.array([1.0, 1.0, site.attribute("height_scale", 1.0), site.attribute("width_scale", 1.0)])
        return np.array(site.attribute("scales"))
    operand = 1 if site.node.op_type == "Upsample" or site.version < 11 else 2
    if not site.has(operand):
        return None
    scales = site.settled(operand).reshape(-1)
    return scales if scales.size else None


def _named(site: Site) -> list[int]:
    """The axes that sizes and scales are for, in order."""
    rank, named = len(site.axes()), site.attribute("axes")
    return list(range(rank)) if named is None else [int(i) % rank for i in named]


def _resize(site: Site) -> None:
    if site.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise NoRule(f"{site.what} crops while it resizes")
    for operand in (1, 2, 3):
        hold(site, operand, "takes sizes from it")
    axes, shape, scales = list(site.axes()), site.result(), _scales(site)
    grown = dict(zip(_named(site), scales.tolist(), strict=True)) if scales is not None else {}
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if axis.size != size or grown.get(i, 1) != 1:
            site.pin(axis, f"resizes axis {i}")
            axes[i] = site.fixed(size, f"resizes axis {i}")
    site.give(axes, site.null(0))


def resize_sizes(site: Site, cut: Cut) -> None:
    """The operand that holds the sizes of the result's axes: the fourth of a Resize, the second of a CenterCropPad."""
    operand = 3 if site.node.op_type == "Resize" else 1
    if not site.has(operand) or not cut.touches(site.outputs[0]):
        return
    if site.node.op_type == "Upsample" or (site.node.op_type == "Resize" and site.version < 11):
        return
    axes = [site.outputs[0][i] for i in _named(site)]
    sizes = [cut.count(axis) if cut.touches([axis]) else None for axis in axes]
    if any(size is not None for size in sizes):
        cut.set_sizes(site, operand, sizes)


def _center_crop_pad(site: Site) -> None:
    axes = list(site.axes())
    hold(site, 1, "takes sizes from it")
    for i in _named(site):
        size = site.result()[i]
        if axes[i].size != size or site.varies(i):
            site.pin(axes[i], f"crops or pads axis {i}")
            axes[i] = site.fixed(size, f"crops or pads axis {i}")
    site.give(axes, site.null(0))


def _grid_sample(site: Site) -> None:
    axes, grid = site.axes(), site.axes(1)
    site.labels.tie(axes[0], grid[0])
    for axis in (*axes[2:], *grid[1:]):
        site.pin(axis, "samples at places in the image")
    made = [site.fixed(size, "samples at places in the image") for size in site.result()[2:]]
    site.give([*axes[:2], *made], [*site.null(0)[:2], *[False] * len(made)])


def _affine_grid(site: Site) -> None:
    axes = site.axes()
    hold(site, 1, "takes sizes from it")
    for axis in axes:
        site.pin(axis, "makes coordinates from it")
    site.give_fixed("makes coordinates")


def _rois(site: Site) -> None:
    """RoiAlign, MaxRoiPool: one result per region, with the image's channels."""
    axes, regions = site.axes(), site.axes(1)
    for axis in (axes[0], *axes[2:], regions[1]):
        site.pin(axis, "looks regions up in the image")
    if site.has(2):
        site.labels.tie(regions[0], site.axes(2)[0])
    made = [site.fixed(size, "pools a region") for size in site.result()[2:]]
    site.give([regions[0], axes[1], *made], [False, site.null(0)[1], *[False] * len(made)])


def _col2im(site: Site) -> None:
    """(batch, channel * block, places) to (batch, channel, *image)."""
    batch, columns, places = site.axes()
    for operand in (1, 2):
        hold(site, operand, "takes sizes from it")
    block = int(np.prod(site.settled(2)))
    channels, inner = site.labels.split(columns, (columns.size // block, block), site.what)
    for axis in (inner, places):
        site.pin(axis, "moves blocks into the image")
    made = [site.fixed(size, "moves blocks into it") for size in site.result()[2:]]
    site.give([batch, channels, *made], [*site.null(0)[:2], *[False] * len(made)])


def _pool(site: Site) -> None:
    axes = site.axes()
    for i, axis in enumerate(axes[2:], 2):
        site.pin(axis, f"pools axis {i}")
    for index, name in enumerate(site.node.output):
        if not name:
            continue
        if index:
            for axis in axes[:2]:
                site.pin(axis, "counts places through all axes")
        pooled = [site.fixed(size, "pools it") for size in site.result(index)[2:]]
        nulls = [not index and null for null in site.null(0)[:2]]
        site.give([*axes[:2], *pooled], [*nulls, *[False] * len(pooled)])


POOLS = ["MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"]

RULES: dict[tuple[str, str], Rule] = {
    **{("", op): Rule(_pool) for op in POOLS},
    ("", "Resize"): Rule(_resize, resize_sizes),
    ("", "Upsample"): Rule(_resize),
    ("", "CenterCropPad"): Rule(_center_crop_pad, resize_sizes),
    ("", "GridSample"): Rule(_grid_sample),
    ("", "AffineGrid"): Rule(_affine_grid),
    **{("", op): Rule(_rois) for op in ("RoiAlign", "MaxRoiPool")},
    ("", "Col2Im"): Rule(_col2im),
}
