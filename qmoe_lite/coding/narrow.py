"""Numbers in as many bits as they need: row lengths; steps and column scales, which are given few bits of mantissa.

Patterns of positive bfloat16 numbers are in the order of the numbers, at nearly equal distances on a logarithmic scale.
So a step or scale is stored as its pattern's distance from the smallest one's, in units that divide them all. That
loses nothing, whatever the numbers are; `round_scales`, which is called before weights are rounded to what they make,
leaves few patterns for them. FORMAT.md says what is stored.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MANTISSA_BITS = 4  # of steps and column scales; fewer save bits, but cost loss where scales are trained
HEADER_BYTES = 3  # before the codes of steps or scales: the smallest pattern, and the binary logarithm of their unit
_FLOAT32_MANTISSA = 23
_MOST_BITS = 16  # of a number
_LARGEST = 0x7F7F  # pattern of a finite number
_NO_NUMBER = 0x7FFF  # a pattern that is NaN: what is out of range is refused as others' NaN is


def round_scales(values: Tensor) -> Tensor:
    """Return float32 numbers rounded to four bits of mantissa: sixteen in an octave, and exact in bfloat16."""
    dropped = _FLOAT32_MANTISSA - MANTISSA_BITS
    bits = values.contiguous().view(torch.int32) + (1 << dropped - 1)
    rounded = (bits & -(1 << dropped)).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)  # a GPU's NaN has all bits set: the sum would wrap to zero


def rescaled(scales: Tensor, factors: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a matrix's steps or scales, at least 0, times factors as they can be stored in a dtype; all float32.

    In bfloat16 they are rounded, and no farther apart than they were: they take no more bits.
    """
    if dtype != torch.bfloat16:
        return (scales * factors).to(dtype).to(torch.float32)
    some = scales > 0
    if not some.any():
        return scales.clone()
    found = round_scales(scales * factors).clamp(scales[some].min(), scales.max())
    return torch.where(some, found, 0.0)


def dtype_of_levels(stored: Tensor) -> torch.dtype:
    """Return the dtype of levels as they are multiplied, given how they are stored."""
    return torch.bfloat16 if stored.dtype == torch.uint8 else stored.dtype


def bits_of_numbers(size: int, count: int) -> int:
    """Return the bits of each of `count` numbers that take so many bytes; 0 where no such numbers do."""
    bits = 8 * size // count if count else 0
    return bits if 1 <= bits <= _MOST_BITS and size == -(-count * bits // 8) else 0


def pack_numbers(numbers: NDArray[np.integer], bits: int | None = None) -> NDArray[np.uint8]:
    """Return numbers (E, N), at least 0, in as few bits as the largest needs, or in so many: (E, bytes)."""
    experts, count = numbers.shape
    size = -(-count * (bits or max(1, int(numbers.max()).bit_length())) // 8)
    bits = 8 * size // count
    whole = numbers.astype("<u2")[:, :, None].view(np.uint8)
    single = np.unpackbits(whole, axis=2, count=bits, bitorder="little")
    return np.packbits(single.reshape(experts, -1), axis=1, bitorder="little")


def unpack_numbers(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint32]:
    """Return what was packed, (E, count), of (E, bytes); `bits_of_numbers` has said that it fits."""
    bits = 8 * packed.shape[1] // count
    wide = np.pad(packed, ((0, 0), (0, 2))).astype(np.uint32)
    words = wide[:, :-2] | wide[:, 1:-1] << 8 | wide[:, 2:] << 16  # a number is in three bytes at most
    first = np.arange(count) * bits
    found: NDArray[np.uint32] = words.take(first // 8, axis=1)  # a row's lie next to each other
    return found >> (first % 8).astype(np.uint32) & np.uint32((1 << bits) - 1)


def pack_scales(scales: Tensor) -> Tensor | None:
    """Return steps or column scales, (E, N), as they are stored, uint8 (E, bytes); None where they are to stay.

    They stay where one is negative or none is bfloat16, and where they are so many different ones that nothing is won.
    """
    if scales.dtype != torch.bfloat16 or not scales.numel():
        return None
    patterns = scales.contiguous().view(torch.int16).numpy().astype(np.int64)
    if (patterns < 0).any():
        return None
    some = patterns > 0
    base = np.where(some, patterns, _NO_NUMBER).min(axis=1)
    above = np.where(some, patterns - base[:, None], 0)
    union = np.bitwise_or.reduce(above, axis=1)
    shift = np.where(union, np.log2(np.maximum(union & -union, 1)), 0).astype(np.int64)
    header = np.stack([base & 255, base >> 8, shift], axis=1).astype(np.uint8)
    codes = pack_numbers(np.where(some, (above >> shift[:, None]) + 1, 0))
    packed = torch.from_numpy(np.concatenate([header, codes], axis=1))
    return packed if packed.nbytes < scales.nbytes else None


def unpack_scales(packed: Tensor, count: int) -> Tensor:
    """Return the steps or column scales, bfloat16 (E, count), of uint8 (E, bytes), where these are; any bytes do."""
    stored = packed.cpu().numpy()
    base, shift = _header(stored)
    codes = unpack_numbers(stored[:, HEADER_BYTES:], count).astype(np.int64)
    patterns = base + ((codes - 1) << shift)
    patterns = np.where(codes > 0, np.minimum(patterns, _NO_NUMBER), 0).astype(np.int16)
    return torch.from_numpy(patterns).view(torch.bfloat16).to(packed.device)


def repack_scales(packed: Tensor, scales: Tensor) -> Tensor:
    """Return other scales, float32 (E, N), at least 0, in place of packed ones: the nearest that the codes can say."""
    stored = packed.numpy()
    base, shift = _header(stored)
    bits = 8 * (stored.shape[1] - HEADER_BYTES) // scales.shape[1]
    patterns = scales.to(torch.bfloat16).view(torch.int16).numpy().astype(np.int64)
    most = np.minimum((1 << bits) - 2, (_LARGEST - base) >> shift)
    codes = np.clip((patterns - base + (1 << shift >> 1)) >> shift, 0, most) + 1
    codes = pack_numbers(np.where(patterns > 0, codes, 0), bits)
    return torch.from_numpy(np.concatenate([stored[:, :HEADER_BYTES], codes], axis=1))


def _header(stored: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return smallest patterns and shifts, each (E, 1); a shift beyond all patterns as the least such."""
    first, second, shift = stored[:, :HEADER_BYTES].astype(np.int64).T[:, :, None]
    return first | second << 8, np.minimum(shift, _MOST_BITS)
