"""One node as its rule sees it, and one node as it is made smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper

from onnxprune.structure.facts import Facts, Shape, compute, describe
from onnxprune.structure.labels import Axes, Axis, Labels, Solution

Nulls = tuple[bool, ...]
"""For each axis of a value: whether positions that are pruned hold exactly 0 where they are only zeroed."""


class NoRule(Exception):  # noqa: N818  (a finding, not an error)
    """A node whose rule cannot be applied; the text is the reason a user reads."""


@dataclass(eq=False)
class Site:
    """One node: what its rule is told, and what it says.

    Attributes:
        node: the node.
        labels: where labels are made, tied and pinned.
        facts: shapes and contents by value name.
        inputs: labels of each operand's axes; None where it is not given, or its shape is not known.
        nulls: of each operand.
        constant: whether each operand is stored in the model, or computed from what is.
        version: of the operator set the node's domain has.
        second: the facts for other sizes of the open dims, where there are any.
        inexact: whether an axis that is averaged over may lose positions, though the average is then another one.
        outputs: labels of each result's axes, once the rule has been applied.
        solid: operands whose entries must not be touched in a masked model (divisors, variances).
        shifted: operand -> the operand that holds its zero point, and the axis that one runs along.
        title: what reasons call the node, where it stands in for another one.
    """

    node: onnx.NodeProto
    labels: Labels
    facts: Facts
    inputs: list[Axes | None]
    nulls: list[Nulls]
    constant: list[bool]
    version: int
    second: Facts | None = None
    inexact: bool = False
    outputs: list[Axes] = field(default_factory=list)
    null_outputs: list[Nulls] = field(default_factory=list)
    solid: list[int] = field(default_factory=list)
    shifted: dict[int, tuple[int, int]] = field(default_factory=dict)
    title: str = ""

    @property
    def what(self) -> str:
        """The node as reasons name it."""
        return self.title or describe(self.node)

    @property
    def domain(self) -> str:
        """The node's domain; "" is the standard one."""
        return "" if self.node.domain == "ai.onnx" else str(self.node.domain)

    def has(self, operand: int) -> bool:
        """Whether an operand is given."""
        return operand < len(self.node.input) and bool(self.node.input[operand])

    def axes(self, operand: int = 0) -> Axes:
        """The labels of an operand's axes.

        Raises:
            NoRule: its shape is not known.
        """
        found = self.inputs[operand] if self.has(operand) else None
        if found is None:
            name = self.node.input[operand] if self.has(operand) else "?"
            raise NoRule(self.facts.unknown.get(name, f"{self.what} has an operand of unknown shape"))
        return found

    def shape(self, operand: int = 0) -> Shape:
        """An operand's shape."""
        return tuple(axis.size for axis in self.axes(operand))

    def result(self, index: int = 0) -> Shape:
        """A result's shape.

        Raises:
            NoRule: it is not known.
        """
        name = self.node.output[index]
        if name not in self.facts.shapes:
            raise NoRule(self.facts.unknown.get(name, f"the shape of '{name}' is not known"))
        return self.facts.shapes[name]

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value; ONNX's default where it is not given, `default` where there is none."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        if self.node.domain in ("", "ai.onnx") and defs.has(self.node.op_type, self.version, ""):
            schema = defs.get_schema(self.node.op_type, self.version, "")
            known = schema.attributes.get(name)
            if known is not None and known.default_value.ByteSize() and known.default_value.name:
                value = helper.get_attribute_value(known.default_value)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def content(self, operand: int) -> np.ndarray | None:
        """An operand's content, where it is small and settled."""
        return self.facts.contents.get(self.node.input[operand]) if self.has(operand) else None

    def settled(self, operand: int) -> np.ndarray:
        """An operand's content.

        Raises:
            NoRule: it is not known before the model runs.
        """
        content = self.content(operand)
        if content is None:
            raise NoRule(f"operand '{self.node.input[operand]}' of {self.what} is only known when the model runs")
        return content

    def ints(self, name: str, operand: int) -> list[int] | None:
        """Integers given as an attribute in older operator sets and as an operand in newer ones."""
        given = self.attribute(name)
        if given is not None:
            return [int(i) for i in (given if isinstance(given, (list, tuple)) else [given])]
        return [int(i) for i in self.settled(operand).reshape(-1)] if self.has(operand) else None

    def axis(self, name: str = "axis", default: int = 0, rank: int | None = None) -> int:
        """An attribute that names an axis, counted from the front."""
        return int(self.attribute(name, default)) % (len(self.axes()) if rank is None else rank)

    def fixed(self, size: int, why: str) -> Axis:
        """Labels of an axis of a result that keeps its positions."""
        return self.labels.fixed(size, f"{self.what} {why}")

    def pin(self, axis: Axis, why: str) -> None:
        """Positions stay."""
        self.labels.pin(axis, f"{self.what} {why}")

    def average(self, axis: Axis, why: str) -> None:
        """Positions stay, since an average over fewer of them is another one; unless that is accepted."""
        if not self.inexact:
            self.pin(axis, why)

    def pin_all(self, why: str) -> None:
        """All positions of all operands stay."""
        for axes in self.inputs:
            for axis in axes or ():
                self.pin(axis, why)

    def give(self, axes: Sequence[Axis], nulls: Sequence[bool] = ()) -> None:
        """Say what a result's axes are (results in order)."""
        given = tuple(nulls) if nulls else (False,) * len(axes)
        self.outputs.append(tuple(axes))
        # Where nothing is pruned, all that is pruned holds 0.
        self.null_outputs.append(tuple(n or self.labels.is_fixed(a) for n, a in zip(given, axes, strict=True)))

    def give_fixed(self, why: str) -> None:
        """A result that keeps all its positions."""
        self.give([self.fixed(size, why) for size in self.result(len(self.outputs))])

    def varies(self, axis: int, index: int = 0) -> bool:
        """Whether the size of a result's axis differs from run to run."""
        if self.second is None:
            return False
        other = self.second.shapes.get(self.node.output[index])
        return other is None or axis >= len(other) or other[axis] != self.result(index)[axis]

    def content_varies(self, operand: int) -> np.ndarray:
        """Which entries of an operand that holds sizes differ from run to run."""
        content = self.settled(operand)
        if self.second is None:
            return np.zeros(content.shape, np.bool_)
        other = self.second.contents.get(self.node.input[operand])
        if other is None or other.shape != content.shape:
            return np.ones(content.shape, np.bool_)
        return np.asarray(other != content)

    def null(self, operand: int) -> Nulls:
        """Where an operand's pruned positions hold 0."""
        return self.nulls[operand]


@dataclass(eq=False)
class Cut:
    """A decision about labels, and the means to carry it out on nodes.

    Attributes:
        solution: label -> class.
        dead: class -> whether it goes.
        taken: names that values have.
        made: value -> the node that computes it.
        added: initializers made on the way.
        before: nodes to stand before the one at work.
    """

    solution: Solution
    dead: np.ndarray
    taken: set[str]
    made: Mapping[str, Site]
    added: list[onnx.TensorProto] = field(default_factory=list)
    before: list[onnx.NodeProto] = field(default_factory=list)

    def alive(self, axis: Axis) -> np.ndarray:
        """Which positions of an axis stay."""
        root = self.solution.root[axis]
        alive: np.ndarray = self.solution.pinned[root] | ~self.dead[root]
        return alive

    def touches(self, axes: Sequence[Axis]) -> bool:
        """Whether any of some axes loses positions."""
        return any(not self.alive(axis).all() for axis in axes)

    def count(self, axis: Axis) -> int:
        """How many positions stay."""
        return int(self.alive(axis).sum())

    def follows(self, site: Site, operand: int) -> np.ndarray | None:
        """What an operand that is made of sizes comes to in the cut graph by itself; None where that is not known."""
        return self._after(site.node.input[operand], site.facts)

    def _after(self, name: str, facts: Facts) -> np.ndarray | None:
        site = self.made.get(name)
        if site is None or name not in facts.contents:
            return facts.contents.get(name)
        if site.node.op_type == "Shape" and site.inputs[0] is not None:
            counts = np.array([self.count(axis) for axis in site.axes()], np.int64)
            return counts[site.attribute("start", 0) : site.attribute("end", counts.size)]
        given = {name: self._after(name, facts) for name in site.node.input if name}
        known = {name: value for name, value in given.items() if value is not None}
        found = compute(site.node, known, site.version) if len(known) == len(given) else None
        return None if found is None else dict(zip((n for n in site.node.output if n), found, strict=True)).get(name)

    def name(self, near: str) -> str:
        """A name nothing has yet."""
        name = next(n for n in (f"{near}_{i}" for i in range(10**9)) if n not in self.taken)
        self.taken.add(name)
        return name

    def store(self, content: np.ndarray, near: str) -> str:
        """Keep an array as an initializer; returns its name."""
        name = self.name(near)
        self.added.append(numpy_helper.from_array(np.asarray(content, order="C"), name))
        return name

    def set_operand(self, site: Site, operand: int, content: np.ndarray) -> None:
        """Give a node a constant in place of an operand."""
        site.node.input[operand] = self.store(content, f"{site.node.input[operand]}_cut")

    def set_attribute(self, site: Site, name: str, value: Any) -> None:
        """Give a node's attribute another value."""
        for attribute in [a for a in site.node.attribute if a.name == name]:
            site.node.attribute.remove(attribute)
        site.node.attribute.append(helper.make_attribute(name, value))

    def set_ints(self, site: Site, name: str, operand: int, values: Sequence[int]) -> None:
        """Change integers where they are given: in the attribute or in the operand."""
        if any(a.name == name for a in site.node.attribute) or not site.has(operand):
            self.set_attribute(site, name, list(values))
        else:
            old = site.settled(operand)
            self.set_operand(site, operand, np.array(values, old.dtype).reshape(old.shape))

    def set_sizes(self, site: Site, operand: int, sizes: Sequence[int | None]) -> None:
        """Change some entries of an operand that holds sizes, and leave the others to what computes them.

        Args:
            site: the node.
            operand: its operand.
            sizes: the new entries; None where the old one stands.
        """
        old = site.settled(operand)
        changed = np.array([size is not None for size in sizes])
        wanted = np.array([o if s is None else s for o, s in zip(old.reshape(-1), sizes, strict=True)], old.dtype)
        if not (site.content_varies(operand).reshape(-1) & ~changed).any():
            self.set_operand(site, operand, wanted.reshape(old.shape))
            return
        where = self.store(changed, f"{site.node.input[operand]}_which")
        fixed = self.store(wanted, f"{site.node.input[operand]}_cut")
        name = self.name(f"{site.node.input[operand]}_sizes")
        self.before.append(helper.make_node("Where", [where, fixed, site.node.input[operand]], [name], name=name))
        site.node.input[operand] = name


@dataclass(frozen=True)
class Rule:
    """What an operator does to labels.

    Attributes:
        tie: says what is tied and pinned, and what the results' axes are.
        resize: changes attributes and size operands when positions are gone; None where nothing names a size.
    """

    tie: Callable[[Site], None]
    resize: Callable[[Site, Cut], None] | None = None
