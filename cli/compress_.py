"""`qmoe compress`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmoe_lite.bench._show.text import duration, megabytes, print_rows, print_table, print_text
from qmoe_lite.cli._options import (
    BatchSizeOption,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    ProductsOption,
    SensitivityOption,
    SequenceLengthOption,
)

if TYPE_CHECKING:
    from qmoe_lite.checkpoint.report import Report
    from qmoe_lite.cli._beforehand import Beforehand


def compress(
    model: Annotated[str, typer.Argument(help="Hugging Face model directory, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    calibration: CalibrationOption = None,
    recipe: Annotated[
        str,
        typer.Option(help="default; paper: the paper's settings; nearest: round to nearest, without calibration."),
    ] = "default",
    rate: Annotated[
        float | None,
        typer.Option(
            help="Stored bits a weight, averaged over all experts, 0.6 to 4: more bits lose less. 2.0 by default, but "
            "for switch_transformers, whose experts bear the ternary grid. [default: 2.0, or minmax for Switch]"
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="uniform: any digit, at the rate; minmax: row minimum, 0, row maximum; two-bit: 4 levels. "
            "[default: uniform, or minmax for Switch and the other recipes]"
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration samples. [default: 80 x experts / experts per token, so that an expert gets 80 samples' "
            "tokens on average]",
            min=1,
        ),
    ] = None,
    sequence_length: SequenceLengthOption = 512,
    codeword_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of a codeword, 9 to 12 at a rate. [default: 10 at a rate, else what fits each layer best]",
            min=8,
            max=13,
        ),
    ] = None,
    dampening: Annotated[float, typer.Option(help="Added to a Hessian's diagonal, as a share of its mean.")] = 0.1,
    validation_samples: Annotated[
        int, typer.Option(help="Samples from the text's end that measure the error and enter no Hessian.", min=0)
    ] = 8,
    batch_size: BatchSizeOption = None,
    activations: Annotated[
        str, typer.Option(help="How activations are kept: float32, or bfloat16 at half the memory.")
    ] = "float32",
    products: ProductsOption = "float32",
    spill: Annotated[
        Path | None,
        typer.Option(
            help="Folder on a disk that holds the activations of all samples in place of memory.", metavar="DIR"
        ),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            help="Make up for what is lost, at no bits. targets: GPTQ solves each expert's last matrix for what is "
            "missing (asymmetric calibration); block: then the expert's steps and scales are trained; full: the "
            "default, then the whole model trained as qmoe tune does; none. [default: block at a rate of up to 2.75 "
            "bits, else targets; none for the other recipes]",
            show_default=False,
        ),
    ] = None,
    tune_epochs: Annotated[
        int,
        typer.Option(
            help="How often each sample is seen by what trains the whole model. [default: 0; 1 if full]",
            min=0,
            show_default=False,
        ),
    ] = 0,
    sensitivity: SensitivityOption = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed for samples, masked spans and drawn tokens.", min=0)] = 0,
    family: Annotated[
        str | None,
        typer.Option(help="auto: take a model type that is not in the list of tested ones, if its first blocks agree."),
    ] = None,
    stop_when_bad: Annotated[
        bool, typer.Option("--stop-when-bad", help="End after the first layer that is bad; the work can be resumed.")
    ] = False,
    check_first: Annotated[
        bool, typer.Option("--check-first", help="Search all tensors for NaN and infinity before the first layer.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work in OUT.partial.")] = False,
    json: JsonOption = False,
) -> None:
    """Compress a model's experts to 0.6 to 4 bits a weight, below one bit where the model bears it.

    An interrupted run resumes when the same command is given again: Ctrl-C finishes the group of experts under way, a
    second one ends at once. OUT.log.jsonl gets a line of JSON for each group of experts.

    It ends with the held-out loss of the dense and of the compressed model, and a verdict.

    Several processes share the work, to the same bytes: torchrun --nproc-per-node 4 -m qmoe_lite compress ..

    Example: qmoe compress Qwen/Qwen3-30B-A3B qwen3-qmoe --calibration text.txt --rate 2.5
    """
    import torch

    from qmoe_lite.cli import _output
    from qmoe_lite.cli._beforehand import Beforehand
    from qmoe_lite.compression.choice import USUAL_RATE
    from qmoe_lite.compression.ranks import ALONE, ranks_of
    from qmoe_lite.compression.run import compress
    from qmoe_lite.compression.verdict import Verdict
    from qmoe_lite.quantization.grid import UniformGrid, grid_of_word

    run: Callable[..., Report] = compress
    if tune_epochs or tune == "full":
        from qmoe_lite.tuning.compressing import compress_and_tune

        run = partial(compress_and_tune, epochs=tune_epochs or 1)
    _output.quiet_transformers()
    settings: dict[str, Any] = {
        "rate": rate,
        "stop_when_bad": stop_when_bad,
        "check_first": check_first,
        "family": family,
        "recipe": recipe,
        "samples": samples,
        "sequence_length": sequence_length,
        "codeword_bits": codeword_bits,
        "dampening": dampening,
        "validation_samples": validation_samples,
        "batch_size": batch_size,
        "activations": activations,
        "products": products,
        "tune": None if tune == "full" else tune,
        "sensitivity": sensitivity,
        "spill": spill,
        "seed": seed,
        "device": device,
    }
    log = out.with_name(f"{out.name}.log.jsonl") if out.name else None
    progress: Beforehand | None = None
    ranks = ALONE
    try:
        with ranks_of(os.environ) as ranks, _output.progress_shown("compressing", not json and ranks.first) as shown:
            chosen = None if grid is None else grid_of_word(grid)(level_dtype=torch.bfloat16)
            if isinstance(chosen, UniformGrid):  # its step follows from the rate
                chosen, settings["rate"] = None, rate or USUAL_RATE
            settings["grid"] = chosen
            progress = Beforehand(model, out, settings, shown, show=not json)
            telling: dict[str, Any] = {
                "progress": progress,
                "log": log,
                "each_group": _FinishedFirst(ranks.first),
                "ranks": ranks,
            }
            if ranks.count == 1:  # the estimate is of one process
                telling["before"] = progress.begin
            report = run(model, out, calibration=calibration, resume=not restart, **telling, **settings)
    except KeyboardInterrupt:
        if ranks.first:
            text = "Finished groups are kept: rerun the command to resume."
            _output.note(f"qmoe: interrupted{_place_of(progress)}. {text}")
        raise typer.Exit(130) from None
    if not ranks.first:
        return
    if json:
        _output.print_json(report.to_json())
    else:
        _print(report, out)
    if report.verdict is not None:
        _output.note(f"qmoe: {Verdict.from_json(report.verdict)}")
    elif recipe != "nearest":
        cause = "without validation samples" if validation_samples == 0 else "since no text was left for validation"
        _output.note(f"qmoe: not judged, {cause}.")


class _FinishedFirst:
    """Holds Ctrl-C back while a group of experts is under way; a second one ends at once, as one does elsewhere.

    A context for each group. Where Ctrl-C does not raise KeyboardInterrupt, in a shell's background, nothing changes.

    Parameters
    ----------
    tells : bool
        Whether to print that the group will be finished first.
    """

    def __init__(self, tells: bool = True) -> None:
        self._asked, self._tells = False, tells

    def __enter__(self) -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._asked and kind is None:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: object) -> None:
        from qmoe_lite.cli import _output

        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._tells:
            return
        with suppress(RuntimeError):  # the signal came in the middle of another line
            _output.note("qmoe: this group of experts will be finished first; Ctrl-C once more ends at once.")


def _place_of(progress: Beforehand | None) -> str:
    """Format where a run was, after its last finished group."""
    last = None if progress is None else progress.last
    return "" if last is None else f" after {last.place} ({last.done} of {last.total} groups)"


def _print(report: Report, out: Path) -> None:
    from rich.table import Table

    table = Table(title=f"{out}: {report.matrices} matrices, {report.expert_weights:,} weights")
    for heading in ("layer", "projection", "bits", "zeros", "error", "held-out"):
        table.add_column(heading, justify="left" if heading in ("layer", "projection") else "right", overflow="fold")
    for row in report.projections:
        held_out = report.held_out_error.get(row.layer)
        table.add_row(
            row.layer.removesuffix(".experts").removesuffix(".mlp"),
            row.projection,
            f"{row.bits_per_weight:.3f}",
            f"{row.zeros:.3f}",
            f"{row.error:.4f}",
            "" if held_out is None else f"{held_out:.4f}",
        )
    print_table(table)
    _print_tokens(report)
    sizes = report.sizes
    print_text(
        f"experts {megabytes(sizes['dense_expert_bytes'])} -> {megabytes(sizes['expert_bytes'])} MB "
        f"({report.bits_per_weight:.3f} bits a weight), all {megabytes(sum_of(sizes, 'dense_'))} -> "
        f"{megabytes(sum_of(sizes, ''))} MB, {duration(report.seconds)}"
    )
    if (by_block := report.tuning_by_block) is not None:
        lacking = f"{by_block['before']:.4f} -> {by_block['after']:.4f}"
        how = "aimed at targets" if report.settings["tune"] == "targets" else "tuned by block"
        print_text(f"{how}: experts lack {lacking} of their outputs, {duration(by_block['seconds'])}")
    if report.tuning is not None:
        before, after, took = (report.tuning[name] for name in ("before", "after", "seconds"))
        print_text(f"tuned: KL divergence from the dense model {before:.4f} -> {after:.4f} nats, {duration(took)}")
    for line in report.degraded:
        print_text(f"note: {line}")


def _print_tokens(report: Report) -> None:
    """Print how the text fell on the experts: on all of them, and on the layer with the most that are starved."""
    layers, together = report.tokens_of_layers, report.tokens_of_all
    if together is None:
        return
    worst = max(layers, key=lambda name: (layers[name].starved, -layers[name].fewest))
    shown = {f"all {together.experts} experts": together}
    if len(layers) > 1:
        shown[worst.removesuffix(".experts").removesuffix(".mlp")] = layers[worst]
    print_rows(
        "Tokens behind each expert's Hessian; starved: fewer than a matrix has columns",
        ("", "fewest", "median", "most", "starved", "with twice the text"),
        [
            [name, f"{t.fewest:,}", f"{t.median:,.0f}", f"{t.most:,}", f"{t.starved:,}", f"{t.starved_at_twice:,.1f}"]
            for name, t in shown.items()
        ],
        text=1,
    )


def sum_of(sizes: dict[str, int], prefix: str) -> int:
    """Bytes of experts and of all else."""
    return sizes[f"{prefix}expert_bytes"] + sizes[f"{prefix}other_bytes"]
