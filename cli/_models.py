"""Models as commands open them: compressed or dense, with their tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qmoe_lite.cli._options import Placement


def open_model(name: str, dtype: str = "float32", placement: Placement | None = None) -> tuple[Any, Any]:
    """Load a compressed or dense model, with its tokenizer; `dtype` is that of all but compressed experts."""
    import torch

    from qmoe_lite.checkpoint.finding import find_model
    from qmoe_lite.compression.calibration import open_tokenizer
    from qmoe_lite.devices import find_device, moved
    from qmoe_lite.errors import SettingError
    from qmoe_lite.models.building import read_config
    from qmoe_lite.models.dense import load_dense
    from qmoe_lite.models.skeletons import open_checkpoint
    from qmoe_lite.offload.loading import load

    placement = placement or Placement()
    path = find_model(name)
    family, checkpoint = open_checkpoint(path, auto=True)
    quantized = checkpoint.config.get("quantization_config") or {}
    if quantized and (method := quantized.get("quant_method")) != "qmoe":
        raise SettingError(f"{path} is quantised by {method}. Name a dense model or one that qmoe compressed.")
    read_config(str(path))  # before the tokenizer, which transformers would blame
    tokenizer = open_tokenizer(path)
    if quantized:
        return load(path, device=placement.device, dtype=getattr(torch, dtype), **placement.given()), tokenizer
    if placement.given():
        option = next(iter(placement.given())).replace("_", "-")
        raise SettingError(f"{path} is a dense model, and --{option} is for compressed ones. Compress it first.")
    where = find_device(placement.device)
    model = load_dense(path, family, checkpoint, getattr(torch, dtype))
    return moved(model, where, path), tokenizer


@contextmanager
def watched(model: Any, stats: bool = False, trace: str | None = None) -> Iterator[None]:
    """Record the routing while the model is used; in the end print what its runner counted, and close it."""
    from qmoe_lite.cli import _output
    from qmoe_lite.errors import SettingError
    from qmoe_lite.offload.runner import runner_of

    runner = runner_of(model)
    if trace is not None:
        if runner is None:
            raise SettingError("--trace records what a cache is asked for. Give --expert-cache or --offload too.")
        runner.trace(trace)
    try:
        yield
    finally:
        if runner is not None:
            if stats and runner.statistics.passes:
                for line in runner.statistics.lines():
                    _output.note(f"qmoe: {line}")
            runner.close()
