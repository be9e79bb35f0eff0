"""How a kernel's helpers are compiled: for the kernel alone, which takes two thirds of the time."""

from __future__ import annotations

from functools import partial

from numba import njit

# without what only a caller from Python or from C would need
inlined = partial(njit, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
