"""A dense model as a run opens it: everything checked that can be before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.sources import check_method
from qmoe_lite.errors import SettingError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import read_config, skeleton
from qmoe_lite.models.family import Family
from qmoe_lite.models.skeletons import check_dense, check_promise, open_checkpoint, unused


@dataclass(frozen=True)
class Opened:
    """A dense model.

    Attributes
    ----------
    family, checkpoint, config
        Of it.
    model : torch module
        Its skeleton in float32, without weights.
    layers : list of MoELayer
        Its sparse layers.
    notes : list of str
        What of the checkpoint is left out, in words.
    """

    family: Family
    checkpoint: Checkpoint
    config: Any
    model: Any
    layers: list[MoELayer]
    notes: list[str]


def check_family(word: str | None) -> None:
    """Raise SettingError for a word that names no family."""
    if word not in (None, "auto"):
        raise SettingError(f"family {word} is unknown; it is read in config.json. Give 'auto', or nothing.")


def opened(directory: Path, auto: bool) -> Opened:
    """Open a dense model, as far as that can be done without its weights.

    Parameters
    ----------
    directory : Path
        Of the checkpoint.
    auto : bool
        Whether a model type that is not among the tested ones is taken.

    Raises
    ------
    CheckpointError, UnsupportedFamilyError, SettingError
        It cannot be compressed.
    """
    family, checkpoint = open_checkpoint(directory, auto)
    check_method(checkpoint.config, directory)
    config, notes = read_config(str(directory)), list[str]()
    model = skeleton(family, config, torch.float32)
    if extra := unused(family, model, checkpoint):
        checkpoint.forget(extra)
        notes.append(f"left out {len(extra)} tensors that transformers does not load, such as {extra[0]}")
    checkpoint.check_index()
    layers = check_promise(family, config, checkpoint)
    check_dense(family, model, checkpoint)
    return Opened(family, checkpoint, config, model, layers, notes)
