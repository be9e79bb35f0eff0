"""A model directory's config.json, as it stands there."""

from __future__ import annotations

import json
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
