"""How far long work is: told by whoever does it, shown by whoever asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Advance = Callable[[int], None]
"""Says that so many more bytes are done; from any thread."""

Show = Callable[[str, int], "contextlib.AbstractContextManager[Advance]"]
"""Shows a piece of work: what it is, and its bytes."""

_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)


@contextlib.contextmanager
def shown(show: Show) -> Iterator[None]:
    """Have the work in this context shown."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


@contextlib.contextmanager
def task(what: str, total: int) -> Iterator[Advance]:
    """A piece of work of so many bytes."""
    show = _SHOW.get()
    if show is None:
        yield lambda count: None
        return
    with show(what, total) as advance:
        yield advance
