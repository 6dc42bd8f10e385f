"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="An ONNX file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1x3x224x224", help="Size of an input with dynamic dims; may be repeated."),
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="Threads of onnxruntime.", show_default=False)]
Metric = Annotated[
    str | None,
    typer.Option(metavar="MODULE:FUNCTION", help="Called with outputs and labels; higher is better."),
]
Baseline = Annotated[
    str | None, typer.Option(metavar="DENSE", help="The dense model, to compare with.", show_default=False)
]
Table = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="JSON with times of layers: taken from it where it exists, else written.",
        show_default=False,
    ),
]
NoTiming = Annotated[bool, typer.Option("--no-timing", help="Estimate what is faster instead of timing layers.")]
DATA = "An .npz with an array per input and optional 'labels', or module:function."
Report = Annotated[
    Path | None,
    typer.Option(metavar="OUT.html", help="Write a page about it all, which opens offline.", show_default=False),
]
