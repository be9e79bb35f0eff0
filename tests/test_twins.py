"""A CPU function and its CUDA twin have one face."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TWINS = [
    ("quantization.solver", "solve_block"),
    ("coding.codec", "encode"),
    ("coding.codec", "decode"),
    ("coding.codec", "decode_dense"),
    ("coding.matmul", "decode_matmul"),
]
# a CUDA kernel's twin lies in the file of the same name, or here
CPU_KERNELS = {"_decode_kernel": "decode_kernels", "_count_codewords_kernel": "counting", "block_kernel": "columns"}

# they are about the GPU itself, or hold a part of a twin
NO_TWINS = ("__init__", "cubins", "experts", "gather", "intrinsics", "launch", "packets", "static", "variants")
WINDOWS = ("window_packets", "windows", "windows_product")  # their kernels have no public face of their own
WITH_KERNELS = ("codec", "gather", "solver")  # the product's kernel lies beside it


def stems():
    return sorted(path.stem for path in (ROOT / "cuda").glob("*.py") if path.stem not in (*NO_TWINS, *WINDOWS))


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("stem", "name"), TWINS)
def test_signatures_are_equal(stem, name):
    cpu = getattr(importlib.import_module(f"qmoe_lite.{stem}"), name)
    twin = getattr(importlib.import_module(f"qmoe_lite.cuda.{stem.rpartition('.')[2]}"), name)
    spelled = [str(inspect.signature(function)).replace("torch.", "") for function in (cpu, twin)]
    assert spelled[0] == spelled[1]
    assert twin.__doc__.startswith(f"CUDA twin of :func:`qmoe_lite.{stem}.{name}`")


def test_every_public_twin_is_listed():
    import qmoe_lite.cuda

    assert {name for _, name in TWINS} | {"available", "reason"} == set(qmoe_lite.cuda.__all__)
    assert qmoe_lite.cuda.__all__ == sorted(qmoe_lite.cuda.__all__)
    assert {stem.rpartition(".")[2] for stem, _ in TWINS} == set(stems())
    for name in qmoe_lite.cuda.__all__:
        assert callable(getattr(qmoe_lite.cuda, name))


def test_no_file_but_those_of_twins_and_packets_has_kernels():
    paths = (ROOT / "cuda").glob("*.py")
    found = {path.stem for path in paths if any(name.endswith("_kernel") for name in functions(path))}
    assert found == {*WITH_KERNELS, "packets", *WINDOWS}


@pytest.mark.parametrize("stem", WITH_KERNELS)
def test_every_kernel_has_its_name_on_the_cpu(stem):
    kernels = [name for name in functions(ROOT / "cuda" / f"{stem}.py") if name.endswith("_kernel")]
    assert kernels
    for name in kernels:
        [path] = (ROOT / "qmoe_lite").rglob(f"{CPU_KERNELS.get(name, stem)}.py")
        found = functions(path)
        assert name.lstrip("_") in {function.lstrip("_") for function in found}


@pytest.mark.parametrize("stem", [*stems(), "experts", "gather", "variants", *WINDOWS])
def test_the_twin_of_a_file_does_not_import_it(stem):
    tree = ast.parse((ROOT / "cuda" / f"{stem}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported
    assert not imported & {f"qmoe_lite.{name}" for name, _ in TWINS}
    assert "qmoe_lite.coding.gather" not in imported
    assert not any(module and module.startswith("numba.cuda") for module in imported)
