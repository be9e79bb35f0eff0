"""How long work takes on a machine that others share."""

from __future__ import annotations

import time

import pytest
import torch

from qmoe_lite.inspection.tries import Tries, median, one_thread


@pytest.fixture
def clocks(monkeypatch):
    """Give what the wall's and the processor's clock say: work adds to both."""
    said = [0.0, 0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: said[0])
    monkeypatch.setattr(time, "process_time", lambda: said[1])
    return said


def takes(clocks, wall, processor=0.0):
    clocks[0] += wall
    clocks[1] += processor


@pytest.mark.parametrize(
    ("walls", "tried", "load"), [([2, 2], 2, 0), ([3, 2, 2.1], 3, 7.1 / 6 - 1), ([2, 4, 6, 8], 4, 20 / 8 - 1)]
)
def test_the_best_of_tries_that_agree_or_of_four(clocks, walls, tried, load):
    tries, left = Tries(by_processor=False), list(walls)
    assert tries.load == 0
    assert tries.best(lambda: tries.once(lambda: takes(clocks, left.pop(0)))) == 2
    assert len(walls) - len(left) == tried
    assert tries.load == pytest.approx(load)


def test_others_do_not_slow_the_processor_s_clock(clocks):
    tries, left = Tries(by_processor=True), [6.0, 4.0]
    assert tries.best(lambda: tries.once(lambda: takes(clocks, left.pop(), 2.0))) == 2
    assert tries.load == pytest.approx(10 / 4 - 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert not one_thread(torch.device("cuda"))
        by_processor = one_thread(torch.device("cpu"))  # Numba may have more of them
        assert median(lambda: takes(clocks, 3.0, 1.0), torch.device("cpu")) == (1 if by_processor else 3)
    finally:
        torch.set_num_threads(threads)
