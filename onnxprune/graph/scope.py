"""Where a node stands: inside which calls of a model's own functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir


@dataclass(frozen=True)
class Scope:
    """A function call on the way to a node: formal inputs and referenced attributes are looked up here."""

    call: ir.Node | None = None
    function: ir.Function | None = None
    parent: Scope | None = None

    @property
    def path(self) -> str:
        """Names of the calls, outermost first; empty in the main graph."""
        if self.call is None or self.parent is None:
            return ""
        return "/".join(filter(None, (self.parent.path, self.call.name or self.call.op_type)))

    def attribute(self, attribute: ir.Attr) -> Any:
        """An attribute's value; one that refers to the function's own is taken from the call."""
        if not attribute.is_ref():
            return attribute.value
        if self.call is None or self.function is None or self.parent is None:
            return None
        given = self.call.attributes.get(str(attribute.ref_attr_name))
        if given is not None:
            return self.parent.attribute(given)
        default = self.function.attributes.get(str(attribute.ref_attr_name))
        return None if default is None else default.value

    def attributes(self, node: ir.Node) -> dict[str, Any]:
        """A node's attributes by name; references with no value are left out."""
        values = {name: self.attribute(attribute) for name, attribute in node.attributes.items()}
        return {name: value for name, value in values.items() if value is not None}


MAIN = Scope()
"""Outside any call."""
