"""How large the parts of a model are, by its configuration and the headers of its files; nothing is read of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qmoe_lite.checkpoint.config_file import check_named
from qmoe_lite.checkpoint.headers import Headers
from qmoe_lite.checkpoint.reader import of_experts
from qmoe_lite.checkpoint.sources import check_method
from qmoe_lite.errors import CheckpointError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import read_config, skeleton
from qmoe_lite.models.family import Family, family_of

_SUFFIXES = (  # of what lies beside a quantised tensor, or in its place
    *("_scale_inv", "_scale", "_blocks", "_scales", "_packed", "_shape", "_zero_point"),
    *("_input_scale", "_activation_scale"),
)


@dataclass(frozen=True)
class BlockParts:
    """One block without its experts.

    Attributes
    ----------
    weights : int
        Parameters of its dense part.
    widest : int
        Outputs of its widest linear map but the router.
    layer : MoELayer or None
        Its sparse layer.
    """

    weights: int
    widest: int
    layer: MoELayer | None


@dataclass(frozen=True)
class Anatomy:
    """A model's parts.

    Attributes
    ----------
    family : Family
    config : transformers configuration
    stacks : list of list of BlockParts
        Encoder and decoder, or the one chain of blocks.
    experts, others : int
        Parameters in experts' matrices, and all others; tied ones once.
    outside : int
        Of the others, those outside the blocks that calibration loads.
    head : int
        Of the output head.
    expert_bytes, other_bytes : int
        In the files.
    kept_bytes : int
        Of all but the experts in a compressed model, where FP8 and MXFP4 become bfloat16.
    tensors : int
        In the files.
    dtype : torch dtype
        Of all but the experts, of most of them.
    read, assumed : list of str
        Where these figures come from.
    """

    family: Family
    config: Any
    stacks: list[list[BlockParts]]
    experts: int
    others: int
    outside: int
    head: int
    expert_bytes: int
    other_bytes: int
    kept_bytes: int
    tensors: int
    dtype: torch.dtype
    read: list[str]
    assumed: list[str]

    @property
    def layers(self) -> list[MoELayer]:
        return [block.layer for stack in self.stacks for block in stack if block.layer is not None]

    @property
    def hidden(self) -> int:
        """Values of a token between two blocks."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(self.config.get_text_config().num_attention_heads or 1)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)


def anatomy_of(headers: Headers, auto: bool = False) -> Anatomy:
    """Work out a model's parts.

    Parameters
    ----------
    headers : Headers
        Of the model.
    auto : bool
        As `family_of` takes it.

    Raises
    ------
    CheckpointError
        A config.json that makes no model, or one without experts.
    UnsupportedFamilyError, SettingError
        As `compress`.
    """
    check_named(headers.directory)
    check_method(headers.config, headers.directory)
    family = family_of(headers.config.get("model_type"), auto)
    config = read_config(str(headers.directory))
    model = skeleton(family, config, torch.float32)
    layer_of = {layer.block: layer for layer in family.layers(config)}
    if not layer_of:
        raise CheckpointError(f"{headers.directory} has no sparse layer: there are no experts to compress.")
    tied = family.tied(config)
    sizes = {name: each.numel() for name, each in model.state_dict().items() if not of_experts(name)}
    dense = {name: size for name, size in sizes.items() if name not in tied}
    stacks = [
        [_block(model, block, sizes, layer_of.get(block)) for block in stack.blocks] for stack in family.stacks(config)
    ]
    experts, others = sum(layer.weights for layer in layer_of.values()), sum(dense.values())
    in_blocks = sum(block.weights for stack in stacks for block in stack)
    head = int(config.get_text_config().vocab_size) * int(config.get_text_config().hidden_size)
    outside = others - in_blocks - (0 if family.seq2seq or not _own_head(dense) else head)
    read, assumed = ["config.json"], list[str]()
    if headers.held:
        read.append(headers.origin)
        expert_bytes, other_bytes, kept_bytes = _bytes_of(headers, family, config, assumed, len(layer_of))
        largest = max(headers.held.values(), key=lambda each: each.nbytes)
        dtype = largest.dtype if largest.dtype.itemsize > 1 else torch.bfloat16
    else:
        dtype = _dtype_of(headers.config, assumed)
        width = dtype.itemsize
        expert_bytes, other_bytes, kept_bytes = experts * width, others * width, others * width
        if headers.file_bytes is not None:
            read.append(headers.origin)
            other_bytes = min(other_bytes, headers.file_bytes)
            expert_bytes = headers.file_bytes - other_bytes
    tensors = len(headers.held) or sum(layer.matrices for layer in layer_of.values()) + len(dense)
    sums = (experts, others, max(outside, 0), head, expert_bytes, other_bytes, kept_bytes, tensors)
    return Anatomy(family, config, stacks, *sums, dtype, read, assumed)


def _own_head(dense: Mapping[str, int]) -> bool:
    return any(name.endswith("lm_head.weight") for name in dense)


def _block(model: Any, block: str, sizes: dict[str, int], layer: MoELayer | None) -> BlockParts:
    prefix = f"{block}."
    linear = [m for m in model.get_submodule(block).modules() if isinstance(m, nn.Linear)]
    count = 0 if layer is None else layer.count
    widest = max((m.out_features for m in linear if m.out_features != count), default=0)
    return BlockParts(sum(size for name, size in sizes.items() if name.startswith(prefix)), widest, layer)


def _dtype_of(config: dict[str, Any], assumed: list[str]) -> torch.dtype:
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    named = next((c[key] for c in (config, inner or {}) for key in ("dtype", "torch_dtype") if c.get(key)), None)
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(found, torch.dtype):
        return found
    assumed.append("weights of bfloat16: there are no files, and config.json names no dtype")
    return torch.bfloat16


def _bytes_of(headers: Headers, family: Family, config: Any, assumed: list[str], layers: int) -> tuple[int, int, int]:
    """Return bytes of experts and of all others in the files, and of the others as a compressed model keeps them."""
    sources = headers.sources
    views = family.views(config, headers)  # type: ignore[arg-type]
    of_them = {view.stored for name, view in views.items() if of_experts(name)}
    expert_bytes = other_bytes = 0
    for name, held in headers.held.items():
        known = {name, *(name.removesuffix(suffix) for suffix in _SUFFIXES)}
        if known & of_them:
            expert_bytes += held.nbytes
        else:
            other_bytes += held.nbytes
    kept = sum(
        math.prod(sources[view.stored].shape) * sources[view.stored].dtype.itemsize
        for name, view in views.items()
        if not of_experts(name)
    )
    promised = sum(layer.matrices for layer in family.layers(config))
    if (found := sum(of_experts(name) for name in views)) != promised:
        assumed.append(f"the files hold {found:,} experts' matrices, config.json promises {promised:,}")
    return expert_bytes, other_bytes, kept


def directory_of(headers: Headers) -> Path:
    """Return where a model's disk is measured: beside its shards, or in the current directory."""
    return headers.shards[0].parent if headers.shards else Path()
