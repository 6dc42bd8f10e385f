"""onnx-ir without sympy, which it computes symbolic sizes with: nothing here does, and its import costs more than
pruning a small model."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class Later(ModuleType):
    """Stands for a module that is imported when something of it is used.

    Attributes:
        wanted: whether to import it now. Before, whatever is taken from it becomes a function that does when called.
    """

    wanted = False

    def __getattr__(self, name: str) -> Any:
        """Something of the module."""
        if name.startswith("__"):
            raise AttributeError(name)
        if self.wanted:
            return getattr(import_module(self.__name__), name)

        def use(*args: Any) -> Any:
            if not self.wanted:
                raise ImportError(f"{self.__name__}.{name} is needed at once")
            return getattr(import_module(self.__name__), name)(*args)

        return use


def bring(name: str, without: str) -> None:
    """Import a module with another put off, if neither is there yet and it can do without."""
    if name in sys.modules or without in sys.modules:
        return
    later = Later(without)
    sys.modules[without] = later
    try:
        import_module(name)
    except Exception:  # a version that needs the other at once is imported with it
        for part in [part for part in sys.modules if part.split(".")[0] == name]:
            del sys.modules[part]
    finally:
        if sys.modules.get(without) is later:
            del sys.modules[without]
        later.wanted = True
