"""What trainings with frozen digits share: Adam's moments, and how the learning rate rises and falls."""

from __future__ import annotations

import math

BETAS = (0.9, 0.95)  # of Adam; there are few steps
_WARM = 0.1  # of the steps, in which the learning rate rises; then it falls to zero as a cosine


def share_of_rate(number: int, steps: int) -> float:
    """Return the share of the highest learning rate in a step, from 0 on."""
    warm = max(1, round(_WARM * steps))
    if number < warm:
        return (number + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (number - warm) / max(1, steps - warm)))
