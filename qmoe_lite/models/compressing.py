"""A dense model compressed while from_pretrained loads it, as GPTQConfig does it in transformers."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.errors import CheckpointError, SettingError


def compress_for(model: Any, first: Path, settings: Mapping[str, Any]) -> Path:
    """Compress the files that a model is about to be loaded from.

    Parameters
    ----------
    model : transformers model
        On the meta device.
    first : Path
        One of the files.
    settings : mapping
        Of `QMoEConfig`.

    Returns
    -------
    Path
        The directory: `out`, or one that is removed when the model is.

    Raises
    ------
    SettingError
        A setting that `compress` does not have.
    CheckpointError
        The files are of another revision than the hub's main one.
    QMoEError
        As `compress`.
    """
    from qmoe_lite import compress  # by its public name: what compresses stands above this room

    chosen = dict(settings)
    dataset, out = chosen.pop("dataset", None), chosen.pop("out", None)
    if unknown := sorted(chosen.keys() - (inspect.signature(compress).parameters.keys() - {"model"})):
        text = f"QMoEConfig has no setting {unknown[0]}; for a dense model it takes dataset, out"
        raise SettingError(f"{text} and what qmoe_lite.compress takes by name.")
    scratch = Path(tempfile.mkdtemp(prefix="qmoe-"))
    remove = weakref.finalize(model, shutil.rmtree, scratch, ignore_errors=True)
    try:
        if isinstance(dataset, list):
            texts, dataset = dataset, scratch / "dataset.jsonl"
            dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        target = scratch / "model" if out is None else Path(out)
        compress(_source(model, first), target, calibration=dataset, **chosen)
    except BaseException:
        remove()
        raise
    if out is not None:
        remove()
    return target


def _source(model: Any, first: Path) -> Path:
    """Return the dense model's directory, the tokenizer in it: from_pretrained fetches weights alone."""
    name = model.config.name_or_path
    if Path(name).is_dir() or (found := find_model(name)) == first.parent:
        return first.parent
    raise CheckpointError(
        f"{name} was loaded from {first.parent}, the hub's main revision is in {found}. Compress the directory by "
        "qmoe_lite.compress."
    )
