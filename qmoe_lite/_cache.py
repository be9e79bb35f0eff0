"""Makes sure that numba finds a place for what it compiles: without one it cannot even be asked to keep a kernel."""

from __future__ import annotations

import os
from pathlib import Path


def provide_cache_directory() -> None:
    """Give numba a directory for this process alone where it would find none: a read-only system without a home.

    numba takes NUMBA_CACHE_DIR, else the package's own directory, else the user's cache directory.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or os.access(Path(__file__).parent, os.W_OK):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    if os.access(cache, os.W_OK):
        return
    import atexit
    import shutil
    import tempfile
    import warnings

    try:
        directory = tempfile.mkdtemp(prefix="qmoe-lite-")  # no other user may write there: numba runs what it finds
    except OSError:
        return  # numba says what it could not do
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = directory
    warnings.warn(
        "numba may write neither to the package's directory nor to the user's cache: the kernels are compiled anew in "
        "each process. Set NUMBA_CACHE_DIR to a directory that is kept.",
        stacklevel=2,
    )
