"""The learning rate of tuning: which is tried, what makes it lower, and what a new try begins with."""

from __future__ import annotations

import pytest
import torch

import qmoe_lite as qm
from qmoe_lite.errors import NotFiniteError
from qmoe_lite.tuning.learning_rate import HIGHEST, Held, train_at_its_rate
from qmoe_lite.tuning.train import Measured, Step, Tuner

STEPS = 8


class Told:
    """A tuner whose divergences are told to it: (after half of the steps, at the end) of each try."""

    def __init__(self, *tries):
        self.tries, self.found, self.rates, self.undone = iter(tries), None, [], 0

    def train(self, drawn, dense, *, rate, progress, goes_on, **how):
        half, end = next(self.tries)
        self.rates.append(rate)
        if half != half:
            raise NotFiniteError("the loss is NaN.")
        self.found = half
        progress(Step(STEPS // 2, STEPS, 0.0))
        if goes_on is not None and not goes_on():
            return True
        self.found = end
        progress(Step(STEPS, STEPS, 0.0))
        return False

    def measure(self, samples, dense):
        return Measured(self.found, [], [], [])

    def stored(self):
        return {"found": torch.tensor(self.found)}

    def reset(self):
        self.undone += 1


@pytest.mark.parametrize(
    ("tries", "rate", "tried", "given_up"),
    [
        ([(0.9, 0.8)], None, [1], [0, 0]),
        ([(1.1, None), (0.9, 0.8)], None, [1, 3], [0, 4, 4]),
        ([(0.9, 1.1), (0.9, 0.8)], None, [1, 3], [0, 0, 8, 8]),
        ([(1.1, None), (1.1, None), (1.1, 0.8)], None, [1, 3, 9], [0, 4, 8, 8]),
        ([(0.9, 1.0), (1.1, None), (1.1, 1.2)], None, [1, 3, 9], [0, 0, 8, 12, 12]),
        ([(1.1, 1.2)], 0.02, [0.5], [0, 0]),
        ([(float("nan"), None), (0.9, 0.8)], None, [1, 3], [0, 0]),
    ],
    ids=["first", "half", "end", "twice", "never", "given", "nan"],
)
def test_a_rate_at_which_the_divergence_rises_is_given_up(tries, rate, tried, given_up):
    tuner, seen = Told(*tries), []
    how = {"rate": rate, "epochs": 1, "batch": 1, "seed": 0}
    stored, after, used = train_at_its_rate(
        tuner, None, [], Held(None, []), 1.0, **how, progress=lambda *step: seen.append(step)
    )
    assert tuner.rates == pytest.approx([HIGHEST / each for each in tried])
    assert used == tuner.rates[-1]
    assert tuner.undone == len(tried) - 1
    assert [each[2] for each in seen] == given_up
    assert seen[-1][1] == used
    assert after.divergence == pytest.approx(float(stored["found"])) == tries[-1][1]


def test_what_is_undone_is_as_it_was_loaded(compressed_causal):
    tuner = Tuner(qm.load(compressed_causal("qwen3_moe"), dtype=torch.float32))
    trained = [each for group in tuner.parameters(0.01) for each in group["params"]]
    before = [each.detach().clone() for each in trained]
    with torch.no_grad():
        for each in trained:
            each.add_(0.1)
    tuner.reset()
    assert all(torch.equal(*pair) for pair in zip(trained, before, strict=True))
