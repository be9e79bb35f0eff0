"""Hessians: sums, means, blends, dampening and the factor of the inverse."""

import naive
import numpy as np
import pytest
import torch

from qmoe_lite.errors import DtypeError, SettingError, ShapeError
from qmoe_lite.quantization import hessian as hs


def inputs(tokens, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)


@pytest.mark.parametrize("columns", [1, 27, 28, 29, 63])
def test_accumulate_adds_the_products_of_all_tokens(columns):
    x = inputs(50, columns)
    hessian = hs.new(columns)
    for batch in (x[:7], x[7:7], x[7:]):
        hs.accumulate(hessian, batch)
    np.testing.assert_allclose(hessian.numpy(), naive.gram(x), rtol=2e-5, atol=1e-4 * hessian.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_accumulate_multiplies_in_float32_whatever_the_inputs(dtype):
    x = inputs(40, 9).to(dtype).requires_grad_()
    hessian = hs.new(9, experts=3)
    hs.accumulate(hessian[1], x)
    np.testing.assert_allclose(hessian[1].numpy(), naive.gram(x.detach().double().numpy()), rtol=1e-5, atol=1e-3)
    assert not hessian[0].any()
    assert not hessian[2].any()


def test_accumulate_refuses_wrong_shapes_and_dtypes():
    with pytest.raises(ShapeError, match=r"\(3, 3\) for inputs \(5, 4\)"):
        hs.accumulate(hs.new(3), torch.zeros(5, 4))
    with pytest.raises(ShapeError, match=r"\(2, 5, 4\)"):
        hs.accumulate(hs.new(4), torch.zeros(2, 5, 4))
    with pytest.raises(DtypeError, match="float64"):
        hs.accumulate(hs.new(4).double(), torch.zeros(5, 4))
    with pytest.raises(DtypeError, match="int64"):
        hs.accumulate(hs.new(4), torch.zeros(5, 4, dtype=torch.int64))


def test_lower_precision_is_off_inside_and_restored_outside():
    torch.set_float32_matmul_precision("medium")
    try:
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        before = [backend.fp32_precision for backend in backends]
        assert "ieee" not in before
        with hs.full_float32():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mean_divides_by_the_tokens_and_leaves_none_at_zero():
    total = torch.stack((torch.eye(4) * 6, torch.zeros(4, 4)))
    result = hs.mean(total, torch.tensor([3, 0]))
    assert torch.equal(result, torch.stack((torch.eye(4) * 2, torch.zeros(4, 4))))
    assert torch.equal(hs.mean(total[0], 2), torch.eye(4) * 3)
    with pytest.raises(ShapeError, match="tokens"):
        hs.mean(total, torch.tensor([3]))


def test_blend_weighs_by_tokens():
    own, layer = torch.full((3, 2, 2), 1.0), torch.full((2, 2), 5.0)
    own[0] = torch.nan
    blended = hs.blend(own, layer, torch.tensor([0, 30, 10]), 10)
    assert torch.equal(blended[0], layer)
    assert torch.equal(blended[1], torch.full((2, 2), 2.0))
    assert torch.equal(blended[2], torch.full((2, 2), 3.0))
    assert torch.equal(hs.blend(own[1], layer, 30, 10), blended[1])
    assert torch.equal(hs.blend(own[1:], layer, torch.tensor([0, 4]), 0), own[1:])


def test_blend_refuses_a_bad_n0_and_a_layer_of_another_width():
    with pytest.raises(SettingError, match="-1"):
        hs.blend(torch.eye(2), torch.eye(2), 1, -1)
    with pytest.raises(SettingError, match="nan"):
        hs.blend(torch.eye(2), torch.eye(2), 1, float("nan"))
    with pytest.raises(ShapeError, match=r"\(3, 3\)"):
        hs.blend(torch.eye(2), torch.eye(3), 1, 1)


def test_dampening_is_a_share_of_each_matrix_s_own_mean_diagonal():
    group = torch.stack((torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2, 2) * 8))
    assert hs.added(group, 0.5).tolist() == [1.0, 4.0]
    damped = group[0] + hs.added(group[0], 0.5) * torch.eye(2)
    np.testing.assert_allclose(damped.numpy(), naive.dampen(group[0].numpy(), 0.5))


@pytest.fixture(params=["one by one", "together"])
def factorise(request):
    """What the CPU does, and what a GPU does."""
    if request.param == "one by one":
        return hs.factorise
    return lambda hessian, dampening, block=128, order=None: hs._factorise_together(hessian, dampening, block, order)


@pytest.mark.parametrize("columns", [1, 27, 28, 29, 63])
def test_the_factor_is_the_upper_triangle_whose_square_is_the_inverse(factorise, columns):
    hessian = torch.stack([torch.from_numpy(naive.gram(inputs(80, columns, seed))).float() for seed in (0, 1)])
    factor, info = factorise(hessian, 0.1)
    assert info.tolist() == [0, 0]
    for matrix, upper in zip(hessian, factor, strict=True):
        assert torch.equal(upper, upper.triu())
        product = upper.double().T @ upper.double() @ torch.from_numpy(naive.dampen(matrix.numpy(), 0.1))
        np.testing.assert_allclose(product.numpy(), np.eye(columns), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "block"), [(29, 1), (29, 8), (63, 29), (100, 64), (500, 128), (450, 449)])
def test_the_blocks_of_the_factor_give_the_hessian_back(factorise, columns, block):
    hessian = torch.from_numpy(naive.gram(inputs(columns // 4, columns))).float()
    garbage = hessian.triu() + torch.full((columns, columns), 1e30).tril(-1)
    factor, info = factorise(garbage[None], 0.1, block)
    assert info.item() == 0, "below the diagonal nothing is read"
    root = torch.zeros(columns, columns, dtype=torch.float64)
    for start in range(0, columns, block):
        part = slice(start, start + block)
        upper = factor[0, part, part].double()
        assert torch.equal(upper, upper.triu())
        root[part, part] = torch.linalg.inv(upper)
        root[:start, part] = factor[0, :start, part].double() @ root[part, part]
    expected = naive.dampen(hessian.numpy(), 0.1)
    np.testing.assert_allclose((root @ root.T).numpy(), expected, atol=3e-6 * hessian.abs().max().item())


@pytest.mark.parametrize("block", [8, 128])
def test_columns_are_eliminated_in_the_order_that_is_given(factorise, block):
    hessian = torch.stack([torch.from_numpy(naive.gram(inputs(80, 29, seed))).float() for seed in (0, 1, 2)])
    hessian[1] = torch.nan
    orders = torch.stack([torch.randperm(29, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2)])
    factor, info = factorise(hessian, 0.1, block, orders)
    turned = torch.stack([matrix[order][:, order] for matrix, order in zip(hessian, orders, strict=True)])
    expected, codes = factorise(turned, 0.1, block)
    assert info.tolist() == codes.tolist() == [0, hs.NOT_FINITE, 0]
    assert torch.equal(factor.triu(), expected.triu())


@pytest.mark.parametrize("block", [1, 7, 40, 100, 128])
@pytest.mark.parametrize("bad", [0, 3, 59, 60, 99])
def test_info_counts_the_minors_from_the_last_column(factorise, block, bad):
    diagonal = torch.ones(100)
    diagonal[bad] = -1
    factor, info = factorise(torch.diag(diagonal)[None], 0.0, block)
    assert info.tolist() == [100 - bad]
    assert torch.equal(factor[0], torch.eye(100))


def test_a_bad_matrix_is_told_by_its_info_and_touches_no_neighbour(factorise):
    good = torch.from_numpy(naive.gram(inputs(80, 29))).float()
    indefinite, infinite, nan = -good, good.clone(), good.clone()
    infinite[3, 3], nan[28, 0] = torch.inf, torch.nan
    group = torch.stack((good, indefinite, good, torch.zeros(29, 29), infinite, nan, good))
    factor, info = factorise(group, 0.1)
    assert [code != 0 for code in info.tolist()] == [False, True, False, True, True, True, False]
    assert info[4:6].tolist() == [hs.NOT_FINITE] * 2
    alone, _ = factorise(good[None], 0.1)
    for index in (0, 2, 6):
        assert torch.equal(factor[index], alone[0])
    for index in (1, 3, 4, 5):
        assert torch.equal(factor[index], torch.eye(29))


def test_a_singular_matrix_needs_dampening():
    single_token = torch.ones(28, 28)
    assert hs.factorise(single_token[None], 0.0)[1].item() != 0
    assert hs.factorise(single_token[None], 0.1)[1].item() == 0
