"""The one error a user of onnxprune has to know."""

from __future__ import annotations


class PruneError(ValueError):
    """Bad input, or a model that cannot be pruned as asked.

    The message is one paragraph: which tensor, node, entry or file it is about, what was expected,
    what came, and what to do. Nothing has been written when it is raised. Names come from files of strangers:
    control characters in them are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
