"""Tensors as files hold them, and as a model knows them: whole or an expert's slice, plain or dequantised on the way.

A file may hold an expert's matrices one by one, or those of a whole layer as one tensor; as they are, or as FP8 with
scales or MXFP4 blocks. Whatever it is, a matrix is read alone: a layer's whole tensor is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qmoe_lite.errors import CheckpointError, SettingError

DTYPES = {  # what safetensors calls them
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # of each 4 bits, E2M1
_SCALES = ("_scale_inv", "_scale")  # what is added to the name of an FP8 tensor
_CONVERT = "Convert it to bfloat16 first: load it in transformers with dtype=bfloat16, dequantise, save_pretrained."


class Source(Protocol):
    """One tensor, of which a slice along the first dimension can be read alone."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""

    def read(self, expert: int | None = None) -> Tensor:
        """Return the whole tensor, or an expert's slice of it."""


@dataclass(frozen=True)
class View:
    """Where a model's tensor lies.

    Attributes
    ----------
    stored : str
        Tensor in the files.
    expert : int or None
        Slice of it along the first dimension; None for the whole.
    transposed : bool
        Whether that slice's rows are the matrix's columns.
    rows : slice or None
        Rows of the matrix then: a gate's and an up projection's halves lie in one.
    """

    stored: str
    expert: int | None = None
    transposed: bool = False
    rows: slice | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tensor's shape for that of the one in the files."""
        own = shape if self.expert is None else shape[1:]
        own = own[::-1] if self.transposed else own
        return own if self.rows is None else (len(range(*self.rows.indices(own[0]))), *own[1:])

    def of(self, source: Source) -> Tensor:
        """Read the tensor."""
        found = source.read(self.expert)
        found = found.mT if self.transposed else found
        return found if self.rows is None else found[self.rows]


@dataclass(frozen=True)
class _Fp8:
    """An FP8 tensor and its scales: of blocks, of rows, or one."""

    name: str
    weight: Source
    scale: Source
    block: tuple[int, int]
    dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, expert: int | None = None) -> Tensor:
        weight = self.weight.read(expert).float()
        scale = self.scale.read(expert if len(self.scale.shape) == len(self.shape) else None).float()
        if scale.numel() > 1 and scale.shape != (weight.shape[-2], 1):
            for dim, size in zip((-2, -1), self.block, strict=True):
                if scale.shape[dim] != -(-weight.shape[dim] // size):
                    text = f"{self.name} {tuple(weight.shape)} has scales {tuple(scale.shape)}; config.json says one "
                    raise CheckpointError(f"{text}for each block of {self.block}. Fetch it again.")
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return (weight * scale).to(self.dtype)


@dataclass(frozen=True)
class _Mxfp4:
    """Two values a byte, one power of two for 32 of them; stored by output, known by input (gpt-oss)."""

    blocks: Source
    scales: Source
    dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        *first, rows, groups, size = self.blocks.shape
        return (*first, 2 * groups * size, rows)

    def read(self, expert: int | None = None) -> Tensor:
        blocks, scales = self.blocks.read(expert), self.scales.read(expert)
        values = _MXFP4[torch.stack([blocks & 15, blocks >> 4], -1).int()].flatten(-2)
        return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2).mT.to(self.dtype)


def method_of(config: Mapping[str, Any]) -> str | None:
    """Name what a config.json says that the model is quantised by; None for nothing."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    return str(settings.get("quant_method")) if isinstance(settings, dict) else str(settings)


def check_method(config: Mapping[str, Any], place: object) -> None:
    """Raise SettingError for a model that is compressed already, or quantised in a way that is not read."""
    method = method_of(config)
    if method == "qmoe":
        raise SettingError(f"{place} is quantised already. Compress the original model.")
    settings: Any = config.get("quantization_config")
    if method == "compressed-tensors" and settings.get("format") != "float-quantized":
        method = f"compressed-tensors ({settings.get('format')})"
    if method not in (None, "fp8", "mxfp4", "compressed-tensors"):
        raise SettingError(f"{place} is quantised by {method}; read are FP8 and MXFP4. {_CONVERT}")


def dequantised(config: Mapping[str, Any], sources: dict[str, Source]) -> dict[str, Source]:
    """Return the tensors of a model as they are without its quantisation, by name.

    Parameters
    ----------
    config : mapping
        Of config.json.
    sources : dict
        The tensors in the files.

    Returns
    -------
    dict
        FP8 tensors are bfloat16, MXFP4 ones too, under the name that blocks and scales have in common; what scales
        them is left out. A model that is not quantised, or in a way that `check_method` refuses, is left as it is.
    """
    method = method_of(config)
    if method in ("fp8", "compressed-tensors"):
        size = config["quantization_config"].get("weight_block_size") or (128, 128)
        return _fp8(sources, (int(size[0]), int(size[1])))
    if method == "mxfp4":
        return _mxfp4(sources)
    return sources


def _fp8(sources: dict[str, Source], block: tuple[int, int]) -> dict[str, Source]:
    found = dict(sources)
    for name in sources:
        for scale in (f"{name}{suffix}" for suffix in _SCALES):
            if scale in sources:
                found[name] = _Fp8(name, sources[name], sources[scale], block)
                del found[scale]
    return {name: source for name, source in found.items() if not name.endswith(("input_scale", "activation_scale"))}


def _mxfp4(sources: dict[str, Source]) -> dict[str, Source]:
    found = dict(sources)
    for name in [each.removesuffix("_blocks") for each in sources if each.endswith("_blocks")]:
        blocks, scales = found.pop(f"{name}_blocks"), found.pop(f"{name}_scales", None)
        if scales is None:
            raise CheckpointError(f"the checkpoint has {name}_blocks without {name}_scales. Fetch it again.")
        found[name] = _Mxfp4(blocks, scales)
    return found


def whole(names: Iterable[str]) -> dict[str, View]:
    """Return a view of each tensor as it is."""
    return {name: View(name) for name in names}
