"""The choice of the dead zone: outputs as large as the dense experts'."""

from __future__ import annotations

import json
import math

import pytest

from qmoe_lite.compression.dead_zone import USUAL, DeadZone


def energy(width, inflation, slope):
    return math.exp(inflation - slope * width)


@pytest.mark.parametrize(
    ("inflation", "slope", "expected"), [(0.3, 5.0, 0.06), (0.2, 5.0, 0.04), (-0.1, 3.0, 0.0), (2.0, 5.0, 0.15)]
)
def test_the_first_group_decides_by_what_two_widths_do(inflation, slope, expected):
    zone = DeadZone()
    zone.begin(energy(0.0, inflation, slope), energy(USUAL, inflation, slope))
    assert zone.known
    assert zone.width == pytest.approx(expected)
    assert zone.slope == pytest.approx(slope)


def test_layers_that_inflate_more_widen_it_step_by_step():
    zone = DeadZone()
    zone.begin(energy(0.0, 0.1, 5.0), energy(USUAL, 0.1, 5.0))
    for _ in range(12):
        zone.finish_layer(energy(zone.width, 0.4, 5.0))
        zone = DeadZone(**json.loads(json.dumps(zone.to_json())))  # as a resumed run
    assert zone.width == pytest.approx(0.08, abs=0.001)


def test_outputs_of_zeros_and_infinite_ones_leave_it_within_bounds():
    for found in (0.0, 1e300, math.inf):
        zone = DeadZone()
        zone.begin(found, found)
        zone.finish_layer(found)
        assert 0.0 <= zone.width <= 0.15
