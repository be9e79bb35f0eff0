"""`qmoe unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmoe_lite.cli._options import JsonOption
from qmoe_lite.cli._packing import ThreadsOption, packing_shown, print_packed


def unpack(
    file: Annotated[Path, typer.Argument(help="File that `qmoe pack` wrote.")],
    directory: Annotated[Path, typer.Argument(help="Directory to create.")],
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Make the directory that a file was packed from, byte for byte; every checksum is compared.

    Example: qmoe unpack qwen3.qmoe qwen3-qmoe
    """
    from qmoe_lite.checkpoint.packing import unpack as run

    with packing_shown("unpacking", show=not json) as progress:
        found = run(file, directory, threads=threads, progress=progress)
    print_packed(found, json, f"{directory}: ", found.packed_bytes, found.bytes)
