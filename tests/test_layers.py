"""The library's imports point one way."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"qmoe_lite": "qmoe_lite", "cuda": "qmoe_lite.cuda", "cli": "qmoe_lite.cli", "bench": "qmoe_lite.bench"}
# each line may import from the lines above it, and from its own
ORDER = (
    ("errors", "settings"),
    ("_expert_cache", "_expert_reader", "_routing"),
    ("_words", "_vectors", "_stream", "_walk", "_products", "_columns", "codewords"),
    ("codebook",),
    ("grid", "hessian", "packed", "digits"),
    ("cuda.cubins",),
    ("cuda.launch",),
    ("cuda.solver", "cuda.codec", "cuda.matmul", "cuda"),
    ("devices", "validation", "codec", "solver", "matmul"),
    ("checkpoint", "list_buffer", "calibration", "families", "skeletons", "experts"),
    ("_ram_tier", "_dense_checks"),
    ("_gpu_tier",),
    ("offload",),
    ("hf",),
    ("_hook", "_cache"),
    ("report",),
    ("layer_compression", "block_runner", "output"),
    ("compression", "evaluation", "inspection", "generation"),
    ("conversation", "verification"),
    ("__init__", "__main__", "cli", "bench"),
)
# imports inside a function that point the other way: a method that only forwards
FORWARDED = {("packed", "codec")}
RANK = {name: i for i, row in enumerate(ORDER) for name in row}


def rank(module: str) -> int:
    """Place of a module, by its longest listed prefix."""
    while module not in RANK:
        assert "." in module, f"{module} is not in ORDER"
        module = module.rpartition(".")[0]
    return RANK[module]


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            name = package if path.stem == "__init__" and folder != "qmoe_lite" else f"{package}.{path.stem}"
            found.append((name.removeprefix("qmoe_lite.").removeprefix("qmoe_lite") or "__init__", path))
    return found


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "qmoe_lite" or node.module == "qmoe_lite.cli"
            names += [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
    return [name for name in names if name.startswith("qmoe_lite.")]


def test_imports_point_one_way():
    for name, path in modules():
        for target in imported(path):
            target = target.removeprefix("qmoe_lite.")
            if target.startswith("__") or name == "__init__":
                continue
            if (name, target) in FORWARDED:
                continue
            assert rank(target) <= rank(name), f"{name} imports {target}"


def test_no_module_has_the_name_of_a_public_function():
    import qmoe_lite

    assert not {path.stem for path in (ROOT / "qmoe_lite").glob("*.py")} & set(qmoe_lite.__all__)


def test_nothing_else_is_at_the_top():
    allowed = {"qmoe_lite", "cuda", "cli", "tests", "bench", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ("build", "dist")}
    assert {name for name in found if not name.endswith(".egg-info")} <= allowed | {"CONTRIBUTING.md"}
