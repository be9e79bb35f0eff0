"""The table and the picture of `qmoe bench accuracy`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_lite.bench._show.picture import new_figure, save_figure
from qmoe_lite.bench._show.text import print_rows, print_text

if TYPE_CHECKING:
    from qmoe_lite.bench.accuracy import AccuracyReport


def print_accuracy(report: AccuracyReport) -> None:
    """Print what each variant loses, llama.cpp's types between them by their bits."""
    dense, *rest = report.points
    rows = [
        (p.bits, [p.name, f"{p.bits:.3f}", f"{p.loss:.3f}", f"{p.gap:.3f}", f"{p.standard_error:.3f}", p.verdict or ""])
        for p in rest
    ]
    rows += [(bits, [f"llama.cpp {name}", f"{bits:.3f}", "", f"{gap:.3f}", "", ""]) for name, bits, gap in report.peers]
    title = f"{report.model}: dense loss {dense.loss:.3f} nats on {report.tokens:,} held-out tokens"
    headings = ("", "bits a weight", "loss", "gap", "+-", "verdict")
    print_rows(title, headings, [row for _, row in sorted(rows, key=lambda pair: pair[0])], text=1)
    if report.peers:
        print_text("llama.cpp: by ggml of llama-cpp-python 0.3.36, 2026-11-25; see bench/README.md")


def draw_accuracy(report: AccuracyReport, file: Path) -> None:
    """Draw the gaps over the bits.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    for label, tuned in (("qmoe compress --rate", False), ("the same, then qmoe tune", True)):
        rated = [p for p in report.points if p.name.startswith("--rate") and p.name.endswith("tuned") == tuned]
        if rated:
            bits, gaps, errors = zip(*sorted((p.bits, p.gap, p.standard_error) for p in rated), strict=True)
            axes.errorbar(bits, gaps, yerr=errors, fmt="o-", markersize=4, linewidth=1.2, label=label)
    for point in report.points[1:]:
        if not point.name.startswith("--rate"):
            axes.plot([point.bits], [point.gap], "s", markersize=5, label=point.name)
    if report.peers:
        axes.plot([p[1] for p in report.peers], [p[2] for p in report.peers], "x", color="black", label="llama.cpp")
        for i, (name, bits_of_peer, gap) in enumerate(report.peers):
            beside = (4, 4) if i % 2 else (4, -9)  # neighbours' names must not meet
            axes.annotate(name, (bits_of_peer, gap), fontsize=7, xytext=beside, textcoords="offset points")
        axes.margins(x=0.1)
    axes.set_yscale("log")
    axes.set_xlabel("stored bits an expert weight")
    axes.set_ylabel("held-out loss above the dense model's, nats")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize="small", frameon=False)
    figure.suptitle(Path(report.model).name, fontsize="medium", parse_math=False)
    save_figure(figure, file)
