"""A directory as one file, and back: `pack` and `unpack`. FORMAT.md describes the file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qmoe_lite.checkpoint.atomic import sync_directory, write_atomically
from qmoe_lite.checkpoint.pack_frames import HEAD, Span, check_head, decode_frame, encode_frame
from qmoe_lite.checkpoint.pack_list import MOST_LIST, encode_list, is_safe, read_list
from qmoe_lite.errors import CheckpointError, FormatError, OutputError, SettingError, unreadable

_MOST_HEADER = 1 << 27  # bytes of a safetensors file's
_ALONE = 1 << 16  # bytes from which on a tensor that is no floats is a run of its own
_WORD_OF = {"BF16": 2, "F16": 2, "F32": 4}  # bytes of what is taken apart
_AHEAD = 2  # frames a thread that are in memory
_FETCH = "Fetch it again."

Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Packed:
    """What `pack` or `unpack` did.

    Attributes
    ----------
    files : int
        In the directory.
    bytes : int
        Of them all.
    packed_bytes : int
        Of the pack file.
    float_bytes, packed_float_bytes : int
        Of tensors of floats (BF16, F16, F32) among them, and what these take in the pack file; 0 of `unpack`.
    seconds : float
    """

    files: int
    bytes: int
    packed_bytes: int
    float_bytes: int
    packed_float_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def pack(
    directory: str | Path, file: str | Path, *, threads: int | None = None, progress: Told | None = None
) -> Packed:
    """Put all files of a model's directory into one, smaller by what zstd finds in tensors of floats and in text.

    Parameters
    ----------
    directory : path or str
        All files in it and below it are taken, names and bytes; links to files as the files that they lead to.
    file : path or str
        To make; it appears when it is complete.
    threads : int, optional
        That compress; by default one a core. The file is the same for any number.
    progress : callable, optional
        Called with the bytes that are done, those of all, and the name of the file that they are of.

    Returns
    -------
    Packed

    Raises
    ------
    CheckpointError
        No such directory, nothing in it, or something that is no file, cannot be read, or changes meanwhile.
    OutputError
        `file` exists already, lies in the directory, or cannot be written.
    SettingError
        `threads` below 1.

    Notes
    -----
    A few frames of 4 MiB a thread are in memory. Codes of experts are noise to zstd and are stored as they are.
    """
    started, source, target = time.perf_counter(), Path(directory), Path(file)
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists already. Name another file, or remove it.")
    if not source.is_dir():
        raise CheckpointError(f"{source} is no directory. Name one with a model.")
    workers = _workers(threads)
    if source.resolve() in target.absolute().parent.resolve().joinpath(target.name).parents:
        raise OutputError(f"{target} would lie in {source} itself. Name a place outside.")
    names = _names_in(source)
    sizes = [_size(source / name) for name in names]
    listed = [{"name": name, "size": size} for name, size in zip(names, sizes, strict=True)]
    start = encode_list(listed)
    if len(start) > MOST_LIST:
        raise CheckpointError(f"{source} holds {len(names)} files, too many for one. Name a directory with a model.")
    floats = [0, 0]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as out, ThreadPoolExecutor(workers) as pool:
            out.write(start)
            done = 0
            todo = _pieces(source, listed)
            for frame, (name, span) in _in_order(pool, _AHEAD * workers, _encode, todo):
                out.write(frame)
                done += span.length
                if span.word > 1:
                    floats[0], floats[1] = floats[0] + span.length, floats[1] + len(frame)
                if progress is not None:
                    progress(done, sum(sizes), name)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target} cannot be made: {error.strerror}. Name another place.") from error
    try:
        write_atomically(target, write)
    except OutputError as error:
        reason = getattr(error.__cause__, "strerror", None) or "the disk refuses it"
        raise OutputError(f"{target} cannot be written: {reason}. Free some space, or name another place.") from error
    return Packed(
        len(names), sum(sizes), target.stat().st_size, floats[0], floats[1], round(time.perf_counter() - started, 3)
    )


def unpack(
    file: str | Path, directory: str | Path, *, threads: int | None = None, progress: Told | None = None
) -> Packed:
    """Make the directory that a file was packed from, byte for byte.

    Parameters
    ----------
    file : path or str
        What `pack` made.
    directory : path or str
        To make; it appears when it is complete and every checksum was right.
    threads, progress
        As for `pack`.

    Returns
    -------
    Packed

    Raises
    ------
    FormatError
        It is no pack file, of a newer version, truncated, damaged or forged: nothing is left of it then.
    CheckpointError
        It cannot be read.
    OutputError
        `directory` exists already, cannot be written, or has no room.
    SettingError
        `threads` below 1.

    Notes
    -----
    Safe on any bytes: no name leads outside the directory, a file grows to 256 times its size at most, and a few frames
    of 4 MiB a thread are in memory.
    """
    started, source, target = time.perf_counter(), Path(file), Path(directory)
    workers = _workers(threads)
    if target.name in ("", "..") or target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists already. Name another directory, or remove it.")
    if not source.is_file():
        raise CheckpointError(f"{source} is no file. Name one that qmoe pack wrote.")
    try:
        with source.open("rb") as opened:
            listed = read_list(opened, source)
            total = sum(entry["size"] for entry in listed)
            temporary = _make_temporary(target, total)
            try:
                with ThreadPoolExecutor(workers) as pool:
                    frames = ((frame, None) for frame in _frames(opened, source, listed))
                    _write_files(temporary, listed, _in_order(pool, _AHEAD * workers, _decode, frames), progress)
                temporary.rename(target)
                sync_directory(target.absolute().parent)
            except OSError as error:
                text = f"{target} cannot be written: {error.strerror}. Free some space, or name another place."
                raise OutputError(text) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise unreadable(source, error) from error
    return Packed(len(listed), total, source.stat().st_size, 0, 0, round(time.perf_counter() - started, 3))


# -- what both do


def _workers(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise SettingError(f"threads is {threads}; expected at least 1.")
    return threads or len(os.sched_getaffinity(0))


def _in_order(
    pool: ThreadPoolExecutor, ahead: int, work: Callable[[int, Any], Any], items: Iterable[tuple[Any, Any]]
) -> Iterator[tuple[Any, Any]]:
    """Yield what threads make of the first of each pair, with the second, in order; `ahead` wait at a time."""
    waiting: deque[tuple[Future[Any], Any]] = deque()
    for number, (item, kept) in enumerate(items):
        waiting.append((pool.submit(work, number, item), kept))
        if len(waiting) > ahead:
            done, of = waiting.popleft()
            yield done.result(), of
    for done, of in waiting:
        yield done.result(), of


# -- pack


def _names_in(directory: Path) -> list[str]:
    """Return the names of all files below a directory, with slashes, sorted."""
    found: list[str] = []
    for root, folders, files in os.walk(directory, onerror=_not_listed):
        here = Path(root)
        for name in folders:
            if (here / name).is_symlink():
                raise CheckpointError(f"{here / name} is a link to a directory. Put the directory in its place.")
        for name in files:
            if not (here / name).is_file():
                raise CheckpointError(f"{here / name} is no file, or a link to none. Remove it.")
            found.append((here / name).relative_to(directory).as_posix())
    if (bad := next((name for name in found if not is_safe(name)), None)) is not None:
        raise CheckpointError(f"{directory / bad} lies too deep below {directory}. Pack a directory of it.")
    if not found:
        raise CheckpointError(f"{directory} holds no file. Name a directory with a model.")
    return sorted(found)


def _not_listed(error: OSError) -> None:
    raise unreadable(Path(error.filename), error) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def _encode(number: int, piece: tuple[bytes, Span]) -> bytes:
    return encode_frame(piece[0], number, piece[1])


def _pieces(directory: Path, listed: list[dict[str, Any]]) -> Iterator[tuple[tuple[bytes, Span], tuple[str, Span]]]:
    """Yield the bytes of all files, a frame at a time, with what they are."""
    for entry in listed:
        path = directory / entry["name"]
        try:
            with path.open("rb") as file:
                for span in _spans(file, path, entry["size"]):
                    file.seek(span.offset)
                    for each in span.frames():
                        raw = file.read(each.length)
                        if len(raw) != each.length:
                            raise CheckpointError(f"{path} became shorter while it was read. Pack it again.")
                        yield (raw, each), (entry["name"], each)
                if file.seek(0, os.SEEK_END) != entry["size"]:
                    raise CheckpointError(f"{path} changed while it was read. Pack it again.")
        except OSError as error:
            raise unreadable(path, error, "read") from error


def _spans(file: BinaryIO, path: Path, size: int) -> list[Span]:
    """Cut a file where its bytes change in kind: a safetensors file at its tensors, any other nowhere."""
    whole = [Span(0, size)] if size else []
    if path.suffix != ".safetensors" or size < 8:
        return whole
    start = 8 + int.from_bytes(file.read(8), "little")
    if start > min(size, _MOST_HEADER):
        return whole
    try:
        header = json.loads(file.read(start - 8))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        ends = ((value["data_offsets"], _WORD_OF.get(value["dtype"], 1)) for value in tensors)
        places = sorted((int(first), int(end), word) for (first, end), word in ends)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return whole
    spans = [Span(0, start)]
    for first, end, word in places:
        last = spans[-1]
        place = last.offset + last.length
        if start + first != place or not first <= end <= size - start or (end - first) % word:
            return whole
        if not last.text and last.word == word and (word > 1 or min(last.length, end - first) < _ALONE):
            spans[-1] = Span(last.offset, last.length + end - first, word, False)
        elif end > first:
            spans.append(Span(place, end - first, word, False))
    if (end := spans[-1].offset + spans[-1].length) < size:
        spans.append(Span(end, size - end))
    return spans


# -- unpack


def _make_temporary(target: Path, total: int) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if total > free:
            raise OutputError(f"{target} takes {total} bytes and there are {free} free. Free some space.")
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
    except OSError as error:
        raise OutputError(f"{target} cannot be made: {error.strerror}. Name another directory.") from error
    return made


def _write_files(
    directory: Path, listed: list[dict[str, Any]], frames: Iterator[tuple[bytes, Any]], progress: Told | None
) -> None:
    """Write all files; the last look at the frames finds what stands behind them."""
    done, total = 0, sum(entry["size"] for entry in listed)
    for entry in listed:
        target, left = directory / entry["name"], entry["size"]
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            while left:
                raw, _ = next(frames)
                out.write(raw)
                left, done = left - len(raw), done + len(raw)
                if progress is not None:
                    progress(done, total, entry["name"])
            out.flush()
            os.fsync(out.fileno())
    next(frames, None)


def _frames(file: BinaryIO, path: Path, listed: list[dict[str, Any]]) -> Iterator[tuple[bytes, bytes, str]]:
    """Yield head and body of all frames, as many as the files take; raise FormatError where they do not fit."""
    for entry in listed:
        left = entry["size"]
        while left:
            head = file.read(HEAD.size)
            body = b""
            try:
                length, size = check_head(head)
                body = file.read(size)
                if len(body) != size:
                    raise FormatError("it was truncated")
                if length > left:
                    raise FormatError("a frame is longer than its file")
            except FormatError as error:
                raise FormatError(f"{path} is damaged at {entry['name']}: {error}. {_FETCH}") from error
            left -= length
            yield head, body, f"{path} is damaged at {entry['name']}"
    if file.read(1):
        raise FormatError(f"{path} is damaged: it goes on behind its last frame. {_FETCH}")


def _decode(number: int, frame: tuple[bytes, bytes, str]) -> bytes:
    head, body, where = frame
    try:
        return decode_frame(head, body, number)
    except FormatError as error:
        raise FormatError(f"{where}: {error}. {_FETCH}") from error
