"""Inner loops that are compiled by themselves and called by address from a parallel kernel.

Numba optimises what a parallel kernel's loop calls four times: alone, in the loop's function and in two wrappers. An
inner loop has some twenty variants, so each is compiled once, as a C function of uint64, and the parallel kernel around
it, which has few or no variants, gets its address: a third of the time, for one call a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

_INT64 = ir.IntType(64)


def compiled(function: Callable[..., Any], signature: str) -> Any:
    """Compile a function of uint64 and pointers, which returns a uint64, so that `call` can call it at its `address`.

    What the function closes over is compiled in, and is part of its name in Numba's cache. The address is good as long
    as the result is kept.
    """
    return cfunc(signature, cache=True, error_model="numpy")(function)


@intrinsic
def call(typing: Any, address: Any, arguments: Any) -> Any:
    """Return what the function at an address returns for a tuple of uint64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(_INT64, [_INT64] * arguments.count)
        function = builder.inttoptr(values[0], kind.as_pointer())
        return builder.call(function, [builder.extract_value(values[1], i) for i in range(arguments.count)])

    return types.uint64(types.uint64, arguments), generate
