"""`qmoe compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qmoe_lite.bench._show.text import duration, megabytes, print_table, print_text
from qmoe_lite.cli._options import DeviceOption, JsonOption, SequenceLengthOption


def compress(
    model: Annotated[str, typer.Argument(help="Hugging Face model directory, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="UTF-8 text, .jsonl with a text field, a directory of them, or a data set's name."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(help="default; paper: the paper's settings; nearest: round to nearest, without calibration."),
    ] = "default",
    grid: Annotated[str, typer.Option(help="minmax: row minimum, 0, row maximum; or two-bit: 4 levels.")] = "minmax",
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration samples. [default: 80 x experts / experts per token]", min=1),
    ] = None,
    sequence_length: SequenceLengthOption = 512,
    codeword_bits: Annotated[
        int | None,
        typer.Option(help="Bits of a codeword. [default: chosen for each layer and projection]", min=8, max=13),
    ] = None,
    dampening: Annotated[float, typer.Option(help="Added to a Hessian's diagonal, as a share of its mean.")] = 0.1,
    validation_samples: Annotated[
        int, typer.Option(help="Samples from the text's end that measure the error and enter no Hessian.", min=0)
    ] = 8,
    batch_size: Annotated[int, typer.Option(help="Samples per pass through a block.", min=1)] = 16,
    activations: Annotated[
        str, typer.Option(help="How activations are kept: float32, or bfloat16 at half the memory.")
    ] = "float32",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed for samples, masked spans and drawn tokens.", min=0)] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work in OUT.partial.")] = False,
    json: JsonOption = False,
) -> None:
    """Compress a model's experts to less than one bit a weight.

    An interrupted run resumes when the same command is given again.

    Example: qmoe compress google/switch-base-8 switch-qmoe --calibration text.txt
    """
    import torch

    from qmoe_lite.cli import _output
    from qmoe_lite.compression.run import compress as run
    from qmoe_lite.quantization.grid import grid_of_word

    chosen = grid_of_word(grid)
    _output.quiet_transformers()
    settings: dict[str, Any] = {
        "grid": chosen(level_dtype=torch.bfloat16),
        "recipe": recipe,
        "samples": samples,
        "sequence_length": sequence_length,
        "codeword_bits": codeword_bits,
        "dampening": dampening,
        "validation_samples": validation_samples,
        "batch_size": batch_size,
        "activations": activations,
        "seed": seed,
        "device": device,
    }
    try:
        with _output.progress_shown("compressing", show=not json) as progress:
            report = run(model, out, calibration=calibration, resume=not restart, progress=progress, **settings)
    except KeyboardInterrupt:
        _output.note("qmoe: interrupted. Finished layers are kept: rerun the command to resume.")
        raise typer.Exit(130) from None
    if json:
        _output.print_json(report.to_json())
        return
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
    sizes = report.sizes
    print_text(
        f"experts {megabytes(sizes['dense_expert_bytes'])} -> {megabytes(sizes['expert_bytes'])} MB "
        f"({report.bits_per_weight:.3f} bits a weight), all {megabytes(sum_of(sizes, 'dense_'))} -> "
        f"{megabytes(sum_of(sizes, ''))} MB, {duration(report.seconds)}"
    )
    for line in report.degraded:
        print_text(f"note: {line}")


def sum_of(sizes: dict[str, int], prefix: str) -> int:
    """Bytes of experts and of all else."""
    return sizes[f"{prefix}expert_bytes"] + sizes[f"{prefix}other_bytes"]
