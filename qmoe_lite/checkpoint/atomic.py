"""Write files crash-safely.

A file is written under a temporary name, synced, and renamed: it is there whole or not at all. torch is imported by
what writes tensors alone: packing a directory takes none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qmoe_lite.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

_COPIED = re.compile(r".*(token|vocab|merges|spiece|special|generation_config|chat_template|\.model$|\.jinja$).*")


def crc32(tensor: Tensor) -> int:
    """CRC-32 of a CPU tensor's bytes."""
    import torch

    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0


def file_sum(path: Path) -> list[int]:
    """Return a file's size in bytes and the CRC-32 of all of it; OSError where it cannot be read."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, sync it, and rename it to `path`.

    Raises
    ------
    OutputError
        The disk is full or the place not writable; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # what somebody put there may be a link to another file
        write(temporary)
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # safetensors leaves its files to their owner alone
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    except BaseException:  # what `write` ran into, or Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def unwritable(path: Path, error: Exception) -> OutputError:
    """Word why a file cannot be written."""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return OutputError(f"{path} cannot be written: {reason}. Finished work is kept: free some space, then rerun.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON crash-safely; `indent` is None for what nobody reads, in a tenth of the time."""
    write_atomically(path, lambda file: _dump(file, value, indent))


def _dump(file: Path, value: Any, indent: int | None) -> None:
    file.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write a safetensors file crash-safely; return the CRC-32 of each tensor."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # one key only: safetensors writes several in random order, and equal runs must give equal bytes
    write_atomically(path, lambda file: save_file(contiguous, file, {"format": "pt"}))
    return {name: crc32(tensor) for name, tensor in contiguous.items()}


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and chat-template files of a model."""
    for file in sorted(source.iterdir()):
        if file.is_file() and _COPIED.fullmatch(file.name) and file.suffix != ".safetensors":
            write_atomically(target / file.name, lambda out, file=file: shutil.copyfile(file, out))  # type: ignore[misc]
