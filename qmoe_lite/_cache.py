"""Makes sure that numba finds a place for what it compiles: without one it cannot even be asked to keep a kernel."""

from __future__ import annotations

import os
import sys


def provide_cache_directory() -> None:
    """Set a directory for this process alone where numba would find none: a read-only system without a home.

    numba takes NUMBA_CACHE_DIR, else the package's own directory, else the user's cache directory.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or os.access(os.path.dirname(__file__), os.W_OK):
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    while not os.path.exists(cache) and cache != os.path.dirname(cache):
        cache = os.path.dirname(cache)
    if os.access(cache, os.W_OK):
        return
    import atexit
    import logging
    import shutil
    import tempfile

    try:
        directory = tempfile.mkdtemp(prefix="qmoe-lite-")  # no other user may write there: numba runs what it finds
    except OSError:
        return  # numba says what it could not do
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = directory
    if "numba" in sys.modules:  # it has read the variable already
        sys.modules["numba"].config.CACHE_DIR = directory
    # to a log and not as a warning, which would show a line of whoever imports: unless told otherwise Python prints it
    logging.getLogger(__name__).warning(
        "note: numba may write neither to the package's directory nor to the user's cache: the kernels are compiled "
        "again in each process. Set NUMBA_CACHE_DIR to a directory that is kept."
    )
