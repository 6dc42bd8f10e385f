"""What the command line prints: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from onnxprune.errors import PruneError

if TYPE_CHECKING:
    from rich.console import RenderableType

BROKEN_PIPE, INTERRUPTED = 141, 130


@contextlib.contextmanager
def results_only(told: Callable[[], str] = lambda: "interrupted") -> Iterator[None]:
    """The work of a command. Stdout is kept for results: what a function or a library prints goes to stderr.

    Args:
        told: what is said when it is interrupted.
    """
    from onnxprune import progress

    try:
        with contextlib.redirect_stdout(sys.stderr), progress.shown(_bar), _interruptible(told):
            yield
    except KeyboardInterrupt:
        say(told())
        raise typer.Exit(INTERRUPTED) from None


def interrupted(keep: Path | None) -> str:
    """What is said of a run that keeps what it has done in a file."""
    if keep is None or not keep.exists():
        return "interrupted"
    return f"interrupted; the same command goes on from here: what was done is kept in '{keep}'"


GRACE = 1.5
"""Seconds from Ctrl-C on that the work is given to end."""


@contextlib.contextmanager
def _interruptible(told: Callable[[], str]) -> Iterator[None]:
    """End the process where Ctrl-C does not end the block: Python cannot interrupt a call into a library.

    What is left in hidden folders then is what a killed run leaves; the next one clears it away.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    signalled, signal_to = os.pipe()
    os.set_blocking(signal_to, False)
    ended = threading.Event()

    def watch() -> None:
        while received := os.read(signalled, 1):
            if received[0] == signal.SIGINT and not ended.wait(GRACE):
                say(told())
                leave(INTERRUPTED)

    watcher = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(signal_to, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(signal_to)
        watcher.join()
        os.close(signalled)


def leave(status: int) -> NoReturn:
    """End the process, and those it has started, at once: what Python takes down at its end takes a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "multiprocessing" in sys.modules:
        for process in sys.modules["multiprocessing"].active_children():
            process.terminate()
    os._exit(status)


SLOW = 2.0
"""Seconds from which on work is shown to go on."""


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes and rate on stderr, where that is a terminal and the work takes longer than `SLOW`."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    lock, start, done, bar = threading.Lock(), time.monotonic(), 0, None
    with contextlib.ExitStack() as stack:

        def advance(count: int) -> None:
            nonlocal done, bar
            with lock:
                done += count
                if bar is None and time.monotonic() - start > SLOW:
                    from onnxprune import tables

                    bar = tables.bar(sys.stderr)
                    stack.enter_context(bar)
                    bar.add_task(tables.escaped(what), total=total)
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=done)

        yield advance


def show(parts: Iterable[RenderableType]) -> None:
    """Tables and sentences, to stdout."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(*parts, sep="")
    lines = [line.rstrip() for line in capture.get().splitlines()]
    doubled = [not line and (index == 0 or not lines[index - 1]) for index, line in enumerate(lines)]
    _print("\n".join(line for line, drop in zip(lines, doubled, strict=True) if not drop))


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, to stdout."""
    _print(json.dumps(value, indent=2, allow_nan=False))


def _print(text: str) -> None:
    """To stdout; where nobody reads it any more, that is the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail again
        raise typer.Exit(BROKEN_PIPE) from None


def check_report(report: Path | None, *others: str | Path) -> None:
    """What would make a page fail to be written is found out before anything is measured."""
    if report is None:
        return
    from onnxprune.report import page

    page.check()
    if not report.parent.is_dir() or report.is_dir():
        raise PruneError(f"cannot write the report to '{report}': give the name of a file in an existing folder")
    if report.resolve() in {Path(other).resolve() for other in others}:
        raise PruneError(f"the report '{report}' is the model itself or the output; choose another name")


def reported(
    report: Path, kind: str, result: Mapping[str, Any], configuration: Any = None, **more: Any
) -> dict[str, Any]:
    """Write the page about a result; returns its JSON."""
    from onnxprune.report import page
    from onnxprune.report.document import document

    made = document(kind, result, configuration, **more)
    page.write(made, report)
    say(f"report: {report}")
    return made


def say(text: str) -> None:
    """One paragraph on stderr."""
    from onnxprune.tables import escaped

    print(escaped(" ".join(text.split())), file=sys.stderr)
