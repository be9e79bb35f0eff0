"""`qmoe bench`: measurements against their baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qmoe_lite.bench._show.text import print_wrapped
from qmoe_lite.cli._options import JsonOption, SensitivityOption
from qmoe_lite.errors import SettingError

PlotOption = Annotated[Path | None, typer.Option(help="Draw the figures into this .png file.")]
ThreadsOption = Annotated[int, typer.Option(help="Threads for torch and Numba.", min=1)]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure against baselines: one command per question."""


@app.command("rates")
def rates(
    model: Annotated[
        str | None, typer.Option(help="Compressed directory: code its digits instead of random ones.")
    ] = None,
    weights: Annotated[
        int, typer.Option(help="Digits drawn per share of zeros, or read per projection.", min=1)
    ] = 4_300_800,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Uniform digits of so many bits instead of ternary ones; may be repeated. Takes no --plot."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the random digits.", min=0)] = 0,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Compare bits per weight: fitted codes, the paper's dictionary, zstd.

    Example: qmoe demo --out tiny-qmoe; qmoe bench rates --model tiny-qmoe
    """
    from qmoe_lite.bench._show import plots, tables
    from qmoe_lite.bench.rates import ZEROS, measure, measure_model

    _check(plot)
    if rate:
        from qmoe_lite.bench import rate_codes

        if model is not None or plot is not None:
            raise SettingError("--rate draws digits of its own. Leave --model and --plot out.")
        _show(rate_codes.measure(tuple(rate), weights, seed), json, tables.print_rate_codes, None, None)
    elif model is None:
        report = measure(weights, seed=seed, zeros=ZEROS)
        _show(report, json, tables.print_rates, plot, plots.draw_rates)
    else:
        from qmoe_lite.cli import _output

        _output.quiet_transformers()
        _show(measure_model(model, weights), json, tables.print_model_rates, plot, plots.draw_model_rates)


@app.command("matmul")
def matmul(
    shape: Annotated[
        list[str] | None, typer.Option(help="switch-base, mixtral, ..; may be repeated. [default: all]")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens per product; may be repeated. [default: 1, 4, 16, 64, 256]", min=1)
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Codes of so many bits a weight instead of ternary ones; may be repeated. Takes no --plot."),
    ] = None,
    threads: ThreadsOption = 1,
    seed: Annotated[int, typer.Option(help="Seed for digits and activations.", min=0)] = 0,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Time the product from codewords against torch's dense products, weights from memory.

    Example: qmoe bench matmul --shape qwen3-30b-a3b --threads 2
    """
    from qmoe_lite.bench._show import plots, tables
    from qmoe_lite.bench.matmul import SHAPES, TOKENS, measure

    _check(plot)
    if rate:
        from qmoe_lite.bench import rate_matmul

        chosen = tuple(shape or ("mixtral", "qwen3-30b-a3b")), tuple(tokens or rate_matmul.TOKENS)
        _show(rate_matmul.measure(tuple(rate), *chosen, threads, seed), json, tables.print_rate_matmul, None, None)
        return
    report = measure(tuple(shape or SHAPES), tuple(tokens or TOKENS), threads, seed)
    _show(report, json, tables.print_matmul, plot, plots.draw_matmul)


@app.command("layer")
def layer(
    name: Annotated[str, typer.Option("--layer", help="qwen3-30b-a3b, olmoe-1b-7b or mixtral-8x7b.")] = "qwen3-30b-a3b",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens per call; may be repeated. [default: 1, 4, 16, 64, 256]", min=1)
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Codes of so many bits a weight instead of ternary ones.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for torch and Numba. [default: all]", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed for digits, tokens and routing.", min=0)] = 0,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Time a whole layer of experts against transformers' experts in bfloat16.

    Example: qmoe bench layer --tokens 1
    """
    from qmoe_lite.bench._show import plots, tables
    from qmoe_lite.bench.layer import TOKENS, measure

    _check(plot)
    report = measure(name, tuple(tokens or TOKENS), threads, seed, rate)
    _show(report, json, tables.print_layer, plot, plots.draw_layer)


@app.command("gptq")
def gptq(
    experts: Annotated[int, typer.Option(help="Experts of each shape.", min=1)] = 16,
    threads: ThreadsOption = 1,
    seed: Annotated[int, typer.Option(help="Seed for weights and Hessians.", min=0)] = 0,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Time the solver against GPTQ's plain loop over columns in torch.

    Example: qmoe bench gptq --experts 4 --threads 2
    """
    from qmoe_lite.bench._show import plots, tables
    from qmoe_lite.bench.gptq import SHAPES, measure

    _check(plot)
    _show(measure(experts, threads, seed, SHAPES), json, tables.print_gptq, plot, plots.draw_gptq)


@app.command("accuracy")
def accuracy(
    model: Annotated[str, typer.Argument(help="Hugging Face model directory, or its name on the hub.")],
    calibration: Annotated[str, typer.Option(help="Calibration text, as qmoe compress takes it.")],
    text: Annotated[str, typer.Option(help="Held-out text, which shares nothing with the calibration text.")],
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Stored bits a weight; may be repeated. [default: .8, 1, 1.3, 1.6, 2, 2.5, 3, 4]"),
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Measure rounding to nearest and the paper's recipe too.")] = True,
    tuned: Annotated[bool, typer.Option("--tuned", help="Measure each once more after qmoe tune.")] = False,
    tune: Annotated[
        str | None,
        typer.Option(help="none, targets or block, as compress takes it, where it calibrates.", show_default=False),
    ] = None,
    sensitivity: SensitivityOption = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples.", min=1)] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample.", min=16)] = 512,
    held_out: Annotated[int | None, typer.Option(help="Samples of the held-out text. [default: all]", min=1)] = None,
    directory: Annotated[str | None, typer.Option(help="Where there is room for a compressed model.")] = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what a model loses at each number of stored bits.

    Example: qmoe bench accuracy MODEL --calibration text.txt --text held_out.txt --rate 2 --rate 3
    """
    from qmoe_lite.bench._show.accuracy import draw_accuracy, print_accuracy
    from qmoe_lite.bench.accuracy import RATES, measure
    from qmoe_lite.cli import _output
    from qmoe_lite.compression.shares import layers_of

    _check(plot)
    layers_of(sensitivity)  # refuses what is none before anything is measured
    _output.quiet_transformers()
    report = measure(
        model,
        calibration,
        text,
        rates=tuple(rate or RATES),
        baselines=baselines,
        tuned=tuned,
        tune=tune,
        samples=samples,
        sequence_length=sequence_length,
        held_out=held_out,
        directory=directory,
        settings={"sensitivity": sensitivity},
        progress=_output.note,
    )
    _show(report, json, print_accuracy, plot, draw_accuracy)


@app.command("offload")
def offload(
    layers: Annotated[
        int, typer.Option(help="Layers of the model; the dense one takes 1.2 GB of disk per layer.", min=1)
    ] = 2,
    tokens: Annotated[int, typer.Option(help="Timed tokens; slower contenders generate fewer.", min=1)] = 24,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Cache size as a share of the experts' bytes; may be repeated. [default: 1, 0.5, 0.25, 0.1]"),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Measure the dense model too.")] = True,
    disk: Annotated[
        bool,
        typer.Option(help="Measure experts from disk; otherwise both models in memory, with no dense one on disk."),
    ] = True,
    trace: Annotated[
        list[str] | None, typer.Option(help="File of qmoe generate --trace on which to compare cache policies.")
    ] = None,
    directory: Annotated[str | None, typer.Option(help="Directory with room for the models.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for weights, routing and prompt.", min=0)] = 0,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Run a model that does not fit in memory, against the dense one from disk and in memory.

    Example: qmoe bench offload --layers 4 --budget 0.1
    """
    from qmoe_lite.bench._show import plots, tables
    from qmoe_lite.bench.offload import BUDGETS, measure
    from qmoe_lite.cli import _output

    _check(plot)
    _output.quiet_transformers()
    report = measure(
        layers,
        tokens,
        tuple(budget or BUDGETS),
        peers=peers,
        disk=disk,
        traces=tuple(trace or ()),
        directory=directory,
        seed=seed,
    )
    _show(report, json, tables.print_offload, plot, plots.draw_offload)


@app.command("kernels")
def kernels(
    static: Annotated[bool, typer.Option("--static", help="Compile them without a GPU.")] = False,
    json: JsonOption = False,
) -> None:
    """Compile the CUDA kernels, and show their registers, memory and instructions.

    Example: qmoe bench kernels --static
    """
    from qmoe_lite.bench._show import tables
    from qmoe_lite.bench.kernels import measure

    if not static:
        raise SettingError("bench kernels compiles only; expected --static. On a GPU, run: python bench/gpu.py")
    _show(measure(), json, tables.print_kernels, None, None)


def _check(plot: Path | None) -> None:
    """Refuse a picture that cannot be drawn before minutes are spent on its figures."""
    from qmoe_lite.bench._show.picture import check_picture

    if plot is not None:
        check_picture(plot)


def _show(report: Any, json: bool, show: Any, plot: Path | None, draw: Any) -> None:
    """Print a report in one way or the other, and draw it where asked."""
    from qmoe_lite.cli import _output

    if json:
        _output.print_json(report.to_json())
    else:
        show(report)
        print_wrapped(report.machine)
    if plot is not None:
        draw(report, plot)
