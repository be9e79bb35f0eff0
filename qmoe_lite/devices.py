"""Which device work is done on, and what torch.compile goes around."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from qmoe_lite.errors import DeviceError, SettingError

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile go around a function, as `torch.compiler.disable` does, which imports torch._dynamo at once.

    That import takes as long as torch itself, and a command that compiles nothing, such as `qmoe inspect`, would wait.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compile leaves a function out by
    return call


def find_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device that a name stands for.

    Parameters
    ----------
    device : str or torch device
        "auto": the first GPU that torch and the kernels can use, else the CPU (`qmoe doctor` says why). "cpu". "cuda"
        or "cuda:1": that GPU.

    Raises
    ------
    DeviceError
        The GPU that was named cannot be used; says what to install.
    SettingError
        Another name.
    """
    name = str(device)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or not (number.isdecimal() or name == "cuda")):
        raise SettingError(f"device is {name}; expected auto, cpu, cuda or cuda:N.")
    from qmoe_lite.cuda import launch  # not before: it imports the compiler

    index = int(number or 0)
    missing = launch.reason(index)
    if missing is not None and name == "auto":
        return torch.device("cpu")
    if missing is not None:
        raise DeviceError(f"device {name}: {missing}")
    return torch.device("cuda", index)


def moved(model: Any, device: torch.device, path: Path) -> Any:
    """Move a model that was loaded from `path` to a device; raise DeviceError where it does not fit."""
    try:
        return model if device.type == "cpu" else model.to(device)
    except torch.OutOfMemoryError as error:
        free, whole = (round(each / 1e9, 1) for each in torch.cuda.mem_get_info(device))
        message = f"{path} does not fit {device}, where {free} of {whole} GB are free. "
        raise DeviceError(message + "Use device cpu, or free GPU memory.") from error
