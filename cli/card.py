"""`qmoe card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmoe_lite.bench._show.text import print_text


def card(
    directory: Annotated[Path, typer.Argument(help="Compressed directory.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="Name on the hub of the dense model. [default: as the report has it]", metavar="OWNER/NAME"),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Of the dense model, as the hub calls it. [default: as its own README.md says]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that is there.")] = False,
) -> None:
    """Write README.md: a model card for the hub with bits, losses and settings, and how to load the model.

    Example: qmoe card qwen3-qmoe --base-model Qwen/Qwen3-30B-A3B --license apache-2.0
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.inspection.card import write_card

    _output.quiet_transformers()
    file = write_card(directory, base_model=base_model, license=license, force=force)
    print_text(f"{file} is written. Upload it with all else: hf upload OWNER/NAME {directory}")
