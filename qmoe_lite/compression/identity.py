"""Which work unfinished work is: of which model, text and settings, so that nothing else goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.format import FORMAT
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.compression.calibration import Samples
from qmoe_lite.compression.ranks import Ranks
from qmoe_lite.compression.settings import Progress, Settings
from qmoe_lite.compression.shares import NONE
from qmoe_lite.errors import SettingError, unreadable
from qmoe_lite.quantization.grid import Grid

_NOT_DECISIVE = ("stop_when_bad", "check_first", "batch_size")
_SIZES_OF_GROUPS = ("group_size", "group_bytes")
_SOLVER = 3  # raised when it rounds otherwise: what another one began would not end with the same bytes
_LARGE = 1 << 30  # bytes of a model that take a while to read


def fingerprint_of(checkpoint: Checkpoint, settings: Settings, grid: Grid, samples: Samples | None) -> dict[str, Any]:
    """Return all that decides what a compression writes, as JSON values by name; what is long as a digest."""
    ignored = {*_NOT_DECISIVE, *(_SIZES_OF_GROUPS if settings.rate is None else ())}  # a rate's steps go by groups
    decisive = {name: value for name, value in asdict(settings).items() if name not in ignored}
    if isinstance(settings.sensitivity, dict):
        decisive["sensitivity"] = _digest(json.dumps(settings.sensitivity).encode())
    elif settings.sensitivity == NONE:
        decisive["sensitivity"] = None  # as earlier versions had it
    sizes = [(name, (checkpoint.directory / name).stat().st_size) for name in checkpoint.files]
    ids = [] if samples is None else [samples.input_ids, *([] if samples.labels is None else [samples.labels])]
    return {
        "format": FORMAT,
        "the solver's version": _SOLVER,
        "the model's config.json": _digest(json.dumps(checkpoint.config, sort_keys=True).encode()),
        "the model's weight files": _digest(json.dumps(sizes).encode()),
        **decisive,
        "grid": grid.to_config(),
        "the calibration text": _digest(*(np.ascontiguousarray(each).data for each in ids)),
    }


def _digest(*contents: bytes | memoryview) -> dict[str, str]:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return {"sha256": digest.hexdigest()}


def difference(before: Any, now: dict[str, Any]) -> str | None:
    """Say which of two fingerprints' values differs first; None where they are the same."""
    if not isinstance(before, dict):
        return "it is of another version of qmoe-lite"
    for name, value in now.items():
        if name not in before:
            return "it is of another version of qmoe-lite"
        if (known := before[name]) != value:
            digest = any(isinstance(each, dict) and "sha256" in each for each in (known, value))
            return f"{name} is another" if digest else f"{name} is {value}, and was {known}"
    return None


def check_same(fingerprint: dict[str, Any], ranks: Ranks) -> None:
    """Raise SettingError where a rank was given other work than the first one; GPUs may have other numbers."""
    every = [{**each, "device": each["device"].split(":")[0]} for each in ranks.gather(fingerprint)]
    for rank, other in enumerate(every):
        if (what := difference(every[0], other)) is not None:
            text = f"rank {rank} was given other work than rank 0: {what}"
            raise SettingError(f"{text}. Give all ranks the same model, text and settings.")


def contents_of(
    checkpoint: Checkpoint, progress: Callable[[Progress], None], known: dict[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """Return time of change, size and CRC-32 of each weight file of a model.

    Parameters
    ----------
    checkpoint : Checkpoint
        The dense model.
    progress : callable
        Told of each file of a large model.
    known : dict, file to its figures
        What an earlier call returned: a file of the same time and size is not read again.

    Raises
    ------
    CheckpointError
        A file cannot be read.
    """
    found: dict[str, list[int]] = {}
    large = sum((checkpoint.directory / name).stat().st_size for name in checkpoint.files) > _LARGE
    for name in checkpoint.files:
        path = checkpoint.directory / name
        try:
            status = path.stat()
            found[name] = (known or {}).get(name, [])
            if found[name][:2] != [status.st_mtime_ns, status.st_size]:
                if large:
                    progress(Progress(0, 1, f"reading {name}, to know it again if the run is interrupted"))
                found[name] = [status.st_mtime_ns, *files.file_sum(path)]
        except OSError as error:
            raise unreadable(path, error, "read") from error
    return found
