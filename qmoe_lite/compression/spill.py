"""Rows of activations on disk, where memory is too small for those of all samples.

Every row has a place and a checksum of its own: an expert gathers its tokens' rows, and adds to them, without the
others being read. Frames of zstandard would have to be decoded whole for that, once for each expert, and could not be
written in their place; they save 7% of float32 activations. The system's page cache is the second buffer: it is asked
for what comes next, and writes what was given to it, while a block computes.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.checkpoint.weight_file import read_ahead
from qmoe_lite.errors import FormatError, OutputError, SettingError


def check_folder(spill: str | Path | None) -> None:
    """Raise SettingError unless a folder for activations is there, or none is asked for."""
    if spill is not None and not Path(spill).is_dir():
        raise SettingError(f"spill is {spill}, which is no directory. Make it, or name another.")


class SpilledRows:
    """Rows in a file that has no name: it is gone with this object, and with the process, however that ends.

    Parameters
    ----------
    folder : path
        Where the file lies. All of its room is taken at once.
    rows, width : int
        Shape; zeros at first.
    dtype : torch dtype
        Of a value.

    Raises
    ------
    OutputError
        There is no such folder, or no room in it.
    """

    def __init__(self, folder: Path, rows: int, width: int, dtype: torch.dtype) -> None:
        self._folder, self._width, self._dtype = folder, width, dtype
        self._bytes = width * dtype.itemsize
        self._word = np.dtype(f"u{math.gcd(8, self._bytes)}")
        self._weights = _odd_numbers(self._bytes // self._word.itemsize)
        self._sums = np.zeros(rows, dtype=np.uint64)
        with self._told(f"{rows * self._bytes / 1e9:.2f} GB of activations cannot be kept"):
            file = tempfile.TemporaryFile(dir=folder, prefix="qmoe-spill-", buffering=0)  # noqa: SIM115
            weakref.finalize(self, file.close)
            self._file = file.fileno()
            if rows * self._bytes:
                os.posix_fallocate(self._file, 0, rows * self._bytes)

    def get(self, where: slice | Tensor) -> Tensor:
        """Return some rows, by a span or by their numbers, shape (len(where), width).

        Raises
        ------
        FormatError
            A row is not what was written.
        OutputError
            The disk does not answer.
        """
        numbers = self._numbers(where)
        found = torch.empty(len(numbers), self._width, dtype=self._dtype)
        flat = found.view(torch.uint8).view(-1).numpy().data
        runs = list(_runs(numbers))
        with self._told("activations cannot be read"):
            for first, count in runs:  # the disk gets all of them before it is waited for
                read_ahead(self._file, first * self._bytes, count * self._bytes)
            begin = 0
            for first, count in runs:
                self._read(flat[begin : begin + count * self._bytes], first * self._bytes)
                begin += count * self._bytes
            if isinstance(where, slice):
                read_ahead(self._file, where.stop * self._bytes, len(numbers) * self._bytes)
        damaged = numbers[self._sums_of(flat) != self._sums[numbers]]
        if len(damaged):
            text = f"activations in {self._folder} were damaged on the disk (row {damaged[0]}). Check the disk"
            raise FormatError(f"{text}, then run the same command again: it goes on from the last finished group.")
        return found

    def put(self, where: slice | Tensor, values: Tensor) -> None:
        """Store some rows, shape (len(where), width), of this dtype; no row may occur twice.

        Raises
        ------
        OutputError
            The disk does not take them.
        """
        numbers = self._numbers(where)
        flat = values.contiguous().view(torch.uint8).view(-1).numpy().data
        begin = 0
        with self._told("activations cannot be written"):
            for first, count in _runs(numbers):
                self._write(flat[begin : begin + count * self._bytes], first * self._bytes)
                begin += count * self._bytes
        self._sums[numbers] = self._sums_of(flat)

    def _sums_of(self, flat: memoryview) -> NDArray[np.uint64]:
        """Return the sum of each row's words, each times an odd number, modulo 2^64: no damaged word goes unseen."""
        words = np.frombuffer(flat, self._word).reshape(-1, len(self._weights))
        sums: NDArray[np.uint64] = np.einsum("ij,j->i", words, self._weights)
        return sums

    def _numbers(self, where: slice | Tensor) -> NDArray[np.int64]:
        if isinstance(where, slice):
            return np.arange(*where.indices(len(self._sums)), dtype=np.int64)
        numbers: NDArray[np.int64] = where.numpy()
        return numbers

    def _read(self, into: memoryview, offset: int) -> None:
        while into:
            if not (done := os.preadv(self._file, [into], offset)):
                raise OSError(errno.EIO, "the file has become shorter")
            into, offset = into[done:], offset + done

    def _write(self, values: memoryview, offset: int) -> None:
        while values:
            done = os.pwrite(self._file, values, offset)
            values, offset = values[done:], offset + done

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "Name another folder, with more room, by --spill; finished work is kept."
            raise OutputError(f"{what} in {self._folder}: {error.strerror}. {remedy}") from error


def _runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first of each run of numbers that follow one another, and how many they are."""
    if len(numbers):
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
        counts = np.diff(starts, append=len(numbers))
        yield from zip(numbers[starts].tolist(), counts.tolist(), strict=True)


def _odd_numbers(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(1 << 63, size=count, dtype=np.uint64) * 2 + 1
