"""From a dense model to a compressed directory: calibration, block by block, layer by layer."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {  # names that other programs and our messages use
    "Settings": "settings",
    "Progress": "settings",
    "compress": "run",
}


def __getattr__(name: str) -> Any:
    # lazily: importing a module of this room must not import its others
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
