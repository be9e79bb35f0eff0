"""A safetensors file's header: safetensors checks it, and does not tell where a tensor's bytes lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmoe_lite.checkpoint.json_file import parse_json
from qmoe_lite.errors import CheckpointError, unreadable


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where a file's data begin, and its header; raise CheckpointError where a tensor is twice in that.

    The file is one that safetensors opened.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return 8 + size, parse_json(file.read(min(size, path.stat().st_size)))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise rewritten(path) from error


def rewritten(path: Path) -> CheckpointError:
    """Word that a header does not go with what safetensors found."""
    text = f"{path} was truncated or rewritten while it was read, or its header is forged."
    return CheckpointError(f"{text} Fetch the file again.")
