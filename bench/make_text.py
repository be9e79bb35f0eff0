"""Gather the package's texts from Python's own documentation and sources.

The files are committed; this script is their provenance (Python 3.11.7, PSF licence 2). The demo's
three hold the help topics of `pydoc_data` and the docstrings of the standard library, each paragraph
once, split by module, so that no module is in two files.

default.jsonl.xz, which `qmoe compress` takes without --calibration, holds such prose and, of other
modules, the sources: a record a topic or module. Nothing of it is in evaluation.txt.

    python bench/make_text.py qmoe_lite/data/text
"""

from __future__ import annotations

import ast
import hashlib
import json
import lzma
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
SHORTEST_DOCSTRING = 200  # characters; shorter ones are fragments, not prose
PROSE, SOURCE = 600_000, 480_000  # characters of the default text
LONGEST_SOURCE = 30_000  # characters of a module, so that it is of many
OTHERS = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)  # a module that names its own is left out


def documents(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each help topic and of each module's docstrings, in a fixed order."""
    from pydoc_data.topics import topics

    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        yield f"topic {name}", topics[name]
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        text = "\n\n".join(d for d in found if d and len(d) >= SHORTEST_DOCSTRING)
        if text:
            yield str(relative), text


def share_of(name: str) -> int:
    """A number from 0 to 99, by a hash of the document's name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100


def split_of(name: str) -> str:
    """Train, calibration or evaluation."""
    share = share_of(name)
    return "evaluation" if share < 14 else "calibration" if share < 28 else "train"


def paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Yield each paragraph's words, by which it is known, and the paragraph."""
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) > 2:
            yield key, paragraph.rstrip()


def unseen(text: str, seen: set[str]) -> Iterator[str]:
    """Yield the paragraphs that did not occur before."""
    for key, paragraph in paragraphs(text):
        if key not in seen:
            seen.add(key)
            yield paragraph


def default_records(library: Path, held_out: set[str]) -> list[str]:
    """Prose of some modules and the sources of others, mixed; no paragraph of those held out."""
    drawn = sorted(documents(library), key=lambda known: hashlib.sha256(known[0].encode()).digest())
    chosen: list[str] = []
    prose_left, source_left, seen = PROSE, SOURCE, set(held_out)
    for name, prose in drawn:
        if split_of(name) == "evaluation":
            continue
        if share_of(name) < 60 or name.startswith("topic "):
            text = "\n\n".join(unseen(prose, seen)) if prose_left > 0 else ""
            prose_left -= len(text)
        else:
            text = (library / name).read_text(encoding="utf-8") if source_left > 0 else ""
            known = any(key in held_out for key, _ in paragraphs(prose))
            if known or len(text) > LONGEST_SOURCE or OTHERS.search(text):
                continue
            source_left -= len(text)
        chosen += [text] if text else []
    return chosen


def main(out: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "evaluation": []}
    for name, text in documents(library):
        parts[split_of(name)] += unseen(text, seen)
    out.mkdir(parents=True, exist_ok=True)
    for split, found in parts.items():
        (out / f"{split}.txt").write_text("\n\n".join(found) + "\n", encoding="utf-8")
        print(f"{split}.txt {(out / f'{split}.txt').stat().st_size:,} bytes")
    held_out = {key for each in parts["evaluation"] for key, _ in paragraphs(each)}
    records = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in default_records(library, held_out)]
    packed = lzma.compress("".join(records).encode(), preset=9 | lzma.PRESET_EXTREME)
    (out / "default.jsonl.xz").write_bytes(packed)
    print(f"default.jsonl.xz {len(packed):,} bytes, {len(records)} records of {sum(map(len, records)):,} characters")
    for licence in (library / "LICENSE.txt", library.parents[1] / "LICENSE"):
        if licence.exists():
            shutil.copy(licence, out / "LICENSE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
