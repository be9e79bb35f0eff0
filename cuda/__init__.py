"""Numba CUDA twins of the CPU kernels, for people with device arrays of their own; imported as `qmoe_lite.cuda`.

Importing this package needs no GPU and no numba-cuda; `available()` says whether its functions can run, and `reason()`
what is missing.
"""

from __future__ import annotations

if __name__ == "cuda":  # the repository root is on sys.path: join NVIDIA's namespace package `cuda`
    __path__ = __import__("pkgutil").extend_path(__path__, __name__)
else:
    import importlib
    from typing import TYPE_CHECKING, Any

    if TYPE_CHECKING:
        from qmoe_lite.cuda.codec import decode as decode
        from qmoe_lite.cuda.codec import decode_dense as decode_dense
        from qmoe_lite.cuda.codec import encode as encode
        from qmoe_lite.cuda.launch import available as available
        from qmoe_lite.cuda.launch import reason as reason
        from qmoe_lite.cuda.matmul import decode_matmul as decode_matmul
        from qmoe_lite.cuda.solver import solve_block as solve_block

    _HOMES = {
        "available": "launch",
        "decode": "codec",
        "decode_dense": "codec",
        "decode_matmul": "matmul",
        "encode": "codec",
        "reason": "launch",
        "solve_block": "solver",
    }

    __all__ = ["available", "decode", "decode_dense", "decode_matmul", "encode", "reason", "solve_block"]

    def __getattr__(name: str) -> Any:
        # lazily: the compiler's packages take a second to import
        if name in _HOMES:
            return getattr(importlib.import_module(f"qmoe_lite.cuda.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'qmoe_lite.cuda' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return list(__all__)
