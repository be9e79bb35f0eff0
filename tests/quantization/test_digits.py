"""Digits kept five, or four, to a byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_lite.quantization.digits import count, squeeze, unsqueeze


@given(st.integers(1, 7), st.integers(1, 40), st.sampled_from([3, 4]), st.integers(0, 999))
def test_digits_come_back_and_are_counted(rows, columns, alphabet, seed):
    low = -1 if alphabet == 3 else 0
    digits = np.random.default_rng(seed).integers(low, low + alphabet, (rows, columns)).astype(np.int8)
    small = squeeze(digits, alphabet)
    assert small.nbytes == -(-digits.size // (5 if alphabet == 3 else 4))
    assert np.array_equal(unsqueeze(small, digits.shape, alphabet), digits)
    assert count(digits, alphabet).tolist() == [int((digits == low + i).sum()) for i in range(alphabet)]


@pytest.mark.parametrize("alphabet", [3, 4])
def test_every_byte_value_is_distinct(alphabet):
    per_byte = 5 if alphabet == 3 else 4
    all_groups = np.stack(np.meshgrid(*[np.arange(alphabet)] * per_byte), -1).reshape(-1, per_byte)
    digits = (all_groups - (alphabet == 3)).astype(np.int8)
    assert len(np.unique(squeeze(digits, alphabet))) == alphabet**per_byte
