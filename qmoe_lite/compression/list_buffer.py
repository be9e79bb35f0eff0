"""Activations of all samples in one CPU tensor, addressed by sample and by expert.

QMoE, section 3.1: layer after layer is calibrated on all samples, so the activations between two blocks must be kept,
and each expert gathers its own tokens from among all of them. One big buffer makes both a slice or an index. With
samples of equal length, sample i is rows [i * tokens, (i + 1) * tokens).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.errors import FormatError, ShapeError

_CHUNK = 1 << 26  # bytes copied or compressed at a time
_HEADER = 18  # bytes of a frame's header, at most


class ListBuffer:
    """One row of activations for each token of each sample.

    Parameters
    ----------
    samples, tokens, width : int
        Samples, tokens of each, values of a token.
    dtype : torch dtype
        float32, or bfloat16 at half the memory.
    file : path, optional
        Keep the buffer in this file, mapped into memory, instead of in RAM.
    """

    def __init__(
        self, samples: int, tokens: int, width: int, dtype: torch.dtype = torch.float32, file: Path | None = None
    ) -> None:
        size = samples * tokens * width
        if file is None:
            flat = torch.empty(size, dtype=dtype)
        else:
            flat = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
        self.rows = flat.view(samples * tokens, width)
        self._samples = flat.view(samples, tokens, width)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples, tokens of each, values of a token."""
        return tuple(self._samples.shape)

    @property
    def nbytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    def read(self, samples: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return some samples' activations, shape (samples, tokens, width); a copy unless the dtypes agree."""
        return self._samples[samples].to(dtype)

    def write(self, samples: slice, values: Tensor) -> None:
        """Store some samples' activations, shape (samples, tokens, width)."""
        if values.shape != self._samples[samples].shape:
            raise ShapeError(f"values {tuple(values.shape)} do not fit {tuple(self._samples[samples].shape)}.")
        self._samples[samples] = values.to(self.rows.dtype)

    def gather(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the activations of some tokens, by row number; shape (len(rows), width)."""
        return self.rows[rows].to(dtype)

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add to the activations of some tokens; no row may occur twice."""
        self.rows[rows] = (self.rows[rows].float() + values).to(self.rows.dtype)

    def save(self, file: Path) -> None:
        """Write all rows, compressed by zstandard, to a file object's path (no rename, no fsync)."""
        import zstandard  # here, since experts run where it is not installed

        flat = self.rows.view(torch.uint8).view(-1)
        frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj(size=len(flat))
        with file.open("wb") as out:
            for start in range(0, len(flat), _CHUNK):
                out.write(frame.compress(flat[start : start + _CHUNK].numpy().data))
            out.write(frame.flush())

    @staticmethod
    def whole(file: Path) -> bool:
        """Return whether a file holds one frame of zstandard to its end, as `save` writes; all of it is read."""
        import zstandard

        found = 0
        try:
            with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as source:
                expected = zstandard.frame_content_size(raw.read(_HEADER))
                raw.seek(0)
                while piece := source.read(_CHUNK):
                    found += len(piece)
        except (OSError, zstandard.ZstdError):
            return False
        return found == expected  # the reader ends quietly where a file does

    def load(self, file: Path) -> None:
        """Read what `save` wrote.

        Raises
        ------
        FormatError
            The file is damaged or holds another number of bytes.
        """
        import zstandard

        flat = self.rows.view(torch.uint8).view(-1).numpy()
        filled = 0
        try:
            with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as source:
                while piece := source.read(_CHUNK):
                    if filled + len(piece) > len(flat):
                        break
                    flat[filled : filled + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
                    filled += len(piece)
                else:
                    if filled == len(flat):
                        return
        except (OSError, zstandard.ZstdError) as error:
            raise FormatError(f"{file} is damaged ({error}). Start over with --restart.") from error
        raise FormatError(f"{file} holds other activations than this run needs. Start over with --restart.")
