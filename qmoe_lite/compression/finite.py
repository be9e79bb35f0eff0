"""Searches a whole model for NaN and infinity, which a run would meet when it comes to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.compression.settings import Progress
from qmoe_lite.errors import NotFiniteError

_PIECE = 1 << 24  # values looked at at a time


def check_finite(checkpoint: Checkpoint, progress: Callable[[Progress], None]) -> None:
    """Look at each tensor once, one after another.

    Parameters
    ----------
    checkpoint : Checkpoint
        The dense model.
    progress : callable
        Told of each hundredth tensor.

    Raises
    ------
    NotFiniteError
        Names the first tensor that holds NaN or infinity, and how many others do.
    """
    names = sorted(checkpoint.names)
    bad: list[str] = []
    for number, name in enumerate(names):
        if number % 100 == 0:
            progress(Progress(0, 1, f"looking for NaN, tensor {number + 1} of {len(names)}"))
        if not _finite(checkpoint.tensor(name)):
            bad.append(name)
    if bad:
        others = f", and {len(bad) - 1} other tensors do" if len(bad) > 1 else ""
        raise NotFiniteError(f"{bad[0]} in {checkpoint.directory} holds NaN or infinity{others}. Fetch them again.")


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        wide = piece.to(torch.bfloat16) if piece.itemsize == 1 else piece
        if not wide.isfinite().all():
            return False
    return True
