"""`python bench/soak.py`: its verdict."""

from __future__ import annotations

from qmoe_lite.bench.soak import Tally, show


def steady(growth: float = 0.0, **found: object) -> Tally:
    """What clients saw in 60 s, and memory that grows in the last third."""
    memory = [(float(t), int(5e8), int(3e8 * (1 + growth * (t >= 40)))) for t in range(60)]
    return Tally(answers=[(t + 0.5, 10) for t in range(60)], memory=memory, **found)


def test_memory_that_grows_and_answers_that_differ_are_failures(capsys):
    assert show(steady(0.015), 60, "title")
    assert "+1.50%" in capsys.readouterr().out
    assert not show(steady(0.03), 60, "title")
    assert not show(steady(wrong=["'x' is not 'y'"]), 60, "title")
    assert "1 wrong" in capsys.readouterr().out
    assert not show(steady(failed=["OSError: 503"]), 60, "title")
    assert not show(Tally(memory=steady().memory), 60, "title")
