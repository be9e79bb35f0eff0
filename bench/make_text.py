"""Gather the demo's text: the prose of Python's own documentation, each paragraph once.

The three files are committed; this script is their provenance. They hold the help topics of
`pydoc_data` and the docstrings of the standard library (Python 3.11.7, PSF licence 2), split by
module, so that no module is in two files.

    python bench/make_text.py qmoe_lite/data/text
"""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
SHORTEST_DOCSTRING = 200  # characters; shorter ones are fragments, not prose


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


def split_of(name: str) -> str:
    """Train, calibration or evaluation, by a hash of the document's name."""
    share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "evaluation" if share < 14 else "calibration" if share < 28 else "train"


def main(out: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "evaluation": []}
    for name, text in documents(library):
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if len(key) > 2 and key not in seen:
                seen.add(key)
                parts[split_of(name)].append(paragraph.rstrip())
    out.mkdir(parents=True, exist_ok=True)
    for split, paragraphs in parts.items():
        (out / f"{split}.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
        print(f"{split}.txt {(out / f'{split}.txt').stat().st_size:,} bytes")
    for licence in (library / "LICENSE.txt", library.parents[1] / "LICENSE"):
        if licence.exists():
            shutil.copy(licence, out / "LICENSE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
