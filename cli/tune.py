"""`qmoe tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe_lite.bench._show.text import duration, print_text
from qmoe_lite.cli._options import CalibrationOption, JsonOption, SequenceLengthOption

if TYPE_CHECKING:
    from qmoe_lite.tuning.run import TuneReport


def tune(
    model: Annotated[str, typer.Argument(help="Compressed model directory, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    dense: Annotated[str, typer.Option(help="The dense model that it was made of: a directory, or a name on the hub.")],
    calibration: CalibrationOption = None,
    samples: Annotated[int, typer.Option(help="Samples to train on.", min=1)] = 256,
    sequence_length: SequenceLengthOption = 512,
    epochs: Annotated[int, typer.Option(help="How often each sample is seen.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Samples a step of training.", min=1)] = 2,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of Adam, for relative changes. [default: .01, or a third or a ninth of that where validation samples "
            "come no nearer to the dense model]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto: the first GPU that can be used and has twice the room for the dense model in float32, else the "
            "CPU; or cpu, cuda, cuda:1."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed for samples and their order.", min=0)] = 0,
    json: JsonOption = False,
) -> None:
    """Train a compressed model's steps, scales and norms against the dense model; its size stays the same.

    Digits are not changed. Both models are loaded in float32, one after the other.

    Example: qmoe tune qwen3-qmoe qwen3-tuned --dense Qwen/Qwen3-30B-A3B --calibration text.txt
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.tuning.run import tune as run

    _output.quiet_transformers()
    with _output.progress_shown("tuning", show=not json) as progress:
        report = run(
            model,
            out,
            dense=dense,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            device=device,
            seed=seed,
            progress=progress,
        )
    if json:
        _output.print_json(report.to_json())
    else:
        _print(report, out)


def _print(report: TuneReport, out: Path) -> None:
    before = report.loss_before - report.dense_loss
    where = "" if report.device == "cpu" else f" on {report.device}"
    how = f"{report.samples} samples, learning rate {report.learning_rate:.3g}, {duration(report.seconds)}{where}"
    print_text(f"{out}: {how}")
    print_text(f"KL divergence from the dense model {report.before:.4f} -> {report.after:.4f} nats a token")
    print_text(
        f"loss above the dense model's {report.dense_loss:.3f}: {before:+.3f} -> {report.gap:+.3f} "
        f"+- {report.standard_error:.3f}, on {report.validation_samples} validation samples"
    )
