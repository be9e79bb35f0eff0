"""Imports point one way: between rooms, and inside a room."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"qmoe_lite": "qmoe_lite", "cuda": "qmoe_lite.cuda", "cli": "qmoe_lite.cli", "bench": "qmoe_lite.bench"}
# each line may import from the lines above it; rooms on one line in the order in which they stand
ROOMS = (
    ("errors", "_cache", "_hook", "devices"),
    ("coding", "quantization", "cuda"),
    ("checkpoint",),
    ("models",),
    ("compression", "offload", "text"),
    ("inspection", "tuning"),
    ("__init__", "hf", "bench", "cli", "__main__"),
)
RANK = {room: i for i, room in enumerate(room for row in ROOMS for room in row)}
DISPATCHED = "cuda"  # a function hands its arrays to its CUDA twin: imported there, and there only


def modules() -> dict[str, Path]:
    """Each module's name below qmoe_lite, and its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(parts).removesuffix(".__init__").removeprefix("qmoe_lite").removeprefix(".")
            found[name or "__init__"] = path
    return found


def imports(path: Path) -> list[tuple[str, bool]]:
    """Each module of ours that a file imports, and whether a function does it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(n.removeprefix("qmoe_lite."), id(node) in inside) for n in names if n.startswith("qmoe_lite.")]
    return found


KNOWN = modules()


def edges() -> list[tuple[str, str]]:
    """All imports between our modules, but a function's of its CUDA twin."""
    found = []
    for name, path in KNOWN.items():
        for target, deferred in imports(path):
            while target and target not in KNOWN:
                target = target.rpartition(".")[0]
            if target and name != "__init__" and not (deferred and target.split(".")[0] == DISPATCHED):
                found.append((name, target))
    return found


def test_rooms_import_from_the_rooms_below():
    wrong = [(a, b) for a, b in edges() if RANK[a.split(".")[0]] < RANK[b.split(".")[0]]]
    assert not wrong


def test_no_circle_inside_a_room():
    pairs = {(a, b) for a, b in edges() if a != b}
    below = {name: {b for a, b in pairs if a == name} for name in KNOWN}
    while free := {name for name, targets in below.items() if not targets & below.keys()}:
        below = {name: targets for name, targets in below.items() if name not in free}
    assert not below


def test_no_module_has_the_name_of_a_public_function():
    import qmoe_lite

    names = {part for name in KNOWN if name.split(".")[0] not in FOLDERS for part in name.split(".")}
    assert not names & set(qmoe_lite.__all__)


def test_every_folder_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert listed == sorted({f"qmoe_lite.{n}".removesuffix(".__init__") for n in KNOWN if KNOWN[n].stem == "__init__"})


def test_nothing_else_is_at_the_top():
    allowed = {"qmoe_lite", "cuda", "cli", "tests", "bench", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ("build", "dist")}
    assert {name for name in found if not name.endswith(".egg-info")} <= allowed | {"CONTRIBUTING.md"}
