"""The index of a model's shards, and which files of a directory may be opened."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from qmoe_lite.checkpoint.json_file import read_json
from qmoe_lite.errors import CheckpointError, unreadable

_LARGEST = 64 << 20  # bytes; that of a Switch of 369,500 tensors has 36 MB
_PLAIN = re.compile(r"[ -~]{1,255}")  # a name that may stand in a path and in a message


class Index(NamedTuple):
    """What an index says.

    Attributes
    ----------
    file_of : dict
        The file of each tensor.
    checksums : dict
        The tensors' CRC-32, where `compress` put them there.
    total_bytes : int or None
        Of all tensors.
    """

    file_of: dict[str, str]
    checksums: dict[str, int]
    total_bytes: int | None


def read_index(index: Path, ours: bool = False) -> Index:
    """Read an index.

    `ours`: of a compressed model, which has metadata, as transformers asks for; others' may have none.

    Raises
    ------
    CheckpointError
        It cannot be read, is no index, or names a file that would lie elsewhere than beside it.
    """
    try:
        content = read_json(index, largest=_LARGEST)
        file_of: dict[str, str] = content["weight_map"]
        metadata: dict[str, Any] = content["metadata"] if ours else content.get("metadata", {})
        checksums, total = metadata.get("crc32", {}), metadata.get("total_size")
        if not all(_PLAIN.fullmatch(name) for name in {*file_of, *file_of.values()}):
            raise ValueError("a name is empty, too long or not printable")
        if any("/" in name or name in (".", "..") for name in file_of.values()):
            raise ValueError("a shard lies elsewhere")
        if not isinstance(checksums, dict):
            raise TypeError("crc32 is no object")
    except OSError as error:
        raise unreadable(index, error) from error
    except ValueError as error:
        raise CheckpointError(f"{index} is no shard index: {error}. Fetch the file again.") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no shard index. Fetch the file again.") from error
    if isinstance(total, float) and total.is_integer():  # some programs wrote 5e9
        total = int(total)
    return Index(file_of, checksums, total if type(total) is int and total > 0 else None)


def check_inside(directory: Path, file_name: str) -> None:
    """Raise CheckpointError where a file is a link to one elsewhere, but for the links of the hub's cache.

    That has each model's files in `blobs`, beside `snapshots`, where a directory of links stands for each revision.
    """
    if not (directory / file_name).is_symlink():
        return
    home = directory.resolve()
    target = Path(os.path.normpath(home / (directory / file_name).readlink()))
    blobs = home.parent.parent / "blobs"
    if home not in target.parents and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise CheckpointError(
            f"{directory / file_name} is a link to {target}, outside the model's directory. Put the file itself there."
        )
