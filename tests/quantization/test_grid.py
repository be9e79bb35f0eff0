"""Grids: what each may represent, where it rounds, and how it is stored."""

import dataclasses
import json

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_lite.errors import FormatError, NotFiniteError, SettingError, ShapeError
from qmoe_lite.quantization.grid import (
    MinMaxTernary,
    MinMaxTwoBit,
    Quantized,
    dequantize,
    grid_from_config,
)
from qmoe_lite.quantization.rounding import nearest_digits

GRIDS = [MinMaxTernary(), MinMaxTwoBit()]
ids = [grid.name for grid in GRIDS]
rows = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30)


def quantise(row, grid):
    weight = torch.tensor(np.array([row], dtype=np.float32))
    levels = grid.fit(weight)
    digits = nearest_digits(weight, grid.rounding(levels))
    return digits[0].tolist(), levels[0].tolist(), dequantize(digits, levels)[0].tolist()


@given(rows)
@settings(deadline=None, max_examples=200)
def test_ternary_rounds_each_weight_as_the_reference_does(row):
    row = np.float32(row)
    digits, levels, weight = quantise(row, MinMaxTernary())
    reference = naive.ternary_levels(row)
    assert levels == reference
    assert list(zip(digits, weight, strict=True)) == [naive.round_ternary(float(value), reference) for value in row]


@pytest.mark.parametrize("columns", [1, 27, 28, 29, 63, 1000])
def test_two_bit_rounds_each_weight_as_the_reference_does(columns):
    row = np.random.default_rng(columns).standard_normal(columns).astype(np.float32)
    digits, _, weight = quantise(row, MinMaxTwoBit())
    expected = [naive.round_two_bit(float(value), naive.two_bit_affine(row)) for value in row]
    assert digits == [digit for digit, _ in expected]
    np.testing.assert_allclose(weight, [value for _, value in expected], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [MinMaxTernary, MinMaxTwoBit])
@given(rows)
@settings(deadline=None, max_examples=100)
def test_every_weight_takes_the_nearest_value_of_its_row(grid, dtype, row):
    _, levels, weight = quantise(row, grid(dtype))
    for value, rounded in zip(np.float32(row).tolist(), weight, strict=True):
        distance = abs(value - naive.nearest_value(value, [0.0, *levels]))
        assert abs(value - rounded) <= distance * (1 + 1e-6) + 1e-30


@pytest.mark.parametrize("grid", [MinMaxTernary, MinMaxTwoBit])
@given(rows)
@settings(deadline=None, max_examples=100)
def test_no_digit_stands_for_a_level_of_zero(grid, row):
    digits, levels, weight = quantise(row, grid(torch.float16))
    assert all((digit == 0) == (value == 0) for digit, value in zip(digits, weight, strict=True))
    assert levels == sorted(levels)


def test_a_weight_exactly_halfway_becomes_zero():
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    assert quantise([1.0, 0.5, -0.25, -0.5, above, -0.26], MinMaxTernary())[0] == [1, 0, 0, -1, 1, -1]
    # scale 1, values -1, 0, 1, 2: halves go to the value nearer to zero
    assert quantise([-1.0, 2.0, 0.5, 1.5, -0.5], MinMaxTwoBit())[2] == [-1.0, 2.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_of_one_sign_has_level_zero_for_the_digit_it_never_uses(sign):
    digits, levels, _ = quantise([sign * 1.0, sign * 0.4, sign * 0.9, 0.0], MinMaxTernary())
    assert levels == [min(0.0, sign), max(0.0, sign)]
    assert digits == [sign, 0, sign, 0]
    table = MinMaxTernary().rounding(torch.tensor([levels]))
    extremes = nearest_digits(torch.tensor([[-1e30, 1e30]]), table)[0].tolist()
    assert extremes == ([0, 1] if sign > 0 else [-1, 0])


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_a_row_of_zeros_has_levels_zero_and_digits_zero(grid):
    digits, levels, weight = quantise([0.0, -0.0, 0.0], grid)
    assert digits == [0, 0, 0]
    assert weight == [0.0] * 3
    assert not np.any(levels)
    assert not np.any(np.signbit(levels))
    assert not nearest_digits(torch.tensor([[-1e30, 1e30]]), grid.rounding(torch.tensor([levels]))).any()


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
@pytest.mark.parametrize("value", [0.7, -0.7])
def test_a_constant_row_is_represented_exactly(grid, value):
    assert quantise([value] * 5, grid)[2] == pytest.approx([value] * 5, rel=1e-6)


def test_two_bit_has_zero_at_every_place_a_row_can_put_it():
    for row, zero_point in (([0.0, 3.0], 0), ([-1.0, 2.0], 1), ([-2.0, 1.0], 2), ([-3.0, 0.0], 3)):
        expected = [float(q - zero_point) for q in range(4)]
        digits, levels, weight = quantise(row + expected, MinMaxTwoBit())
        assert levels == [value for value in expected if value != 0]
        assert weight[2:] == expected
        assert digits[2:] == [0 if value == 0 else levels.index(value) + 1 for value in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [MinMaxTernary, MinMaxTwoBit])
def test_a_level_dtype_holds_every_level_exactly(grid, dtype):
    weight = torch.randn(3, 63, 29, generator=torch.Generator().manual_seed(0))
    levels = grid(dtype).fit(weight)
    assert levels.dtype == torch.float32
    assert torch.equal(levels.to(dtype).float(), levels)
    assert torch.equal(grid().fit(weight).to(dtype).float(), levels)
    assert not torch.equal(grid().fit(weight), levels)


def test_a_level_that_the_dtype_rounds_to_zero_is_never_used():
    digits, levels, weight = quantise([1e-8, 1e-8, -1.0], MinMaxTernary(torch.float16))
    assert levels == [-1.0, 0.0]
    assert digits == [0, 0, -1]
    assert weight == [0.0, 0.0, -1.0]
    # scale 4e-8 becomes float16's smallest number, 6e-8, and so does its double: of equal levels the inner one serves
    digits, levels, _ = quantise([4e-8, 8e-8, 1.2e-7], MinMaxTwoBit(torch.float16))
    assert levels[0] == levels[1] < levels[2]
    assert 2 not in digits
    # scale 2e-8 becomes 0, the other levels do not
    digits, levels, weight = quantise([2e-8, 4e-8, 6e-8], MinMaxTwoBit(torch.float16))
    assert levels[0] == 0 < levels[1]
    assert 1 not in digits
    assert all((digit == 0) == (value == 0) for digit, value in zip(digits, weight, strict=True))
    mirrored, _, _ = quantise([-2e-8, -4e-8, -6e-8], MinMaxTwoBit(torch.float16))
    assert 3 not in mirrored


def test_levels_beyond_the_dtype_are_refused():
    with pytest.raises(SettingError, match=r"100000 overflow torch\.float16"):
        MinMaxTernary(torch.float16).fit(torch.tensor([[1e5, 0.0]]))
    with pytest.raises(NotFiniteError, match="NaN"):
        MinMaxTwoBit().fit(torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(SettingError, match="float64"):
        MinMaxTernary(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_the_weight_may_have_any_float_dtype_and_any_leading_axes(grid, dtype):
    weight = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    levels = grid.fit(weight)
    assert levels.shape == (2, 3, 5, grid.alphabet - 1)
    assert not levels.requires_grad
    assert torch.equal(levels[1, 2], grid.fit(weight[1, 2].float()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [MinMaxTernary, MinMaxTwoBit])
def test_a_config_survives_json(grid, dtype):
    config = json.loads(json.dumps(grid(dtype).to_config()))
    assert grid_from_config(config) == grid(dtype)
    assert type(grid_from_config(config)) is grid


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"name": "minmax-ternary"},
        {"name": "other", "level_dtype": None},
        {"name": ["minmax-ternary"], "level_dtype": None},
        {"name": "minmax-ternary", "level_dtype": "float64"},
        {"name": "minmax-ternary", "level_dtype": []},
        {"name": "minmax-ternary", "level_dtype": None, "group_size": 128},
    ],
)
def test_a_foreign_config_is_refused(config):
    with pytest.raises(FormatError, match="expected"):
        grid_from_config(config)


def test_dequantize_reads_one_two_and_three_levels():
    digits = torch.tensor([[-1, 0, 1]], dtype=torch.int8)
    assert dequantize(digits, torch.tensor([[2.0]])).tolist() == [[-2.0, 0.0, 2.0]]
    assert dequantize(digits, torch.tensor([[-3.0, 2.0]])).tolist() == [[-3.0, 0.0, 2.0]]
    two_bit = torch.tensor([[0, 1, 2, 3]], dtype=torch.int8)
    assert dequantize(two_bit, torch.tensor([[-1.0, 1.0, 2.0]])).tolist() == [[0.0, -1.0, 1.0, 2.0]]
    with pytest.raises(ShapeError, match=r"\(2, 2\) for digits \(1, 3\)"):
        dequantize(digits, torch.ones(2, 2))


def test_levels_of_another_grid_are_refused():
    with pytest.raises(ShapeError, match=r"expected \(..., R, 3\)"):
        MinMaxTwoBit().rounding(torch.zeros(4, 2))


def test_values_and_results_cannot_be_changed():
    result = Quantized(
        torch.zeros(1, 1, dtype=torch.int8), torch.zeros(1, 2), torch.zeros(1), torch.zeros(1).bool(), ("own",)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.digits = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        MinMaxTernary().level_dtype = torch.float16
    assert hash(MinMaxTernary()) == hash(MinMaxTernary())


def test_a_group_s_matrices_are_made_one_by_one():
    digits, levels = torch.tensor([[[0, 1], [2, -1]], [[3, 0], [0, -2]]]).to(torch.int16), torch.rand(2, 2, 1)
    nothing = torch.zeros(2)
    for scales in (None, torch.rand(2, 2)):
        group = Quantized(digits, levels, nothing, nothing > 0, ("own", "own"), scales)
        for expert in range(2):
            assert torch.equal(group.weight_of(expert), group.weight[expert])
