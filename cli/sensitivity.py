"""`qmoe sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe_lite.bench._show.text import print_rows, print_text
from qmoe_lite.cli._options import CalibrationOption, DeviceOption, JsonOption, SequenceLengthOption

if TYPE_CHECKING:
    from qmoe_lite.compression.shares import Sensitivity


def sensitivity(
    model: Annotated[str, typer.Argument(help="Dense model directory, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write, for qmoe compress --sensitivity.")],
    calibration: CalibrationOption = None,
    rate: Annotated[float, typer.Option(help="Stored bits a weight, about, that a layer is given.")] = 2.0,
    sequence_length: SequenceLengthOption = 512,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed for masked spans and drawn tokens.", min=0)] = 0,
    family: Annotated[
        str | None, typer.Option(help="auto: a model type that is not in the list of tested ones.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure what each layer's experts, quantised alone, make a model lose; compress shares out a rate's bits by it.

    compress measures it by itself, on fewer tokens; a file serves for all rates. Some thousand tokens go through the
    model once.

    Example: qmoe sensitivity Qwen/Qwen3-30B-A3B layers.json --calibration text.txt
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.compression import layer_sensitivity
    from qmoe_lite.errors import OutputError

    if not out.resolve().parent.is_dir():
        raise OutputError(f"{out} cannot be written: there is no folder {out.parent}. Make it.")
    if out.is_dir():
        raise OutputError(f"{out} is a folder. Name a file.")
    _output.quiet_transformers()
    with _output.progress_shown("measuring", show=not json) as progress:
        found = layer_sensitivity.sensitivity(
            model,
            calibration=calibration,
            rate=rate,
            sequence_length=sequence_length,
            device=device,
            seed=seed,
            family=family,
            progress=progress,
        )
    found.write(out)
    if json:
        _output.print_json(found.to_json())
    else:
        _print(found, out)


def _print(found: Sensitivity, out: Path) -> None:
    print_rows(
        f"Quantised alone to about {found.rate:g} bits, over {found.tokens:,} tokens",
        ("layer", "KL divergence, nats", "octaves its step is longer"),
        [
            [name.removesuffix(".experts").removesuffix(".mlp"), f"{loss:.6f}", f"{share:+.2f}"]
            for (name, loss), share in zip(found.layers.items(), found.shares(), strict=True)
        ],
        text=1,
    )
    print_text(f"Written to {out}: qmoe compress MODEL OUT --sensitivity {out}")
