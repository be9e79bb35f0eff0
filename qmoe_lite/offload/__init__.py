"""Running a model whose experts do not fit: caches, tiers, the runner that feeds them."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {  # names that other programs and our messages use
    "Runner": "runner",
    "Statistics": "statistics",
    "attach": "runner",
    "parse_size": "sizes",
    "runner_of": "runner",
    "show_size": "sizes",
}


def __getattr__(name: str) -> Any:
    # lazily: importing a module of this room must not import its others
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
