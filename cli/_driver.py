"""What NVIDIA's driver reports, asked through no package: it is found even where torch or numba-cuda is broken."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Driver:
    """The driver and its GPUs.

    Attributes
    ----------
    version : str
        Such as 580.65.06; "unknown" where the kernel does not report it.
    cuda : (int, int)
        Newest CUDA that it runs.
    gpus : list of (str, (int, int))
        Name and compute capability of each, in the order in which torch counts them.
    """

    version: str
    cuda: tuple[int, int]
    gpus: list[tuple[str, tuple[int, int]]]


def find_driver() -> Driver | None:
    """Ask libcuda.so.1; None where there is none."""
    try:
        library: Any = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    file = Path("/sys/module/nvidia/version")
    number, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        count.value = 0  # a driver without a GPU, or one that CUDA_VISIBLE_DEVICES hides
    return Driver(
        version=file.read_text(encoding="ascii").strip() if file.is_file() else "unknown",
        cuda=(number.value // 1000, number.value % 1000 // 10),
        gpus=[_gpu(library, index) for index in range(count.value)],
    )


def _gpu(library: Any, index: int) -> tuple[str, tuple[int, int]]:
    device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    for figure, attribute in zip((major, minor), _CAPABILITY, strict=True):
        library.cuDeviceGetAttribute(ctypes.byref(figure), attribute, device)
    return name.value.decode(errors="replace"), (major.value, minor.value)
