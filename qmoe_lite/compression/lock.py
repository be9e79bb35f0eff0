"""One run at a time on one OUT: a lock beside OUT.partial that ends with its holder, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmoe_lite.compression.ranks import ALONE, Ranks
from qmoe_lite.errors import OutputError

_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without locks answer


def check_free(target: Path) -> None:
    """Raise OutputError where no directory of this name can be made."""
    if target.name in ("", ".."):
        raise OutputError(f"{target} names no new directory. Give OUT a name of its own.")
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists already. Name another directory, or remove it.")


@contextmanager
def locked(partial: Path, ranks: Ranks = ALONE) -> Iterator[str | None]:
    """Hold `OUT.partial.lock` while the work of OUT.partial goes on; the file is removed in the end.

    Of a run's ranks the first holds it for all, and all see that they mean the same directory.

    The kernel frees the lock of a process that is killed: its file may stay, and the next run takes it.

    Parameters
    ----------
    partial : Path
        OUT.partial; need not exist.
    ranks : Ranks, optional
        Of the run.

    Yields
    ------
    str or None
        A note for the report, where the file system has no locks.

    Raises
    ------
    OutputError
        Another run holds it, or the file cannot be made.
    """
    if not ranks.first:
        ranks.meet_in(partial.parent)
        yield None
        return
    file = partial.with_name(f"{partial.name}.lock")
    made = [each for each in file.parents if not each.exists()]
    try:
        handle, note = _take(file, partial)
        try:
            ranks.meet_in(partial.parent)
            yield note
        finally:
            file.unlink(missing_ok=True)  # while it is held: see `_take`
            os.close(handle)
    finally:
        for each in made:  # of a run that failed before it wrote something
            with suppress(OSError):
                each.rmdir()


def _take(file: Path, partial: Path) -> tuple[int, str | None]:
    """Open and lock the file; return its handle, and a note where it could not be locked."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return handle, f"{file.parent} has no file locks: nothing kept other runs away from {partial.name}"
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "a process that just began"
                os.close(handle)
                if error.errno not in _BUSY:
                    raise
                raise OutputError(
                    f"{partial} is being written by another run, {holder}. Wait for its end, or name another OUT."
                ) from error
            if _is(handle, file):
                break
            os.close(handle)  # the holder before removed the file after it was opened here
    except OSError as error:
        raise OutputError(f"{file} cannot be made: {error.strerror}. Name another directory.") from error
    with suppress(OSError):  # on a full disk the lock holds without its holder's name
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    return handle, None


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False
