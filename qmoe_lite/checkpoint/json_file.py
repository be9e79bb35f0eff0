"""JSON that somebody else wrote: of bounded size and depth, no key twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = 64 << 20  # bytes; the index of a model of 140,000 tensors has 15


def read_json(path: Path, twice: Callable[[str], None] | None = None) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : Path
        Of the file.
    twice : callable, optional
        Told of a key that an object has twice, of which the last value is taken; by default such a file is refused.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is larger than 64 MiB (of which nothing is read), no JSON, nested too deeply, or has a key twice.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1) if path.stat().st_size <= LARGEST else b""
    if not content and path.stat().st_size:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {LARGEST:,} are read")
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
