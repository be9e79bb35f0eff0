"""CUDA twin of :mod:`qmoe_lite.coding.matmul`: few tokens by the gather kernel, many by decoded tiles of rows."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.coding.decode_kernels import slot_values
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import codebook_of
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import check_validated, decode_rows, row_starts
from qmoe_lite.cuda.gather import Groups, gather
from qmoe_lite.cuda.launch import as_tensor
from qmoe_lite.cuda.packets import Packets, decode_packets, make_packets
from qmoe_lite.cuda.variants import WIDTHS, choose_variant
from qmoe_lite.errors import DtypeError, SettingError, ShapeError

# on an H200 decoded tiles took longer than gathering for 32 tokens and less long for 64 (bench/results/nvidia-h200.txt)
GATHERED_TOKENS = 32
TILE_VALUES = 1 << 24  # values decoded at a time for many tokens: 64 MiB of float32
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_PACKETS: weakref.WeakKeyDictionary[PackedMatrix, Packets] = weakref.WeakKeyDictionary()


def decode_matmul(packed: PackedMatrix, x: Any) -> Any:
    """CUDA twin of :func:`qmoe_lite.coding.matmul.decode_matmul`; `x` and the matrix on one GPU, the result a tensor.

    A matrix's first product lays its codes out in packets, which are kept with it. Up to 32 tokens: a few lanes share a
    row, packet after packet, and add in a fixed order. More tokens: tiles of rows are decoded, to the dtype of `x`
    where that holds the levels exactly, and torch.matmul multiplies, in the precision that torch is set to. A matrix
    that `encode` did not make must have been validated.
    """
    tokens = _tokens(x, packed)
    y = None
    if isinstance(packed.codebook, Dictionary):
        from qmoe_lite.cuda.window_packets import matrix_packets
        from qmoe_lite.cuda.windows_product import multiply

        y = multiply(matrix_packets(packed), 0, tokens)
    elif 0 < tokens.shape[0] <= GATHERED_TOKENS:
        y = _gather_product(packed, tokens)
    if y is None:
        y = _tile_product(packed, tokens)
    return y.reshape(*x.shape[:-1], packed.shape[0]).to(as_tensor(x, "x").dtype)


def _tokens(x: Any, packed: PackedMatrix) -> Tensor:
    """Check `x` and return it as a contiguous tensor of shape (T, C), float64 as float32."""
    rows, columns = packed.shape
    tokens = as_tensor(x, "x")
    if tokens.dtype not in _FLOATS:
        raise DtypeError(f"x is {tokens.dtype}; expected float16, bfloat16, float32 or float64. Convert it.")
    if tokens.ndim not in (1, 2) or tokens.shape[-1] != columns:
        raise ShapeError(
            f"x has shape {tuple(tokens.shape)} but the packed matrix is {rows} x {columns}; expected ({columns},) or "
            f"(tokens, {columns}). Reshape x, or transpose it."
        )
    if tokens.device != packed.device:
        raise SettingError(f"x is on {tokens.device} but the matrix on {packed.device}; expected one GPU. Move one.")
    return (tokens.float() if tokens.dtype == torch.float64 else tokens).reshape(-1, columns)


def _tile_product(packed: PackedMatrix, tokens: Tensor) -> Tensor:
    """Product by decoded tiles of rows: tokens (T, C) -> (T, R)."""
    if packed in _PACKETS:
        return decoded_product(_PACKETS[packed], 0, tokens)
    check_validated(packed)
    values: dict[torch.dtype, Tensor] = {}
    starts = row_starts(packed)

    def decode(first: int, tile: Tensor) -> None:
        if tile.dtype not in values:
            values[tile.dtype] = slot_values(packed.levels, codebook_of(packed).alphabet, tile.dtype)
        decode_rows(packed, values[tile.dtype], starts, first, tile)

    return _by_tiles(packed.shape[0], packed.levels.dtype, decode, tokens)


def decoded_product(packets: Packets, expert: int, tokens: Tensor) -> Tensor:
    """Return the product of tokens (T, C) and one expert's matrix, (T, R): tiles of rows are decoded and multiplied."""
    return _by_tiles(packets.rows, packets.levels.dtype, functools.partial(decode_packets, packets, expert), tokens)


def _by_tiles(rows: int, levels_dtype: torch.dtype, decode: Callable[[int, Tensor], None], tokens: Tensor) -> Tensor:
    """Multiply tokens by tiles of rows; `decode` fills a tile of zeros, given the number of its first row."""
    columns = tokens.shape[1]
    dtype = tokens.dtype if tokens.dtype == levels_dtype else torch.float32
    tokens = tokens.to(dtype)
    y = torch.empty(len(tokens), rows, dtype=dtype, device=tokens.device)
    tile_rows = max(1, TILE_VALUES // columns)
    for first in range(0, rows if len(tokens) else 0, tile_rows):
        tile = torch.zeros(min(tile_rows, rows - first), columns, dtype=dtype, device=tokens.device)
        decode(first, tile)
        y[:, first : first + len(tile)] = tokens @ tile.T
    return y


def _gather_product(packed: PackedMatrix, tokens: Tensor) -> Tensor | None:
    """Product by adding nonzeros: tokens (T, C) -> (T, R) of the same dtype; None where x is too wide."""
    count = tokens.shape[0]
    wanted = wanted_width(count)
    limit, levels = launch.shared_limit(tokens.device), packed.levels.shape[1]
    variant = choose_variant((codebook_of(packed),), levels, packed.columns, wanted, None, limit)
    if variant is None:
        return None
    y = torch.empty((count, packed.shape[0]), dtype=tokens.dtype, device=tokens.device)
    groups = groups_in_order(count, variant.tokens, tokens.device)
    gather((_packets(packed),), in_order(1, tokens.device), variant, tokens, groups, 1, None, y)
    return y


def wanted_width(tokens: int) -> int:
    """Return how many of so many tokens a group shall hold."""
    return tokens if tokens < 3 else WIDTHS[0]


def _packets(packed: PackedMatrix) -> Packets:
    """Return a matrix as packets; made once for a matrix, which is not changed."""
    packets = _PACKETS.get(packed)
    if packets is None:
        check_validated(packed)
        packets = _PACKETS[packed] = make_packets(packed)
    return packets


@functools.lru_cache(maxsize=64)
def groups_in_order(tokens: int, width: int, device: torch.device, expert: int = 0) -> Groups:
    """Return the tokens of one expert, `width` at a time."""
    groups = -(-tokens // width)
    members = torch.arange(groups * width, dtype=torch.int32)
    members[tokens:] = -1
    # made on the CPU: it is there when the copy returns, whichever stream uses it, and no graph is filled with it
    return torch.full((groups,), expert, dtype=torch.int32).to(device), members.to(device)


@functools.cache  # as `variants.device_words`
def in_order(experts: int, device: torch.device) -> Tensor:
    """Return the places of experts that lie at their own numbers."""
    return torch.arange(experts, dtype=torch.int32).to(device)  # as `groups_in_order`
