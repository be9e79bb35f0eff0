"""Where compiled kernels are kept; each case is a process of its own with some directories closed to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, os, sys
closed = sys.argv[1:]
whole = os.access
os.access = lambda path, mode: not any(str(path).startswith(c) for c in closed) and whole(path, mode)
seen = []
logging.getLogger("qmoe_lite").addHandler(type("H", (logging.Handler,), {"emit": lambda self, r: seen.append(r)})())
import qmoe_lite
directory = os.environ.get("NUMBA_CACHE_DIR", "")
print(directory, len(seen), oct(os.stat(directory).st_mode & 0o777) if directory else "")
"""
PACKAGE = str(Path(__file__).parents[1] / "qmoe_lite")


def run(tmp_path, *closed, **variables):
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path), **variables}
    environment.setdefault("HOME", str(tmp_path))
    command = [sys.executable, "-c", SCRIPT, *closed]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("closed", [[], [PACKAGE]], ids=["nothing is closed", "the package is"])
def test_numba_is_left_alone_where_it_finds_a_place(tmp_path, closed):
    assert run(tmp_path, *closed) == ["0"]


def test_without_a_place_a_process_gets_one_of_its_own_that_goes_with_it(tmp_path):
    directory, warned, mode = run(tmp_path, PACKAGE, str(tmp_path))
    assert (warned, mode) == ("1", "0o700")
    assert Path(directory).parent == tmp_path
    assert not Path(directory).exists()


@pytest.mark.slow
def test_numba_that_was_imported_before_is_told(tmp_path):
    after = "from qmoe_lite.coding.counting import _count_codewords_kernel as k; print(k.stats.cache_path)"
    script = "import numba\n" + SCRIPT + after
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", script, PACKAGE, str(tmp_path)]
    directory, *_, used = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert used.startswith(directory)


def test_a_home_that_may_not_be_looked_into_is_no_place(tmp_path):
    directory, *_ = run(tmp_path, PACKAGE, "/proc", HOME="/proc/1/root/x", before="import os; os.path.exists('/')\n")
    assert Path(directory).parent == tmp_path


def test_the_command_line_says_so_in_one_line(tmp_path):
    closed = "closed = sys.argv.pop(1), sys.argv.pop(1)"
    script = SCRIPT.partition("seen = []")[0].replace("closed = sys.argv[1:]", closed)
    script += "from qmoe_lite.cli.main import main\nmain()"
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", script, PACKAGE, str(tmp_path), "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qmoe-lite ")
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: numba may write neither")
