"""Inputs and comparisons that several test files share."""

from __future__ import annotations

import numpy as np


def draw_digits(rng, shares, shape):
    """Independent digits, int8: -1, 0, +1 where there are three shares, 0 to 3 where there are four."""
    shares = np.asarray(shares, dtype=float)
    lowest = -1 if len(shares) == 3 else 0
    return (rng.choice(len(shares), size=shape, p=shares / shares.sum()) + lowest).astype(np.int8)
