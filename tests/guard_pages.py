"""Memory between pages that nobody may touch: a byte too far ends the process."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(size, at_end):
    """Bytes between two pages that may not be touched, at the end of what lies between them or at its beginning."""
    room = max(-(-size // PAGE), 1) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    for offset in (0, room + PAGE):
        if LIBC.mprotect(ctypes.c_void_p(whole.ctypes.data + offset), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (room - size if at_end else 0)
    return whole[start : start + size]
