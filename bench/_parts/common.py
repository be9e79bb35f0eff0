"""What every measurement reports of the machine, and the threads it may use."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from qmoe_lite import __version__
from qmoe_lite.errors import SettingError


def machine_line(*packages: str) -> str:
    """Return processor, system, Python and the packages' versions in one line."""
    versions = [f"qmoe-lite {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in packages]
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; {', '.join(versions)}"


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or "unknown processor"


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Limit torch and Numba to so many threads inside the block; raise SettingError for more than there are."""
    import numba
    import torch

    most = numba.config.NUMBA_NUM_THREADS
    if not 1 <= threads <= most:
        raise SettingError(f"threads is {threads}; expected 1 to {most} on this machine.")
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
