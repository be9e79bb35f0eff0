"""Reads a model's files into memory of ours: exactly the bytes asked for.

A file is opened once, so one that is deleted later can still be read. Nothing is mapped: a file that got shorter is an
error at the read, where a map would end the process. Where the file system allows it the page cache is passed by
(O_DIRECT); else what was read is dropped from it, so that a budget of memory is what is used.
"""

from __future__ import annotations

import errno
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.devices import uncompiled
from qmoe_lite.errors import CheckpointError, unreadable

PAGE = 4096  # bytes; what O_DIRECT wants places, lengths and addresses to be multiples of
THREADS = 4
_ASKED = 1 << 17  # bytes that the system is asked for at a time: of more it takes what it reads at once
_PIECE = 1 << 20  # bytes of a checksum at a time; they stay in a core's cache


def room(length: int) -> int:
    """Bytes that `WeightFile.read_into` may need for so many: it reads whole pages, from before to behind them."""
    return -(-length // PAGE) * PAGE + PAGE


def page_memory(size: int) -> NDArray[np.uint8]:
    """Anonymous memory of this process alone that begins on a page; none of it is resident before it is touched."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)


def read_ahead(file: int, offset: int, length: int) -> None:
    """Let the system read some bytes of an open file into its cache, while something else is computed."""
    for start in range(offset, offset + length, _ASKED):
        os.posix_fadvise(file, start, min(_ASKED, offset + length - start), os.POSIX_FADV_WILLNEED)


def ask_for(path: Path, offset: int, length: int) -> None:
    """Do what `read_ahead` does, of a file that need not be open."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # who reads it will say so
        return
    try:
        read_ahead(file, offset, length)
    finally:
        os.close(file)


class WeightFile:
    """One open file of a model.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CheckpointError
        It cannot be opened.
    """

    _close = staticmethod(os.close)  # a file that is left at the interpreter's end has no `os` any more

    def __init__(self, path: Path) -> None:
        self.path = path
        self.direct = True
        self._file = self._direct_file = -1
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._direct_file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system knows no O_DIRECT
                    raise
                self.direct = False
        except OSError as error:
            raise unreadable(path, error) from error
        self.size = os.fstat(self._file).st_size

    def check_size(self) -> None:
        """Raise CheckpointError if the file has become shorter: touching a map of it would end the process."""
        if (size := os.fstat(self._file).st_size) < self.size:
            raise self._shrunk(size)

    def _shrunk(self, size: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} had {self.size} bytes and now has {size}: it was truncated while the model ran. "
            "Restore the file and load the model again."
        )

    def _ended(self, end: int) -> CheckpointError:
        if (size := os.fstat(self._file).st_size) < self.size:
            return self._shrunk(size)
        return CheckpointError(
            f"{self.path} has {size} bytes of at least {end}: it was truncated. Fetch the file again."
        )

    def read(self, offset: int, length: int) -> bytearray:
        """Read some bytes through the page cache, and drop them from it."""
        data = bytearray(length)
        self._read_cached(memoryview(data), offset)
        return data

    def read_into(self, memory: NDArray[np.uint8], offset: int, length: int) -> int:
        """Read into memory that begins on a page and has `room(length)` bytes; return where in it the bytes begin.

        Raises
        ------
        CheckpointError
            The file has become shorter, or cannot be read.
        """
        skip = offset % PAGE
        if self.direct:
            whole = -(-(skip + length) // PAGE) * PAGE
            try:
                done = os.preadv(self._direct_file, [memory[:whole].data], offset - skip)
            except OSError:  # a file system that promised O_DIRECT and does not keep it
                self.direct = False
            else:
                if done >= skip + length:
                    return skip
        self._read_cached(memory[skip : skip + length].data, offset)
        return skip

    def crc32(self, offset: int, length: int) -> int:
        """CRC-32 of some bytes. They stay in the page cache: whoever asks is about to use a map of them.

        Raises
        ------
        CheckpointError
            The file has become shorter, or cannot be read.
        """
        crc = 0
        for piece in self.pieces(offset, length):
            crc = zlib.crc32(piece, crc)
        return crc

    def pieces(self, offset: int, length: int, memory: NDArray[np.uint8] | None = None) -> Iterator[memoryview]:
        """Read some bytes a piece at a time. They stay in the page cache.

        All pieces but the last are of one size, a multiple of every dtype's. They follow each other in `memory`, if
        there is one; else each overwrites the one before.

        Raises
        ------
        CheckpointError
            The file has become shorter, or cannot be read.
        """
        view = memoryview(bytearray(min(length, _PIECE))) if memory is None else memory[:length].data
        for start in range(0, length, _PIECE):
            piece = view[: length - start] if memory is None else view[start : start + _PIECE]
            self._fill(piece, offset + start)
            yield piece

    def _read_cached(self, view: memoryview, offset: int) -> None:
        self._fill(view, offset)
        os.posix_fadvise(self._file, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                step = os.preadv(self._file, [view[done:]], offset + done)
                if step == 0:
                    raise self._ended(offset + len(view))
                done += step
        except OSError as error:
            raise unreadable(self.path, error, "read") from error

    def close(self) -> None:
        for file in (self._file, self._direct_file):
            if file >= 0:
                self._close(file)
        self._file = self._direct_file = -1

    def __del__(self) -> None:
        self.close()


class SizeGuard:
    """A hook before a forward pass, or before a state is given: raises CheckpointError where a file has become shorter.

    Touching a map of such a file would end the process. A copy of the model has tensors of its own, and nothing to
    guard; to make it is to touch them.

    Attributes
    ----------
    files : dict, path to WeightFile
    """

    def __init__(self, paths: list[Path]) -> None:
        self.files = {path: WeightFile(path) for path in paths}

    @uncompiled
    def __call__(self, *arguments: Any) -> None:
        for file in self.files.values():
            file.check_size()

    def __reduce__(self) -> tuple[Any, ...]:
        self()
        return SizeGuard, ([],)
