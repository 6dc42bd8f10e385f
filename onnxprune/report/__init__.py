"""One self-contained page about a result, which opens offline."""
