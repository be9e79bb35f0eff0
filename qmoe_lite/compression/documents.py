"""Text as files, directories and data sets hold it, in pieces of a bounded size.

What a file is decides its content, where that can be told: compression, byte order marks, tables. Its name, in upper or
lower case, decides between plain text and JSON.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from qmoe_lite.errors import TextError, first_line

_CHUNK = 1 << 20  # characters that are yielded at a time, up to the next end of a line or record
_LINE = 1 << 17  # characters of a line beyond that; what is longer is cut at white space
_RECORD = 1 << 28  # characters of a line or document of JSON, which is parsed as a whole
_LINES = (".jsonl", ".ndjson")
_LISTED = (".txt", ".md", *_LINES)  # read in a directory; a .json there is as likely to describe the texts
_PACKED = (".gz", ".bz2", ".xz")
_TABLES = (".parquet", ".arrow", ".feather")
_NOT_HUB = (*_LISTED, ".json", *_PACKED, *_TABLES, ".zst", ".zip")  # a missing file so named is no data set's name

_OPENERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_EXPORT = "Export its text column to .jsonl, e.g. by pandas: read_parquet(..).to_json(.., orient='records', lines=True)"
_REFUSED = {  # what a file begins with: what it is, what to do
    b"PAR1\x15": ("a Parquet table", _EXPORT),
    b"ARROW1\0\0": ("an Arrow table", _EXPORT.replace("parquet", "feather")),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "Decompress it first: zstd -d"),
    b"PK\3\4": ("a zip archive", "Unpack it first: unzip"),
    b"%PDF-": ("a PDF document", "Extract its text first, e.g. by pdftotext"),
    b"version https://git-lfs": ("a Git LFS pointer and not the text itself", "Fetch it: git lfs pull"),
}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_LONE = re.compile("[\ud800-\udfff]")  # halves of a pair: no character, and nothing that a tokenizer takes


def read_text(source: str | Path) -> Iterator[str]:
    """Yield the documents of a text source; a long one in pieces.

    Parameters
    ----------
    source : path or str
        A text file, UTF-8 or with a byte order mark that says otherwise; JSON with a "text" field in each line
        (.jsonl, .ndjson) or in each object of a list (.json); any of these compressed by gzip, bzip2 or xz; a directory
        of .txt, .md, .jsonl and .ndjson files, in which hidden ones are passed over; or the name of a data set on the
        Hugging Face hub (needs the `datasets` package).

    Yields
    ------
    str
        At most about a million characters. A line or record that is longer is cut before white space.

    Raises
    ------
    TextError
        The source is missing, no text, damaged, or a JSON record has no "text".
    """
    if not str(source).strip():
        raise TextError("the name of the text is empty. Give a UTF-8 .txt or .jsonl file, or a directory of them.")
    path = Path(source)
    if path.is_dir():
        for file in _listed(path):
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) and path.suffix.lower() not in _NOT_HUB:
        yield from _read_hub(str(source))
    else:
        raise TextError(f"text {path} does not exist. Give a UTF-8 .txt or .jsonl file, or a directory of them.")


def _listed(directory: Path) -> list[Path]:
    """Return a directory's text files; nothing hidden, such as .ipynb_checkpoints and what lies in it."""
    shown = sorted(
        path
        for path in directory.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(directory).parts) and path.is_file()
    )
    if found := [path for path in shown if _kind(path) in _LISTED]:
        return found
    if tables := [path for path in shown if path.suffix.lower() in _TABLES]:
        raise TextError(f"{directory} holds no text file but tables, such as {tables[0].name}. {_EXPORT}")
    raise TextError(f"{directory} holds no .txt, .md or .jsonl file. Name a text file or a directory of them.")


def _kind(path: Path) -> str:
    """Return a file's suffix in lower case, without that of its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def _read_file(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as raw:
            head = raw.peek(64)  # type: ignore[attr-defined]  # of a pipe too
            opener = next((each for start, each in _OPENERS.items() if head.startswith(start)), None)
            if opener is None:
                yield from _read_stream(raw, path)
            else:
                with opener(raw) as unpacked:
                    yield from _read_stream(io.BufferedReader(unpacked), path)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text. Convert it, e.g. with iconv.") from error
    except _DAMAGED as error:
        raise TextError(f"{path} is damaged: {first_line(error)}. Fetch or make it again.") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror or first_line(error)}.") from error


def _read_stream(raw: IO[bytes], path: Path) -> Iterator[str]:
    """Yield the texts of a file that is not compressed any more."""
    head = raw.peek(64)  # type: ignore[attr-defined]
    for start, (what, remedy) in _REFUSED.items():
        if head.startswith(start):
            raise TextError(f"{path} is {what}. {remedy}.")
    encoding = next((each for mark, each in _MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise TextError(f"{path} is no text, or UTF-16 without a byte order mark: it has zero bytes. Convert it.")
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        if (kind := _kind(path)) in _LINES:
            yield from _json_lines(file, path)
        elif kind == ".json":
            yield from _json_document(file, path)
        else:
            yield from _plain(file)


def _plain(file: io.TextIOBase) -> Iterator[str]:
    kept = ""
    while chunk := file.read(_CHUNK):
        rest = file.readline(_LINE)
        piece = kept + chunk + rest
        cut = len(piece) if len(rest) < _LINE or rest.endswith("\n") else _place_to_cut(piece)
        kept = piece[cut:]
        yield piece[:cut]
    if kept:
        yield kept


def _place_to_cut(text: str) -> int:
    """Return where the last word begins, with the white space before it, as tokenizers take it; else the end."""
    for at in range(len(text) - 2, max(len(text) - _LINE, 0), -1):
        if text[at].isspace() and not text[at + 1].isspace():
            return at
    return len(text)


def _pieces(text: str) -> Iterator[str]:
    """Cut a record that is long, and end it as a line does."""
    text = _LONE.sub("\ufffd", text)
    start = 0
    while len(text) - start > _CHUNK + _LINE:
        piece = text[start : start + _CHUNK]
        piece = piece[: _place_to_cut(piece)]
        start += len(piece)
        yield piece
    yield text[start:] + "\n"


def _json_lines(file: io.TextIOBase, path: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(_RECORD):
        number += 1
        if len(line) == _RECORD:
            raise TextError(f"{path} line {number} has over {_RECORD:,} characters. Split it, or use a .txt file.")
        if not line.strip("\ufeff \t\r\n"):
            continue
        try:
            text = _text_of(json.loads(line.lstrip("\ufeff")))  # files that were joined have marks inside
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f'{path} line {number} is no JSON object with a "text" field.'
            raise TextError(f"{problem} Fix the line, or use a plain .txt file.") from error
        yield from _pieces(text)


def _json_document(file: io.TextIOBase, path: Path) -> Iterator[str]:
    """Yield the texts of an object, of a list of them, or of one in each line, which is called .json too."""
    content = file.read(_RECORD)
    if len(content) == _RECORD:
        raise TextError(f"{path} has over {_RECORD:,} characters. Make it a .jsonl file, an object a line.")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        yield from _json_lines(io.StringIO(content), path)
        return
    for number, record in enumerate(found if isinstance(found, list) else [found], 1):
        try:
            text = _text_of(record)
        except (KeyError, TypeError) as error:
            problem = f'{path} record {number} is no JSON object with a "text" field.'
            raise TextError(f"{problem} Fix it, or use a plain .txt file.") from error
        yield from _pieces(text)


def _text_of(record: Any) -> str:
    """Return a record's text; raise KeyError or TypeError where it has none."""
    text = record["text"]
    if not isinstance(text, str):
        raise TypeError
    return text


def _read_hub(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f"{name} is no file, and reading it from the Hugging Face hub needs the datasets package. "
            f"Check the path, or run: pip install 'qmoe-lite[calibration]'"
        ) from error
    try:
        for row in datasets.load_dataset(name, split="train", streaming=True):
            if "text" not in row:
                raise TextError(f'data set {name} has no "text" column; it has: {", ".join(row)}. Export it to .jsonl.')
            yield from _pieces(row["text"] or "")
    except TextError:
        raise
    except Exception as error:  # datasets raises its own, requests' and the file system's exceptions
        raise TextError(f"{name} is no file and no readable data set: {first_line(error)}. Check the name.") from error
