"""Fields of a table entry: the scalar core that the CPU kernels and their CUDA twins share.

An entry is a uint64. Byte 0 is the number of weights; bytes 1 to 7 are one field per nonzero, `digits * position +
slot`, where an absent nonzero is the zero slot of position 0. Scalars in, scalars out, unsigned throughout.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(inline="always")
def entry_length(entry: np.uint64) -> np.uint32:
    """Return the number of weights that an entry stands for; 0 where the code stands for nothing."""
    return np.uint32(entry & np.uint64(255))


@njit(inline="always")
def entry_field(entry: np.uint64, index: int) -> np.uint32:
    """Return the field of nonzero `index` (0 to 6)."""
    return np.uint32((entry >> np.uint64(8 * index + 8)) & np.uint64(255))


@njit(inline="always")
def field_position(field: np.uint32, digits: int) -> np.uint32:
    """Return a field's position from the codeword's start: `field // digits`, without a division in the loop."""
    return np.uint32((field * np.uint32((1023 + digits) // digits)) >> np.uint32(10))


@njit(inline="always")
def field_slot(field: np.uint32, position: np.uint32, digits: int) -> np.uint32:
    """Return a field's slot, given its position; `digits - 1` is the zero slot."""
    return np.uint32(field - position * np.uint32(digits))
