"""`qmoe bench`: measurements beside their baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qmoe_lite.cli._options import JsonOption

if TYPE_CHECKING:
    from qmoe_lite.bench.matmul import MatmulReport
    from qmoe_lite.bench.rates import RatesReport

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure beside baselines: one command for each question."""


@app.command("rates")
def rates(
    weights: Annotated[int, typer.Option(help="Digits drawn for each share of zeros.", min=1)] = 4_300_800,
    seed: Annotated[int, typer.Option(help="Decides the digits.", min=0)] = 0,
    json: JsonOption = False,
) -> None:
    """Compare bits per weight: fitted codes, the paper's dictionary, zstd.

    Example: qmoe bench rates --json
    """
    from qmoe_lite.bench.rates import measure
    from qmoe_lite.cli import _output

    report = measure(weights, seed=seed)
    if json:
        _output.print_json(report.to_json())
        return
    _print_rates(report)


def _print_rates(report: RatesReport) -> None:
    from rich.table import Table

    from qmoe_lite.bench.rates import BITS, OUR_ROW_BITS, PAPER_ROW_BITS, WIDTH
    from qmoe_lite.cli import _output

    def show(title: str, headings: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*row)
        _output.print_table(table)

    def figures(*values: float) -> list[str]:
        return [f"{value:.3f}" for value in values]

    show(
        f"Code bits per weight, {report.weights:,} ternary digits in rows of {WIDTH}",
        ["P(0)", "entropy", *(f"ours b={bits}" for bits in BITS), "paper b=16"],
        [figures(r.zeros, r.entropy, *r.tunstall.values(), r.paper) for r in report.rates],
    )
    show(
        "The same digits through zstd (all rows at once)",
        ["P(0)", "entropy", "ours b=10", *report.rates[0].zstd],
        [figures(r.zeros, r.entropy, r.tunstall["10"], *r.zstd.values()) for r in report.rates],
    )
    show(
        f"With what is stored for each row: ours {OUR_ROW_BITS} bits, the paper's {PAPER_ROW_BITS}",
        ["P(0)", "columns", "ours b=10", "with rows", "paper", "with rows"],
        [
            [f"{r.zeros:.3f}", str(w.columns), *figures(w.ours, w.ours_stored, w.paper, w.paper_stored)]
            for r in report.rates
            for w in r.widths
        ],
    )
    _output.print_text(report.machine)


@app.command("matmul")
def matmul(
    shape: Annotated[
        list[str] | None, typer.Option(help="switch-base, mixtral, ..; may be repeated. [default: all]")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of a product; may be repeated. [default: 1, 4, 16, 64, 256]", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="For torch and Numba.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Decides digits and activations.", min=0)] = 0,
    json: JsonOption = False,
) -> None:
    """Time the product from codewords beside torch's dense products, weights from memory.

    Example: qmoe bench matmul --shape qwen3-30b-a3b --threads 2
    """
    from qmoe_lite.bench.matmul import SHAPES, TOKENS, measure
    from qmoe_lite.cli import _output

    report = measure(tuple(shape or SHAPES), tuple(tokens or TOKENS), threads, seed)
    if json:
        _output.print_json(report.to_json())
        return
    _print_matmul(report)


def _print_matmul(report: MatmulReport) -> None:
    from rich.table import Table

    from qmoe_lite.bench.matmul import SHAPES
    from qmoe_lite.cli import _output

    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    table = Table(title=f"10^9 multiply-adds a second, {threads}, {report.bits_per_weight:.2f} bits a weight")
    table.add_column("rows x columns", no_wrap=True)
    headings = ("tokens", "1 level", "2 levels", "fp32", "bf16", "/ fp32", "/ bf16")
    for heading in headings:
        table.add_column(heading, justify="right")
    shown = None
    for row in report.speeds:
        if row.shape != shown and shown is not None:
            table.add_section()
        name = "{} x {}".format(*SHAPES[row.shape]) if row.shape != shown else ""
        shown = row.shape
        speeds = (row.one_level, row.two_levels, row.float32, row.bfloat16)
        ratios = (f"{row.two_levels / peer:.2f}x" for peer in (row.float32, row.bfloat16))
        table.add_row(name, str(row.tokens), *(f"{speed:.1f}" for speed in speeds), *ratios)
    _output.print_table(table)
    _output.print_text("Ratios: 2 levels a row, as qmoe compress stores them, to torch's dense product.")
    _output.print_text(f"Copying float32 in memory: {report.copy_gigabytes:.1f} GB/s read and written.")
    _output.print_text(report.machine)
