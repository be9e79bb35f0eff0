"""Tensors as files hold them, and as a model knows them: whole or an expert's slice, plain or dequantised on the way.

A file may hold an expert's matrices one by one, or those of a whole layer as one tensor; as they are, as FP8 or
integers with scales, or as MXFP4 blocks. Whatever it is, a matrix is read alone: a layer's whole tensor is never in
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qmoe_lite.checkpoint.compressed_tensors import WHOLE, Scheme, schemes_of
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
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", ".k_scale", ".q_scale", ".v_scale")
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
class _Scaled:
    """A tensor of FP8 or small integers, and its scales: of blocks, of rows, or one."""

    name: str
    weight: Source
    scale: Source
    blocks: tuple[tuple[int, int], ...]  # rows and columns of what has one scale; one of these
    dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, expert: int | None = None) -> Tensor:
        weight = self.weight.read(expert).float()
        scale = self.scale.read(expert if len(self.scale.shape) == len(self.shape) else None).float()
        if scale.numel() > 1 and scale.shape != (weight.shape[-2], 1):
            fitting = [
                block
                for block in self.blocks
                if tuple(scale.shape) == tuple(-(-n // size) for n, size in zip(weight.shape, block, strict=True))
            ]
            if len(set(fitting)) != 1:
                text = f"{self.name} {tuple(weight.shape)} has scales {tuple(scale.shape)}; config.json says one "
                named = " or ".join(f"({_sized(rows)}, {_sized(columns)})" for rows, columns in self.blocks)
                raise CheckpointError(f"{text}for each block of {named}. Fetch it again.")
            for dim, size in zip((-2, -1), fitting[0], strict=True):
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return (weight * scale).to(self.dtype)


def _sized(size: int) -> str:
    return "all" if size == WHOLE else str(size)


@dataclass(frozen=True)
class _Packed:
    """Small integers of which several share 32 bits, the first in the lowest; negative ones are stored from zero up."""

    name: str
    packed: Source
    size: Source
    bits: frozenset[int]  # of a weight; one of these
    dtype = torch.int8

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], int(self.size.read().flatten()[-1]))

    def read(self, expert: int | None = None) -> Tensor:
        packed, columns = self.packed.read(expert), self.shape[-1]
        fitting = [each for each in self.bits if -(-columns * each // 32) == packed.shape[-1]]
        if len(fitting) != 1:
            text = f"{self.name}_packed has {packed.shape[-1]} columns of 32 bits; config.json says {columns} weights"
            raise CheckpointError(f"{text} of {' or '.join(map(str, sorted(self.bits)))} bits. Fetch it again.")
        (bits,) = fitting
        parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
        return (torch.stack(parts, -1).flatten(-2)[..., :columns] - (1 << bits - 1)).to(self.dtype)


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
    if method == "compressed-tensors" and isinstance(found := schemes_of(config["quantization_config"]), str):
        method = found
    if method not in (None, "fp8", "mxfp4", "compressed-tensors"):
        read = "read are FP8, MXFP4 and compressed-tensors' symmetric integers of 4 and 8 bits"
        raise SettingError(f"{place} is quantised by {method}; {read}. {_CONVERT}")


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
        FP8 tensors are bfloat16, MXFP4 and packed ones too, under the name that these have in common with their
        scales, which are left out. A model that is not quantised, or in a way that `check_method` refuses, is left as
        it is.
    """
    method = method_of(config)
    if method == "fp8":
        size = config["quantization_config"].get("weight_block_size") or (128, 128)
        return _scaled(sources, ((int(size[0]), int(size[1])),))
    if method == "compressed-tensors" and not isinstance(schemes := schemes_of(config["quantization_config"]), str):
        return _compressed(sources, schemes)
    if method == "mxfp4":
        return _mxfp4(sources)
    return sources


def _scaled(sources: dict[str, Source], blocks: tuple[tuple[int, int], ...]) -> dict[str, Source]:
    found = dict(sources)
    for name in sources:
        for scale in (f"{name}{suffix}" for suffix in _SCALES):
            if scale in sources:
                found[name] = _Scaled(name, sources[name], sources[scale], blocks)
                del found[scale]
    return {name: source for name, source in found.items() if not name.endswith(_OF_ACTIVATIONS)}


def _compressed(sources: dict[str, Source], schemes: list[Scheme]) -> dict[str, Source]:
    plain = dict(sources)
    bits = frozenset(scheme.bits for scheme in schemes if scheme.packed)
    for name in [each.removesuffix("_packed") for each in sources if each.endswith("_packed")]:
        packed, shape = plain.pop(f"{name}_packed"), plain.pop(f"{name}_shape", None)
        if shape is None or f"{name}_scale" not in sources:
            raise CheckpointError(f"the checkpoint has {name}_packed without shape or scales. Fetch it again.")
        plain[name] = _Packed(name, packed, shape, bits)
    return _scaled(plain, tuple(dict.fromkeys(scheme.block for scheme in schemes)))


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
