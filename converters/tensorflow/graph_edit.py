"""Masks inside a TensorFlow graph: the ops that form, apply, hold and move them, and the edits that put them in place.

The masks are boolean variables that no collection knows, so that initialisers, savers and
`report_uninitialized_variables` never see them. They form by themselves the first time a session runs an op that
needs one. The forward pass reads masked values; every op that updates a variable is followed by one that zeroes what
the mask removes. All ops are made at once, so that a graph finalised later still moves on.

Existing ops are edited through TensorFlow's own `_update_input` and `_add_control_input`, as its graph editors do;
sessions that ran before an edit never see it (`MaskOps.seen`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from .graph_weights import HANDLES, Variable

v1 = tf.compat.v1
raw = tf.raw_ops

SCOPE = "onnxprune/"
SUBTRACTIONS = ("AssignAddVariableOp", "AssignSubVariableOp", "AssignAdd", "AssignSub")
SCATTERS = ("ResourceScatterAdd", "ResourceScatterSub", "ScatterAdd", "ScatterSub")
ASSIGNMENTS = ("AssignVariableOp", "Assign")
UPDATES = ("ResourceApply", "ResourceSparseApply", "Apply", "SparseApply", "ResourceScatter", "Scatter")


class Edits:
    """Edits of existing ops, and the way back."""

    def __init__(self) -> None:
        self._ops: dict[Any, tuple[list[Any], list[Any]]] = {}
        self._constraints: list[tuple[Any, Any]] = []

    def input(self, op: Any, index: int, tensor: Any) -> None:
        """Let an op read another tensor."""
        self._note(op)
        op._update_input(index, tensor)

    def after(self, op: Any, earlier: Any) -> None:
        """Let an op run after another."""
        self._note(op)
        op._add_control_input(earlier)

    def constraint(self, variable: Any, function: Callable[[Any], Any]) -> None:
        """Give a variable another constraint."""
        self._constraints.append((variable, variable._constraint))
        variable._constraint = function

    def undo(self) -> None:
        """Take all edits back."""
        for op, (inputs, controls) in self._ops.items():
            for index, tensor in enumerate(inputs):
                if op.inputs[index] is not tensor:
                    op._update_input(index, tensor)
            op._remove_all_control_inputs()
            op._add_control_inputs(controls)
        for variable, constraint in self._constraints:
            variable._constraint = constraint
        self._ops, self._constraints = {}, []

    def plain(self) -> Any:
        """The GraphDef of the graph without the edits."""
        graph = next(iter(self._ops)).graph
        definition = graph.as_graph_def()
        nodes = {node.name: node for node in definition.node}
        for op, (inputs, controls) in self._ops.items():
            names = [tensor.name.removesuffix(":0") for tensor in inputs]
            nodes[op.name].input[:] = [*names, *(f"^{control.name}" for control in controls)]
        return definition

    def _note(self, op: Any) -> None:
        if op not in self._ops:
            self._ops[op] = (list(op.inputs), list(op.control_inputs))


class MaskOps:
    """The masks of some variables of a graph, in place.

    Args:
        graph: the graph; it is edited.
        variables: the weights to mask, by name.
        form: called by the first run of each session with the variables' values; returns their masks.

    Attributes:
        values: variable name -> tensor of the variable's value now.
        masks: variable name -> tensor of the session's mask as it is.
        formed: tensor, whether the session has masks.
        ready: tensor; running it makes the session form its masks, where it has none.
        feeds: variable name -> placeholder that `move` reads.
        move: ops that put the masks fed and zero what they remove.
        zero: ops that zero what the session's masks remove.
        release: ops that let everything go.
    """

    def __init__(
        self,
        graph: Any,
        variables: Mapping[str, Variable],
        form: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    ) -> None:
        self.graph, self.variables, self.edits = graph, variables, Edits()
        ops = graph.get_operations()
        with _outside(graph):
            self._store = {n: _hidden(graph, "mask", v.object.shape) for n, v in variables.items()}
            self._flag = _hidden(graph, "formed")
            self._mark = _hidden(graph, "seen")
            self.values = {n: self._value(n) for n in variables}
            self.masks = {n: self._mask(n) for n in variables}
            self.formed = raw.VarIsInitializedOp(resource=self._flag)
            self.ready = self._forming(form)
            with tf.control_dependencies([self.ready]):
                self._held = {n: self._mask(n) for n in variables}
            self.feeds = {n: v1.placeholder(tf.bool, v.object.shape, "new_mask") for n, v in variables.items()}
            put = [_assign(self._store[n], self.feeds[n]) for n in variables] + [_assign(self._flag, True)]
            self.move = [self._zeroed(n, put, self._mask) for n in variables]
            self.zero = [self._zeroed(n, (), self._mask) for n in variables]
            self.release = [_assign(self._store[n], tf.ones(v.object.shape, tf.bool)) for n, v in variables.items()]
            self.release.append(_assign(self._flag, True))
            self._seen = raw.VarIsInitializedOp(resource=self._mark)
            self._probe = next((op for op in ops if op.type == "Const" and _plain(op)), None)
            if self._probe is not None:
                self.edits.after(self._probe, _assign(self._mark, True))
            self._forward()
            self._updates(ops)
            self._constraints()

    def seen(self, session: Any) -> bool:
        """Whether a session runs the graph as edited: one that ran before goes on with the graph it ran."""
        if self._probe is None:
            return True
        session.run(self._probe)
        return bool(session.run(self._seen))

    # -------------------------------------------------------------------------------------------------- building blocks

    def _value(self, name: str) -> Any:
        op = self.variables[name].op
        if op.type in HANDLES:
            return raw.ReadVariableOp(resource=op.outputs[0], dtype=op.get_attr("dtype"))
        return tf.identity(op.outputs[0])

    def _mask(self, name: str) -> Any:
        """A session's mask as it is when this is run."""
        mask = raw.ReadVariableOp(resource=self._store[name], dtype=tf.bool)
        mask.set_shape(self.variables[name].object.shape)
        return mask

    def _zeroed(self, name: str, earlier: Any, mask: Callable[[str], Any] | None = None) -> Any:
        """An op that runs after others and zeroes what the mask removes from the variable."""
        op = self.variables[name].op
        with tf.control_dependencies(earlier):
            value = masked(self._value(name), mask(name) if mask else self._held[name])
            if op.type in HANDLES:
                return raw.AssignVariableOp(resource=op.outputs[0], value=value)
            return v1.assign(op.outputs[0], value).op

    # ------------------------------------------------------------------------------------------------------------ parts

    def _forming(self, form: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Any:
        """A tensor that exists once the session has masks: the first time, they form."""
        names = list(self.variables)

        def call(*values: np.ndarray) -> list[np.ndarray]:
            masks = form(dict(zip(names, values, strict=True)))
            return [np.ascontiguousarray(masks[name], np.bool_) for name in names]

        def first() -> Any:
            masks = tf.numpy_function(call, [self.values[n] for n in names], [tf.bool] * len(names), stateful=True)
            for name, mask in zip(names, masks, strict=True):
                mask.set_shape(self.variables[name].object.shape)
            done = [_assign(self._store[n], m) for n, m in zip(names, masks, strict=True)]
            done += [
                raw.AssignVariableOp(resource=self.variables[n].op.outputs[0], value=masked(self.values[n], m))
                for n, m in zip(names, masks, strict=True)
                if n not in references
            ]
            with tf.control_dependencies(done):
                last = _assign(self._flag, True)
            with tf.control_dependencies([last]):
                return tf.constant(True)

        # The values are read outside: a branch cannot capture a reference.
        references = [n for n in names if self.variables[n].op.type not in HANDLES]
        ready = v1.cond(self.formed, lambda: tf.constant(True), first, name="form")
        return self._references_zeroed(references, ready) if references else ready

    def _references_zeroed(self, names: list[str], ready: Any) -> Any:
        """Zero variables of the old kind where masks have just formed: by a switch, since a branch takes no reference.

        A variable that no optimizer updates is otherwise written nowhere, and a checkpoint would hold what is pruned.
        """
        done = []
        with tf.control_dependencies([ready]):
            for name in names:
                fresh = raw.RefSwitch(data=self.variables[name].op.outputs[0], pred=self.formed).output_false
                done.append(v1.assign(fresh, masked(tf.identity(fresh), self._mask(name))).op)
            before = raw.Switch(data=tf.constant(True), pred=self.formed).output_true
        with tf.control_dependencies(done):
            just = tf.constant(True)
        return raw.Merge(inputs=[before, just], name="form_done").output

    def _forward(self) -> None:
        """Weight operands read masked values."""
        for name, variable in self.variables.items():
            reads: dict[str, Any] = {}
            for op, index in variable.edges:
                tensor = op.inputs[index]
                if tensor.name not in reads:
                    reads[tensor.name] = masked(tf.identity(tensor), self._held[name])
                self.edits.input(op, index, reads[tensor.name])
            for op in variable.gathers:
                rows = tf.gather(
                    masked(self._value(name), self._held[name]), op.inputs[1], batch_dims=op.get_attr("batch_dims")
                )
                for consumer in list(op.outputs[0].consumers()):
                    for index, tensor in enumerate(consumer.inputs):
                        if tensor is op.outputs[0]:
                            self.edits.input(consumer, index, rows)

    def _updates(self, ops: list[Any]) -> None:
        """The ops that exist and write to a variable leave zeros behind."""
        for op in ops:
            name = op.inputs[0].op.name if op.inputs else ""
            if name not in self.variables:
                continue
            if op.type in SUBTRACTIONS + SCATTERS:  # zero before, and nothing added
                self.edits.after(op, self._zeroed(name, [self.ready]))
                last = len(op.inputs) - 1
                mask = tf.gather(self._held[name], op.inputs[1]) if op.type in SCATTERS else self._held[name]
                self.edits.input(op, last, masked(op.inputs[last], mask))
            elif op.type in ASSIGNMENTS and self._reads(op.inputs[1], self.variables[name].op):
                self.edits.input(op, 1, masked(op.inputs[1], self._held[name]))
            elif op.type.startswith(UPDATES):
                self.edits.after(op, self.ready.op)
                later = {c for t in op.outputs if t.dtype != tf.resource for c in t.consumers()} | set(
                    op._control_outputs
                )
                zeroed = self._zeroed(name, [op])
                for consumer in later:
                    self.edits.after(consumer, zeroed)

    def _reads(self, tensor: Any, variable: Any) -> bool:
        """Whether a tensor is computed from a variable."""
        waiting, met = [tensor.op], set()
        while waiting:
            op = waiting.pop()
            if op is variable:
                return True
            if op not in met and not op.name.startswith(SCOPE):
                met.add(op)
                waiting += [t.op for t in op.inputs]
        return False

    def _constraints(self) -> None:
        """Optimizers to come apply a variable's constraint after each update."""
        for name, variable in self.variables.items():
            self.edits.constraint(variable.object, self._constraint(name, variable.object.constraint))

    def _constraint(self, name: str, own: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        return lambda value: masked(tf.convert_to_tensor(own(value) if own else value), self._held[name])


def masked(value: Any, mask: Any) -> Any:
    """A tensor with exactly +0.0 where the mask is False, whatever stood there."""
    return tf.math.multiply_no_nan(value, tf.cast(mask, value.dtype))


def sessions(graph: Any) -> list[Any]:
    """The open sessions of a graph. TensorFlow keeps no list; the garbage collector does."""
    kind = v1.Session.__mro__[1]
    found = [s for s in gc.get_objects() if issubclass(type(s), kind)]
    return [s for s in found if getattr(s, "_graph", None) is graph and not getattr(s, "_closed", True)]


@contextmanager
def _outside(graph: Any) -> Any:
    """Where the new ops are made: in the graph, in no user's scope, branch or device."""
    with graph.as_default(), graph.control_dependencies(None), graph.name_scope(SCOPE), tf.device(None):
        yield


def _hidden(graph: Any, name: str, shape: Any = ()) -> Any:
    """The handle of a boolean variable that is in no collection, and has no value before it is given one."""
    return raw.VarHandleOp(
        dtype=tf.bool, shape=shape, shared_name=graph.unique_name(name, mark_as_used=False), name=name
    )


def _assign(handle: Any, value: Any) -> Any:
    return raw.AssignVariableOp(resource=handle, value=tf.convert_to_tensor(value))


def _plain(op: Any) -> bool:
    return not op.control_inputs and op._get_control_flow_context() is None
