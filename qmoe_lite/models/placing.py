"""Experts put into a model that transformers built, and blocks that call their experts in a way of their own."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

# transformers' classes of blocks, and ours that call the experts with each token's index and weight
_OWN_CALLS = {
    "Llama4TextMoe": ("qmoe_lite.models.llama4", "RoutedLlama4Moe"),
    "LongcatFlashMoE": ("qmoe_lite.models.longcat", "RoutedLongcatMoe"),
}


def put(model: Any, name: str, experts: nn.Module) -> None:
    """Put a module in the place of the experts of this name."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, experts)
    if (ours := _OWN_CALLS.get(type(owner).__name__)) is not None:
        module, class_name = ours
        owner.__class__ = getattr(importlib.import_module(module), class_name)  # all that it holds stays


def put_dense(model: Any, name: str, experts: nn.Module, like: nn.Module) -> None:
    """Put transformers' own experts back; `like` is the block that had them in a model that transformers built."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, experts)
    owner.__class__ = type(like)
