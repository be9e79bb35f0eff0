"""What the command line alone prints: JSON on standard output, progress and notes on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from qmoe_lite.bench._show.text import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmoe_lite.compression.settings import Progress


def print_json(value: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def note(text: str) -> None:
    """Print one line on standard error; where that cannot be written, the work goes on without it."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress_shown(title: str, show: bool = True) -> Iterator[Callable[[Progress], None]]:
    """Yield a callback for `compress`: a bar with the time left on a terminal, now and then a plain line elsewhere."""
    if not show:
        yield warn
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("elapsed"), TimeElapsedColumn())
        known_too = TextColumn("{task.fields[known]}")
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), *left, known_too)
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None, known="")

            def advance(event: Progress) -> None:
                warn(event)
                described = f"{title}: {event.place}"
                known = figures(event).removeprefix(", ")
                bar.update(task, completed=event.done, total=event.total, description=described, known=known)

            yield advance
    else:
        yield _PlainLines(title)


def warn(event: Progress) -> None:
    """Print an event's warning, if it has one."""
    if event.warning is not None:
        note(f"qmoe: warning: {event.warning}")


class _PlainLines:
    """One line for each block, and at least one a minute, with the time that is left."""

    def __init__(self, title: str) -> None:
        self._title, self._start, self._last = title, time.monotonic(), 0.0
        self._first: int | None = None  # groups that an earlier run did
        self._block = ""

    def __call__(self, event: Progress) -> None:
        warn(event)
        now = time.monotonic()
        if self._first is None and event.done:
            self._first = event.done - 1
        block = event.place.split(",")[0]
        if block == self._block and event.done < event.total and now - self._last < 60:
            return
        self._block, self._last = block, now
        left = event.seconds_left
        if left is None and self._first is not None:
            left = (now - self._start) / max(event.done - self._first, 1) * (event.total - event.done)
        time_left = "" if left is None else f", about {duration(left)} left"
        where = f"{event.done} of {event.total} groups ({event.place}){time_left}"
        note(f"{self._title}: {where}{figures(event)}")


def figures(event: Progress) -> str:
    """Format what is known of a group besides its place: speed, error so far, memory."""
    found = ""
    if event.tokens_per_second is not None:
        found += f", {event.tokens_per_second:,.0f} tokens a second"
    if event.held_out_error is not None:
        found += f", held-out error {event.held_out_error:.3f}"
    if event.memory_bytes is not None:
        found += f", {event.memory_bytes / 1e9:.2f} GB of memory"
    return found
