"""The table of rules: which operators have none, and that no rule forgets an axis of an operand."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
from onnx import defs, numpy_helper
from test_backend_cases import cases

from onnxprune.structure import facts as known
from onnxprune.structure.control import CONTROLS
from onnxprune.structure.labels import Labels
from onnxprune.structure.rules import RULES, SHAPES
from onnxprune.structure.rules.without import WITHOUT
from onnxprune.structure.site import NoRule, Site

UNREAD = {("Shape", 0), ("Size", 0), ("CastLike", 1)}
"""Operands of which only the sizes, or the type, are read."""

PICKING = {"Compress", "Gather", "Slice"}
"""Operators that leave positions out."""

NOT_AMONG_CASES = {"Cast", "CastLike", "GlobalLpPool", "MaxRoiPool", "SimplifiedLayerNormalization"}
"""Operators with a rule but without a case in ONNX's own tests that has arrays as inputs."""


def test_which_operators_have_no_rule() -> None:
    operators = {schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""}
    assert operators - {op for domain, op in RULES if domain == ""} - CONTROLS == set(WITHOUT)


def representative() -> dict[str, list[tuple[onnx.ModelProto, list]]]:
    """Some of ONNX's own cases for each operator with a rule: those with most operands and axes."""
    found: dict[str, list[tuple[onnx.ModelProto, list]]] = {}
    for model, inputs, _ in cases().values():
        node = model.graph.node[0]
        plain = all(isinstance(value, (np.ndarray, np.generic)) for value in inputs)
        if len(model.graph.node) == 1 and ("", node.op_type) in RULES and node.domain == "" and plain:
            found.setdefault(node.op_type, []).append((model, inputs))
    for tried in found.values():
        tried.sort(key=lambda case: (-len(case[1]), -sum(np.ndim(value) for value in case[1])))
    return found


def applied(model: onnx.ModelProto, inputs: list) -> Site:
    """The rule of the only node of a graph, applied to axes of which nothing is known."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    given = [(value, np.asarray(array)) for value, array in zip(model.graph.input, inputs, strict=False)]
    for value, array in given:
        sizes = array.dtype == np.int64 and len(given) == 1
        if array.ndim < 2 and (value.name != given[0][0].name or array.ndim == 0 or sizes):
            bare.graph.initializer.append(numpy_helper.from_array(array, value.name))
    facts = known.gather(bare, {value.name: array.shape for value, array in given}, SHAPES)
    labels = Labels()
    node = bare.graph.node[0]
    shapes = [facts.shapes.get(name) for name in node.input]
    axes = [None if shape is None else tuple(labels.fresh(size) for size in shape) for shape in shapes]
    nulls = [(False,) * len(shape or ()) for shape in shapes]
    site = Site(node, labels, facts, list(axes), nulls, [False] * len(axes), bare.opset_import[0].version)
    RULES["", node.op_type].tie(site)
    return site


def forgotten(site: Site) -> list[tuple[int, int]]:
    """The operands and axes with positions that are neither tied nor pinned, in no product and in no result."""
    labels = site.labels
    said = [*itertools.chain.from_iterable(labels._ties), *(axis for axis, _ in labels._pins)]
    said += [axis for product in labels._products for axis in (product.cells, *product.factors)]
    said += [axis for axes in site.outputs for axis in axes]
    enough = np.any if site.node.op_type in PICKING else np.all
    mentioned = np.unique(np.concatenate([axis.reshape(-1) for axis in said])) if said else np.zeros(0)
    return [
        (operand, i)
        for operand, axes in enumerate(site.inputs)
        for i, axis in enumerate(axes or ())
        if (site.node.op_type, operand) not in UNREAD and not enough(np.isin(axis, mentioned))
    ]


def test_no_rule_forgets_an_axis() -> None:
    seen, applicable = representative(), set()
    assert {op for domain, op in RULES if domain == ""} - set(seen) - {"Constant"} == NOT_AMONG_CASES
    wrong = {}
    for operator, tried in seen.items():
        done = 0
        for model, inputs in tried:
            if done == 2:
                break
            try:
                site = applied(model, inputs)
            except NoRule:
                continue
            done += 1
            applicable.add(operator)
            if forgotten(site) and all(axis.size for axis in site.outputs[0]):
                wrong[model.graph.node[0].op_type, model.graph.name] = forgotten(site)
            for name, axes in zip(site.node.output, site.outputs, strict=False):
                sizes = tuple(axis.size for axis in axes)
                if name and site.facts.shapes.get(name, sizes) != sizes:
                    wrong[operator, f"{model.graph.name}: {name}"] = [site.facts.shapes[name], sizes]
    assert wrong == {}
    assert set(seen) - applicable == set()
