"""No stream, table or list of exceptions makes a kernel touch what lies outside its tensors."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import window_book

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.trees import FAULTS, read_trees
from qmoe_lite.errors import QMoEError

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_kernels_touch_no_byte_outside_a_matrix_s_tensors():
    """Tensors lie against pages that may not be touched, on either side; in a process of its own, which would die."""
    command = [sys.executable, "-X", "faulthandler", str(TESTS / "guarded.py"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == 12
    accepted, refused = (sum(int(line.split()[place]) for line in told) for place in (-4, -2))
    assert accepted > 20, "the forgeries that validation accepts are those that matter"
    assert refused > 100


@pytest.mark.parametrize(("at_end", "place"), [(True, 100), (False, -1)])
def test_a_byte_outside_would_end_the_process(at_end, place):
    code = (
        "import ctypes, guard_pages\n"
        f"place = guard_pages.guarded(100, {at_end}).ctypes.data\n"
        "assert ctypes.string_at(place, 100) == bytes(100)\n"
        f"ctypes.string_at(place + {place}, 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True)
    assert done.returncode == -signal.SIGSEGV, done.stderr


def test_any_bytes_are_trees_or_a_fault():
    """And trees' tables have no string longer than a row, no window outside the table."""
    rng, quotas = np.random.default_rng(0), np.array([256, 128, 128])
    found = set()
    honest = window_book(8)
    for i in range(300):
        kinds = rng.integers(0, rng.integers(2, 8), rng.integers(0, 60), dtype=np.uint8)
        if i % 3 == 0:
            kinds = np.frombuffer(honest.kinds, dtype=np.uint8).copy()
            kinds[rng.integers(len(kinds), size=rng.integers(1, 3))] = rng.integers(0, 256)
        clip, starts = (honest.clip, np.array(honest.starts)) if i % 3 == 0 else (2, np.array([0, 1, 2]))
        own = np.array(honest.quarters) << honest.bits >> 2 if i % 3 == 0 else quotas
        fault, trees = read_trees(kinds, clip, 8, starts, own)
        found.add(fault)
        if fault == 0:
            assert (trees.lengths <= 8).all()
            assert trees.numbers.max() < own.sum()
            assert ((trees.first_children >= 0) & (trees.first_children <= len(kinds))).all()
    assert found >= FAULTS.keys() - {5}, found


@pytest.mark.parametrize(
    ("starts", "quarters"),
    [
        ((0, 70000), (2, 2)),
        ((0, 1, 1), (2, 1, 1)),
        ((1,), (4,)),
        ((), ()),
        ((0,), (5,)),
        ((0, 1), (4, 0)),
        ((0, 1), (6, -2)),
        ((0, 1), (2,)),
        ((0, 1, 2, 3, 4), (1, 1, 1, 1, 0)),
        ((0, True), (2, 2)),
        ((0, 1.0), (2, 2)),
        ((0, 1), (2**70, 4 - 2**70)),
    ],
    ids=str,
)
def test_classes_that_are_none_are_refused(starts, quarters):
    book = window_book(8)
    with pytest.raises(QMoEError) as caught:
        Dictionary(book.bits, book.clip, book.longest, starts, quarters, book.kinds)
    assert "\n" not in str(caught.value)
