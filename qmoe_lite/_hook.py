"""Makes `import qmoe_lite` enough for from_pretrained, without importing transformers.

transformers has no entry points for quantizers: one must register before a model is loaded. Importing transformers for
that would cost seconds, so its own import of the registry is awaited.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the quantizer now if transformers is loaded, else when it is."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Awaiting())


class _Awaiting(importlib.abc.MetaPathFinder):
    """Sees the registry being imported, and registers after it."""

    _looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)  # by the ordinary finders
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)  # where it fails, the next import of transformers comes here again
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        importlib.import_module("qmoe_lite.models.hf")
    except Exception as error:  # a transformers that has changed must stay importable
        warnings.warn(
            f"qmoe-lite cannot register with transformers: {error}. from_pretrained will not load compressed models; "
            "run qmoe doctor.",
            stacklevel=2,
        )
