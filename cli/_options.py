"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Dtype(StrEnum):
    """What a model runs in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Offload(StrEnum):
    """Where the experts are that have no place where they are multiplied."""

    ram = "ram"
    disk = "disk"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
SequenceLengthOption = Annotated[int, typer.Option(help="Tokens of a sample.")]
DeviceOption = Annotated[
    str, typer.Option(help="auto: the first GPU that can be used, else the CPU; or cpu, cuda, cuda:1.")
]
ModelArgument = Annotated[str, typer.Argument(help="Compressed directory, or a dense model's directory or name.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of everything but compressed experts.")]

# how tokens are chosen: qmoe generate, qmoe chat
MaxNewTokensOption = Annotated[int, typer.Option(help="Where a text is cut, if the model does not end it.", min=1)]
TemperatureOption = Annotated[
    float, typer.Option(help="0 takes the likeliest token: the same text each time. Above 0 draws.", min=0)
]
TopPOption = Annotated[
    float | None, typer.Option(help="Draw among the likeliest tokens of this probability. [default: all]", max=1)
]
TopKOption = Annotated[
    int | None, typer.Option(help="Draw among this many of the likeliest tokens. [default: all]", min=1)
]
RepetitionPenaltyOption = Annotated[float, typer.Option(help="Above 1 lowers what stands there already.")]
SeedOption = Annotated[int, typer.Option(help="Decides the draws.", min=0)]
PrefillChunkOption = Annotated[
    int, typer.Option(help="Tokens of a long prompt taken at once: fewer need less memory, more go faster.", min=1)
]

# where experts are kept: all commands that run a compressed model for long
ExpertCacheOption = Annotated[
    str | None,
    typer.Option(
        help="Memory for experts where they are multiplied, such as 4GiB. [default: no limit]", metavar="SIZE"
    ),
]
RamCacheOption = Annotated[
    str | None,
    typer.Option(help="Memory for experts beside a GPU's, such as 16GiB. [default: no limit]", metavar="SIZE"),
]
OffloadOption = Annotated[
    Offload | None,
    typer.Option(
        help="Where the other experts wait: in memory once they were read, or on disk, which needs a limit of memory. "
        "[default: disk with such a limit, else ram]"
    ),
]
DevicesOption = Annotated[
    str | None, typer.Option(help="GPUs to spread the experts over, such as cuda:0,cuda:1.", metavar="NAMES")
]
StatsOption = Annotated[
    bool, typer.Option("--stats", help="Print speed, and the experts' cache hits, on standard error.")
]
TraceOption = Annotated[
    str | None, typer.Option(help="Write which experts each token goes through, as JSON lines.", metavar="FILE")
]
