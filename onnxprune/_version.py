"""The version, read from the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("onnxprune")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0"
