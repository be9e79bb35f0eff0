"""The GPTQ solver against the published code's results, a slow reference, and its own promises."""

from pathlib import Path

import naive
import numba
import numpy as np
import pytest
import torch

from qmoe_lite.errors import DtypeError, NotFiniteError, SettingError, ShapeError
from qmoe_lite.quantization import solver
from qmoe_lite.quantization.grid import MinMaxTernary, MinMaxTwoBit, dequantize
from qmoe_lite.quantization.hessian import factorise
from qmoe_lite.quantization.rounding import nearest_digits
from qmoe_lite.quantization.solver import gptq, gptq_shared

VECTORS = Path(__file__).parents[1] / "vectors" / "gptq_paper_recipe.npz"
GRIDS = {"ternary": MinMaxTernary(), "two_bit": MinMaxTwoBit()}


def problem(experts, rows, columns, seed=0, tokens=None):
    """Return weights and the Hessians of correlated inputs, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=generator)
    mixing = torch.randn(experts, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    tokens = tokens or 3 * columns + 4
    x = (torch.randn(experts, tokens, columns, generator=generator) + 0.5) @ mixing
    return weight, x.mT @ x / tokens


def assert_same(first, second):
    assert torch.equal(first.digits, second.digits)
    assert torch.equal(first.levels, second.levels)
    assert torch.equal(first.error, second.error)
    assert first.hessian_class == second.hessian_class


@pytest.mark.parametrize("name", list(GRIDS))
def test_the_published_solver_is_reproduced(name):
    data = np.load(VECTORS)
    result = gptq(data["weight"], data["hessian"], GRIDS[name], dampening=0.1, block_size=128)
    same = np.isclose(result.weight.numpy(), data[name], rtol=1e-5, atol=1e-7)
    assert same.mean() >= 0.999
    assert result.hessian_class == ("own",) * 3


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize(
    ("experts", "rows", "columns", "block"),
    [
        *((1, 1, 1, 128), (2, 1, 27, 8), (1, 28, 28, 28), (3, 5, 29, 7), (1, 63, 27, 128), (2, 3, 63, 16)),
        *((1, 2, 100, 64), (2, 64, 29, 8), (2, 65, 28, 128), (1, 130, 27, 5)),
    ],
)
def test_every_digit_is_the_slow_reference_s(name, experts, rows, columns, block):
    weight, hessian = problem(experts, rows, columns, seed=columns)
    result = gptq(weight, hessian, GRIDS[name], dampening=0.05, block_size=block)
    digits, values = naive.gptq(weight.numpy(), hessian.numpy(), name, 0.05)
    assert (result.digits.numpy() == digits).mean() >= 0.999
    same = result.digits.numpy() == digits
    np.testing.assert_allclose(result.weight.numpy()[same], values[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(GRIDS))
def test_the_block_size_changes_no_more_than_ties(name):
    weight, hessian = problem(2, 29, 100)
    first = gptq(weight, hessian, GRIDS[name], block_size=1)
    for block in (3, 64, 100, 1000):
        other = gptq(weight, hessian, GRIDS[name], block_size=block)
        assert (first.digits == other.digits).float().mean() >= 0.999


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 27, 28), (1, 29, 63), (1, 3, 1000)])
def test_an_identity_hessian_and_none_both_round_to_nearest(name, shape):
    weight, grid = problem(*shape, tokens=2)[0], GRIDS[name]
    levels = grid.fit(weight)
    direct = nearest_digits(weight, grid.rounding(levels))
    identity, none = gptq(weight, torch.eye(shape[2]), grid), gptq(weight, None, grid)
    for result in (identity, none):
        assert torch.equal(result.digits, direct)
        assert torch.equal(result.levels, levels)
        assert not result.fallback.any()
    assert identity.hessian_class == ("own",) * shape[0]
    assert none.hessian_class == ("nearest",) * shape[0]
    torch.testing.assert_close(identity.error, none.error)


@pytest.mark.parametrize("name", list(GRIDS))
def test_gptq_loses_less_than_rounding_to_nearest_on_correlated_inputs(name):
    weight, hessian = problem(3, 28, 63)
    result, nearest = gptq(weight, hessian, GRIDS[name]), gptq(weight, None, GRIDS[name])
    for e in range(3):
        rounded = naive.relative_error(weight[e], nearest.weight[e], hessian[e])
        assert result.error[e].item() < 0.7 * rounded


def test_the_error_is_measured_with_the_hessian_before_dampening():
    weight, hessian = problem(3, 7, 600, tokens=50)
    weight[1] = 0
    result = gptq(weight, hessian, MinMaxTernary(), dampening=0.5)
    expected = [naive.relative_error(weight[e], result.weight[e], hessian[e]) for e in range(3)]
    np.testing.assert_allclose(result.error.numpy(), expected, rtol=1e-3)
    assert result.error[1].item() == 0
    assert not result.digits[1].any()


@pytest.mark.parametrize("dampening", [0.01, 1.0])
@pytest.mark.parametrize("tokens", [1, 3, 40, 2000])
@pytest.mark.parametrize("name", list(GRIDS))
def test_the_error_is_right_however_small_it_is_beside_the_dampening_s_share(name, tokens, dampening):
    weight, hessian = problem(2, 20, 200, tokens=tokens)
    result = gptq(weight, hessian, GRIDS[name], dampening=dampening, block_size=64)
    expected = [naive.relative_error(weight[e], result.weight[e], hessian[e]) for e in range(2)]
    np.testing.assert_allclose(result.error.numpy(), expected, rtol=1e-3)


def test_experts_that_are_solved_one_after_the_other_have_the_same_bits(monkeypatch):
    weight, hessian = problem(5, 29, 150)
    together = gptq(weight, hessian, MinMaxTwoBit(), block_size=64)
    for chunk in (1, 2 * 29 * 150):
        monkeypatch.setattr(solver, "_CHUNK", chunk)
        assert_same(gptq(weight, hessian, MinMaxTwoBit(), block_size=64), together)


@pytest.mark.parametrize("name", list(GRIDS))
def test_what_rounding_lost_is_the_same_from_the_kernel_and_from_torch(name):
    weight, grid = problem(2, 29, 63)[0], GRIDS[name]
    levels = grid.fit(weight)
    digits = nearest_digits(weight, grid.rounding(levels))
    scaled = torch.randn(2, 40, 29)
    part, out = slice(20, 60), torch.zeros(2, 2, 63, 29)
    sums = [
        lose(weight.mT, digits.mT[:, part], scaled, levels, None, 20, to)
        for lose, to in zip((solver._lose, solver._lose_by_torch), out, strict=True)
    ]
    torch.testing.assert_close(sums[0], sums[1])
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0, :, part], (weight - dequantize(digits, levels)).mT[:, part])
    assert not out[:, :, :20].any()
    assert not out[:, :, 60:].any()


def test_a_block_is_taken_and_given_in_any_layout():
    weight, hessian = problem(2, 70, 29)
    table = MinMaxTernary().rounding(MinMaxTernary().fit(weight))
    factor, _ = factorise(hessian, 0.1)
    before = weight.clone()
    digits, errors = solver.solve_block(weight, factor, table)
    for layout in (weight.mT.contiguous().mT, torch.cat((weight, weight), dim=2)[..., :29]):
        again, same = solver.solve_block(layout, factor, table)
        assert torch.equal(digits, again)
        assert torch.equal(errors, same)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["own", "shared", "none"])
def test_the_error_of_all_experts_at_once_is_that_of_each(monkeypatch, kind):
    weight, hessian = problem(4, 9, 230)
    weight[2] *= 2.0**40
    weight[3] = 0
    known = {"own": hessian, "shared": hessian[:1], "none": None}[kind]
    table = MinMaxTernary().rounding(levels := MinMaxTernary().fit(weight))
    digits = nearest_digits(weight, table)
    lost = torch.tensor([torch.nan, 0.5, torch.inf, 0.0], dtype=torch.float64)
    each = solver._relative_error(weight, digits, levels, None, known, lost)
    monkeypatch.setattr(solver, "_turns", lambda experts, device: [slice(None)])
    torch.testing.assert_close(solver._relative_error(weight, digits, levels, None, known, lost), each)
    assert each[0] > 0
    assert each[3] == 0


def test_the_error_does_not_overflow_where_weights_and_inputs_are_large():
    weight, hessian = problem(1, 5, 29)
    plain = gptq(weight, hessian, MinMaxTernary())
    large = gptq(weight * 2.0**60, hessian * 2.0**80, MinMaxTernary())
    assert torch.equal(plain.digits, large.digits)
    torch.testing.assert_close(plain.error, large.error)


def test_a_shared_hessian_is_the_same_as_one_for_each_expert():
    weight, hessian = problem(3, 5, 29)
    shared = gptq(weight, hessian[0], MinMaxTernary())
    assert_same(shared, gptq(weight, hessian[:1].expand(3, -1, -1), MinMaxTernary()))


def test_a_two_dimensional_weight_is_a_group_of_one():
    weight, hessian = problem(1, 5, 29)
    flat, group = gptq(weight[0], hessian[0], MinMaxTwoBit()), gptq(weight, hessian, MinMaxTwoBit())
    assert torch.equal(flat.digits, group.digits[0])
    assert torch.equal(flat.levels, group.levels[0])
    assert torch.equal(flat.weight, group.weight[0])
    assert flat.error.shape == flat.fallback.shape == (1,)
    assert_same(flat, gptq(weight[0], hessian, MinMaxTwoBit()))


@pytest.mark.parametrize("name", list(GRIDS))
def test_an_expert_s_result_does_not_depend_on_its_group(name):
    weight, hessian = problem(4, 29, 150)
    group = gptq(weight, hessian, GRIDS[name], block_size=64)
    for e in range(4):
        alone = gptq(weight[e], hessian[e], GRIDS[name], block_size=64)
        assert torch.equal(alone.digits, group.digits[e])
        assert torch.equal(alone.error[0], group.error[e])


@pytest.mark.parametrize("bad", ["zero", "nan", "inf", "negative"])
def test_one_unusable_hessian_leaves_the_others_every_bit(bad):
    weight, hessian = problem(4, 28, 63)
    good = gptq(weight, hessian, MinMaxTernary())
    spoilt = hessian.clone()
    spoilt[2] = {"zero": torch.zeros(63, 63), "negative": -hessian[2]}.get(bad, hessian[2])
    if bad in ("nan", "inf"):
        spoilt[2, 62, 1] = float(bad)
    result = gptq(weight, spoilt, MinMaxTernary())
    assert result.hessian_class == ("own", "own", "nearest", "own")
    assert result.fallback.tolist() == [False, False, True, False]
    nearest = gptq(weight, None, MinMaxTernary())
    assert torch.equal(result.digits[2], nearest.digits[2])
    assert torch.isfinite(result.error).all()
    if bad in ("nan", "inf"):
        assert result.error[2] == nearest.error[2]
    for e in (0, 1, 3):
        assert torch.equal(result.digits[e], good.digits[e])
        assert torch.equal(result.error[e], good.error[e])


def test_a_hessian_that_needs_more_dampening_gets_it():
    weight, hessian = problem(3, 5, 29)
    hessian[1] = torch.ones(29, 29)
    result = gptq(weight, hessian, MinMaxTernary(), dampening=0.0)
    assert result.hessian_class == ("own", "dampened", "own")
    assert not result.fallback.any()
    expected = gptq(weight[1], hessian[1], MinMaxTernary(), dampening=0.01)
    assert torch.equal(result.digits[1], expected.digits)
    assert expected.hessian_class == ("own",)


def test_dampening_rises_tenfold_and_stops_at_one():
    weight = torch.ones(1, 2)
    for lift, dampening, outcome in (
        (0.2, 0.03, "dampened"),
        (0.9, 0.03, "dampened"),
        (0.9, 0.5, "dampened"),
        (1.1, 0.5, "nearest"),
    ):
        hessian = torch.diag(torch.tensor([2 + lift, -lift]))  # mean diagonal 1
        assert gptq(weight, hessian, MinMaxTernary(), dampening=dampening).hessian_class == (outcome,)


def test_the_first_retry_has_exactly_ten_times_the_dampening():
    weight, hessian = problem(1, 28, 63)
    middle = hessian.diagonal(dim1=1, dim2=2).mean()
    lowest = torch.linalg.eigvalsh(hessian[0])[0]
    # mean diagonal 1, lowest eigenvalue about -0.1: too low for dampening 0.03, high enough for 0.15 and for 0.3
    shift = (lowest + 0.1 * middle) / 1.1
    hessian = (hessian - shift * torch.eye(63)) / (middle - shift)
    result = gptq(weight, hessian, MinMaxTernary(), dampening=0.03)
    tenfold, fivefold = (gptq(weight, hessian, MinMaxTernary(), dampening=step) for step in (0.3, 0.15))
    assert result.hessian_class == ("dampened",)
    assert tenfold.hessian_class == fivefold.hessian_class == ("own",)
    assert torch.equal(result.digits, tenfold.digits)
    assert not torch.equal(result.digits, fivefold.digits)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_the_layer_s_hessian_stands_in_for_one_that_is_unusable(bad):
    weight, hessian = problem(3, 5, 29)
    layer = hessian.mean(dim=0)
    good = gptq(weight, hessian, MinMaxTernary())
    spoilt = hessian.clone()
    spoilt[1] = bad
    result = gptq(weight, spoilt, MinMaxTernary(), layer_hessian=layer)
    assert result.hessian_class == ("own", "blended", "own")
    assert not result.fallback.any()
    expected = gptq(weight[1], layer, MinMaxTernary())
    assert torch.equal(result.digits[1], expected.digits)
    assert torch.equal(result.error[1:2], expected.error)
    assert torch.equal(result.digits[::2], good.digits[::2])
    useless = gptq(weight, spoilt, MinMaxTernary(), layer_hessian=torch.zeros(29, 29))
    assert useless.hessian_class == ("own", "nearest", "own")
    assert useless.fallback.tolist() == [False, True, False]


def test_errors_that_overflow_end_in_rounding_to_nearest():
    weight, hessian = problem(2, 28, 63)
    weight[1] = weight[1].sign() * 3e38
    weight[1, :, ::2] *= 0.4
    correlated = torch.full((63, 63), 0.999) + 0.001 * torch.eye(63)
    hessian[1] = correlated
    result = gptq(weight, hessian, MinMaxTernary(), dampening=0.0)
    assert result.hessian_class == ("own", "nearest")
    assert result.fallback.tolist() == [False, True]
    assert torch.equal(result.digits[1], gptq(weight, None, MinMaxTernary()).digits[1])
    assert torch.equal(result.digits[0], gptq(weight[0], hessian[0], MinMaxTernary(), dampening=0.0).digits)
    assert torch.isfinite(result.error).all()


def test_inputs_that_calibration_never_saw_keep_their_weights():
    weight, hessian = problem(1, 28, 29)
    hessian[:, 7, :] = hessian[:, :, 7] = 0
    result = gptq(weight, hessian, MinMaxTernary())
    nearest = gptq(weight, None, MinMaxTernary())
    assert result.hessian_class == ("own",)
    assert torch.equal(result.digits[..., 7], nearest.digits[..., 7])
    assert result.digits[..., 7].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_solver_makes_up_for_the_rounding_of_the_levels(dtype):
    weight, hessian = problem(2, 29, 63)
    result = gptq(weight, hessian, MinMaxTernary(dtype))
    assert torch.equal(result.levels.to(dtype).float(), result.levels)
    assert torch.equal(result.weight.to(dtype).float(), result.weight)
    digits, _ = naive.gptq(weight.numpy(), hessian.numpy(), "ternary", 0.1, levels=result.levels.tolist())
    assert (result.digits.numpy() == digits).mean() >= 0.999


def test_rows_of_one_sign_one_value_or_zeros_use_no_digit_of_level_zero():
    weight, hessian = problem(1, 4, 63)
    weight[0, 0] = weight[0, 0].abs()
    weight[0, 1] = -weight[0, 1].abs()
    weight[0, 2] = 0
    weight[0, 3] = 0.3
    result = gptq(weight, hessian, MinMaxTernary())
    digits = result.digits[0]
    assert set(digits[0].tolist()) == {0, 1}
    assert set(digits[1].tolist()) == {0, -1}
    assert not digits[2].any()
    assert (digits[3] == 1).all()
    assert result.levels[0, 2].tolist() == [0, 0]
    reference, _ = naive.gptq(weight.numpy(), hessian.numpy(), "ternary", 0.1)
    assert np.array_equal(digits.numpy(), reference[0])


def test_the_number_of_threads_changes_no_bit():
    weight, hessian = problem(3, 28, 150)
    before = numba.get_num_threads()
    results = []
    for threads in {1, 2, before}:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        results.append(gptq(weight, hessian, MinMaxTwoBit(), block_size=64))
    numba.set_num_threads(before)
    for result in results[1:]:
        assert_same(results[0], result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_computed_in_float32(dtype):
    weight, hessian = problem(1, 5, 29)
    weight, hessian = weight.to(dtype).requires_grad_(), hessian.double()
    result = gptq(weight, hessian, MinMaxTernary())
    assert_same(result, gptq(weight.detach().float(), hessian.float(), MinMaxTernary()))
    assert result.digits.dtype == torch.int8
    assert result.levels.dtype == result.weight.dtype == result.error.dtype == torch.float32
    assert torch.equal(result.weight, dequantize(result.digits, result.levels))


def test_arrays_of_any_layout_are_taken_and_not_changed():
    weight, hessian = problem(2, 28, 29)
    expected = gptq(weight, hessian, MinMaxTernary())
    array, matrix = np.asfortranarray(weight.numpy()), hessian.numpy().copy()
    array.flags.writeable = matrix.flags.writeable = False
    assert_same(gptq(array, matrix, MinMaxTernary()), expected)
    transposed = weight.mT.contiguous().mT
    before = transposed.clone(), hessian.clone()
    assert_same(gptq(transposed, hessian, MinMaxTernary()), expected)
    assert torch.equal(transposed, before[0])
    assert torch.equal(hessian, before[1])


def test_a_weight_that_is_not_finite_is_named():
    weight, hessian = problem(3, 5, 29)
    weight[2, 4, 7] = float("nan")
    with pytest.raises(NotFiniteError, match="nan at expert 2, row 4, column 7"):
        gptq(weight, hessian, MinMaxTernary())
    with pytest.raises(NotFiniteError, match="inf at expert 0, row 1, column 0"):
        gptq(np.array([[1.0], [1e300]]), None, MinMaxTernary())


@pytest.mark.parametrize(
    ("weight", "hessian", "layer", "message"),
    [
        ((2, 3, 4), (2, 4, 5), None, r"\(2, 4, 5\) for a weight of shape \(2, 3, 4\)"),
        ((2, 3, 4), (3, 4, 4), None, r"hessian has shape \(3, 4, 4\)"),
        ((2, 3, 4), (3, 3), None, r"expected \(4, 4\) or \(2, 4, 4\)"),
        ((2, 3, 4), (4, 4), (2, 4, 4), r"layer_hessian has shape \(2, 4, 4\)"),
        ((4,), (4, 4), None, r"weight has shape \(4,\)"),
        ((2, 0, 4), (4, 4), None, r"weight has shape \(2, 0, 4\)"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(weight, hessian, layer, message):
    layer_hessian = None if layer is None else torch.ones(layer)
    with pytest.raises(ShapeError, match=message):
        gptq(torch.ones(weight), torch.ones(hessian), MinMaxTernary(), layer_hessian=layer_hessian)


def test_bad_settings_and_dtypes_are_refused():
    weight = torch.ones(2, 2)
    for dampening in (-0.1, float("nan"), float("inf")):
        with pytest.raises(SettingError, match="dampening"):
            gptq(weight, None, MinMaxTernary(), dampening=dampening)
    with pytest.raises(SettingError, match="block_size is 0"):
        gptq(weight, None, MinMaxTernary(), block_size=0)
    with pytest.raises(DtypeError, match="int64"):
        gptq(weight.long(), None, MinMaxTernary())
    with pytest.raises(DtypeError, match="hessian is int64"):
        gptq(weight, np.eye(2, dtype=np.int64), MinMaxTernary())


def test_matrices_of_one_input_share_the_factor_and_no_bit_changes():
    torch.manual_seed(5)
    weights = [torch.randn(3, rows, 40) for rows in (7, 30)]
    x = torch.randn(3, 90, 40)
    hessian = x.transpose(1, 2) @ x
    hessian[1] = float("nan")
    together = gptq_shared(weights, hessian, MinMaxTernary())
    for weight, found in zip(weights, together, strict=True):
        alone = gptq(weight, hessian, MinMaxTernary())
        assert found.hessian_class == alone.hessian_class == ("own", "nearest", "own")
        assert torch.equal(found.digits, alone.digits)
        assert torch.equal(found.levels, alone.levels)
        assert torch.equal(found.error, alone.error)
    with pytest.raises(ShapeError, match="expected one E and one C"):
        gptq_shared([weights[0], weights[0][:, :, :39]], hessian, MinMaxTernary())
