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
from dataclasses import dataclass
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
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]*))?(?::([\w.-]+))?")  # name, configuration, split
_FIELDS = ("text", "messages", "conversations")  # of a record: the first that it has
_HOLDING = 'with "text" or "messages"'
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # roles as "conversations" name them

DEFAULT_TEXT = Path(__file__).parents[1] / "data" / "text" / "default.jsonl.xz"
DEFAULT_NAME = "the package's default text"  # what reports call it


class Continued(str):
    """Text that goes on with the document of the piece before it; other text begins one."""

    __slots__ = ()


@dataclass(frozen=True)
class Conversation:
    """Messages that a model's chat template makes text of.

    Attributes
    ----------
    messages : list of dict
        As chat templates take them: "role", "content", and what else a record has.
    place : str
        Where they stand, in words.
    """

    messages: list[dict[str, Any]]
    place: str


def read_text(source: str | Path) -> Iterator[str | Conversation]:
    """Yield the documents of a text source; a long one in pieces, all but the first of them `Continued`.

    Parameters
    ----------
    source : path or str
        A text file, UTF-8 or with a byte order mark that says otherwise; JSON with a "text" field in each line
        (.jsonl, .ndjson) or in each object of a list (.json), or with "messages", or "conversations" as ShareGPT has
        them; any of these compressed by gzip, bzip2 or xz; a directory of .txt, .md, .jsonl and .ndjson files, in which
        hidden ones are passed over; or the name of a data set on the Hugging Face hub, NAME[:CONFIGURATION[:SPLIT]]
        with the same fields for columns (needs the `datasets` package).

    Yields
    ------
    str or Conversation
        At most about a million characters. A line or record that is longer is cut before white space.

    Raises
    ------
    TextError
        The source is missing, no text, damaged, or a JSON record has neither "text" nor messages.
    """
    if not str(source).strip():
        raise TextError("the name of the text is empty. Give a UTF-8 .txt or .jsonl file, or a directory of them.")
    path = Path(source)
    if path.is_dir():
        for file in _listed(path):
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    elif (named := _HUB_NAME.fullmatch(str(source))) and path.suffix.lower() not in _NOT_HUB:
        yield from _read_hub(*named.groups())
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


def _read_file(path: Path) -> Iterator[str | Conversation]:
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


def _read_stream(raw: IO[bytes], path: Path) -> Iterator[str | Conversation]:
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
    kept, begun = "", False
    while chunk := file.read(_CHUNK):
        rest = file.readline(_LINE)
        piece = kept + chunk + rest
        cut = len(piece) if len(rest) < _LINE or rest.endswith("\n") else _place_to_cut(piece)
        kept = piece[cut:]
        yield Continued(piece[:cut]) if begun else piece[:cut]
        begun = True
    if kept:
        yield Continued(kept)


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
        yield Continued(piece) if start else piece
        start += len(piece)
    rest = text[start:] + "\n"
    yield Continued(rest) if start else rest


def _json_lines(file: io.TextIOBase, path: Path) -> Iterator[str | Conversation]:
    number = 0
    while line := file.readline(_RECORD):
        number += 1
        if len(line) == _RECORD:
            raise TextError(f"{path} line {number} has over {_RECORD:,} characters. Split it, or use a .txt file.")
        if not line.strip("\ufeff \t\r\n"):
            continue
        try:
            record = json.loads(line.lstrip("\ufeff"))  # files that were joined have marks inside
        except (ValueError, RecursionError):
            record = None
        yield from _of_record(record, f"{path} line {number}", "Fix the line, or use a plain .txt file.")


def _json_document(file: io.TextIOBase, path: Path) -> Iterator[str | Conversation]:
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
        yield from _of_record(record, f"{path} record {number}", "Fix it, or use a plain .txt file.")


def _of_record(record: Any, place: str, remedy: str) -> Iterator[str | Conversation]:
    """Yield a record's text in pieces, or its conversation; raise TextError where it has neither."""
    try:
        content = _content_of(record, place)
    except (KeyError, TypeError) as error:
        raise TextError(f"{place} is no JSON object {_HOLDING}. {remedy}") from error
    yield from _pieces(content) if isinstance(content, str) else [content]


def _content_of(record: Any, place: str) -> str | Conversation:
    """Return a record's text or conversation; raise KeyError or TypeError where it has neither."""
    if not isinstance(record, dict):
        raise TypeError
    field = next((name for name in _FIELDS if record.get(name) is not None), _FIELDS[0])
    content = record[field]
    if field == "text" and isinstance(content, str):
        return content
    if field == "text" or not isinstance(content, list) or not content:
        raise TypeError
    return Conversation([_message_of(each) for each in content], place)


def _message_of(record: Any) -> dict[str, Any]:
    """Return a message as chat templates take it; raise KeyError or TypeError where it is none."""
    if "role" not in record:
        record = {"role": _SHAREGPT.get(record["from"], record["from"]), "content": record["value"]}
    content = record.get("content")
    return {**record, "content": _LONE.sub("\ufffd", content) if isinstance(content, str) else content}


def _read_hub(name: str, configuration: str | None, split: str | None) -> Iterator[str | Conversation]:
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f"{name} is no file, and reading it from the Hugging Face hub needs the datasets package. "
            f"Check the path, or run: pip install 'qmoe-lite[calibration]'"
        ) from error
    options = {"name": configuration} if configuration else {}
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True, **options)
        for number, row in enumerate(rows, 1):
            if not set(_FIELDS).intersection(row):
                columns = ", ".join(row)
                raise TextError(f"data set {name} has no column {_HOLDING}; it has: {columns}. Export it to .jsonl.")
            if any(row.get(field) for field in _FIELDS):  # a row without text says nothing
                yield from _of_record(row, f"data set {name}, row {number}", "Export it to .jsonl, and fix it there.")
    except TextError:
        raise
    except Exception as error:  # datasets raises its own, requests' and the file system's exceptions
        raise TextError(f"{name} is no file and no readable data set: {first_line(error)}. Check the name.") from error
