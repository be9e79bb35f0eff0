"""What the suite's processes have in common: where kernels are kept, and things that are made once for all workers."""

from __future__ import annotations

import ast
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    with _locked(folder / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)  # of a worker that failed
            make(place)
            done.touch()
    return place


def compile_once(dispatcher: Any, cache_file: Any) -> None:
    """Let one process at a time compile a signature of a numba function that is kept: the others find it on disk.

    Without that all workers compile all kernels. And one at a time reads or writes a function's index, of
    `IndexDataCacheFile`: two that write at once may name one signature's file for the other's.
    """
    from numba.core.compiler_lock import global_compiler_lock

    compile_ = dispatcher.compile

    @functools.wraps(compile_)
    def locked(self: Any, signature: Any) -> Any:
        folder = self._cache.cache_path
        if folder is None:
            return compile_(self, signature)
        os.makedirs(folder, exist_ok=True)
        name = f"{self.py_func.__qualname__}-{hashlib.sha256(str(signature).encode()).hexdigest()[:16]}"
        # numba's own lock first: another thread that holds it may wait for ours
        with global_compiler_lock, _locked(Path(folder) / f"{name}.lock"):
            return compile_(self, signature)

    def one_at_a_time(method: Any) -> Any:
        @functools.wraps(method)
        def locked(self: Any, *arguments: Any) -> Any:
            os.makedirs(self._cache_path, exist_ok=True)
            with _locked(Path(f"{self._index_path}.lock")):
                return method(self, *arguments)

        return locked

    dispatcher.compile = locked
    cache_file.save, cache_file.load = one_at_a_time(cache_file.save), one_at_a_time(cache_file.load)


def keep_ptx(kernel_type: Any) -> None:
    """Let a `launch.Kernel` keep its PTX on disk, found again by all that it follows from; linking takes .06 s."""
    from qmoe_lite.cuda.cubins import cubin_key

    compile_ = kernel_type.ptx
    folder = Path(os.environ["NUMBA_CACHE_DIR"]) / "ptx"
    folder.mkdir(parents=True, exist_ok=True)

    def ptx(kernel: Any, signature: str) -> str:
        name = cubin_key(kernel.py_func, signature, kernel.bounds)
        if name is None:
            return compile_(kernel, signature)
        path = folder / name
        with _locked(folder / f"{name}.lock"):
            if not path.is_file():
                written = path.with_suffix(".new")
                written.write_text(compile_(kernel, signature), encoding="utf-8")
                written.replace(path)
            return path.read_text(encoding="utf-8")

    kernel_type.ptx = ptx


def fit_once(dictionary: Any) -> None:
    """Let a process search the trees for the same digits once: of module `dictionary`, whose `fit_trees` takes .08 s.

    Runs that are killed and gone on with, and those that they are compared with, have the same digits.
    """
    fit, known = dictionary.fit_trees, dict[tuple[Any, ...], Any]()

    @functools.wraps(fit)
    def fit_trees(sizes: Any, *settings: Any) -> Any:
        key = sizes.tobytes(), *settings
        if key not in known:
            known[key] = fit(sizes, *settings)
        return known[key]

    dictionary.fit_trees = fit_trees


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which ends with the process at the latest."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
