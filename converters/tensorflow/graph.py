"""Holding masks in a TensorFlow graph (`tf.Graph`), run by sessions.

A graph has no values; a session has. So the masks form inside the first run of a session, from the values its variables
have by then, by calling back into the core; `at` opens a session to move them later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakSet

import numpy as np
import tensorflow as tf

from onnxprune.errors import PruneError
from onnxprune.graph.weights import Skipped, Weight

from ..deploy import Candidate
from .graph_edit import MaskOps, sessions
from .graph_export import candidate
from .graph_weights import find

Masks = Mapping[str, np.ndarray]

_HELD: WeakSet[Any] = WeakSet()
_STALE = (
    "a session has already run this graph, and TensorFlow goes on with the graph it ran, without masks; "
    "call the pruner before the first sess.run, or open a new session after it and restore a checkpoint there"
)


class GraphHolder:
    """A graph whose weights can be read, and whose masks are held while sessions train it.

    Nothing is edited before `attach`. While masks are held, checkpoints are as ever, but a .meta file that a Saver
    writes loads nowhere else, for it calls back into this process; one written after `remove` does.

    Args:
        graph: the graph, its forward pass built; training ops may be there already, or come later.
        form: returns the masks (weight name -> stored shape, True is kept) from the values that the weights'
            storages read now.

    Attributes:
        weights: the weights in their roles.
        skipped: what is left alone, with reasons.
    """

    def __init__(self, graph: Any, form: Callable[[], Masks]) -> None:
        if graph in _HELD:
            raise PruneError("another pruner holds masks in this graph already; call its remove() first, or use it")
        self.graph, self._form = graph, form
        self._values: dict[str, np.ndarray] = {}
        found, skipped = find(graph, self._values)
        self.weights: tuple[Weight, ...] = tuple(weight for weight, _ in found)
        self.skipped: tuple[Skipped, ...] = tuple(skipped)
        self._variables = {weight.name: variable for weight, variable in found}
        self._ops: MaskOps | None = None
        self._session: Any = None
        self._forming = False
        self._lock = Lock()
        self._pruned: set[str] = set()
        self._zeroed: WeakSet[Any] = WeakSet()

    def attach(self, names: Collection[str]) -> None:
        """Put masks for these weights into the graph.

        Raises:
            PruneError: the graph is finalised, or a session has already run it; it is as it was.
        """
        if self.graph.finalized:
            raise PruneError(
                "the graph is finalised; call the pruner before the MonitoredSession (or graph.finalize()) that does so"
            )
        chosen = {n: v for n, v in self._variables.items() if n in names}
        if not chosen:
            raise PruneError(
                f"there is no weight to hold: the configuration leaves out all of {', '.join(self._variables) or 'it'}"
            )
        self._ops = MaskOps(self.graph, chosen, self._formed)
        _HELD.add(self.graph)
        if not all(self._ops.seen(session) for session in sessions(self.graph)):
            self._ops.edits.undo()
            _HELD.discard(self.graph)
            self._ops = None
            raise PruneError(_STALE)

    @contextmanager
    def at(self, sess: Any) -> Iterator[None]:
        """While open, `hold` writes into this session.

        On entry, the values are fetched, and zeroed where the session's masks remove them.

        Raises:
            PruneError: no session, that of another graph, one that ran before the call, or one whose
                variables have no values yet.
        """
        ops = self._attached()
        session = self._own(sess)
        if not ops.seen(session):
            raise PruneError(_STALE)
        try:
            values = session.run(ops.values)
        except tf.errors.FailedPreconditionError as error:
            raise PruneError(
                "the session's variables have no values yet; run their initialisers or restore a checkpoint first"
            ) from error
        if session.run(ops.formed):
            self._refresh(session, values, session.run(ops.masks))
        self._values.update(values)
        before, self._session = self._session, session
        try:
            yield
        finally:
            self._session = before

    def hold(self, kept: Masks) -> None:
        """Put masks into the session that is open and zero what they remove; else they enter when it forms."""
        self._pruned = set(kept)
        if self._session is None or self._forming:
            return
        ops = self._attached()
        masks = {n: kept.get(n, np.True_) for n in ops.variables}
        masks = {n: np.broadcast_to(m, self._values[n].shape) for n, m in masks.items()}
        self._session.run(ops.move, {ops.feeds[n]: mask for n, mask in masks.items()})
        self._zeroed.add(self._session)

    def remove(self) -> None:
        """Take the masks out of the graph, and out of its open sessions, where zeros stay."""
        if self._ops is None:
            return
        ops, self._ops = self._ops, None
        ops.edits.undo()
        _HELD.discard(self.graph)
        for session in sessions(self.graph):
            if session.run(ops.formed):
                session.run(ops.zero)
            session.run(ops.release)

    def candidate(self, kept: Masks, example_inputs: Any, outputs: Any, sess: Any) -> Candidate:
        """The graph's outputs with a session's values, as exported to be deployed, to be checked while `at` is open.

        Args:
            kept: not used: the masks are the session's.
            example_inputs: placeholder (or its name) -> array; random where it is not given.
            outputs: the output's tensor or name, or a list of them.
            sess: the session.

        Raises:
            PruneError: an output is missing, or the graph cannot be converted.
        """
        ops = self._attached()
        self._session.run(ops.ready)
        with self.at(sess):
            masks = {n: m for n, m in self._session.run(ops.masks).items() if n in self._pruned}
            held = [weight for weight in self.weights if weight.name in masks]
            return candidate(self._session, ops.edits, held, masks, example_inputs, outputs)

    def _formed(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Called inside a session's first run, on a thread of TensorFlow's."""
        with self._lock:
            self._values.update(values)
            self._forming = True
            try:
                kept = self._form()
            finally:
                self._forming = False
        return {n: kept[n] if n in kept else np.ones(v.shape, np.bool_) for n, v in values.items()}

    def _refresh(self, session: Any, values: dict[str, np.ndarray], masks: Masks) -> None:
        """Zero in a session, and in the values fetched, what its masks remove; say so where it had come back."""
        ops = self._attached()
        revived = [n for n, value in values.items() if np.any(value[~masks[n]])]
        if revived and session in self._zeroed:
            warnings.warn(
                f"pruned entries of {', '.join(revived)} were written since the last update, by an assignment or a "
                "checkpoint of another model; they are zeroed again",
                stacklevel=4,
            )
        if revived:
            session.run(ops.zero)
        for name in revived:
            values[name] = np.where(masks[name], values[name], np.zeros((), values[name].dtype))
        self._zeroed.add(session)

    def _attached(self) -> MaskOps:
        if self._ops is None:
            raise PruneError("the pruner holds no masks in this graph; call it with the graph first")
        return self._ops

    def _own(self, sess: Any) -> Any:
        # A monitored session's hooks are not ours to run.
        session = sess._tf_sess() if hasattr(sess, "_tf_sess") else sess
        if getattr(session, "graph", None) is not self.graph:
            found = f"{type(sess).__name__} of another graph" if hasattr(session, "graph") else repr(sess)
            raise PruneError(
                "a graph's values are a session's: expected sess, a session of this graph, "
                f"as in update_epoch(epoch, sess), not {found}"
            )
        return session
