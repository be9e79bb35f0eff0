"""The uniform grid: digits, steps and column scales against a slow reference, and hard rows."""

from __future__ import annotations

import json

import naive
import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qmoe_lite as qm
from qmoe_lite.errors import DtypeError, FormatError, NotFiniteError, SettingError, ShapeError
from qmoe_lite.quantization import solver
from qmoe_lite.quantization.grid import GRIDS, UniformGrid, dequantize, grid_from_config, grid_of_word
from qmoe_lite.quantization.hessian import factorise
from qmoe_lite.quantization.rounding import nearest_digits
from qmoe_lite.quantization.solver import gptq, gptq_shared
from qmoe_lite.quantization.uniform import column_scales

GRID = UniformGrid(0.8, level_dtype=torch.bfloat16)


def problem(experts, rows, columns, seed=0, tokens=None):
    """Return weights and the Hessians of correlated inputs, some far larger than others, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=generator)
    mixing = torch.randn(experts, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    tokens = tokens or 3 * columns + 4
    x = (torch.randn(experts, tokens, columns, generator=generator) + 0.5) @ mixing
    x[:, :, ::5] *= 8
    return weight, x.mT @ x / tokens


def assert_same(first, second):
    assert torch.equal(first.digits, second.digits)
    assert torch.equal(first.levels, second.levels)
    assert torch.equal(first.column_scales, second.column_scales)
    assert torch.equal(first.error, second.error)
    assert first.hessian_class == second.hessian_class


@pytest.mark.parametrize(
    ("experts", "rows", "columns", "block"),
    [
        *((1, 1, 1, 128), (2, 1, 27, 8), (1, 28, 28, 28), (3, 5, 29, 7), (1, 63, 27, 128), (2, 3, 63, 16)),
        *((1, 2, 100, 64), (2, 64, 29, 8), (2, 65, 28, 128), (1, 130, 27, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_every_digit_is_the_slow_reference_s(experts, rows, columns, block, dtype):
    weight, hessian = problem(experts, rows, columns, seed=columns)
    found = gptq(weight, hessian, UniformGrid(0.8, 0.08, level_dtype=dtype), dampening=0.05, block_size=block)
    digits, values, steps, scales = naive.uniform_gptq(
        weight.numpy(), hessian.numpy(), 0.8, 0.08, 0.05, rounded=dtype is not None
    )
    assert found.digits.dtype == torch.int16
    same = found.digits.numpy() == digits
    assert same.mean() >= 0.999
    np.testing.assert_allclose(found.levels[..., 0].numpy(), steps, rtol=1e-6)
    assert np.array_equal(found.column_scales.numpy(), scales.astype(np.float32))
    np.testing.assert_allclose(found.weight.numpy()[same], values[same], rtol=1e-5, atol=1e-6)
    error = [naive.relative_error(*parts) for parts in zip(weight, found.weight, hessian, strict=True)]
    np.testing.assert_allclose(found.error.numpy(), error, rtol=1e-3)


@pytest.mark.parametrize("columns", [1, 27, 1000])
@pytest.mark.parametrize("dead_zone", [0.0, 0.06, 0.25])
def test_rounding_to_nearest_is_the_reference_s(columns, dead_zone):
    weight = torch.from_numpy(np.random.default_rng(columns).standard_normal((3, columns)).astype(np.float32))
    grid = UniformGrid(0.7, dead_zone)
    digits = nearest_digits(weight, grid.rounding(levels := grid.fit(weight)))
    for row, step, found in zip(weight.tolist(), levels[:, 0].tolist(), digits.tolist(), strict=True):
        assert found == [naive.round_uniform(value, step, dead_zone)[0] for value in row]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), st.floats(0.05, 4))
@settings(deadline=None, max_examples=100)
def test_no_weight_is_farther_than_half_a_step_and_the_dead_zone(row, step):
    weight = torch.tensor([row])
    grid = UniformGrid(step)
    levels = grid.fit(weight)
    found = dequantize(nearest_digits(weight, grid.rounding(levels)), levels)
    assert ((weight - found).abs() <= levels * 0.5601 + 1e-30).all()


@pytest.mark.parametrize("column_steps", [True, False])
def test_without_a_hessian_each_weight_is_rounded_by_itself(column_steps):
    weight, _ = problem(2, 9, 63)
    grid = UniformGrid(1.0, column_steps=column_steps)
    found = gptq(weight, None, grid)
    assert torch.equal(found.digits, nearest_digits(weight, grid.rounding(grid.fit(weight))))
    assert found.hessian_class == ("nearest", "nearest")
    assert not found.fallback.any()
    if column_steps:
        assert torch.equal(found.column_scales, torch.ones(2, 63))
    else:
        assert found.column_scales is None
    assert gptq(weight, None, qm.MinMaxTernary()).column_scales is None


def test_steps_follow_what_errors_count():
    weight, hessian = problem(2, 9, 20)
    weight[0, 3], weight[1, 5] = 0, 1e-3 * weight[1, 5]
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(2, 9, generator=generator) ** 4
    importance[0, 4] = 0
    found = gptq(weight, hessian, UniformGrid(0.9), importance=importance)
    steps = [naive.important_steps(*pair, 0.9) for pair in zip(weight.tolist(), importance.tolist(), strict=True)]
    np.testing.assert_allclose(found.levels[..., 0].numpy(), steps, rtol=1e-5)
    plain = gptq(weight, hessian, UniformGrid(0.9))
    assert not torch.equal(found.levels, plain.levels)
    # only what outputs count beside each other matters; where nothing is known, steps follow the weights
    assert_same(gptq(weight, hessian, UniformGrid(0.9), importance=8 * importance), found)
    assert_same(gptq(weight, hessian, UniformGrid(0.9), importance=torch.zeros(2, 9)), plain)
    one = gptq(weight[1].numpy(), hessian[1].numpy(), UniformGrid(0.9), importance=importance[1].numpy())
    assert torch.equal(one.digits, found.digits[1])


@pytest.mark.parametrize(
    ("importance", "grid", "error", "words"),
    [
        (torch.ones(2, 8), GRID, ShapeError, r"\(2, 8\).*expected \(2, 9\)"),
        (-torch.ones(2, 9), GRID, SettingError, "negative"),
        (torch.full((2, 9), torch.nan), GRID, NotFiniteError, "not finite"),
        (torch.ones(2, 9, dtype=torch.int32), GRID, DtypeError, "importance is torch.int32"),
        (torch.ones(2, 9), qm.MinMaxTernary(), SettingError, "Pass a UniformGrid"),
    ],
)
def test_importance_that_cannot_be(importance, grid, error, words):
    weight, hessian = problem(2, 9, 20)
    with pytest.raises(error, match=words):
        gptq(weight, hessian, grid, importance=importance)


def test_an_identity_hessian_has_scales_of_one():
    weight, _ = problem(2, 9, 63)
    found, nearest = gptq(weight, torch.eye(63), GRID), gptq(weight, None, GRID)
    assert torch.equal(found.column_scales, torch.ones(2, 63))
    assert torch.equal(found.digits, nearest.digits)
    torch.testing.assert_close(found.error, nearest.error)


def test_steps_by_column_lose_less_at_fewer_bits():
    weight, hessian = problem(2, 128, 150)
    plain = gptq(weight, hessian, UniformGrid(1.0, column_steps=False))
    found = gptq(weight, hessian, UniformGrid(1.0))
    assert (found.error < 0.8 * plain.error).all()
    assert plain.column_scales is None
    assert torch.equal(found.column_scales.bfloat16().float(), found.column_scales)
    assert torch.equal(found.levels, plain.levels)


def order_of(hessian):
    """Return the columns by the Hessian's diagonal, the largest first."""
    return torch.tensor(sorted(range(len(hessian)), key=lambda column: -hessian[column, column].item()))


def test_the_solver_commutes_with_the_columns_scales():
    """Weights divided by scales, with a Hessian scaled alike, on a grid of the rows alone: the same digits."""
    weight, hessian = problem(1, 28, 63)
    found = gptq(weight, hessian, GRID, dampening=0.0)
    scales, order = found.column_scales, order_of(hessian[0])
    rounding = GRID.rounding(found.levels)
    factor, info = factorise(hessian * scales[:, :, None] * scales[:, None], 0.0, order=order[None])
    assert not info.any()
    digits, _ = solver.solve_block((weight / scales[:, None])[..., order], factor, rounding)
    assert (digits == found.digits[..., order]).float().mean() >= 0.999


@pytest.mark.parametrize("columns", [1, 29, 300])
def test_columns_that_matter_most_are_rounded_first_wherever_they_stand(columns):
    weight, hessian = problem(3, 20, columns)
    found = gptq(weight, hessian, GRID)
    for expert in range(3):
        shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(expert))
        for turn in (order_of(hessian[expert]), shuffled):
            turned = gptq(weight[expert][:, turn], hessian[expert][turn][:, turn], GRID)
            assert torch.equal(turned.digits, found.digits[expert][:, turn])
            assert torch.equal(turned.column_scales, found.column_scales[expert, turn])
            torch.testing.assert_close(turned.error, found.error[expert : expert + 1])


def test_an_expert_whose_errors_overflow_has_the_nearest_digits_by_its_scales(monkeypatch):
    weight, hessian = problem(2, 20, 63)
    sound = gptq(weight, hessian, GRID)
    solve = solver.solve_block

    def overflows(block, factor, table):
        digits, errors = solve(block, factor, table)
        errors[1] = torch.inf
        return digits, errors

    monkeypatch.setattr(solver, "solve_block", overflows)
    found = gptq(weight, hessian, GRID)
    assert found.hessian_class == ("own", "nearest")
    assert torch.equal(found.digits[0], sound.digits[0])
    assert torch.equal(found.column_scales, sound.column_scales)
    scaled = weight[1] / found.column_scales[1]
    assert torch.equal(found.digits[1], nearest_digits(scaled, GRID.rounding(found.levels[1])))


def test_an_expert_that_takes_the_layer_s_hessian_takes_its_order():
    weight, hessian = problem(3, 20, 63)
    layer = hessian[2].clone()
    hessian[1] = torch.nan
    found = gptq(weight, hessian, GRID, layer_hessian=layer)
    assert found.hessian_class == ("own", "blended", "own")
    assert order_of(layer).tolist() != order_of(hessian[0]).tolist()
    for expert, own in enumerate((hessian[0], layer, hessian[2])):
        alone = gptq(weight[expert], own, GRID)
        assert torch.equal(found.digits[expert], alone.digits)
        assert torch.equal(found.column_scales[expert], alone.column_scales)


def test_matrices_of_one_input_share_the_scales_and_no_bit_changes():
    hessian = problem(3, 1, 40)[1]
    weights = [problem(3, rows, 40, seed=rows)[0] for rows in (7, 30)]
    hessian[1] = torch.nan
    together = gptq_shared(weights, hessian, GRID)
    for weight, found in zip(weights, together, strict=True):
        assert_same(found, gptq(weight, hessian, GRID))
        assert torch.equal(found.column_scales, together[0].column_scales)
        assert found.hessian_class == ("own", "nearest", "own")
        assert found.fallback.tolist() == [False, True, False]
        assert torch.equal(found.column_scales[1], torch.ones(40))
        assert torch.equal(found.digits[1], gptq(weight, None, GRID).digits[1])


def test_an_expert_s_result_depends_on_nothing_beside_it(monkeypatch):
    weight, hessian = problem(4, 29, 150)
    group = gptq(weight, hessian, GRID, block_size=64)
    for e in range(4):
        alone = gptq(weight[e], hessian[e], GRID, block_size=64)
        assert torch.equal(alone.digits, group.digits[e])
        assert torch.equal(alone.column_scales, group.column_scales[e])
        assert torch.equal(alone.weight, group.weight[e])
        assert torch.equal(alone.error[0], group.error[e])
    monkeypatch.setattr(solver, "_CHUNK", 1)
    assert_same(gptq(weight, hessian, GRID, block_size=64), group)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    assert_same(gptq(weight, hessian, GRID, block_size=64), group)
    numba.set_num_threads(before)


def test_a_shared_hessian_is_the_same_as_one_for_each_expert():
    weight, hessian = problem(3, 5, 29)
    assert_same(gptq(weight, hessian[0], GRID), gptq(weight, hessian[:1].expand(3, -1, -1), GRID))


def test_hessians_stand_in_for_each_other_as_on_any_grid():
    weight, hessian = problem(3, 5, 29)
    layer, spoilt = hessian.mean(dim=0), hessian.clone()
    spoilt[1] = 0
    found = gptq(weight, spoilt, GRID, layer_hessian=layer)
    assert found.hessian_class == ("own", "blended", "own")
    assert torch.equal(found.digits[1], gptq(weight[1], layer, GRID).digits)
    assert torch.equal(found.error[1:2], gptq(weight[1], layer, GRID).error)
    spoilt[1] = torch.ones(29, 29)
    dampened = gptq(weight, spoilt, GRID, dampening=0.0)
    assert dampened.hessian_class == ("own", "dampened", "own")
    assert torch.equal(dampened.digits[1], gptq(weight[1], spoilt[1], GRID, dampening=0.01).digits)


def test_what_rounding_lost_is_the_same_from_the_kernel_and_from_torch():
    weight, _ = problem(2, 29, 63)
    digits = nearest_digits(weight, GRID.rounding(levels := GRID.fit(weight)))
    scales, scaled = torch.rand(2, 40) + 0.5, torch.randn(2, 40, 29)
    part, out = slice(20, 60), torch.zeros(2, 2, 63, 29)
    sums = [
        lose(weight.mT, digits.mT[:, part], scaled, levels, scales, 20, to)
        for lose, to in zip((solver._lose, solver._lose_by_torch), out, strict=True)
    ]
    torch.testing.assert_close(sums[0], sums[1])
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0, :, part], (weight - dequantize(digits, levels)).mT[:, part])


def test_rows_of_zeros_of_one_value_and_with_one_large_weight():
    weight, hessian = problem(1, 5, 63)
    weight[0, 0] = 0
    weight[0, 1] = 0.3125  # a step of half of it needs no rounding
    weight[0, 2] = 0.01 * weight[0, 2].clamp(-1, 1)
    weight[0, 2, 40] = 100.0
    weight[0, 3] = 1e-42  # under float32's normal numbers
    grid = UniformGrid(0.5, level_dtype=torch.bfloat16)
    for found in (gptq(weight, hessian, grid), gptq(weight, None, grid)):
        assert torch.isfinite(found.weight).all()
        assert not found.digits[0, 0].any()
        assert not found.digits[0, 3].any()
        assert found.levels[0, [0, 3]].tolist() == [[0.0], [0.0]]
        assert found.weight[0, 2, 40].item() == pytest.approx(100, rel=0.3)
        assert torch.isfinite(found.error).all()
    assert (gptq(weight, None, grid).digits[0, 1] == 2).all()
    torch.testing.assert_close(gptq(weight, None, grid).weight[0, 1], weight[0, 1], rtol=1e-2, atol=0)


def test_digits_are_clamped_to_int16_and_the_columns_after_make_up_for_it():
    weight, hessian = problem(1, 3, 28)
    weight[0, 1, 0] = 100.0
    grid = UniformGrid(1e-4, column_steps=False)
    nearest, found = gptq(weight, None, grid), gptq(weight, hessian, grid)
    for each in (nearest, found):
        assert each.digits[0, 1, 0] == 32767
        assert each.digits.abs().max() == 32767
    assert torch.isfinite(found.error).all()
    assert found.error[0] < naive.relative_error(weight[0], nearest.weight[0], hessian[0])


def test_errors_that_overflow_keep_the_scales_of_the_input(monkeypatch):
    weight, hessian = problem(2, 28, 63)
    good, solve = gptq(weight, hessian, GRID), solver._solve

    def overflow(*arguments):
        digits, lost = solve(*arguments)
        lost[1] = torch.inf
        return digits, lost

    monkeypatch.setattr(solver, "_solve", overflow)
    found = gptq(weight, hessian, GRID)
    assert found.hessian_class == ("own", "nearest")
    assert found.fallback.tolist() == [False, True]
    assert torch.equal(found.column_scales, good.column_scales)
    assert torch.equal(found.digits[0], good.digits[0])
    whole = weight / found.column_scales[:, None]
    assert torch.equal(found.digits[1], nearest_digits(whole, GRID.rounding(found.levels))[1])
    assert torch.isfinite(found.error).all()


def test_column_scales_are_ratios_within_bounds():
    diagonal = torch.tensor([[1.0, 4.0, 2.0], [1e-30, 1.0, 1e30]])
    assert column_scales(diagonal).tolist() == [[0.5, 2.0, 1.0], [1 / 1024, 1.0, 1024.0]]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_config_survives_json(dtype):
    grid = UniformGrid(0.97, 0.04, level_dtype=dtype, column_steps=False)
    config = json.loads(json.dumps(grid.to_config()))
    assert grid_from_config(config) == grid
    for damage in ({"step": 0}, {"step": "1"}, {"dead_zone": 0.5}, {"column_steps": 1}, {"more": 1}, {"step": True}):
        with pytest.raises(FormatError, match="expected"):
            grid_from_config(config | damage)
    with pytest.raises(FormatError, match="expected"):
        grid_from_config({key: value for key, value in config.items() if key != "step"})


def test_grids_register_by_name_and_by_word():
    assert [grid.word for grid in GRIDS] == ["minmax", "two-bit", "uniform"]
    for grid in GRIDS:
        assert grid_of_word(grid.word) is grid
        assert grid_from_config(grid(level_dtype=torch.bfloat16).to_config()) == grid(level_dtype=torch.bfloat16)
    with pytest.raises(SettingError, match="expected one of minmax, two-bit, uniform"):
        grid_of_word("fitted")
    assert qm.UniformGrid is UniformGrid


@pytest.mark.parametrize(
    "settings",
    [
        *({"step": value} for value in (0, -1.0, float("nan"), float("inf"))),
        *({"dead_zone": -0.1}, {"dead_zone": 0.5}, {"level_dtype": torch.float64}, {"column_steps": None}),
    ],
)
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(SettingError, match="expected"):
        UniformGrid(**({"step": 1.0} | settings))


def test_weights_that_are_not_finite_and_steps_that_overflow_are_refused():
    with pytest.raises(NotFiniteError, match="NaN"):
        UniformGrid(1.0).fit(torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(SettingError, match=r"overflow torch\.float16"):
        UniformGrid(1.0, level_dtype=torch.float16).fit(torch.tensor([[1e6, 1e6]]))
    with pytest.raises(ShapeError, match=r"expected \(..., R, 1\)"):
        UniformGrid(1.0).rounding(torch.zeros(4, 2))


def test_dequantize_multiplies_by_the_columns_scales():
    digits = torch.tensor([[-300, 0, 7]], dtype=torch.int16)
    scales = torch.tensor([0.5, 1.0, 2.0])
    assert dequantize(digits, torch.tensor([[2.0]]), scales).tolist() == [[-300.0, 0.0, 28.0]]
    assert dequantize(digits, torch.tensor([[2.0]]).bfloat16(), scales).dtype == torch.bfloat16
    assert dequantize(digits[None], torch.tensor([[[2.0]]]), scales[None]).tolist() == [[[-300.0, 0.0, 28.0]]]
    with pytest.raises(ShapeError, match="one for each column"):
        dequantize(digits, torch.tensor([[2.0]]), scales[:2])
