"""Pictures of what `qmoe bench` measured, as .png files; each raises OutputError where its file cannot be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_lite.bench._show.picture import NAMES_BELOW, legend_beside, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qmoe_lite.bench.gptq import GptqReport
    from qmoe_lite.bench.layer import LayerReport
    from qmoe_lite.bench.matmul import MatmulReport
    from qmoe_lite.bench.offload import OffloadReport, Parts
    from qmoe_lite.bench.rates import ModelRatesReport, ProjectionRates, Rates, RatesReport


def draw_rates(report: RatesReport, file: Path) -> None:
    """Draw code bits over the share of zeros, and below what each adds to the entropy."""
    figure = new_figure(6.4, 6.4)
    over_zeros, over_entropy = figure.subplots(2, 1, sharex=True)
    zeros, entropy = [r.zeros for r in report.rates], [r.entropy for r in report.rates]
    over_zeros.plot(zeros, entropy, "k--", linewidth=1, label="entropy")
    for (name, values), marker in zip(_codes(report.rates).items(), "oxs^", strict=True):
        style = {"marker": marker, "markersize": 5, "markerfacecolor": "none", "linewidth": 1, "label": name}
        over_zeros.plot(zeros, values, **style)
        over_entropy.plot(zeros, [100 * (v / h - 1) for v, h in zip(values, entropy, strict=True)], **style)
    over_zeros.set_ylabel("code bits per weight")
    over_entropy.set_ylabel("% over entropy")
    over_entropy.set_xlabel("share of zeros")
    for axes in (over_zeros, over_entropy):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    over_entropy.set_yscale("symlog", linthresh=1, linscale=0.3)
    ticks = (0, 1, 2, 5, 10, 20, 50, 100, 200)
    over_entropy.set_yticks(ticks, [str(tick) for tick in ticks])
    over_zeros.legend(fontsize="small", frameon=False)
    save_figure(figure, file)


def draw_model_rates(report: ModelRatesReport, file: Path) -> None:
    """Draw the code bits of each projection of a model, with its entropy."""
    rows = report.projections
    figure = new_figure(max(6.4, min(12.8, 0.4 * len(rows))), 3.6)
    axes = figure.subplots()
    places = range(len(rows))
    axes.plot(places, [r.entropy for r in rows], "k_", markersize=12, label="entropy")
    for (name, values), marker in zip(_codes(rows).items(), "oxs^", strict=True):
        axes.plot(places, values, marker=marker, markersize=6, markerfacecolor="none", linewidth=0, label=name)
    step = -(-len(rows) // NAMES_BELOW)
    names = [f"{r.layer} {r.projection}" for r in rows]
    axes.set_xticks(places[::step], names[::step], rotation=45, ha="right")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("code bits per weight")
    axes.grid(axis="y", alpha=0.3)
    legend_beside(axes)
    figure.suptitle(Path(report.directory).name, fontsize="medium", parse_math=False)
    save_figure(figure, file)


def _codes(rows: Sequence[Rates] | Sequence[ProjectionRates]) -> dict[str, list[float]]:
    """Return the curves that both pictures of rates have."""
    return {
        "ours": [r.ours for r in rows],
        "paper": [r.paper for r in rows],
        "zstd -19": [min(value for name, value in r.zstd.items() if name.endswith("-19")) for r in rows],
        "zstd -3": [min(value for name, value in r.zstd.items() if name.endswith("-3")) for r in rows],
    }


def draw_matmul(report: MatmulReport, file: Path) -> None:
    """Draw speed over tokens, a panel a shape."""
    from qmoe_lite.bench.matmul import SHAPES

    curves = {
        "ours, 1 level": ("one_level", "C0.--"),
        "ours, 2 levels": ("two_levels", "C0.-"),
        "ours, x bf16": ("bfloat16_input", "C0x:"),
        "torch fp32": ("dense_float32", "C1s-"),
        "torch bf16": ("dense_bfloat16", "C2^-"),
        "torch int8": ("dense_int8", "C3v-"),
        "dequantised, fp32": ("dequantised_float32", "C1s:"),
        "dequantised, bf16": ("dequantised_bfloat16", "C2^:"),
    }
    shapes = list(dict.fromkeys(row.shape for row in report.speeds))
    across = min(3, len(shapes))
    down = -(-len(shapes) // across)
    figure = new_figure(max(6.4, 3.2 * across), 2.8 * down + 0.8)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flat
    for axes, shape in zip(panels, shapes, strict=False):
        rows = [row for row in report.speeds if row.shape == shape]
        tokens = [row.tokens for row in rows]
        for label, (name, style) in curves.items():
            speeds = [getattr(row, name) for row in rows]
            if None not in speeds:
                axes.plot(tokens, speeds, style, markersize=4, linewidth=1, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"{shape}: {SHAPES[shape][0]} x {SHAPES[shape][1]}", fontsize="small")
        axes.grid(alpha=0.3)
    for axes in list(panels)[len(shapes) :]:
        axes.set_axis_off()
    figure.supxlabel("tokens", fontsize="small")
    figure.supylabel("10$^9$ multiply-adds a second", fontsize="small")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", ncols=4, loc="outside upper center", frameon=False)
    save_figure(figure, file)


def draw_layer(report: LayerReport, file: Path) -> None:
    """Draw the milliseconds of a layer's call over tokens."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    tokens = [s.tokens for s in report.speeds]
    axes.plot(tokens, [s.ours for s in report.speeds], "C0o-", markersize=4, linewidth=1, label="ours")
    for peer, style in zip(report.speeds[0].peers, ("C2^-", "C1s-"), strict=True):
        times = [s.peers[peer] for s in report.speeds]
        axes.plot(tokens, times, style, markersize=4, linewidth=1, label=f"transformers bf16, {peer}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds a call")
    axes.set_title(f"experts of a layer, {report.layer}", fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    save_figure(figure, file)


def draw_gptq(report: GptqReport, file: Path) -> None:
    """Draw the seconds of both solvers, in their parts."""
    figure = new_figure(6.4, 0.6 + 0.9 * len(report.speeds))
    axes = figure.subplots()
    bars = [
        (f"{name}, {s.rows} x {s.columns}", factorisation, whole - factorisation)
        for s in report.speeds
        for name, whole, factorisation in (
            ("ours", s.ours, s.ours_factorisation),
            ("torch loop", s.torch, s.torch_factorisation),
        )
    ]
    names, first, rest = zip(*bars, strict=True)
    axes.barh(names, first, label="factorisation")
    axes.barh(names, rest, left=first, label="columns, error")
    axes.invert_yaxis()
    axes.set_xlabel("seconds an expert")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    save_figure(figure, file)


def draw_offload(report: OffloadReport, file: Path) -> None:
    """Draw tokens a second over the budget, and the parts of a token in memory, as far as measured."""
    limited = any(run.budget is not None for run in report.runs)
    figure = new_figure(6.4, 3.6 * limited + 1.8 * (report.parts is not None))
    heights = [3.6] * limited + [1.8] * (report.parts is not None)
    panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if limited:
        _over_budget(panels[0], report)
    if report.parts is not None:
        _parts_of_token(panels[-1], report.parts)
    figure.suptitle(f"Qwen3-30B-A3B's shape, {report.layers} layers, one token at a time", fontsize="small")
    save_figure(figure, file)


def _over_budget(axes: Axes, report: OffloadReport) -> None:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in report.runs:
        if run.budget is not None:
            curves.setdefault((run.contender, run.routing), []).append((100 * run.budget, run.tokens_per_second))
        elif run.routing == "even":
            colour, name = {"ours": ("C0", "ours, mapped"), "dense": ("C2", "dense bf16, in memory")}.get(
                run.contender, ("C3", f"dense bf16, {run.contender} from disk")
            )
            axes.axhline(run.tokens_per_second, color=colour, linestyle=":", linewidth=1, label=name)
    for (contender, routing), points in curves.items():
        colour, name = ("C0", "ours") if contender == "ours" else ("C1", "bf16 experts, cached")
        style = {"even": f"{colour}o-", "switch": f"{colour}x--"}[routing]
        axes.plot(*zip(*sorted(points), strict=True), style, markersize=4, linewidth=1, label=f"{name}, {routing}")
    ticks = sorted({place for points in curves.values() for place, _ in points})
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("memory for experts, of all compressed ones' bytes")
    axes.set_ylabel("tokens a second")
    axes.grid(alpha=0.3)
    legend_beside(axes)


def _parts_of_token(axes: Axes, parts: Parts) -> None:
    left = [0.0, 0.0]
    both = parts.ours, parts.dense
    pieces = {
        "experts": [p["experts"] for p in both],
        "attention": [p["attention"] for p in both],
        "output head": [p["head"] for p in both],
        "rest": [p["whole"] - p["experts"] - p["attention"] - p["head"] for p in both],
    }
    for name, widths in pieces.items():
        axes.barh(["ours", "dense bf16"], widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a token, all in memory")
    axes.grid(axis="x", alpha=0.3)
    legend_beside(axes)
