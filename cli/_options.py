"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
SequenceLengthOption = Annotated[int, typer.Option(help="Tokens of a sample.")]
DeviceOption = Annotated[
    str, typer.Option(help="auto: the first GPU that can be used, else the CPU; or cpu, cuda, cuda:1.")
]
