"""What `qmoe pack` and `qmoe unpack` have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe_lite.bench._show.text import duration, megabytes, plural, print_text

if TYPE_CHECKING:
    from qmoe_lite.checkpoint.packing import Packed

ThreadsOption = Annotated[int | None, typer.Option(help="Threads. [default: one a core]", min=1)]


def print_packed(found: Packed, json: bool, name: str, before: int, after: int) -> None:
    """Print what was done: one JSON document, or sizes before and after, time and speed."""
    if json:
        from qmoe_lite.cli import _output

        _output.print_json(found.to_json())
        return
    speed = found.bytes / 1e6 / max(found.seconds, 1e-3)
    sizes = f"{megabytes(before)} -> {megabytes(after)} MB ({after / before - 1:+.1%})" if before else "empty"
    print_text(f"{name}{plural(found.files, 'file')}, {sizes}, {duration(found.seconds)}, {speed:,.0f} MB/s")
    if found.float_bytes:
        share = found.packed_float_bytes / found.float_bytes - 1
        sizes = f"{megabytes(found.float_bytes)} -> {megabytes(found.packed_float_bytes)} MB"
        print_text(f"floats {sizes} ({share:+.1%})")


@contextmanager
def packing_shown(title: str, show: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callback that shows how far it is, in megabytes, on a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda done, total, name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=f"{title} {name}")
