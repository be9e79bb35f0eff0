"""A model directory's config.json, as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmoe_lite.checkpoint.json_file import read_json
from qmoe_lite.errors import CheckpointError, unreadable

_LARGEST = 8 << 20  # bytes; with a code for each of 300 projections there is 1 MB
_MOST_VALUES = 32_768  # with so many codes 6,000


def read_config_file(directory: Path) -> dict[str, Any]:
    """Read it; raise CheckpointError where it is missing, unreadable, no JSON object, or too large to be a model's.

    What is compressed may have no key twice; a dense model's is taken as transformers takes it: the last one counts.
    """
    path, twice = directory / "config.json", list[str]()
    try:
        config = read_json(path, twice.append, _LARGEST)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no model: it has no config.json.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}). Fetch the file again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object. Fetch the file again.")
    if (count := _values(config)) > _MOST_VALUES:  # transformers copies them a dozen times
        raise CheckpointError(f"{path} holds {count:,} values; no model's has more than {_MOST_VALUES:,}.")
    if twice and config.get("quantization_config"):
        raise CheckpointError(f"{path} has the key {twice[0][:80]!r} twice. Fetch the file again.")
    return config


def _values(config: dict[str, Any]) -> int:
    """Count the values of a JSON object, at any depth."""
    inside: list[Any] = [config]
    for each in inside:  # which grows
        inside += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return len(inside)


def check_named(directory: Path) -> None:
    """Raise CheckpointError where config.json does not say what model it is of."""
    config = read_config_file(directory)
    if not isinstance(config.get("model_type"), str):
        lacking = "model_type" if config.get("architectures") else "model_type and architectures"
        text = f"{directory}/config.json lacks {lacking}: it does not say what model this is."
        raise CheckpointError(f"{text} Fetch the model's own config.json.")
