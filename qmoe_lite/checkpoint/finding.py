"""Where a model is, and what transformers calls its weight files."""

from __future__ import annotations

import re
from pathlib import Path

from qmoe_lite.errors import CheckpointError, first_line, unreadable

_VARIANT = (  # a weight file's name, and an index's, with a variant in it
    r"(?:pytorch_)?model\.(.+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)",
    r"(?:pytorch_)?model\.(?:safetensors|bin)\.index\.(.+)\.json",
)


def with_variant(file_name: str, variant: str | None) -> str:
    """Return what transformers calls a weight file, or its index, of a variant."""
    first, _, last = file_name.rpartition(".")
    return file_name if variant is None else f"{first}.{variant}.{last}"


def variant_of(file_name: str) -> str | None:
    """Return the variant that a weight file's or an index's name says; None for the main weights."""
    for pattern in _VARIANT:
        if named := re.fullmatch(pattern, file_name):
            return named[1]
    return None


def check_hub_name(name: str | Path) -> str | None:
    """Return None for a directory with a config.json, else the name, if it can be one on the hub.

    Raises
    ------
    CheckpointError
        As `find_model`, which asks the hub besides.
    """
    path = Path(name)
    try:
        if path.is_dir():
            if (path / "config.json").is_file():
                return None
            raise CheckpointError(f"{path} is no model: it has no config.json. Name a Hugging Face model directory.")
        there = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    # the hub's names have an owner and one slash, and none begins like these
    if there or str(name).startswith((".", "~", "/")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        reason = "it is a file" if there else "there is no such directory"
        raise CheckpointError(f"{name} is no model directory: {reason}. Give one with config.json and weights.")
    return str(name)


def find_model(name: str | Path) -> Path:
    """Return the directory of a model named by path or by its name on the Hugging Face hub.

    Raises
    ------
    CheckpointError
        No such directory, or one without config.json or that may not be looked into, or a name that the hub does not
        know.
    """
    if check_hub_name(name) is None:
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        found = Path(snapshot_download(str(name), allow_patterns=patterns))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.bin", "*.model", "*.txt"]))
    except Exception as error:  # huggingface_hub raises its own, httpx's and the file system's exceptions
        raise CheckpointError(
            f"{name} is no directory here, and the Hugging Face hub answers: {first_line(error)}."
        ) from error
    return found
