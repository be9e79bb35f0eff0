"""`qmoe inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmoe_lite.bench._show.text import duration, megabytes, print_table, print_text
from qmoe_lite.cli._options import JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from qmoe_lite.inspection.contents import Inspection, StoredProjection

CLASSES = {  # of an expert's Hessian: heading, meaning
    "own": ("own", "its own Hessian"),
    "dampened": ("damp", "more dampening"),
    "blended": ("blend", "mixed with the layer's"),
    "nearest": ("near", "none: to nearest"),
}


def inspect(
    directory: Annotated[str, typer.Argument(help="Compressed directory.")],
    layers: Annotated[str, typer.Option(help="Only these layers, as files are named: 'encoder.*', 'layers.1?'.")] = "*",
    plot: Annotated[Path | None, typer.Option(help="Draw the figures over the layers into this .png file.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Show what differs in this compressed directory of the same model.", metavar="DIR"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show a compressed model layer by layer, with its report. Reads no codes.

    Example: qmoe inspect switch-qmoe --plot layers.png
    """
    if compare is not None:
        from qmoe_lite.cli._comparison import show_comparison

        show_comparison(directory, compare, layers, json, plot)
        return
    from qmoe_lite.bench._show.picture import check_picture
    from qmoe_lite.cli import _output
    from qmoe_lite.cli._layers_plot import draw_layers
    from qmoe_lite.inspection.contents import inspect_model

    _output.quiet_transformers()
    if plot is not None:
        check_picture(plot)
    whole = inspect_model(directory)
    found = whole.only(layers)
    if plot is not None:
        draw_layers(found, plot)
    if json:
        _output.print_json(found.to_json())
        return
    print_table(_head(whole))
    print_text()
    print_table(_projections(found))
    print_text()
    if found.report is None:
        print_text("There is no qmoe_report.json: errors, Hessians and tokens are not known.")
        return
    if found.calibrated:
        print_table(_layers(found))
        print_text()
    else:
        print_text("Rounded without calibration text: there are no tokens and no held-out error.")
    print_text(_largest(found))
    for line in found.report.degraded:
        print_text(f"note: {line}")


def _head(found: Inspection) -> Table:
    """Return a few lines on the whole model."""
    from rich.markup import escape
    from rich.table import Table

    from qmoe_lite.compression.verdict import Verdict
    from qmoe_lite.inspection.contents import UNKNOWN

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    rows, totals, versions = found.projections, found.totals, dict(found.versions)
    table.add_row("directory", escape(found.directory))
    layers = len({row.layer for row in rows})
    counts = f"{layers} sparse layers, {totals['matrices']:,} matrices, {totals['expert_weights']:,} weights in experts"
    table.add_row("model", f"{found.model_type}, {counts}")
    for projection, text in _shapes(rows):
        table.add_row(f"  {projection}", text)
    if found.report:
        table.add_row("made from", f"{escape(found.report.model)}, in {duration(found.report.seconds)}")
    table.add_row("made by", f"qmoe-lite {versions.pop('qmoe-lite', UNKNOWN)}, recipe {found.recipe}")
    table.add_row("with", ", ".join(f"{name} {version}" for name, version in versions.items()) or UNKNOWN)
    levels, bits = (sorted({getattr(row, name) for row in rows}) for name in ("level_dtype", "codeword_bits"))
    table.add_row("grid", f"{found.grid}, levels {', '.join(levels)}, codewords of {', '.join(map(str, bits))} bits")
    digits = [(row.weights, row.report) for row in rows if row.report and row.report.entropy is not None]
    if digits:
        weights = sum(weight for weight, _ in digits)
        entropy = sum(weight * (report.entropy or 0.0) for weight, report in digits) / weights
        exceptions = sum(weight * (report.exceptions or 0.0) for weight, report in digits) / weights
        largest = max(report.largest_digit or 0 for _, report in digits)
        table.add_row("digits", f"entropy {entropy:.3f} bits, largest {largest}, exceptions {exceptions:.3%}")
    if steps := [row.report.step for row in rows if row.report and row.report.step is not None]:
        zones = [row.report.dead_zone for row in rows if row.report and row.report.dead_zone is not None]
        zone = f"; dead zones {min(zones):.3f} to {max(zones):.3f} steps" if zones else ""
        range_of = f"{min(steps):.3f} to {max(steps):.3f}"
        table.add_row("steps", f"{range_of} times the root mean square of a row, on average{zone}")
    if found.report and found.report.verdict:
        table.add_row("verdict", str(Verdict.from_json(found.report.verdict)))
    before = found.report.sizes if found.report else {}
    total: tuple[int, int] = (0, 0)
    for name, size in (("expert", found.expert_bytes), ("other", found.other_bytes)):
        dense = before.get(f"dense_{name}_bytes", 0)
        total = total[0] + dense, total[1] + size
        table.add_row(f"{name}s", _shrunk(dense, size) + (_rates(totals) if name == "expert" else ""))
    table.add_row("all", _shrunk(*total))
    return table


def _shapes(rows: list[StoredProjection]) -> Iterator[tuple[str, str]]:
    """Yield each projection's size, with the layers where it is not the same in all."""
    sizes: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        text = f"{row.experts} experts of {row.rows:,} x {row.columns:,}"
        sizes.setdefault(row.projection, {}).setdefault(text, []).append(row.short)
    for projection, layers_of in sizes.items():
        for text, layers in layers_of.items():
            yield projection, text if len(layers_of) == 1 else f"{text}: {', '.join(layers)}"


def _shrunk(dense: int, size: int) -> str:
    return f"{megabytes(dense)} -> {megabytes(size)} MB" if dense else f"{megabytes(size)} MB"


def _rates(totals: dict[str, float | None]) -> str:
    zeros = "" if totals["zeros"] is None else f", {totals['zeros']:.1%} zeros"
    return f", {totals['bits_per_weight']:.3f} bits a weight{zeros}"


def _table(**options: Any) -> Table:
    """Make a table without lines between columns: ten of them must fit."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), **options)


def _projections(found: Inspection) -> Table:
    """Make a row for each projection of each layer, then one for each projection, then one for all."""
    rows = found.projections
    reports = [row.report for row in rows if row.report]
    classes = [name for name in CLASSES if any(name in report.hessian_classes for report in reports)]
    legend = "Experts rounded with: " + ", ".join("{} = {}".format(*CLASSES[name]) for name in classes) + "."
    caption = legend if classes else None
    table = _table(caption=caption, caption_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("projection", overflow="fold")
    headings = ["bits", "codes", "zeros", *(["error"] if reports else []), *(CLASSES[name][0] for name in classes)]
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(row.short, row.projection, *_figures([row], classes))
    table.add_section()
    for projection in dict.fromkeys(row.projection for row in rows):
        table.add_row("all", projection, *_figures([row for row in rows if row.projection == projection], classes))
    table.add_row("all", "all", *_figures(rows, classes))
    return table


def _figures(rows: list[StoredProjection], classes: list[str]) -> list[str]:
    """Cells for one or several projections: means over weights, the error's over matrices."""
    from qmoe_lite.inspection.contents import share_of_zeros

    weights = sum(row.weights for row in rows)
    zeros = share_of_zeros(rows)
    cells = [
        f"{sum(row.bits_per_weight * row.weights for row in rows) / weights:.3f}",
        f"{sum(row.stored_code_bits_per_weight * row.weights for row in rows) / weights:.3f}",
        "-" if zeros is None else f"{zeros:.3f}",
    ]
    if reports := [row.report for row in rows if row.report]:
        cells.append(f"{sum(r.error * r.experts for r in reports) / sum(r.experts for r in reports):.4f}")
        cells += [str(sum(r.hessian_classes.get(name, 0) for r in reports)) for name in classes]
    return cells


def _layers(found: Inspection) -> Table:
    """Make a row for each layer: its calibration tokens, its held-out error and its step."""
    from statistics import median

    from qmoe_lite.compression.notes import ranges

    table = _table(title="Calibration tokens per expert", title_justify="left")
    table.add_column("layer", overflow="fold")
    steps = {row.layer: row.report.step for row in found.projections if row.report and row.report.step is not None}
    for heading in ("min", "median", "max", "held-out error", *(["step"] if steps else [])):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("experts without a token", overflow="fold")
    # the projections of a layer see the same tokens: a layer has one row
    seen = dict.fromkeys((row.short, row.layer, tuple(row.report.tokens)) for row in found.projections if row.report)
    for short, layer, tokens in seen:
        figures = [f"{figure:,.0f}" for figure in (min(tokens), median(tokens), max(tokens))]
        held_out = found.held_out_error.get(layer)
        error = "-" if held_out is None else f"{held_out:.4f}"
        step = [f"{steps[layer]:.3f}" if layer in steps else "-"] if steps else []
        table.add_row(short, *figures, error, *step, ranges([e for e, count in enumerate(tokens) if count == 0]))
    return table


def _largest(found: Inspection) -> str:
    """Return the places to look at first."""
    rows = [(row.report.error, f"{row.short} {row.projection}") for row in found.projections if row.report]
    short = {row.layer: row.short for row in found.projections}
    held_out = [(error, short[layer]) for layer, error in found.held_out_error.items()]
    kinds = (("error", rows), ("held-out", held_out))
    return "Largest " + "; ".join(f"{kind}: {max(of)[0]:.4f} ({max(of)[1]})" for kind, of in kinds if of)
