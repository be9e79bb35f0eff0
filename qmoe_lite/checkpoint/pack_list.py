"""The beginning of a pack file: which version it is of, and which files it holds."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

from qmoe_lite.checkpoint.pack_frames import MOST_GROWTH
from qmoe_lite.errors import FormatError

MAGIC = b"QMOEPACK"
VERSION = 1
MOST_LIST = 1 << 22  # bytes of the list: tens of thousands of files
_START = Struct("<8sIII")  # magic, version, bytes of the list, its CRC-32
_DEEPEST = 32  # directories below one another
_FETCH = "Fetch it again."


def encode_list(listed: list[dict[str, Any]]) -> bytes:
    """Return the beginning of a file; `listed` has a name and a size for each file."""
    text = json.dumps({"files": listed}, separators=(",", ":")).encode()
    return _START.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text


def read_list(file: BinaryIO, path: Path) -> list[dict[str, Any]]:
    """Read which files a pack file holds.

    Raises
    ------
    FormatError
        It is none, of a newer version, or its list is damaged; or says what no writer does.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(_START.size)
    if start[: len(MAGIC)] != MAGIC or len(start) != _START.size:
        raise FormatError(f"{path} is no file of qmoe pack. Name one that it wrote.")
    _, version, length, crc = _START.unpack(start)
    if version != VERSION:
        remedy = "Upgrade qmoe-lite" if version > VERSION else "Fetch it again"
        raise FormatError(f"{path} is of version {version} of pack files; this qmoe-lite reads {VERSION}. {remedy}.")
    if length > min(size, MOST_LIST):
        raise FormatError(f"{path} is damaged: its list of files is longer than it. {_FETCH}")
    text = file.read(length)
    if len(text) != length or zlib.crc32(text) != crc:
        raise FormatError(f"{path} is damaged: its list of files was cut or changed. {_FETCH}")
    try:
        listed = json.loads(text)["files"]
        good = all(type(entry["size"]) is int and entry["size"] >= 0 for entry in listed)
        names = [entry["name"] for entry in listed]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: its list of files says nothing of use. {_FETCH}") from error
    if not good or not names:
        raise FormatError(f"{path} is damaged: its list of files is forged. {_FETCH}")
    if (bad := next((name for name in names if not is_safe(name)), None)) is not None:
        where = "which may lie outside of the directory. Do not trust where it came from."
        raise FormatError(f"{path} names a file {str(bad)[:99]!r}, {where}")
    taken = set(names)
    parents = {name[:place] for name in names for place, letter in enumerate(name) if letter == "/"}
    if len(taken) != len(names) or taken & parents:
        raise FormatError(f"{path} names a file twice, or as a directory too. {_FETCH}")
    if sum(entry["size"] for entry in listed) > MOST_GROWTH * size:
        found = f"its {size} bytes make over {MOST_GROWTH} times as many, which no packed model does"
        raise FormatError(f"{path} says that {found}. {_FETCH}")
    return listed  # type: ignore[no-any-return]


def is_safe(name: Any) -> bool:
    """Return whether a name is one below a directory, and not too deep."""
    if not isinstance(name, str) or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return False
    if name.count("/") > _DEEPEST:
        return False
    try:
        return len(os.fsencode(name)) < 4096
    except UnicodeEncodeError:
        return False
