from __future__ import annotations

import dataclasses

import naive
import numba
import numpy as np
import pytest
import torch
from checks import draw_digits
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_lite.checkpoint.format import pack_experts
from qmoe_lite.coding import matmul
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode
from qmoe_lite.coding.matmul import MatrixStack, decode_matmul
from qmoe_lite.errors import DtypeError, FormatError, SettingError, ShapeError

TERNARY = Codebook.fit([115, 1770, 115])
TWO_BIT = Codebook.fit([885, 50, 40, 25])
FORMS = [(TERNARY, 1), (TERNARY, 2), (TWO_BIT, 3)]
FORM_NAMES = ["symmetric", "ternary", "two-bit"]


def draw(codebook, width, rows, columns, seed=0, shares=None):
    rng = np.random.default_rng(seed)
    digits = draw_digits(rng, shares or codebook.counts, (rows, columns))
    levels = rng.standard_normal((rows, width)).astype(np.float32)
    return digits, levels, encode(digits, levels, codebook)


def assert_close(got, ref, digits, levels, x):
    """Error against the sum of the products' sizes, which bounds what rounding in float32 can do."""
    scale = naive.matmul(np.abs(digits) if levels.shape[1] < 3 else digits, np.abs(levels), np.abs(x))
    assert (np.abs(got - ref) <= 1e-5 * scale).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 16, 17, 33, 65, 130])
@pytest.mark.parametrize(("codebook", "width"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("columns", [1, 28, 63])
def test_product_equals_the_naive_one(codebook, width, columns, tokens):
    digits, levels, packed = draw(codebook, width, 13, columns, seed=columns)
    digits[:4] = [[0]] * 4
    digits[1], digits[2], digits[3] = 1, codebook.lowest_digit, codebook.lowest_digit + codebook.digits - 1
    packed = encode(digits, levels, codebook)
    x = np.random.default_rng(tokens).standard_normal((tokens, columns)).astype(np.float32)
    assert_close(decode_matmul(packed, x), naive.matmul(digits, levels, x), digits, levels, x)


CODEBOOKS = [
    Codebook.fit([115, 1770, 115], bits=8),
    Codebook.fit([115, 1770, 115], bits=12),
    Codebook.fit([885, 50, 40, 25], bits=12),
    Codebook.paper(),
]


@pytest.mark.slow
@given(
    codebook=st.sampled_from(CODEBOOKS),
    symmetric=st.booleans(),
    shares=st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(lambda shares: any(shares[:3])),
    rows=st.integers(1, 30),
    columns=st.integers(1, 1000),
    tokens=st.sampled_from([1, 3, 6, 130]),  # fewest and most in registers, of both kernels; above, any number
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_product_equals_the_dense_one(codebook, symmetric, shares, rows, columns, tokens, seed):
    width = 3 if codebook.digits == 4 else 2 - symmetric
    _, _, packed = draw(codebook, width, rows, columns, seed, shares[: codebook.digits])
    x = np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)
    dense = packed.dense().numpy().astype(np.float64)
    assert (np.abs(decode_matmul(packed, x) - x @ dense.T) <= 1e-5 * (np.abs(x) @ np.abs(dense).T)).all()


def test_codewords_of_seven_nonzeros_add_up():
    codebook = Codebook.fit([1, 1, 1], bits=12)
    digits, levels, packed = draw(codebook, 1, 13, 100)
    x = np.random.default_rng(6).standard_normal((1, 100)).astype(np.float32)
    assert codebook.max_nonzeros == 7
    assert_close(decode_matmul(packed, x), naive.matmul(digits, levels, x), digits, levels, x)


def test_more_rows_than_a_tile_and_a_last_partial_tile_come_out(monkeypatch):
    monkeypatch.setattr(matmul, "TILE_VALUES", 5 * 63)
    digits, levels, packed = draw(TERNARY, 2, 23, 63)
    x = np.random.default_rng(1).standard_normal((20, 63)).astype(np.float32)
    x[3, 5] = np.nan  # or no tile is decoded
    sound = np.arange(20) != 3
    y = decode_matmul(packed, x)
    assert np.isnan(y[3]).all()
    assert_close(y[sound], naive.matmul(digits, levels, x[sound]), digits, levels, x[sound])


@pytest.mark.parametrize("columns", [1, 84, 65535])
def test_widest_rows_and_tails_past_the_end_read_zeros(columns):
    codebook = Codebook.fit([0, 10**9, 0], bits=8)
    digits = np.zeros((3, columns), dtype=np.int8)
    digits[1, -1], digits[2, 0] = 1, -1
    packed = encode(digits, np.float32([[-2, 3]] * 3), codebook)
    x = np.ones(columns, dtype=np.float32)
    x[-1] = 5
    expected = [0, 15, -2 * x[0]]
    assert decode_matmul(packed, x).tolist() == expected
    assert decode_matmul(packed, np.tile(x, (9, 1))).tolist() == [expected] * 9


@pytest.mark.parametrize("shape", [(63,), (0, 63), (1, 63), (3, 63), (20, 63)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("container", ["numpy", "torch"])
def test_result_is_like_x(container, dtype, shape):
    if (container, dtype) == ("numpy", "bfloat16"):
        dtype = "float32"
    _, _, packed = draw(TERNARY, 2, 13, 63)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal(shape)).to(getattr(torch, dtype))
    expected = (x.float().double() @ packed.dense().double().T).to(x.dtype)
    y = decode_matmul(packed, x if container == "torch" else x.numpy())
    assert type(y) is (torch.Tensor if container == "torch" else np.ndarray)
    y = torch.as_tensor(y)
    assert y.dtype == x.dtype
    assert y.shape == (*shape[:-1], 13)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_strides_and_read_only_arrays_make_no_difference():
    _, _, packed = draw(TERNARY, 2, 13, 63)
    x = np.random.default_rng(3).standard_normal((3, 63)).astype(np.float32)
    expected = decode_matmul(packed, x)
    views = [
        np.asfortranarray(x),
        np.repeat(x, 2, axis=1)[:, ::2],
        x[::-1].copy()[::-1],
        torch.from_numpy(x).T.contiguous().T,
    ]
    x.flags.writeable = False
    for view in (*views, x):
        assert (np.asarray(decode_matmul(packed, view)) == expected).all()


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_spread_as_in_a_dense_product(value, tokens):
    _, _, packed = draw(TERNARY, 2, 13, 63)
    x = torch.ones(tokens, 63)
    x[0, 5] = value
    torch.testing.assert_close(decode_matmul(packed, x), x @ packed.dense().T, equal_nan=True)
    assert x[0].isfinite().sum() == 62
    assert not decode_matmul(packed, x)[0].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 9])
def test_activations_whose_sum_overflows_before_its_level_come_out_finite(tokens):
    packed = encode(np.ones((1, 63), np.int8), np.float32([[0, 1e-3]]), TERNARY)
    x = np.full((tokens, 63), 2e37, np.float32)
    assert np.allclose(decode_matmul(packed, x), 63 * 2e34, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize(("codebook", "width"), FORMS, ids=FORM_NAMES)
def test_one_and_two_threads_give_the_same_bytes(codebook, width, tokens):
    _, _, packed = draw(codebook, width, 203, 300)
    x = np.random.default_rng(4).standard_normal((tokens, 300)).astype(np.float32)
    before = numba.get_num_threads()
    results = []
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(threads)
        results.append(decode_matmul(packed, x).tobytes())
    numba.set_num_threads(before)
    assert results[0] == results[1]


def test_a_token_equals_itself_in_a_larger_batch():
    """Also in another block of lanes; up to four tokens are added in another order."""
    _, _, packed = draw(TERNARY, 2, 50, 300)
    x = np.random.default_rng(5).standard_normal((100, 300)).astype(np.float32)
    whole = decode_matmul(packed, x)
    for tokens in (5, 9, 20, 64, 65):
        assert (decode_matmul(packed, x[:tokens]) == whole[:tokens]).all()
    for tokens in (1, 2, 4):
        assert np.allclose(decode_matmul(packed, x[:tokens]), whole[:tokens], rtol=1e-4, atol=1e-5)


def test_gradients_are_not_asked_for():
    _, _, packed = draw(TERNARY, 2, 5, 63)
    assert not decode_matmul(packed, torch.ones(63, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (np.ones(62, np.float32), ShapeError),
        (np.ones((63, 2), np.float32), ShapeError),
        (np.ones((1, 1, 63), np.float32), ShapeError),
        (np.float32(1), DtypeError),
        (np.ones(63, np.int32), DtypeError),
        (np.ones(63, np.complex64), DtypeError),
        (torch.ones(63, dtype=torch.int8), DtypeError),
        ([1.0] * 63, DtypeError),
        (torch.ones(63, device="meta"), SettingError),
    ],
)
def test_unusable_activations_are_refused(x, error):
    _, _, packed = draw(TERNARY, 2, 5, 63)
    with pytest.raises(error) as raised:
        decode_matmul(packed, x)
    assert "\n" not in str(raised.value)


def test_a_matrix_elsewhere_is_refused_with_the_remedy():
    _, _, packed = draw(TERNARY, 2, 5, 63)
    with pytest.raises(SettingError, match=r"packed\.to\('cpu'\)"):
        decode_matmul(packed.to("meta"), np.ones(63, np.float32))


def test_a_damaged_matrix_is_refused_and_a_sound_one_validated_once(monkeypatch):
    _, _, packed = draw(TERNARY, 2, 5, 63)
    loaded = dataclasses.replace(packed, _validated=False)
    x = np.ones(63, np.float32)
    with pytest.raises(FormatError):
        decode_matmul(dataclasses.replace(loaded, columns=64 + 84), np.ones(64 + 84, np.float32))
    assert (decode_matmul(loaded, x) == decode_matmul(packed, x)).all()
    monkeypatch.setattr("qmoe_lite.coding.validation.validate", lambda packed: pytest.fail("validated twice"))
    decode_matmul(loaded, x)


def stack_of(matrices):
    parts = pack_experts(matrices)
    codes, offsets, rows, fewest = (
        parts[name].numpy() for name in ("codes", "expert_offsets", "row_codewords", "fewest_codewords")
    )
    first = matrices[0]
    return MatrixStack(codes, offsets, rows, fewest, parts["levels"], first.codebook, first.columns)


@pytest.mark.parametrize(("codebook", "width"), FORMS, ids=FORM_NAMES)
def test_groups_are_multiplied_as_each_would_be_alone(codebook, width, monkeypatch):
    monkeypatch.setattr(matmul, "EXPANDED_BYTES", 1 << 17)  # a few jobs at a time
    other = Codebook.fit(codebook.counts, bits=12)
    matrices = [
        [draw(book, width, rows, 300, seed)[2] for seed in range(5)] for book, rows in ((codebook, 67), (other, 130))
    ]
    experts, sizes = [0, 1, 3, 4], [1, 4, 70, 2]
    bounds = [0, *np.cumsum(sizes).tolist()]
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((bounds[-1], 300)).astype(np.float32))
    results = matmul.grouped_matmul([stack_of(some) for some in matrices], x, experts, bounds)
    for some, result in zip(matrices, results, strict=True):
        alone = [decode_matmul(some[e], x[a:b]) for e, a, b in zip(experts, bounds, bounds[1:], strict=False)]
        assert torch.equal(result, torch.cat(alone))
        reference = torch.cat([part @ some[e].dense().T for e, part in zip(experts, x.split(sizes), strict=True)])
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric_first", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_rows_of_one_and_of_two_levels_are_multiplied_in_one_call(symmetric_first, tokens):
    matrices = [draw(TERNARY, width, 70, 300, width)[2] for width in (1, 2)][:: 1 if symmetric_first else -1]
    x = torch.from_numpy(np.random.default_rng(9).standard_normal((tokens, 300)).astype(np.float32))
    for packed, y in zip(
        matrices, matmul.grouped_matmul([*map(MatrixStack.of, matrices)], x, [0], [0, tokens]), strict=True
    ):
        torch.testing.assert_close(y, x @ packed.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 9, 11, 12, 13])
@pytest.mark.parametrize("tokens", [1, 4])
def test_codewords_of_any_length_are_cut_where_they_begin(bits, tokens):
    """Sixteen at a time, then four at a time, from every bit of a byte; the usual 10 bits are compiled in."""
    digits, levels, packed = draw(Codebook.fit([115, 1770, 115], bits=bits), 1, 20, 1500, seed=bits)
    x = np.random.default_rng(bits).standard_normal((tokens, 1500)).astype(np.float32)
    assert_close(decode_matmul(packed, x), naive.matmul(digits, levels, x), digits, levels, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codebook", "width", "columns", "tokens"),
    # counts of codewords of 8 bits, and once of 16: another variant of the kernel
    [*((*form, 250, tokens) for form in FORMS for tokens in (1, 2, 4)), (TERNARY, 2, 1000, 1)],
    ids=[*(f"{name}-{tokens}" for name in FORM_NAMES for tokens in (1, 2, 4)), "ternary-1-wide"],
)
def test_columns_walked_in_stretches_give_the_whole_product(codebook, width, columns, tokens, monkeypatch):
    """Rows of very different codeword counts side by side; an odd number of rows; the last task not full."""
    monkeypatch.setattr(matmul, "CACHE_BYTES", 0)
    monkeypatch.setattr(matmul, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(matmul, "CHUNK_COLUMNS", 50)
    digits, levels, _ = draw(codebook, width, 131, columns, seed=tokens)
    digits[1::3], digits[5] = 0, codebook.lowest_digit + codebook.digits - 1
    packed = encode(digits, levels, codebook)
    assert packed.row_codewords.dtype == (torch.uint8 if columns == 250 else torch.uint16)
    x = np.random.default_rng(tokens).standard_normal((tokens, columns)).astype(np.float32)
    assert_close(decode_matmul(packed, x), naive.matmul(digits, levels, x), digits, levels, x)
