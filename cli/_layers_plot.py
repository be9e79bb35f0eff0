"""The picture of `qmoe inspect --plot`: bits, errors and tokens over the layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_lite.bench._show.picture import NAMES_BELOW, legend_beside, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qmoe_lite.inspection.contents import Inspection, StoredProjection


def draw_layers(found: Inspection, file: Path) -> None:
    """Draw bits per weight, errors and tokens over the layers, as far as they are known.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    panels = [_bits]
    if found.report is not None:
        panels.append(_errors)
    if found.calibrated:
        panels.append(_tokens)
    names = list(dict.fromkeys(p.short for p in found.projections))
    figure = new_figure(max(6.4, min(12.8, 0.2 * len(names))), 2.4 * len(panels))
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, axes in zip(panels, column, strict=True):
        panel(axes, found, names)
        axes.grid(axis="y", alpha=0.3)
        legend_beside(axes)
    step = -(-len(names) // NAMES_BELOW)
    column[-1].set_xticks(range(0, len(names), step), names[::step], rotation=45, ha="right")
    figure.suptitle(f"{Path(found.directory).name} ({found.model_type})", fontsize="medium", parse_math=False)
    save_figure(figure, file)


def _by_projection(found: Inspection) -> dict[str, list[StoredProjection]]:
    rows: dict[str, list[StoredProjection]] = {}
    for row in found.projections:
        rows.setdefault(row.projection, []).append(row)
    return rows


def _bits(axes: Axes, found: Inspection, names: list[str]) -> None:
    for projection, rows in _by_projection(found).items():
        places = [names.index(row.short) for row in rows]
        axes.plot(places, [row.bits_per_weight for row in rows], ".-", linewidth=0.8, label=projection)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("bits per weight")


def _errors(axes: Axes, found: Inspection, names: list[str]) -> None:
    drawn: list[float] = []
    for projection, rows in _by_projection(found).items():
        values = [row.report.error for row in rows if row.report]
        axes.plot([names.index(row.short) for row in rows], values, ".-", linewidth=0.8, label=projection)
        drawn += values
    short = {row.layer: row.short for row in found.projections}
    if held_out := found.held_out_error:
        places = [names.index(short[layer]) for layer in held_out]
        axes.plot(places, list(held_out.values()), "k.--", linewidth=0.8, label="held-out")
        drawn += held_out.values()
    if min(drawn) > 0:
        axes.set_yscale("log")
    axes.set_ylabel("relative error")


def _tokens(axes: Axes, found: Inspection, names: list[str]) -> None:
    from statistics import median

    seen = dict.fromkeys((row.short, tuple(row.report.tokens)) for row in found.projections if row.report)
    places = [names.index(short) for short, _ in seen]
    lowest, middle, highest = ([find(tokens) for _, tokens in seen] for find in (min, median, max))
    axes.vlines(places, lowest, highest, linewidth=3, alpha=0.5, label="min to max")
    axes.plot(places, middle, "k.", label="median")
    if min(lowest) > 0:
        axes.set_yscale("log")
    else:  # an expert without a token is seen at the bottom
        axes.set_yscale("symlog")
        axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per expert")
