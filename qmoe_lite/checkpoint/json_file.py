"""JSON that somebody else wrote: of bounded size and depth, no key twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = 32 << 20  # bytes, but of an index (index_file.py). What they hold takes up to 20 times that


def read_json(path: Path, twice: Callable[[str], None] | None = None, largest: int = LARGEST) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : Path
        Of the file.
    twice : callable, optional
        Told of a key that an object has twice, of which the last value is taken; by default such a file is refused.
    largest : int
        Bytes that are read at most.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is larger than `largest` (and nothing of it is read), no JSON, nested too deeply, or has a key twice.
    """
    with path.open("rb") as file:
        content = file.read(largest) if (size := os.fstat(file.fileno()).st_size) <= largest else b""
    if len(content) < size:
        raise ValueError(f"it has {size:,} bytes, of which at most {largest:,} are read")
    return parse_json(content, twice)


def parse_json(content: bytes | bytearray, twice: Callable[[str], None] | None = None) -> Any:
    """Do the same for what was read; ValueError as there."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            names = [name for name, _ in pairs]
            (twice or _refuse)(next(name for name in names if names.count(name) > 1))
        return built

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=build)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse(name: str) -> None:
    raise ValueError(f"the key {name[:80]!r} is there twice")
