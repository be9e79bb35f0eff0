"""Options that several commands share: the single ones, and the groups `Placement` and `Draws`.

A command takes a group as one parameter, `placement: Placement`, under the decorator `grouped`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qmoe_lite.text.generation import Sampling


class Dtype(StrEnum):
    """What a model runs in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Offload(StrEnum):
    """Where the experts are that have no place where they are multiplied."""

    ram = "ram"
    disk = "disk"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="UTF-8 text, .jsonl with text or messages, a directory of them, or a data set: NAME[:CONFIG[:SPLIT]]. "
        "[default: a small text in the package, of Python's documentation and sources]"
    ),
]
SensitivityOption = Annotated[
    str | None,
    typer.Option(
        help="What qmoe sensitivity wrote: layers that lose much get more of the rate's bits; none: all layers get the "
        "same step. [default: measured first]",
        metavar="FILE|none",
        show_default=False,
    ),
]
SequenceLengthOption = Annotated[int, typer.Option(help="Tokens per sample.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Samples per pass through a block. [default: what makes 1,024 tokens on a CPU, 16 on a GPU]", min=1
    ),
]
ProductsOption = Annotated[
    str,
    typer.Option(
        help="What experts and tokens are multiplied in: float32, or bfloat16, faster on processors with AVX512-BF16 "
        "or AMX."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto: the first GPU that can be used, else the CPU; or cpu, cuda, cuda:1.")
]
ModelArgument = Annotated[str, typer.Argument(help="Compressed directory, or a dense model's directory or name.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Data type of everything but compressed experts.")]

MaxNewTokensOption = Annotated[
    int, typer.Option(help="Stop after so many new tokens, if the text has not ended.", min=1)
]
PrefillChunkOption = Annotated[
    int, typer.Option(help="Prompt tokens processed at a time: fewer need less memory, more are faster.", min=1)
]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print speed and expert cache hits on standard error.")]
TraceOption = Annotated[
    str | None, typer.Option(help="Write the experts that each token is routed to, as JSON lines.", metavar="FILE")
]


@dataclass(frozen=True)
class Placement:
    """Where a model runs and a compressed one's experts are kept: options of eval, generate, chat and serve.

    They are `qmoe_lite.load`'s arguments as the user gave them.
    """

    device: DeviceOption = "auto"
    expert_cache: Annotated[
        str | None,
        typer.Option(
            help="Memory for experts on the device that multiplies them, such as 4GiB. [default: no limit]",
            metavar="SIZE",
        ),
    ] = None
    ram_cache: Annotated[
        str | None,
        typer.Option(help="CPU memory for experts, such as 16GiB. [default: no limit]", metavar="SIZE"),
    ] = None
    offload: Annotated[
        Offload | None,
        typer.Option(
            help="Where the other experts are kept: in memory once read, or on disk, which needs a memory limit. "
            "[default: disk with a memory limit, else ram]"
        ),
    ] = None
    devices: Annotated[
        str | None, typer.Option(help="GPUs to spread the experts over, such as cuda:0,cuda:1.", metavar="NAMES")
    ] = None

    def given(self) -> dict[str, Any]:
        """Return the arguments for `load` but the device."""
        found: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        del found["device"]
        if self.devices is not None:
            found["devices"] = [name.strip() for name in self.devices.split(",")]
        return found


@dataclass(frozen=True)
class Draws:
    """How tokens are chosen: options of generate and chat."""

    temperature: Annotated[
        float, typer.Option(help="0: the most likely token, the same text each time. Above 0: sample.", min=0)
    ] = 0.0
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens up to this total probability. [default: all]", max=1),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Sample from this many of the most likely tokens. [default: all]", min=1)
    ] = None
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that occurred already less likely.")
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Seed for sampling.", min=0)] = 0

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Return them as the library takes them; raise SettingError for those that it refuses."""
        from qmoe_lite.text.generation import Sampling

        sampling = Sampling(max_new_tokens, **asdict(self))
        sampling.check()
        return sampling


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer the fields of a command's groups as options of their own, where the group's parameter stands."""
    signature = inspect.signature(command, eval_str=True)
    shown: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        group: Any = parameter.annotation
        if is_dataclass(group):
            groups[name] = group
            hints = inspect.get_annotations(group, eval_str=True)  # type: ignore[arg-type]
            shown += [
                inspect.Parameter(f.name, parameter.kind, default=f.default, annotation=hints[f.name])
                for f in fields(group)
            ]
        else:
            shown.append(parameter)

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        command(**values)

    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return run
