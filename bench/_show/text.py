"""Text that commands and measurements print: lines, tables within 80 columns, sizes and times for people."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_text(text: str = "") -> None:
    """Print one line on standard output."""
    sys.stdout.write(text + "\n")


def print_wrapped(text: str) -> None:
    """Print a sentence, a paragraph or what a machine is called, in lines of at most 80 columns."""
    print_text(textwrap.fill(text, 80, break_on_hyphens=False))


def print_table(table: Table) -> None:
    """Print a table, at most 80 columns wide where the output is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=80)
    console.print(table)


def print_rows(
    title: str, headings: Iterable[str], rows: Iterable[list[str]], *, text: int = 0, tight: bool = False
) -> None:
    """Print a title and a table; its first `text` columns hold words, the others figures.

    A row without its first cell belongs to the one above; a line parts such groups. A tight table has one space between
    columns, not two.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0 if tight else 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < text else "right", overflow="fold")
    grouped = False
    for row in rows:
        if grouped and row[0]:
            table.add_section()
        grouped = not row[0]
        table.add_row(*row)
    print_text(title)
    print_table(table)
    print_text()


def plural(number: int, word: str) -> str:
    """Format a count with its noun: 1 thread, 2 threads."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a time span."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def megabytes(size: int) -> str:
    """Format a size in units of 10^6 bytes."""
    return f"{size / 1e6:,.2f}" if size < 1e8 else f"{size / 1e6:,.0f}"
