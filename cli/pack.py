"""`qmoe pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmoe_lite.cli._options import JsonOption
from qmoe_lite.cli._packing import ThreadsOption, packing_shown, print_packed


def pack(
    directory: Annotated[Path, typer.Argument(help="Directory of a model, compressed or dense.")],
    file: Annotated[Path, typer.Argument(help="File to create.")],
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Put all files of a directory into one, its dense tensors a third smaller; nothing is lost.

    Example: qmoe pack qwen3-qmoe qwen3.qmoe
    """
    from qmoe_lite.checkpoint.packing import pack as run

    with packing_shown("packing", show=not json) as progress:
        found = run(directory, file, threads=threads, progress=progress)
    print_packed(found, json, f"{file}: ", found.bytes, found.packed_bytes)
