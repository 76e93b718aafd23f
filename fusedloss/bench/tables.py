"""Tables and progress in a terminal, drawn by rich if it is installed, and as plain text otherwise."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Tick = Callable[..., None]  # takes a text for the next step, and by how much that step moves the bar (default 1)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        print(title)
        for row in (columns, ["-" * width for width in widths], *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    shown = Table(*columns, title=title, box=box.SIMPLE_HEAD)
    for row in rows:
        shown.add_row(*map(Text, row))  # Text: racers' and devices' names may hold square brackets
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def print_json(found: Any) -> None:
    """Prints what any parser reads: JSON has no NaN and no infinity, which become null."""
    print(json.dumps(_finite(found), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def progress(total: int | None = None) -> Iterator[Tick]:
    """Yields a tick that moves a bar on stderr by one, or by its second argument.

    Without a terminal, or without rich, a tick prints its text if it differs from the last one.
    """
    last = ""

    def line(text: str, advance: int = 1) -> None:
        nonlocal last
        if text != last:
            print(text, file=sys.stderr, flush=True)
        last = text

    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield line
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield line
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        pending = 0  # a tick announces a step, and the bar shows only steps that have ended

        def tick(text: str, advance: int = 1) -> None:
            nonlocal pending
            bar.update(task, description=text, advance=pending)
            pending = advance

        yield tick
