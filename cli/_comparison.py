"""What `qmoe inspect DIR --compare DIR2` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmoe_lite.bench._show.text import megabytes, print_rows, print_text

if TYPE_CHECKING:
    from qmoe_lite.inspection.comparison import Comparison, Pair


def show_comparison(directory: str, other: str, layers: str, json: bool, plot: Path | None) -> None:
    """Print what differs between two compressed directories; options as of `inspect`."""
    from qmoe_lite.cli import _output
    from qmoe_lite.errors import SettingError
    from qmoe_lite.inspection.comparison import compare
    from qmoe_lite.inspection.contents import inspect_model

    if plot is not None:
        raise SettingError("--plot draws one directory. Leave out --compare, or draw each.")
    _output.quiet_transformers()
    found = compare(*(inspect_model(each).only(layers) for each in (directory, other)))
    if json:
        _output.print_json(found.to_json())
        return
    print_text(f"first   {found.directories[0]}")
    print_text(f"second  {found.directories[1]}")
    print_text()
    print_rows("The whole model", ["", "first", "second", "difference"], _totals(found), text=1)
    if found.settings:
        rows = [[name, *map(_setting, pair)] for name, pair in found.settings.items()]
        print_rows("Settings that differ", ["", "first", "second"], rows, text=3)
    rows = list(_layers(found))
    if not rows:
        print_text("No figure of a layer differs.")
        return
    headings = ["layer", "projection", "bits", "second", "error", "second", "held-out", "second"]
    print_rows("Layers that differ", headings, rows, text=2)


def _totals(found: Comparison) -> Iterator[list[str]]:
    totals = found.totals
    size = tuple(a + b for a, b in zip(totals["expert_bytes"], totals["other_bytes"], strict=True))
    for name, pair in (("experts, MB", totals["expert_bytes"]), ("all, MB", size)):
        yield [name, *map(megabytes, pair), f"{pair[1] / pair[0] - 1:+.1%}"]
    for name, key in (("bits an expert weight", "bits_per_weight"), ("zeros", "zeros")):
        yield [name, *_figures(totals[key])]
    if any(value is not None for value in totals["loss"]):
        yield ["held-out loss", *_figures(totals["loss"])]
        yield ["above the dense model's", *_figures(totals["gap"])]
        yield ["+-", *_figures(totals["standard_error"])[:2], ""]
        yield ["predicted tokens", *(("-" if n is None else f"{n:,}") for n in totals["tokens"]), ""]
        yield ["verdict", *(word or "-" for word in totals["word"]), ""]


def _figures(pair: Pair) -> list[str]:
    known = ["-" if value is None else f"{value:.3f}" for value in pair]
    return [*known, f"{pair[1] - pair[0]:+.3f}" if None not in pair else ""]


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)


def _layers(found: Comparison) -> Iterator[list[str]]:
    seen = set[str]()
    for row in found.projections:
        if row.differs:
            held_out = ("", "") if row.layer in seen else _pair(row.held_out_error, 4)
            seen.add(row.layer)
            yield [row.short, row.projection, *_pair(row.bits_per_weight, 3), *_pair(row.error, 4), *held_out]


def _pair(pair: Pair, digits: int) -> tuple[str, str]:
    first, second = ("-" if value is None else f"{value:.{digits}f}" for value in pair)
    return first, second
