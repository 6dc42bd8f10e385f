"""A model run piece by piece: values from inside its graph, batch after batch, on data that are read once.

What lies behind the values that were already computed is not computed again: a `Stream` keeps, where memory
allows, the values that are alive at the point of the graph it has reached, and runs only the nodes from there on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from onnxprune.errors import PruneError
from onnxprune.graph.companions import reads
from onnxprune.graph.model import Model
from onnxprune.graph.trace import NONDETERMINISTIC
from onnxprune.runtime.feeds import BATCH, Dataset, Feed
from onnxprune.runtime.session import Session, open_session


@dataclass(frozen=True)
class Flat:
    """The main graph of a model, calls of functions inlined, and who makes what in it."""

    proto: onnx.ModelProto

    @classmethod
    def of(cls, model: Model) -> Flat:
        """The graph of a model as it is now.

        Raises:
            PruneError: its nodes are not in the order in which they can run.
        """
        proto = model.proto
        if proto.functions:
            from onnx import inliner

            proto = inliner.inline_local_functions(proto)
        flat = cls(proto)
        for place, node in enumerate(proto.graph.node):
            late = next((name for name in reads(node) if flat.made.get(name, -1) >= place), None)
            if late is not None:
                raise PruneError(
                    f"node '{node.name}' ({node.op_type}) reads '{late}' before it is computed; export again"
                )
        return flat

    @cached_property
    def made(self) -> dict[str, int]:
        """Value -> place of the node that makes it."""
        return {name: place for place, node in enumerate(self.proto.graph.node) for name in node.output if name}

    @cached_property
    def stored(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    @cached_property
    def changing(self) -> frozenset[str]:
        """Values that depend on the inputs, or on chance; all others are the same in every run."""
        found = {value.name for value in self.proto.graph.input} - self.stored.keys()
        for node in self.proto.graph.node:
            if node.op_type in NONDETERMINISTIC or not found.isdisjoint(reads(node)):
                found.update(node.output)
        return frozenset(found)

    def alive(self, place: int) -> set[str]:
        """Values made before a node that it or a later one reads."""
        later = [name for node in self.proto.graph.node[place:] for name in reads(node)]
        wanted = {*later, *(value.name for value in self.proto.graph.output)}
        return {name for name in wanted & self.changing if self.made.get(name, -1) < place}

    def behind(self, wanted: Sequence[str], known: Mapping[str, object]) -> list[int]:
        """Places of the nodes that compute some values from others, in order."""
        places: set[int] = set()
        stack = list(wanted)
        while stack:
            name = stack.pop()
            place = self.made.get(name)
            if name not in known and place is not None and place not in places:
                places.add(place)
                stack.extend(reads(self.proto.graph.node[place]))
        return sorted(places)


class Stream:
    """A model on data, run from the point of its graph that was last reached.

    The model may be edited on the way, behind that point: what is run is always the model as it is.
    """

    def __init__(self, model: Model, feeds: Sequence[Feed], memory: int, threads: int | None = None) -> None:
        """A stream at the model's inputs.

        Args:
            model: the model.
            feeds: one for each run.
            memory: bytes that may be kept of values inside the graph.
            threads: of onnxruntime.
        """
        self.model, self.memory, self.threads = model, memory, threads
        self._flat = Flat.of(model)
        self._known: list[Feed] = list(feeds)

    @property
    def flat(self) -> Flat:
        """The graph of the model as it is now."""
        return Flat.of(self.model) if self.model.proto.functions else self._flat

    def read(self, names: Sequence[str], reach: int | None = None) -> Iterator[list[np.ndarray]]:
        """The values of some names, feed after feed.

        Args:
            names: values of the graph.
            reach: go on from the values alive at this node from now on, once all feeds were read, and if the memory
                suffices for them.

        Raises:
            PruneError: onnxruntime fails; a value is no tensor.
        """
        flat = self.flat
        stored = {name: onnx.numpy_helper.to_array(flat.stored[name]) for name in names if name in flat.stored}
        alive = [] if reach is None else sorted(flat.alive(reach))
        wanted = [name for name in dict.fromkeys((*names, *alive)) if name not in stored]
        session = self._segment(flat, [name for name in wanted if name not in self._known[0]])
        kept: list[Feed] | None = None if reach is None else []
        room = self.memory
        for known in self._known:
            values = dict(known)
            if session is not None:
                given = {value.name: known[value.name] for value in session.inputs if value.name in known}
                values |= dict(zip(session.outputs, session.run(given), strict=True))
            if kept is not None:
                kept.append({name: values[name] for name in alive})
                room -= sum(v.nbytes if isinstance(v, np.ndarray) else room + 1 for v in kept[-1].values())
                kept = kept if room >= 0 else None
            found = [stored[name] if name in stored else values[name] for name in names]
            for name, value in zip(names, found, strict=True):
                if not isinstance(value, np.ndarray):
                    raise PruneError(
                        f"value '{name}' is a {type(value).__name__}, no tensor: it cannot be calibrated on"
                    )
            yield found
        if kept is not None:
            self._known = kept

    def _segment(self, flat: Flat, wanted: list[str]) -> Session | None:
        """A session for the nodes between what is known and what is wanted; None where there are none."""
        if not wanted:
            return None
        graph = flat.proto.graph
        places = flat.behind(wanted, self._known[0])
        nodes = [graph.node[place] for place in places]
        needed = {name for node in nodes for name in reads(node)}
        part = onnx.ModelProto(ir_version=max(flat.proto.ir_version, 4), opset_import=flat.proto.opset_import)
        part.graph.name = "part"
        part.graph.node.extend(nodes)
        part.graph.initializer.extend(flat.stored[name] for name in sorted(needed & flat.stored.keys()))
        declared = {value.name: value for value in graph.input}
        for name in sorted(needed & self._known[0].keys()):
            if name in flat.stored:  # an initializer that the data replace
                continue
            value = declared.get(name)
            if value is None:
                kind = onnx.helper.np_dtype_to_tensor_dtype(self._known[0][name].dtype)
                value = onnx.helper.make_tensor_value_info(name, kind, None)
            part.graph.input.append(value)
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        self.model.embed(part)
        return open_session(part, threads=self.threads, label="the model")


def cut(dataset: Dataset, sample_bytes: int, memory: int) -> tuple[list[Feed], int]:
    """The data as feeds that use no more memory than allowed, and how many of them are the first half of the samples.

    Args:
        dataset: the data.
        sample_bytes: what one sample takes.
        memory: bytes that one run may take; a run has one sample at least, and as many as given or fixed where the
            model or the data leave no choice.
    """
    if dataset.whole or dataset.fixed is not None:
        feeds = [batch.feed for batch in dataset]
        return feeds, len(feeds) // 2
    step = max(1, min(BATCH, memory // max(sample_bytes, 1)))
    required = {value.name for value in dataset.inputs if value.required}
    middle, seen, half = dataset.samples // 2, 0, 0
    feeds = []
    for batch in dataset:
        bounds = {0, batch.samples, *range(0, batch.samples, step)}
        bounds |= {middle - seen} & set(range(batch.samples))
        ordered = sorted(bounds)
        for start, stop in itertools.pairwise(ordered):
            feeds.append({n: a[start:stop] if n in required and a.ndim else a for n, a in batch.feed.items()})
            half += seen + stop <= middle
        seen += batch.samples
    return feeds, half


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_memory(given: str | float | None) -> int:
    """Bytes from a number or a text such as '2GB' or '500M'; a quarter of the machine's where nothing is given.

    Raises:
        PruneError: another form, or less than a megabyte.
    """
    if given is None:
        return _machine() // 4
    text = str(given).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)(?:i?b)?", text, re.I)
    size = float(match[1]) * _UNITS[match[2].lower()] if match else math.nan
    if not size >= 2**20:
        raise PruneError(f"max_memory is '{text}'; expected at least 1 MB, in bytes or as 500MB, 2GB")
    return int(size)


def _machine() -> int:
    """Bytes of memory this process may have: the machine's, or its container's."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        sizes = [8 * 2**30]
    limit = Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        sizes.append(int(limit.read_text()))
    return min(sizes)
