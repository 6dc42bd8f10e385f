"""The JSON of a report: a result, and under what circumstances it came about."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np

from onnxprune._version import __version__
from onnxprune.graph.model import ModelSource, load
from onnxprune.graph.weights import find

BINS = 60
LIBRARIES = ("onnxruntime", "onnx", "numpy")


def document(kind: str, result: Mapping[str, Any], configuration: Any = None, **more: Any) -> dict[str, Any]:
    """A result with the command, the configuration and the environment; what `--report` shows and `--json` prints."""
    return {
        "kind": kind,
        **result,
        "command": command(),
        "configuration": configuration,
        "environment": environment(),
        **more,
    }


def command() -> str:
    """The command as it was typed."""
    return shlex.join(["onnxprune", *sys.argv[1:]])


def environment() -> dict[str, str]:
    """Versions and the processor; nothing that names the user or the machine."""
    versions = {"onnxprune": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in LIBRARIES}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    system = f"{platform.system()} {platform.machine()}"
    return {**versions, "processor": _processor(), "CPUs": str(cpus), "system": system}


def histograms(dense: ModelSource, pruned: ModelSource) -> dict[str, Any]:
    """Values other than 0 of each weight before and after, in the same bins; not of weights that left."""
    after = {weight.name: weight for weight in find(load(pruned))[0]}
    found = {}
    for weight in find(load(dense))[0]:
        values = np.asarray(weight.values(), np.float64).reshape(-1)
        values = values[(values != 0) & np.isfinite(values)]
        if weight.name not in after or not values.size:
            continue
        now = np.asarray(after[weight.name].values(), np.float64).reshape(-1)
        now = now[(now != 0) & np.isfinite(now)]
        low = min(float(values.min()), float(now.min(initial=np.inf)))
        high = max(float(values.max()), float(now.max(initial=-np.inf)))
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        counts = {when: np.histogram(part, edges)[0].tolist() for when, part in (("before", values), ("after", now))}
        found[weight.name] = {"edges": edges.tolist(), **counts}
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
