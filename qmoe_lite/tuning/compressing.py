"""`compress_and_tune`: a compression and the tuning of what came of it, as one run that can be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qmoe_lite.checkpoint.atomic import write_json
from qmoe_lite.checkpoint.json_file import read_json
from qmoe_lite.checkpoint.report import FILE_NAME, Report, read_report
from qmoe_lite.compression.lock import check_free
from qmoe_lite.compression.ranks import ALONE
from qmoe_lite.compression.run import compress
from qmoe_lite.compression.settings import Progress
from qmoe_lite.compression.shares import layers_of
from qmoe_lite.errors import BadResultError, ResumeError, SettingError
from qmoe_lite.tuning.run import tune


def compress_and_tune(
    model: str | Path,
    out: str | Path,
    *,
    epochs: int,
    calibration: str | Path | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    log: str | Path | None = None,
    before: Callable[[int | None], None] | None = None,
    each_group: AbstractContextManager[Any] | None = None,
    **settings: Any,
) -> Report:
    """Compress a model, and train the steps, scales and norms of the result against it.

    Parameters
    ----------
    model, out, calibration, resume, progress, log, before, each_group, **settings
        As for `compress`.
    epochs : int
        As for `tune`, which takes the same text, sequence length, seed and device, and as many samples where they were
        named.

    Returns
    -------
    Report
        With what the tuning did; where it won nothing, the result is as it was before it, and `degraded` says so.

    Raises
    ------
    ResumeError
        `OUT.untuned`, where the compressed model waits for its tuning, is of another command.
    QMoEError
        As `compress` and `tune`; finished work is kept.
    """
    if settings.get("recipe") == "nearest":
        raise SettingError("recipe nearest takes no text, and tuning needs one. Choose another recipe, or do not tune.")
    if settings.pop("ranks", ALONE).count > 1:
        raise SettingError("tuning is the work of one process. Compress without it, then tune: qmoe tune.")
    target = Path(out)
    check_free(target)
    untuned, request = (target.with_name(f"{target.name}.untuned{end}") for end in ("", ".json"))
    asked = {name: str(value) for name, value in {"model": model, "calibration": calibration, **settings}.items()}
    asked.pop("device", None)  # what was compressed may be tuned on another
    if "sensitivity" in settings:  # what a file holds, not its name
        asked["sensitivity"] = str(layers_of(settings["sensitivity"]))
    if not resume:
        shutil.rmtree(untuned, ignore_errors=True)
    if untuned.exists():
        _check_same(untuned, request, asked)
    else:
        request.parent.mkdir(parents=True, exist_ok=True)
        write_json(request, asked)
        telling: dict[str, Any] = {"progress": progress, "log": log, "before": before, "each_group": each_group}
        compress(model, untuned, calibration=calibration, resume=resume, **telling, **settings)
    taken = ("samples", "sequence_length", "seed", "device")
    shared = {name: settings[name] for name in taken if settings.get(name) is not None}
    try:
        tune(untuned, target, dense=model, calibration=calibration, epochs=epochs, progress=progress, **shared)
        shutil.rmtree(untuned)
    except BadResultError:
        found = read_report(untuned)
        assert found is not None
        note = "not tuned: training won nothing on the validation samples"
        write_json(untuned / FILE_NAME, replace(found, degraded=[*found.degraded, note]).to_json())
        untuned.rename(target)
    request.unlink()
    report = read_report(target)
    assert report is not None
    return report


def _check_same(untuned: Path, request: Path, asked: dict[str, str]) -> None:
    """Raise ResumeError unless a compressed model that waits for its tuning was made by the same command."""
    known = read_json(request) if request.is_file() else {}
    known.pop("device", None)  # of an earlier version
    differing = sorted(name for name in {*known, *asked} if known.get(name) != asked.get(name))
    if differing:
        name = differing[0]
        raise ResumeError(
            f"{untuned} was compressed with {name} {known.get(name)}, not {asked.get(name)}. "
            "Give the same settings, or begin anew with --restart (resume=False)."
        )
