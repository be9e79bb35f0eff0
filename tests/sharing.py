"""What the suite's processes have in common: where kernels are kept, and things that are made once for all workers."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"qmoe_lite.cuda": ROOT / "cuda", "qmoe_lite.bench": ROOT / "bench", "qmoe_lite.cli": ROOT / "cli"}
_NUMBA = re.compile(r"^(from|import) numba\b", re.MULTILINE)


def kernel_cache() -> Path:
    """Return a folder for compiled kernels, one for each state of the sources that they are compiled from.

    numba's cache sees an edit of the file that holds a kernel, not one of a helper or a constant that it imports.
    """
    digest = hashlib.sha256()
    for path in kernel_sources():
        digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"qmoe-numba-{os.getuid()}-{digest.hexdigest()[:16]}"


def kernel_sources() -> list[Path]:
    """Return the library's files with numba code for the CPU, and those that they import.

    A CUDA kernel's code on disk is found by what it is made of (cuda/cubins.py), whatever the state of its file.
    """
    kernels = [path for path in (ROOT / "qmoe_lite").rglob("*.py") if _NUMBA.search(path.read_text(encoding="utf-8"))]
    return sorted({*kernels, *(each for path in kernels for each in _imported(path))})


def _imported(path: Path) -> list[Path]:
    """Return the library's files that a file imports when it is imported itself."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [file for name in names if (file := _file_of(name)) is not None]
    return found


def _file_of(module: str) -> Path | None:
    """Return the file of a module of the library; None for a package, a name or another library."""
    for package, folder in (*FOLDERS.items(), ("qmoe_lite", ROOT / "qmoe_lite")):
        if module.startswith(package + "."):
            path = folder.joinpath(*module.removeprefix(package + ".").split(".")).with_suffix(".py")
            return path if path.is_file() else None
    return None


def made_once(base: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Return a place that the first worker to ask for it has filled; the others wait for that.

    Parameters
    ----------
    base : Path
        This process's base directory of temporary files: those of the workers lie side by side.
    name : str
        The place's name.
    make : function
        Takes the place, which does not exist, and makes a file or directory there.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    place, done = folder / name, folder / f"{name}.done"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)  # of a worker that failed
            make(place)
            done.touch()
    return place
