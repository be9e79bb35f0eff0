"""The control of the rate, on layers whose bits are a known function of the step."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qmoe_lite.compression.rate import LEAST, MOST, TOLERANCE, RateControl, check_rate, entropy, first_step
from qmoe_lite.errors import SettingError


def bits_of(scale: float, step: float) -> float:
    """Entropy of a Gaussian of that scale, rounded to multiples of the step, and what metadata take."""
    edges = (np.arange(-400, 402) - 0.5) * step / scale
    mass = np.diff([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
    mass = mass[mass > 1e-300]
    return float(-(mass @ np.log2(mass))) * 1.04 + 0.05


def run(rate: float, scales: list[float], weights: list[int], shares: list[float]) -> tuple[float, int, list[float]]:
    """Control layers of these scales as the compressor does; return the mean bits, how many solves, and all steps."""
    control, solves, steps = RateControl(rate, sum(weights), shares=shares), 0, []
    for i, (scale, count) in enumerate(zip(scales, weights, strict=True)):
        tried: list[tuple[float, float]] = []
        while True:
            tried.append((control.step, bits_of(scale, control.step)))
            solves += 1
            if not control.first and i < len(scales) - 1:
                break
            step = control.corrected(tried, control.aim)
            if step is None:
                break
            control.step = step
        aim = control.aim
        control.step, bits = min(tried, key=lambda t: abs(t[1] - aim))
        steps.append(control.step)
        control.finish_layer(count, bits * count)
        control = RateControl(**json.loads(json.dumps(control.to_json())))  # as a resumed run
    return control.done_bits / control.done_weights, solves, steps


@pytest.mark.parametrize("rate", [0.6, 0.8, 1.0, 1.3, 2.0, 3.0, 4.0])
def test_the_model_takes_what_was_asked_for(rate):
    rng = np.random.default_rng(int(10 * rate))
    for layers in (1, 2, 3, 30):
        scales = np.exp(rng.normal(0, 0.15, layers)).tolist()
        found, solves, _ = run(rate, scales, rng.integers(1000, 5000, layers).tolist(), [])
        assert found == pytest.approx(rate, rel=0.01)
        assert solves <= layers + 8


@pytest.mark.parametrize("rate", [0.8, 1.3, 2.0, 3.0, 4.0])
def test_layers_whose_steps_differ_take_what_was_asked_for_together(rate):
    shares = [-0.5, -0.1, 0.3, 0.0, 0.3]
    found, solves, steps = run(rate, [1.0] * 5, [1000] * 5, shares)
    assert found == pytest.approx(rate, rel=0.01)
    assert solves <= 13
    apart = np.log2(steps) - np.mean(np.log2(steps))
    np.testing.assert_allclose(apart, shares, atol=0.12 if rate > 1 else 0.3)  # the table is of other weights
    assert shares == [-0.5, -0.1, 0.3, 0.0, 0.3]  # they are not the control's to change


def test_a_layer_of_zeros_decides_nothing():
    control = RateControl(2.0, 200)
    step = control.step
    control.finish_layer(100, 200.0, tells=False)
    assert (control.step, control.first, control.aim) == (step, True, 2.0)


def test_tries_on_both_sides_close_in_on_the_aim():
    control, tried = RateControl(1.0, 100), [(1.0, 2.0), (4.0, 0.5)]
    while (step := control.corrected(tried, 1.0)) is not None:
        assert 1.0 < step < 4.0
        tried.append((step, 2.0 if step < 2 else 0.5))  # bits that jump
    assert len(tried) == 5


def test_a_rate_out_of_range_is_refused():
    for rate in (0.59, 4.01, math.nan, "2", True):
        with pytest.raises(SettingError, match=r"expected 0\.6 to 4 stored bits"):
            check_rate(rate)
    assert (check_rate(LEAST), check_rate(4)) == (LEAST, MOST)


def test_entropy_is_in_bits():
    assert entropy(np.array([4, 0, 4])) == 1.0
    assert entropy(np.array([7, 0])) == 0.0


def test_smaller_steps_for_more_bits():
    steps = [first_step(bits) for bits in np.linspace(0.3, 4.2, 40)]
    assert steps == sorted(steps, reverse=True)


def test_a_group_is_solved_a_bounded_number_of_times():
    control = RateControl(2.0, 100)
    tried = []
    while control.corrected([*tried, (control.step, 9.0)], 2.0) is not None:
        tried.append((control.step, 9.0))
        control.step = control.corrected(tried, 2.0)
    assert len(tried) < 6
    assert control.corrected([(1.0, 2.0 * (1 + TOLERANCE / 2))], 2.0) is None


@pytest.mark.parametrize("scale", [16.0, 1 / 16])
def test_the_last_layer_is_not_ruined_for_the_rate(scale):
    control, steps = RateControl(2.0, 300), []
    for layer in range(3):
        tried = []
        while True:
            tried.append((control.step, bits_of(scale if layer == 2 else 1.0, control.step)))
            step = control.corrected(tried, control.aim) if layer != 1 else None
            if step is None:
                break
            control.step = step
        aim = control.aim
        control.step, bits = min(tried, key=lambda t: abs(t[1] - aim))
        steps.append(control.step)
        control.finish_layer(100, 100 * bits)
    neighbours = math.sqrt(steps[0] * steps[1])
    assert neighbours / 2.001 < steps[2] < 2.001 * neighbours
    assert abs(control.done_bits / 300 - 2.0) > 0.02


def test_a_state_without_the_mean_step_is_taken_up():
    values = RateControl(2.0, 300).to_json()
    del values["octave"]
    assert RateControl(**values).octave == 0.0
