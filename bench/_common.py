"""What every measurement says about where it was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from qmoe_lite import __version__


def machine_line(*packages: str) -> str:
    """Name processor, system, Python and the packages' versions in one line."""
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
