"""Frames of a pack file: a few megabytes of a file each, compressed by themselves, with a checksum.

Words of 2 and 4 bytes, which in a model are floats, are rotated left by a bit and taken apart: BF16's and F32's
exponent is a byte then, and the bytes of one significance stand in a stream of their own. Exponents take few values, so
zstd's Huffman codes store them in 2 to 3 bits; mantissas are noise and stay as they are (as in DFloat11,
arXiv:2504.11651, and ZipNN, arXiv:2411.05239).
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass
from struct import Struct, error

import numpy as np
import zstandard

from qmoe_lite.errors import FormatError

FRAME_BYTES = 1 << 22  # that a frame stands for at most
MOST_GROWTH = 256  # bytes that a byte of a frame stands for at most
HEAD = Struct("<IIIBxxx")  # bytes it stands for, bytes that follow, CRC-32, bytes of a word
WORDS = (1, 2, 4)  # bytes
_STREAM = Struct("<I")  # bytes of a stream; the highest bit is set where it is not compressed
_PLAIN = 1 << 31
_WORTH = 0.98  # share of a stream's bytes that zstd must get below, else it is stored plain
_own = threading.local()  # a compressor serves one thread


@dataclass(frozen=True)
class Span:
    """A run of bytes of a file that are alike.

    Attributes
    ----------
    offset, length : int
    word : int
        Bytes of a word: 1, 2 or 4.
    text : bool
        Whether repetitions are worth looking for; in tensors' bytes they are not.
    """

    offset: int
    length: int
    word: int = 1
    text: bool = True

    def frames(self) -> list[Span]:
        """Cut it into frames."""
        ends = range(self.offset, self.offset + self.length, FRAME_BYTES)
        last = self.offset + self.length
        return [Span(start, min(FRAME_BYTES, last - start), self.word, self.text) for start in ends]


def encode_frame(raw: bytes, number: int, span: Span) -> bytes:
    """Return a frame with its head.

    Parameters
    ----------
    raw : bytes
        What it stands for, whole words.
    number : int
        Its place among all frames: its checksum begins with that, so that frames cannot trade places.
    span : Span
        What the bytes are.
    """
    body = b"".join(_encode_stream(stream, span.text) for stream in _take_apart(raw, span.word))
    body = body.ljust(-(-len(raw) // MOST_GROWTH), b"\0")
    return HEAD.pack(len(raw), len(body), zlib.crc32(raw, number), span.word) + body


def decode_frame(head: bytes, body: bytes, number: int) -> bytes:
    """Return what a frame stands for.

    Raises
    ------
    FormatError
        It is damaged. No more memory is taken than its head says, which `check_head` bounds.
    """
    length, _, crc, word = HEAD.unpack(head)
    streams, place = [], 0
    try:
        for _ in range(word):
            (size,) = _STREAM.unpack_from(body, place)
            plain, size = bool(size & _PLAIN), size & ~_PLAIN
            place += _STREAM.size
            stream = body[place : place + size]
            if len(stream) != size:
                raise FormatError("a stream is longer than its frame")
            streams.append(stream if plain else _decompressed(stream, length // word))
            place += size
    except error as reason:
        raise FormatError("a stream is missing") from reason
    if any(len(stream) != length // word for stream in streams) or body[place:].strip(b"\0"):
        raise FormatError("its streams do not fit its length")
    raw = _put_together(streams, word)
    if zlib.crc32(raw, number) != crc:
        raise FormatError("checksum")
    return raw


def check_head(head: bytes) -> tuple[int, int]:
    """Return the bytes that a frame stands for and those that follow its head.

    Raises
    ------
    FormatError
        The head is cut, or says what no writer does.
    """
    if len(head) != HEAD.size:
        raise FormatError("it was truncated")
    length, size, _, word = HEAD.unpack(head)
    if word not in WORDS or not 0 < length <= FRAME_BYTES or length % word or HEAD.pack(*HEAD.unpack(head)) != head:
        raise FormatError("a frame's head is forged")
    if size * MOST_GROWTH < length or size > length + word * _STREAM.size:
        raise FormatError("a frame's size is forged")
    return length, size


def _take_apart(raw: bytes, word: int) -> list[bytes]:
    if word == 1:
        return [raw]
    words = np.frombuffer(raw, dtype=f"<u{word}")
    rotated = (words << 1 | words >> 8 * word - 1).astype(f"<u{word}").view(np.uint8).reshape(-1, word)
    return [rotated[:, place].tobytes() for place in reversed(range(word))]


def _put_together(streams: list[bytes], word: int) -> bytes:
    if word == 1:
        return streams[0]
    rotated = np.empty((len(streams[0]), word), dtype=np.uint8)
    for place, stream in zip(reversed(range(word)), streams, strict=True):
        rotated[:, place] = np.frombuffer(stream, dtype=np.uint8)
    words = rotated.view(f"<u{word}")[:, 0]
    return (words >> 1 | words << 8 * word - 1).astype(f"<u{word}").tobytes()


def _encode_stream(stream: bytes, text: bool) -> bytes:
    small: bytes = _compressor(text).compress(stream)
    if len(small) >= _WORTH * len(stream):
        return _STREAM.pack(len(stream) | _PLAIN) + stream
    return _STREAM.pack(len(small)) + small


def _compressor(text: bool) -> zstandard.ZstdCompressor:
    if not hasattr(_own, "of_text"):
        # almost no search for repetitions, which noise has not: twice as fast as level 1, and smaller
        alone = {"window_log": 18, "chain_log": 6, "hash_log": 6, "search_log": 1, "min_match": 7, "target_length": 0}
        quick = zstandard.ZstdCompressionParameters(**alone, strategy=zstandard.STRATEGY_FAST, write_content_size=True)
        _own.of_text = zstandard.ZstdCompressor(level=3)
        _own.of_noise = zstandard.ZstdCompressor(compression_params=quick)
    return _own.of_text if text else _own.of_noise


def _decompressed(stream: bytes, length: int) -> bytes:
    if not hasattr(_own, "back"):
        _own.back = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(stream) != length:  # else as much memory as it says would be taken
            raise FormatError("a stream's length is forged")
        return _own.back.decompress(stream, max_output_size=length, allow_extra_data=False)  # type: ignore[no-any-return]
    except zstandard.ZstdError as reason:
        raise FormatError("zstandard refuses it") from reason
