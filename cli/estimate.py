"""`qmoe estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmoe_lite.bench._show.text import duration, print_table, print_text
from qmoe_lite.cli._options import (
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    ProductsOption,
    SensitivityOption,
    SequenceLengthOption,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from qmoe_lite.inspection.estimation import Estimate

_SHOWN = 0.02  # share of a sum from which on a part has a line
_BUSY = 1.1  # times longer than on a machine of its own: from which on that is told


def estimate(
    model: Annotated[
        str, typer.Argument(help="Model directory, if only with its config.json; or a name on the hub, not fetched.")
    ],
    rate: Annotated[float | None, typer.Option(help="Stored bits a weight, as compress takes it.")] = None,
    grid: Annotated[str | None, typer.Option(help="uniform, minmax or two-bit, as compress takes it.")] = None,
    recipe: Annotated[str, typer.Option(help="default, paper or nearest, as compress takes it.")] = "default",
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration samples. [default: 80 x experts / experts per token]", min=1),
    ] = None,
    sequence_length: SequenceLengthOption = 512,
    validation_samples: Annotated[int, typer.Option(help="Samples that measure the error.", min=0)] = 8,
    batch_size: BatchSizeOption = None,
    activations: Annotated[str, typer.Option(help="How activations are kept: float32, or bfloat16.")] = "float32",
    products: ProductsOption = "float32",
    tune: Annotated[
        str | None,
        typer.Option(
            help="none, targets, block or full, as compress takes it; training the whole model is not counted.",
            show_default=False,
        ),
    ] = None,
    sensitivity: SensitivityOption = None,
    spill: Annotated[
        Path | None, typer.Option(help="Folder for activations, as compress takes it.", metavar="DIR")
    ] = None,
    device: DeviceOption = "auto",
    expert_cache: Annotated[
        str | None,
        typer.Option(
            help="Memory for experts when the model runs, such as 4GiB. [default: all, or what there is]",
            metavar="SIZE",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where it is to be written. [default: the current folder]")] = None,
    family: Annotated[
        str | None, typer.Option(help="auto: a model type that is not in the list of tested ones.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure this machine's speed, 10 to 30 seconds.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Estimate what compressing a model takes on this machine, and running it: memory, disk and time.

    No weights are read but a few to measure by; a config.json is enough.

    Example: qmoe estimate Qwen/Qwen3-30B-A3B --rate 2 --expert-cache 4GiB
    """
    import torch

    from qmoe_lite.cli import _output
    from qmoe_lite.compression.choice import USUAL_RATE
    from qmoe_lite.inspection.estimation import estimate as run
    from qmoe_lite.quantization.grid import UniformGrid, grid_of_word

    chosen: Any = None if grid is None else grid_of_word(grid)(level_dtype=torch.bfloat16)
    if isinstance(chosen, UniformGrid):
        chosen, rate = None, rate or USUAL_RATE
    _output.quiet_transformers()
    found = run(
        model,
        rate=rate,
        grid=chosen,
        recipe=recipe,
        samples=samples,
        sequence_length=sequence_length,
        validation_samples=validation_samples,
        spill=spill,
        batch_size=batch_size,
        activations=activations,
        products=products,
        tune=tune,
        sensitivity=sensitivity,
        device=device,
        expert_cache=expert_cache,
        out=out,
        family=family,
        measuring=measure,
    )
    if json:
        _output.print_json(found.to_json())
    else:
        _print(found)


def brief(found: Estimate) -> Iterable[str]:
    """Yield the lines that `qmoe compress` prints before it starts."""
    from qmoe_lite.offload.sizes import show_size

    work = found.compressing
    dense, after = sum(found.dense_bytes.values()), sum(found.compressed_bytes.values())
    yield (
        f"{_count(found.parameters['experts'])} weights in experts, {_count(found.parameters['others'])} others; "
        f"{show_size(dense)} become about {show_size(after)}"
    )
    gpu = "" if work.gpu_bytes is None else f", {show_size(work.gpu_bytes)} of GPU memory"
    yield f"takes about {show_size(work.memory_bytes)} of memory{gpu} and {show_size(work.disk_bytes)} of disk"


def _count(parameters: int) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return f"{parameters:,}"


def _print(found: Estimate) -> None:
    from rich.markup import escape

    from qmoe_lite.offload.sizes import show_size

    work, run = found.compressing, found.running
    table = _grid()
    table.add_row("model", f"{escape(found.model)}, {found.model_type}")
    counts = (f"{_count(number)} in {part}" for part, number in found.parameters.items())
    table.add_row("parameters", ", ".join(counts).replace("in others", "others"))
    table.add_row("dense", _sum_of(found.dense_bytes))
    asked = f"rate {found.rate:g}" if found.rate is not None else f"grid {found.grid}"
    experts = f"{found.parameters['experts']:,} x {found.bits_per_weight:.4g} bits / 8"
    table.add_row("compressed", f"{_sum_of(found.compressed_bytes)}; {asked}: {experts}")
    print_table(table)
    print_text()
    print_text(f"Compressing on {found.device}" + _of_samples(found))
    table = _grid()
    table.add_row("memory", f"{show_size(work.memory_bytes)} at the peak: {work.stage}")
    for part, size in sorted(work.memory_parts.items(), key=lambda each: -each[1]):
        if size >= _SHOWN * work.memory_bytes:
            table.add_row("", f"{show_size(size):>9}  {part}")
    if work.gpu_bytes is not None:
        table.add_row("GPU memory", show_size(work.gpu_bytes))
    table.add_row("disk", f"{show_size(work.disk_bytes)} at OUT, with what a run resumes from")
    if work.activation_bytes:
        table.add_row("", f"{show_size(work.activation_bytes)} of activations there instead of in memory: --spill DIR")
    if work.seconds is not None:
        now = work.seconds_now or work.seconds
        busy = f", {_time(now)} if the machine stays as busy as it is" if now > _BUSY * work.seconds else ""
        table.add_row("time", _time(work.seconds) + busy)
        for part, seconds in sorted(work.phases.items(), key=lambda each: -each[1]):
            if seconds >= _SHOWN * work.seconds:
                table.add_row("", f"{_time(seconds):>9}  {part}")
    _add_lines(table, "no room", work.obstacles)
    _add_lines(table, "little room", work.doubts)
    print_table(table)
    print_text()
    print_text("Running the result, a token at a time")
    table = _grid()
    share = f"{run.resident:.0%} of the experts in {show_size(run.budget_bytes)}"
    table.add_row("memory", f"{show_size(run.memory_bytes)}, with {share}")
    if run.gpu_bytes is not None:
        table.add_row("GPU memory", f"{show_size(run.gpu_bytes)} with everything there")
    if run.tokens_per_second is not None:
        speed = run.tokens_per_second
        table.add_row("speed", f"{speed:,.0f} tokens a second" if speed >= 10 else f"{speed:.2g} tokens a second")
        for part, seconds in run.parts.items():
            table.add_row("", f"{1000 * seconds:6.2f} ms  {part}")
    print_table(table)
    print_text()
    table = _grid()
    _add_lines(table, "read", found.read)
    _add_lines(table, "measured", _measured(found.measured) if found.measured else ["nothing"])
    _add_lines(table, "assumed", found.assumed)
    print_table(table)


def _grid() -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=10)
    table.add_column(overflow="fold")
    return table


def _add_lines(table: Table, heading: str, lines: Iterable[str]) -> None:
    from rich.markup import escape

    for number, line in enumerate(lines):
        table.add_row("" if number else heading, escape(line))


def _sum_of(sizes: dict[str, int]) -> str:
    from qmoe_lite.offload.sizes import show_size

    return (
        f"{show_size(sum(sizes.values()))}: experts {show_size(sizes['experts'])}, others {show_size(sizes['others'])}"
    )


def _of_samples(found: Estimate) -> str:
    work = found.compressing
    return f", {work.samples:,} samples, {work.tokens:,} tokens" if work.samples else ", without text"


def _time(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else duration(seconds)


def _measured(speeds: dict[str, Any]) -> Iterable[str]:
    shape = ", ".join(f"{rows} x {columns}" for rows, columns in speeds["shape"].values())
    expert, fixed = _short(speeds["expert"]), _short(speeds["expert_fixed"])
    yield f"an expert of {shape}: {expert} to solve and encode,"
    yield f"  of which {fixed} whatever its size; {_short(speeds['expert_token'])} for each token"
    yield f"  by the {speeds['clock']}'s clock, the best of a few tries; all took {speeds['load']:.0%} longer"
    yield f"a layer: {_short(speeds['layer'])} to choose its codes"
    yield f"encoding: {1e9 * speeds['encode']:.2f} ns a weight"
    yield f"products of many tokens: {speeds['multiply'] / 1e9:.0f} Gflop/s in float32"
    yield f"a token's product from codes: {1e9 * speeds['codes']:.3f} ns a weight, at {speeds['bits']:.2f} bits"
    yield f"a token's dense product: {speeds['vector'] / 1e9:.1f} GB/s of weights"
    yield f"disk: {speeds['disk'] / 1e9:.2f} GB/s, by {speeds['disk_file']}"
    yield f"activations are saved at {speeds['save'] / 1e9:.2f} GB/s"


def _short(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.2f} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.1f} us"
    )
