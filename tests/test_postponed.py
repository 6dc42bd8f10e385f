"""onnx-ir comes without sympy, and loses nothing by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onnxprune.graph import postponed

SIZES = """
import onnx_ir as ir
size = ir.SymbolicDim("max(N, 2*M)") + ir.SymbolicDim("floor(M/2)")
print(size, type(size).__name__, (size - 1).value, size.evaluate({"N": 3, "M": 5}) if hasattr(size, "evaluate") else "")
try:
    ir.SymbolicDim(1.5)
except TypeError as error:
    print(error)
import sympy
print(type(ir.SymbolicDim(sympy.Symbol("K") + 1).value), sympy.Symbol("x") + 1, sympy.__version__)
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_symbolic_sizes_are_what_they_are_without_it():
    put_off = "import sys, onnxprune.graph; assert 'onnx_ir' in sys.modules and 'sympy' not in sys.modules\n"
    assert run(put_off + SIZES) == run(SIZES)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two modules to import, of which one needs the other as the text says."""

    def make(text: str) -> None:
        (tmp_path / "needed_module.py").write_text("class Size(int): pass\n")
        (tmp_path / "needing_module.py").write_text(f"import needed_module\n{text}\n")

    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_that_is_needed_later_is_put_off(modules):
    modules("TABLE = {'size': needed_module.Size}\ndef is_size(x): return isinstance(x, needed_module.Size)")
    postponed.bring("needing_module", without="needed_module")
    assert "needed_module" not in sys.modules
    made = sys.modules["needing_module"].TABLE["size"](3)
    assert sys.modules["needed_module"].Size is type(made)
    assert sys.modules["needing_module"].is_size(made)
    assert not sys.modules["needing_module"].is_size(3)


@pytest.mark.parametrize(
    "text",
    ["class Own(needed_module.Size): pass", "assert needed_module.Size(3) + 1 == 4", "assert needed_module.__file__"],
)
def test_a_module_that_is_needed_at_once_is_imported(modules, text):
    modules(text)
    postponed.bring("needing_module", without="needed_module")
    import needing_module

    assert not isinstance(sys.modules["needed_module"], postponed.Later)
    assert not isinstance(needing_module.needed_module, postponed.Later)


def test_a_module_that_is_there_already_stays(modules):
    modules("TABLE = {'size': needed_module.Size}")
    import needed_module

    postponed.bring("needing_module", without="needed_module")
    assert "needing_module" not in sys.modules
    assert sys.modules["needed_module"] is needed_module
