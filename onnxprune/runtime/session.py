"""onnxruntime sessions: a model of any kind in, typed inputs and outputs out, every failure a PruneError."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.errors import PruneError
from onnxprune.graph.model import PROTOBUF_LIMIT, ModelSource, examine, load

# onnxruntime spells types its own way; bfloat16, float8, complex and 4-bit tensors have no way in from Python.
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(string)": np.dtype(object),
    **{
        f"tensor({name})": np.dtype(name)
        for name in ("float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
    },
}


@dataclass(frozen=True)
class ModelInput:
    """A graph input: `shape` holds an int for a fixed dim, a name or None for a dynamic one.

    An empty shape is a scalar or undeclared: onnxruntime does not tell them apart.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    required: bool = True
    """False if an initializer gives it a default value."""

    def __post_init__(self) -> None:
        """Some exporters call every open dim '?', which names nothing."""
        object.__setattr__(self, "shape", tuple(None if dim == "?" else dim for dim in self.shape))

    def __str__(self) -> str:
        """`'x' float32[N, 3, 224, 224]`, for messages."""
        return describe(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class Session:
    """A model loaded in onnxruntime. `label` is what messages call it."""

    label: str
    inputs: tuple[ModelInput, ...]
    outputs: tuple[str, ...]
    threads: int
    native: Any = field(repr=False, compare=False)

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """All outputs, in the model's order: arrays, or lists and dicts where the model returns sequences and maps.

        Raises:
            PruneError: onnxruntime failed; with the shapes it was given.
        """
        try:
            return list(self.native.run(None, feeds))
        except Exception as error:
            given = ", ".join(describe(name, array.dtype, array.shape) for name, array in feeds.items())
            raise PruneError(f"{self.label} fails in onnxruntime on inputs {given}: {_reason(error)}") from error


class LoadError(PruneError):
    """onnxruntime makes no session of a model."""


def open_session(
    model: ModelSource,
    *,
    threads: int | None = None,
    label: str | None = None,
    spinning: bool = False,
    lean: bool = False,
    exact: bool = False,
) -> Session:
    """Load a model on onnxruntime's CPU provider.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model; never modified. Models above 2 GB in memory
            go through a temporary file.
        threads: intra-op threads; None takes every CPU this process may use.
        label: what messages call the model; default its path, or "the model".
        spinning: whether idle threads spin, which makes other processes slower.
        lean: leave weights of external data files where they are, mapped, instead of copying them into another layout:
            slower runs, and hardly any memory.
        exact: multiply in the type that the model says; else onnxruntime rounds what is multiplied by a weight behind
            a DequantizeLinear to 8 bits, in blocks.

    Raises:
        PruneError: the file is missing or no valid model, a ModelProto keeps data in external files, or
            onnxruntime has no kernel for it.
    """
    import onnxruntime as ort

    if threads is not None and threads < 1:
        raise PruneError(f"threads is {threads}; it must be 1 or more")
    threads = threads or available_cpus()
    label = label or (f"'{os.fspath(model)}'" if isinstance(model, (str, os.PathLike)) else "the model")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.log_severity_level = 4  # what matters comes as an exception
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if lean:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")

    def create(source: str | bytes) -> Any:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    if isinstance(model, (str, os.PathLike)):
        examine(Path(model))  # onnxruntime's messages are worse, and it follows whatever the file says
    try:
        native = create(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else _from_memory(model, create)
    except PruneError:
        raise
    except Exception as error:
        raise LoadError(f"onnxruntime {ort.__version__} cannot load {label}: {_reason(error)}") from error
    defaults = [value for value in native.get_overridable_initializers() if value.type in _DTYPES]
    inputs = (
        *(_model_input(label, value, True) for value in native.get_inputs()),
        *(_model_input(label, value, False) for value in defaults),
    )
    return Session(label, inputs, tuple(value.name for value in native.get_outputs()), threads, native)


def available_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(name: str, dtype: np.dtype[Any], shape: Sequence[int | str | None]) -> str:
    """Name, type and shape of a tensor for a message: `x float32[N, 3, ?, 224]`."""
    kind = "string" if dtype.kind in "OUS" else dtype.name
    return f"'{name}' {kind}[{', '.join('?' if d is None else str(d) for d in shape)}]"


def _from_memory(model: onnx.ModelProto | ir.Model, create: Any) -> Any:
    loaded = load(model)
    if not loaded.external_files:
        try:
            content = loaded.proto.SerializeToString()
        except Exception:  # above protobuf's 2 GB; the error's type differs between versions
            content = b""
        if 0 < len(content) <= PROTOBUF_LIMIT:
            return create(content)
    with loaded.stage(None) as staged:
        return create(os.fspath(staged.path))


def _model_input(label: str, value: Any, required: bool) -> ModelInput:
    if value.type not in _DTYPES:
        raise PruneError(
            f"{label}: input '{value.name}' is a {value.type}, which onnxruntime cannot be given from numpy; "
            "make the input a float tensor followed by a Cast, or cut the model behind it"
        )
    # Exporters write 0, -1 or an empty name where they mean "any size".
    shape = tuple(d if d and (isinstance(d, str) or d > 0) else None for d in value.shape)
    return ModelInput(value.name, _DTYPES[value.type], shape, required)


def _reason(error: Exception) -> str:
    """onnxruntime's message on one line, without its status prefix."""
    text = " ".join(str(error).split())
    prefix, _, rest = text.partition(" : ")
    if prefix == "[ONNXRuntimeError]":
        text = rest.split(" : ", 2)[-1]
    return text[:600]
