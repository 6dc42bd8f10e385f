"""`python -m onnxprune`."""

from __future__ import annotations

from onnxprune.cli import command

if __name__ == "__main__":
    command()
