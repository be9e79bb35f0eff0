"""Models as commands open them: compressed or dense, with their tokenizer."""

from __future__ import annotations

from typing import Any


def open_model(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a compressed or dense model, with its tokenizer; `dtype` is that of all but compressed experts."""
    import torch

    from qmoe_lite.calibration import open_tokenizer
    from qmoe_lite.checkpoint import find_model
    from qmoe_lite.errors import CheckpointError, SettingError
    from qmoe_lite.hf import load
    from qmoe_lite.skeletons import auto_class, open_checkpoint

    path = find_model(name)
    family, checkpoint = open_checkpoint(path)
    tokenizer = open_tokenizer(path)
    if quantized := checkpoint.config.get("quantization_config"):
        if quantized.get("quant_method") != "qmoe":
            method = quantized.get("quant_method")
            raise SettingError(f"{path} is quantised by {method}. Name a dense model or one that qmoe compressed.")
        return load(path, dtype=getattr(torch, dtype)), tokenizer
    model, info = auto_class(family).from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
    # transformers fills what a checkpoint lacks with random numbers and goes on
    if lost := sorted(set(info["missing_keys"]) - family.tied(model.config)):
        more = f" and {len(lost) - 1} more tensors" if len(lost) > 1 else ""
        raise CheckpointError(f"{path} lacks {lost[0]}{more}. Is it the whole model?")
    family.tie(model, checkpoint)
    return model.eval(), tokenizer
