"""For tests of bad input: a folder with a good model, and what a call that is refused must leave as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import parse

from onnxprune import PruneError

HALF = [{"sparsity": 0.5}]


def net(**options: Any) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    return parse("(float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", **{"w": weight, **options})


def listing() -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path().rglob("*"))}


def attempt(call: Callable[[], Any]) -> tuple[str, Any]:
    """The text of a PruneError, or what the call returns; any other exception is let through."""
    try:
        return "", call()
    except PruneError as error:
        return str(error), None


def refused(call: Callable[[], object], *parts: str) -> str:
    """The text of the PruneError a call raises: one paragraph with all the parts, and no file changed."""
    before = listing()
    with pytest.raises(PruneError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is PruneError
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert listing() == before
    return text
