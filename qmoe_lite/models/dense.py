"""Dense models with their weights, as transformers loads them: only whole ones, and such that they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.errors import CheckpointError, QMoEError, first_line
from qmoe_lite.models.building import auto_class, read_config
from qmoe_lite.models.family import Family
from qmoe_lite.models.skeletons import check_whole

_ALIGNED = 16  # bytes; what torch's grouped product wants rows and addresses to be multiples of


def load_dense(directory: Path, family: Family, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Load a dense model on the CPU.

    Parameters
    ----------
    directory : Path
        Of the model.
    family, checkpoint
        What `open_checkpoint` returned for it.
    dtype : torch dtype
        Of all floating-point tensors.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    CheckpointError
        A damaged or missing shard, a tensor that is missing or has another shape, in the words that `compress` has; or
        transformers refuses the model.
    """
    check_whole(family, read_config(str(directory)), checkpoint)
    try:
        model, info = auto_class(family, checkpoint.config).from_pretrained(
            directory, dtype=dtype, output_loading_info=True
        )
    except QMoEError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} is refused by transformers: {first_line(error)}.") from error
    # transformers silently fills what a checkpoint lacks with random numbers
    if lost := sorted(set(info["missing_keys"]) - family.tied(model.config)):
        more = f" and {len(lost) - 1} more tensors" if len(lost) > 1 else ""
        raise CheckpointError(f"{directory} lacks {lost[0]}{more}. Is it the whole model?")
    family.tie(model, checkpoint)
    if not can_be_grouped(model):
        model.set_experts_implementation("eager")
    return model.eval()


def can_be_grouped(model: nn.Module) -> bool:
    """Return whether torch's grouped product takes all experts that are one tensor a layer."""
    for module in model.modules():
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, nn.Parameter) and tensor.dim() == 3:
                odd = any(size * tensor.element_size() % _ALIGNED for size in tensor.shape[1:])
                if odd or tensor.data_ptr() % _ALIGNED:
                    return False
    return True
