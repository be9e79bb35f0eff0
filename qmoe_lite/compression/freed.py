"""What the allocator keeps of freed memory, returned to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    with suppress(AttributeError, OSError):  # glibc alone has it
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    return None


def return_freed() -> None:
    """Return freed memory to the system, where the allocator can.

    Notes
    -----
    glibc maps large pieces apart only until the first of them is freed; from then on those of up to 32 MB, Hessians
    among them, are cut out of its heap, which keeps them. Two layers of a Qwen3-30B's shapes took .3 GB more than one.
    """
    if (trim := _trim()) is not None:
        trim(0)
