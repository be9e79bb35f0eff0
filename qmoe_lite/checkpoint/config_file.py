"""A model directory's config.json, as it stands there; and what names a model that is elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qmoe_lite.errors import CheckpointError, unreadable


def read_config_file(directory: Path) -> dict[str, Any]:
    """Read it; raise CheckpointError where it is missing, unreadable or no JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no model: it has no config.json.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}). Fetch the file again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object. Fetch the file again.")
    return config


def check_named(directory: Path) -> None:
    """Raise CheckpointError where config.json does not say what model it is of."""
    config = read_config_file(directory)
    if not isinstance(config.get("model_type"), str):
        lacking = "model_type" if config.get("architectures") else "model_type and architectures"
        text = f"{directory}/config.json lacks {lacking}: it does not say what model this is."
        raise CheckpointError(f"{text} Fetch the model's own config.json.")


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
