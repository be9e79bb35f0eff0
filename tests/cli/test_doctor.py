"""`qmoe doctor`: what it says of a sound and of a broken installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import metadata, version

import pytest

from qmoe_lite.cli.doctor import CheckResult, in_words

HEAVY = ("torch", "numba", "numpy", "transformers")


@pytest.fixture
def first(tmp_path, monkeypatch):
    """A directory in front of the installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def break_package(monkeypatch, first, name, code):
    """Let the next import of a package run `code`."""
    (first / name).mkdir()
    (first / name / "__init__.py").write_text(code)
    monkeypatch.delitem(sys.modules, name, raising=False)


def rows_of(printed):
    return {row["name"]: row for row in json.loads(printed)["findings"]}


def python(*lines, **variables):
    """Run statements in a fresh interpreter; give (exit code, stdout, stderr)."""
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    return done.returncode, done.stdout, done.stderr


def hidden(*names):
    """Statements that run the command as if packages were not installed."""
    return (
        f"import sys; sys.modules.update(dict.fromkeys({names}))",
        "sys.argv = ['qmoe', 'doctor', '--json']",
        "from qmoe_lite.cli.main import main; main()",
    )


@pytest.mark.slow
def test_a_sound_installation_is_ok_without_a_gpu():
    code, printed, noted = python(*hidden(), CUDA_VISIBLE_DEVICES="")
    assert (code, noted) == (0, "")
    assert json.loads(printed)["ok"]
    rows = rows_of(printed)
    required = {*HEAVY, "safetensors", "zstandard", "rich", "typer"}
    assert all(rows[name]["status"] == "ok" and rows[name]["required"] for name in required)
    assert rows["torch"]["found"].startswith(version("torch"))
    assert {"system", "processor", "SIMD", "memory", "Python", "threads", "numba cache", "NVIDIA driver"} <= set(rows)
    for row in rows.values():
        assert row["status"] == "ok" or row["follows"], "what is not ok has a consequence"


def test_doctor_has_help_and_an_example(run):
    code, printed, _ = run("doctor", "--help")
    assert code == 0
    assert "Example: qmoe doctor" in " ".join(printed.split())


def test_rows_fit_80_columns_and_the_last_line_is_the_verdict(run):
    code, printed, _ = run("doctor")
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.splitlines()[-1] == "Everything that qmoe-lite needs is installed."


def test_a_missing_required_package_is_exit_code_1_and_says_what_to_run(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, printed, noted = run("doctor")
    assert (code, noted) == (1, "")
    assert "missing zstandard" in printed
    assert "Run: pip install 'zstandard>=" in printed
    assert printed.splitlines()[-1] == "qmoe-lite does not work yet: see zstandard."


def test_a_missing_optional_package_is_no_error(run, monkeypatch):
    optional = {"matplotlib": "plot", "numba_cuda": "cuda", "datasets": "calibration"}
    for name in optional:
        monkeypatch.setitem(sys.modules, name, None)
    code, printed, _ = run("doctor", "--json")
    assert code == 0
    for name, extra in optional.items():
        row = rows_of(printed)[name.replace("_", "-")]
        assert (row["status"], row["run"]) == ("missing", f"pip install 'qmoe-lite[{extra}]'")
        assert row["follows"]


def test_without_the_packages_that_all_else_needs_every_row_is_there():
    code, printed, noted = python(*hidden(*HEAVY))
    assert (code, noted) == (1, "")
    rows = rows_of(printed)
    for name in HEAVY:
        assert rows[name]["status"] == "missing"
        assert rows[name]["run"].startswith(f"pip install '{name}")
    assert rows["threads"]["found"] == "ModuleNotFoundError: import of numba halted; None in sys.modules"
    assert rows["zstandard"]["status"] == "ok"
    assert {"system", "processor", "memory", "numba cache", "CUDA compiler", "NVIDIA driver"} <= set(rows)


def test_without_packaging_versions_cannot_be_compared(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    code, printed, _ = run("doctor", "--json")
    assert code == 1
    assert rows_of(printed)["packaging"]["run"] == "pip install packaging"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('compiled for\\nanother machine')", "RuntimeError: compiled for"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("import a_package_that_is_nowhere", "ModuleNotFoundError: No module named 'a_package_that_is_nowhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_package_whose_import_raises_is_a_finding_in_one_line(run, first, monkeypatch, code, words):
    break_package(monkeypatch, first, "safetensors", code)
    status, printed, _ = run("doctor", "--json")
    assert status == 1
    row = rows_of(printed)["safetensors"]
    assert (row["status"], row["found"]) == ("broken", words)
    assert row["run"].endswith("--force-reinstall")


@pytest.mark.parametrize(("number", "status"), [("0.1", "too old"), ("99.0", "too new")])
def test_versions_are_compared_with_the_ranges_that_the_package_declares(run, first, number, status):
    (first / "transformers.dist-info").mkdir()  # found before the real one's
    lines = ("Metadata-Version: 2.1", "Name: transformers", f"Version: {number}", "")
    (first / "transformers.dist-info" / "METADATA").write_text("\n".join(lines))
    code, printed, _ = run("doctor", "--json")
    assert code == 1
    row = rows_of(printed)["transformers"]
    declared = next(t for t in metadata("qmoe-lite").get_all("Requires-Dist") if t.startswith("transformers"))
    assert (row["found"], row["status"]) == (number, status)
    assert row["run"] == f"pip install '{declared}'"
    assert row["follows"].endswith(" is needed.")


CACHE = """
import os, sys
os.environ[sys.argv[1]] = sys.argv[2]
from qmoe_lite.cli.doctor import _cache
[row] = _cache()
print(row.status, row.found, row.follows, row.run)
"""


@pytest.mark.slow
def test_the_cache_is_where_numba_has_tried_to_write(tmp_path, forks):
    found = forks.run(CACHE, "NUMBA_CACHE_DIR", tmp_path / "cache").stdout
    assert found.startswith(f"ok {tmp_path}/cache/")
    (tmp_path / "file").write_text("")
    printed = forks.run(CACHE, "NUMBA_CACHE_DIR", tmp_path / "file" / "cache").stdout
    assert printed.startswith("broken ")
    assert "file/cache, where nothing can be written. export NUMBA_CACHE_DIR=" in printed
    # what numba does where neither the package's folder nor the user's can be written
    printed = forks.run(CACHE, "NUMBA_CACHE_LOCATOR_CLASSES", "ZipCacheLocator").stdout
    assert printed.startswith("missing cannot cache function")
    assert "The kernels cannot be imported. export NUMBA_CACHE_DIR=" in printed


def test_a_command_to_run_is_never_broken_into_lines():
    command = "pip install " + "x" * 90
    *others, last = in_words(CheckResult("a", "b " * 60, "missing", False, "c " * 60, command))
    assert last.strip() == f"Run: {command}"
    assert max(map(len, others)) <= 80
