"""Numbers in as many bits as they need: against slow references, at the borders of what patterns there are, forged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specified import read_numbers

import qmoe_lite as qm
from qmoe_lite.checkpoint import format as on_disk
from qmoe_lite.coding.narrow import (
    HEADER_BYTES,
    bits_of_numbers,
    pack_numbers,
    pack_scales,
    repack_scales,
    rescaled,
    round_scales,
    unpack_numbers,
    unpack_scales,
)
from qmoe_lite.coding.validation import validate
from qmoe_lite.errors import FormatError

FINITE = st.integers(0, 0x7F7F)  # patterns of 0 and of positive bfloat16 numbers


def of_patterns(patterns) -> torch.Tensor:
    return torch.tensor(patterns, dtype=torch.int16).view(torch.bfloat16)


@given(
    st.lists(st.integers(0, 15), min_size=1, max_size=30).flatmap(
        lambda low: st.tuples(st.just(low), st.integers(0, 11))
    )
)
@settings(deadline=None, max_examples=60)
def test_numbers_come_back_in_the_bits_that_the_size_says(drawn):
    numbers = [low << drawn[1] for low in drawn[0]]
    packed = pack_numbers(np.array([numbers, numbers[::-1]]))
    bits = bits_of_numbers(packed.shape[1], len(numbers))
    assert packed[0].tolist() == naive.pack_numbers(numbers, bits)
    assert len(numbers) < 8 or bits == max(1, max(numbers).bit_length())
    unpacked = unpack_numbers(packed, len(numbers))
    assert unpacked.tolist() == [numbers, numbers[::-1]]
    assert unpacked.flags.c_contiguous
    assert read_numbers(packed[0].tobytes(), len(numbers)) == numbers


def test_sizes_that_no_numbers_have():
    assert [bits_of_numbers(size, 64) for size in (0, 7, 8, 9, 16, 127, 128, 136)] == [0, 0, 1, 0, 2, 0, 16, 0]
    assert [bits_of_numbers(size, 1) for size in (0, 1, 2, 3)] == [0, 8, 16, 0]
    assert bits_of_numbers(8, 0) == bits_of_numbers(-1, 5) == 0


@given(st.lists(FINITE, min_size=12, max_size=40), st.integers(0, 12), st.booleans())
@settings(deadline=None, max_examples=80)
def test_scales_come_back_bit_for_bit(patterns, unit, zero):
    drawn = of_patterns([(each >> unit << unit) * (not zero or i % 5 > 0) for i, each in enumerate(patterns)])
    scales = torch.stack([drawn, drawn.flip(0)])
    packed = pack_scales(scales)
    if packed is None:  # nothing is won
        assert max(naive.pack_scales(drawn.tolist())[1]).bit_length() * len(drawn) + 8 * HEADER_BYTES > 15 * len(drawn)
        return
    header, numbers = naive.pack_scales(drawn.tolist())
    bits = bits_of_numbers(packed.shape[1] - HEADER_BYTES, len(drawn))
    assert packed[0].tolist() == header + naive.pack_numbers(numbers, bits)
    assert torch.equal(unpack_scales(packed, len(drawn)).view(torch.int16), scales.view(torch.int16))
    assert torch.equal(repack_scales(packed, scales.float()), packed)


@pytest.mark.parametrize("scales", [torch.ones(2, 9), torch.ones(2, 9).half(), -torch.ones(2, 9).bfloat16()])
def test_what_has_no_codes_stays(scales):
    assert pack_scales(scales) is None
    assert pack_scales(torch.empty(4, 0, dtype=torch.bfloat16)) is None


@given(st.lists(st.floats(2**-100, 2**100, width=32), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_rounding_is_the_reference_s_and_changes_nothing_twice(values):
    found = round_scales(torch.tensor(values))
    np.testing.assert_allclose(found.numpy(), values, rtol=1 / 32)
    assert found.tolist() == [naive.round_scale(value) for value in values]
    assert torch.equal(round_scales(found), found)
    assert torch.equal(found.bfloat16().float(), found)


def test_rounding_keeps_what_must_be_seen():
    found = round_scales(torch.tensor([0.0, torch.inf, torch.nan, 3.4e38, 1.0]))
    assert found[[0, 1, 3, 4]].tolist() == [0.0, torch.inf, torch.inf, 1.0]
    assert found[2].isnan()
    everywhere = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x400000], dtype=torch.int32).view(torch.float32)
    assert round_scales(everywhere).isnan().all()  # the first is what a GPU makes


def test_the_example_s_bytes_are_those_that_are_written():
    packed = pack_scales(torch.tensor([[1, 1.125, 1.5, 0]]).bfloat16())
    assert f"`{packed.numpy().tobytes().hex(' ')}`" in (Path(on_disk.__file__).parent / "FORMAT.md").read_text()


def test_rounded_scales_take_a_few_bits():
    steps = round_scales(torch.rand(3, 96) + 0.5)  # an octave and a half: 25 patterns
    assert pack_scales(steps.bfloat16()).shape == (3, HEADER_BYTES + 96 * 5 // 8)


def test_other_scales_are_the_nearest_that_codes_can_say():
    scales = of_patterns([[0x3F80 + 8 * i for i in (1, 4, 30, 2, 7, 11, 3, 9, 5, 6)], [0] + [0x3F80] * 9])
    packed = pack_scales(scales)
    codes = [0x3F88 + 8 * i for i in range(31)]  # five bits, 0 stands for 0
    wanted = scales.float() * torch.tensor([1.02, 0.5, 3, 0.97, 1.06, 1.1, 1, 0.9, 1.04, 1.3])
    found = unpack_scales(repack_scales(packed, wanted), 10)
    patterns = wanted.bfloat16().view(torch.int16).tolist()
    assert found[0].view(torch.int16).tolist() == [min(codes, key=lambda c: (abs(c - p), -c)) for p in patterns[0]]
    assert found[1].tolist()[:4] == [0, 1, 1 + 30 / 128, 1]  # next to a single pattern all have codes


def test_scales_that_were_trained_take_no_more_bits():
    scales = torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0])
    found = rescaled(scales, torch.tensor([2.0, 0.8, 1.1, 1.013, 2.0]))
    assert found.tolist() == [0.0, 0.5, 1.125, 1.5, 3.0]
    assert rescaled(torch.zeros(3), torch.ones(3)).tolist() == [0, 0, 0]
    assert rescaled(scales, torch.full((5,), 1.01), torch.float16).tolist() == (scales * 1.01).half().tolist()


@pytest.mark.parametrize("part", ["levels", "column_scales"])
@pytest.mark.parametrize(
    "header", [(0x80, 0x7F, 0), (0, 0x80, 0), (0xFF, 0xFF, 0), (0x80, 0x3F, 16), (0x80, 0x3F, 255)]
)
def test_forged_codes_are_no_finite_numbers(part, header):
    """Infinity, what would be negative, what would be NaN; shifts beyond all patterns."""
    packed = pack_scales(of_patterns([[0x3F80, 0x3F81, 0x3F83, 0x3F80, 0x3F80, 0x3F80, 0x3F80, 0x3F80, 0x3F80]]))
    packed[0, :HEADER_BYTES] = torch.tensor(header, dtype=torch.uint8)
    forged = unpack_scales(packed, 9)[0]
    assert not forged.isfinite().all()
    digits = np.zeros((9, 9), np.int16)
    matrix = qm.encode(digits, torch.ones(9, 1).bfloat16(), qm.Dictionary.fit(digits), torch.ones(9))
    changed = {"levels": forged[:, None]} if part == "levels" else {"column_scales": forged}
    with pytest.raises(FormatError, match=f"{part} holds"):
        validate(dataclasses.replace(matrix, _validated=False, **changed))
