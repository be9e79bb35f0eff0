from __future__ import annotations

import dataclasses
import functools

import naive
import numba
import numpy as np
import pytest
import torch
from checks import draw_digits
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import decode, encode, with_steps
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.stream import shorten_counts
from qmoe_lite.coding.validation import validate
from qmoe_lite.errors import DigitError, DtypeError, FormatError, NotFiniteError, SettingError, ShapeError

TERNARY = Codebook.fit([115, 1770, 115], bits=8)
TWO_BIT = Codebook.fit([885, 50, 40, 25], bits=8)
PAPER = Codebook.paper()


def draw_levels(rng, rows, width, dtype=torch.float32):
    return torch.from_numpy(rng.standard_normal((rows, width)).astype(np.float32)).to(dtype)


def unchecked(packed, **changes):
    """A copy as if read from a file: not yet validated."""
    parts = {name: getattr(packed, name).clone() for name in ("codes", "row_codewords", "levels")} | changes
    return dataclasses.replace(packed, **parts, _validated=False)


def sample(rows=9, columns=100, codebook=TERNARY, seed=0):
    rng = np.random.default_rng(seed)
    digits = draw_digits(rng, codebook.counts, (rows, columns))
    return digits, encode(digits, draw_levels(rng, rows, codebook.digits - 1), codebook)


shares_strategy = st.one_of(
    st.sampled_from([(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (0, 9, 1), (1, 18, 1), (1, 0, 0, 0), (0, 1, 1, 1)]),
    st.lists(st.integers(0, 100), min_size=3, max_size=4).filter(any),
)


@functools.cache
def default_codebook(digits, bits):
    return Codebook.fit([115, 1770, 115] if digits == 3 else [885, 50, 40, 25], bits)


@given(
    shares=shares_strategy,
    fitted=st.booleans(),
    bits=st.sampled_from([8, 9, 10, 11, 12]),
    rows=st.integers(1, 40),
    columns=st.one_of(st.sampled_from([1, 2, 27, 28, 29, 63, 84, 85, 1000]), st.integers(1, 300)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_decode_gives_back_what_was_encoded(shares, fitted, bits, rows, columns, seed):
    rng = np.random.default_rng(seed)
    digits = draw_digits(rng, shares, (rows, columns))
    codebook = Codebook.fit(shares, bits) if fitted else default_codebook(len(shares), bits)
    levels = draw_levels(rng, rows, len(shares) - 1)
    packed = encode(digits, levels, codebook)
    decoded, decoded_levels = decode(packed)
    assert packed.shape == digits.shape
    assert decoded.dtype == torch.int8
    assert (decoded.numpy() == digits).all()
    assert torch.equal(decoded_levels, levels)
    assert codebook.rate(digits) == int(packed.count_codewords().sum()) * bits / digits.size
    validate(unchecked(packed))


@pytest.mark.parametrize("counts", [[115, 1770, 115], [300, 400, 500], [885, 50, 40, 25], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("columns", [1, 27, 28, 29, 63, 1000])
def test_bytes_equal_the_naive_encoders(counts, columns):
    digits = draw_digits(np.random.default_rng(columns), counts, (5, columns))
    digits[1], digits[2], digits[3] = 0, 1, (-1 if len(counts) == 3 else 3)
    strings = naive.tunstall(counts, 8)
    ref_codes, ref_row_codewords = naive.encode(digits, strings, 8)
    packed = encode(digits, np.ones((5, len(counts) - 1), dtype=np.float32), Codebook.fit(counts, bits=8))
    assert packed.codes.numpy().tobytes() == ref_codes
    assert packed.count_codewords().tolist() == ref_row_codewords
    assert naive.decode(ref_codes, ref_row_codewords, strings, 8, columns) == digits.tolist()
    assert decode(packed)[0].tolist() == digits.tolist()


@pytest.mark.parametrize("bits", [9, 10, 11])
def test_bit_stream_of_odd_widths_equals_the_naive_one(bits):
    digits = draw_digits(np.random.default_rng(bits), [1, 6, 1], (3, 63))
    codebook = Codebook.fit([1, 6, 1], bits)
    strings = [string for string in naive.strings_of(codebook.table.tolist(), 3) if string]
    ref_codes, ref_row_codewords = naive.encode(digits, strings, bits)
    packed = encode(digits, np.ones((3, 1), dtype=np.float32), codebook)
    assert packed.codes.numpy().tobytes() == ref_codes
    assert packed.count_codewords().tolist() == ref_row_codewords


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 17, 90])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 17, 35])
def test_rows_of_any_number_that_end_at_different_steps_equal_the_naive_ones(rows, columns):
    digits = draw_digits(np.random.default_rng(rows), [1, 6, 1], (rows, columns))
    digits[::3], digits[1::5] = 0, 1  # many steps beside few
    ref_codes, ref_row_codewords = naive.encode(digits, naive.tunstall([1, 6, 1], 8), 8)
    codebook = Codebook.fit([1, 6, 1], bits=8)
    packed = encode(digits, np.ones((rows, 1), dtype=np.float32), codebook)
    assert packed.codes.numpy().tobytes() == ref_codes
    assert codebook.count_codewords(digits).tolist() == ref_row_codewords


@pytest.mark.parametrize("bits", [8, 9, 10, 11, 12])
@pytest.mark.parametrize("codewords", [63, 64, 65, 130])
def test_streams_around_a_multiple_of_64_codewords_equal_the_naive_ones(codewords, bits):
    digits = draw_digits(np.random.default_rng(bits), [1, 2, 1], (codewords, 1))  # a codeword a row
    codebook = Codebook.fit([1, 2, 1], bits)
    strings = [string for string in naive.strings_of(codebook.table.tolist(), 3) if string]
    packed = encode(digits, np.ones((codewords, 1), dtype=np.float32), codebook)
    assert packed.codes.numpy().tobytes() == naive.encode(digits, strings, bits)[0]


@pytest.mark.parametrize("codebook", [TERNARY, TWO_BIT, PAPER], ids=["ternary", "two-bit", "paper"])
@pytest.mark.parametrize("digit", [-128, -2, 4, 64, 127])
@pytest.mark.parametrize("row", [0, 3, 4, 5])
def test_a_digit_of_another_alphabet_is_refused_wherever_it_is(codebook, digit, row):
    digits = draw_digits(np.random.default_rng(row), codebook.counts, (6, 29))
    digits[row, 28] = digit
    with pytest.raises(DigitError, match=f"{digit} at row {row}, column 28;"):
        encode(digits, np.ones((6, codebook.digits - 1), dtype=np.float32), codebook)
    with pytest.raises(DigitError, match=f"{digit} at row {row}, column 28;"):
        codebook.rate(digits)


@pytest.mark.parametrize("shares", [(0, 1, 0), (1, 0, 1), (1, 18, 1), (0, 1, 1, 1)], ids=str)
def test_the_widest_row_survives(shares):
    digits = draw_digits(np.random.default_rng(5), shares, (1, 65535))
    codebook = TERNARY if len(shares) == 3 else TWO_BIT
    packed = encode(digits, np.ones((1, len(shares) - 1), dtype=np.float32), codebook)
    assert (decode(unchecked(packed))[0].numpy() == digits).all()


def test_a_codeword_per_weight_still_counts_in_16_bits():
    digits = np.ones((1, 65535), dtype=np.int8)
    packed = encode(digits, np.ones((1, 1), dtype=np.float32), Codebook.fit([0, 10**15, 0], bits=8))
    assert (decode(unchecked(packed))[0].numpy() == 1).all()


@pytest.mark.parametrize(("difference", "dtype"), [(0, torch.uint8), (255, torch.uint8), (256, torch.uint16)])
def test_row_lengths_take_8_bits_where_they_differ_by_less_than_256(difference, dtype):
    digits = np.tril(np.ones((1200, 1200), dtype=np.int8))
    counts = TERNARY.count_codewords(digits)
    digits = digits[[0, int((counts == counts[0] + difference).argmax())]]
    packed = encode(digits, np.ones((2, 1), dtype=np.float32), TERNARY)
    assert packed.row_codewords.dtype == dtype
    assert packed.row_codewords.tolist() == [0, difference]
    assert packed.fewest_codewords == counts[0]
    assert packed.count_codewords().tolist() == [counts[0], counts[0] + difference]
    assert packed.nbytes == len(packed.codes) + 2 * dtype.itemsize + 4 + 2 * 4
    assert (decode(unchecked(packed))[0].numpy() == digits).all()


def test_the_longest_rows_count_beside_the_shortest():
    digits = np.zeros((2, 65535), dtype=np.int8)
    digits[0] = 1
    packed = encode(digits, np.ones((2, 1), dtype=np.float32), Codebook.fit([1, 10**15, 1], bits=8))
    assert packed.count_codewords()[0] > 32767, "more than a signed number of 16 bits holds"
    assert (decode(unchecked(packed))[0].numpy() == digits).all()


def test_one_and_two_threads_give_the_same_bytes():
    rng = np.random.default_rng(6)
    digits = draw_digits(rng, TERNARY.counts, (203, 500))
    levels = draw_levels(rng, 203, 2)
    results = []
    before = numba.get_num_threads()
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(threads)
        packed = encode(digits, levels, Codebook.fit(TERNARY.counts, bits=11))
        results.append(
            (packed.codes.numpy().tobytes(), packed.count_codewords().tolist(), packed.dense().numpy().tobytes())
        )
    numba.set_num_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("codebook", "width"), [(TERNARY, 1), (TERNARY, 2), (TWO_BIT, 3)], ids=["1", "2", "3"])
def test_dense_is_each_level_cast(codebook, width, dtype):
    rng = np.random.default_rng(7)
    digits = draw_digits(rng, codebook.counts, (11, 63))
    levels = draw_levels(rng, 11, width, torch.bfloat16)
    packed = encode(torch.from_numpy(digits), levels, codebook)
    dense = packed.dense(dtype)
    assert dense.dtype == dtype
    assert packed.levels.dtype == torch.bfloat16
    expected = torch.from_numpy(naive.dequantize(digits, levels.tolist())).to(dtype)
    assert torch.equal(dense, expected)


def test_sizes_count_codes_row_lengths_and_levels():
    digits, packed = sample(rows=9, columns=100)
    codewords = int(packed.count_codewords().sum())
    assert packed.nbytes == codewords + 8 + 9 + 4 + 9 * 2 * 4
    assert packed.bits_per_weight == 8 * packed.nbytes / 900
    assert packed.shape == digits.shape
    assert packed.device == torch.device("cpu")
    assert torch.equal(packed.to("cpu").dense(), packed.dense())


def test_input_of_any_strides_and_container_gives_the_same_bytes():
    digits, packed = sample()
    levels = packed.levels.numpy()
    for other in (
        np.asfortranarray(digits),
        np.repeat(digits, 2, axis=1)[:, ::2],
        digits[::-1][::-1],
        torch.from_numpy(digits),
    ):
        assert torch.equal(encode(other, levels, TERNARY).codes, packed.codes)
    digits.flags.writeable = levels.flags.writeable = False
    assert torch.equal(encode(digits, levels, TERNARY).codes, packed.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_steps_and_scales_give_the_bytes_of_encoding_anew(dtype):
    rng = np.random.default_rng(5)
    digits = rng.integers(-9, 10, (33, 70)).astype(np.int8)
    book = Dictionary.fit_counts([40, 50, 26, 9, 2], bits=9)  # clips some
    first, second = draw_levels(rng, 33, 1, dtype), draw_levels(rng, 33, 1, dtype)
    scales = torch.from_numpy(rng.uniform(0.5, 2.0, 70).astype(np.float32)).bfloat16()
    for own in (None, scales):
        changed, anew = with_steps(encode(digits, first, book), second, own), encode(digits, second, book, own)
        for field in dataclasses.fields(anew):
            found, expected = getattr(changed, field.name), getattr(anew, field.name)
            assert torch.equal(found, expected) if torch.is_tensor(expected) else found == expected, field.name
    for levels, own, error in (
        (second[1:], None, ShapeError),
        (second.double(), None, DtypeError),
        (second / 0, None, NotFiniteError),
        (second, scales[1:], ShapeError),
        (second, 0 * scales, NotFiniteError),
        (second, scales.float() + 1e-4, DtypeError),
    ):
        with pytest.raises(error):
            with_steps(encode(digits, first, book), levels, own)


def test_later_changes_of_the_levels_do_not_reach_the_packed_matrix():
    levels = torch.ones(1, 2)
    packed = encode(np.ones((1, 4), dtype=np.int8), levels, TERNARY)
    levels[:] = 7
    assert packed.levels.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("digits", "levels", "error"),
    [
        (np.zeros(4, np.int8), np.ones((4, 2), np.float32), ShapeError),
        (np.zeros((0, 4), np.int8), np.ones((0, 2), np.float32), ShapeError),
        (np.zeros((2, 0), np.int8), np.ones((2, 2), np.float32), ShapeError),
        (np.zeros((1, 65536), np.int8), np.ones((1, 2), np.float32), ShapeError),
        (np.zeros((2, 4), np.int8), np.ones((3, 2), np.float32), ShapeError),
        (np.zeros((2, 4), np.int8), np.ones((2, 3), np.float32), ShapeError),
        (np.zeros((2, 4), np.int8), np.ones(2, np.float32), ShapeError),
        (np.zeros((2, 4), np.int16), np.ones((2, 2), np.float32), DtypeError),
        (torch.zeros(2, 4, dtype=torch.bfloat16), np.ones((2, 2), np.float32), DtypeError),
        ([[0, 1]], np.ones((1, 2), np.float32), DtypeError),
        (np.zeros((2, 4), np.int8), np.ones((2, 2)), DtypeError),
        (np.zeros((2, 4), np.int8), torch.ones(2, 2, dtype=torch.int32), DtypeError),
        (np.zeros((2, 4), np.int8), [[1.0, 1.0]] * 2, DtypeError),
        (np.full((2, 4), -2, np.int8), np.ones((2, 2), np.float32), DigitError),
        (np.full((2, 4), 2, np.int8), np.ones((2, 2), np.float32), DigitError),
        (np.zeros((2, 4), np.int8), np.float32([[1, 2], [np.nan, 1]]), NotFiniteError),
        (np.zeros((2, 4), np.int8), np.float32([[1, 2], [np.inf, 1]]), NotFiniteError),
        (torch.zeros(2, 4, dtype=torch.int8, device="meta"), np.ones((2, 2), np.float32), SettingError),
        (np.zeros((2, 4), np.int8), torch.ones(2, 2, device="meta"), SettingError),
    ],
)
def test_encode_refuses_what_it_cannot_write(digits, levels, error):
    with pytest.raises(error, match=r"[.;]") as raised:
        encode(digits, levels, TERNARY)
    assert "\n" not in str(raised.value)


def test_two_bit_codebook_refuses_negative_digits():
    with pytest.raises(DigitError, match="-1 at row 0, column 2"):
        encode(np.int8([[0, 3, -1]]), np.ones((1, 3), np.float32), TWO_BIT)


def test_dense_of_an_integer_dtype_is_refused():
    with pytest.raises(DtypeError):
        sample()[1].dense(torch.int8)


def test_a_matrix_elsewhere_is_refused_with_the_remedy():
    packed = sample()[1].to("meta")
    for use in (decode, validate, PackedMatrix.dense):
        with pytest.raises(SettingError, match=r"packed\.to\('cpu'\)"):
            use(packed)


def stored_counts(counts):
    row_codewords, fewest = shorten_counts(torch.from_numpy(counts))
    return {"row_codewords": row_codewords, "fewest_codewords": fewest}


def forgeries(packed):
    """Changes that make a sound matrix unsound, by name."""
    counts = packed.count_codewords().numpy()
    rows, fewest = len(counts), packed.fewest_codewords
    longer, shifted, joined = counts.copy(), counts.copy(), counts.copy()
    longer[0] += 1
    shifted[:2] += [1, -1]
    joined[:2] = [0, counts[0] + counts[1]]
    spare, levels = packed.codes.clone(), packed.levels.clone()
    spare[-1] = 1
    levels[3, 1] = float("nan")
    return {
        "truncated codes": {"codes": packed.codes[:-1]},
        "codes too long": {"codes": torch.cat([packed.codes, torch.zeros(8, dtype=torch.uint8)])},
        "no codes": {"codes": packed.codes[:0]},
        "nonzero padding": {"codes": spare},
        "one codeword too many": stored_counts(longer),
        "rows shifted by a codeword": stored_counts(shifted),
        "a row without codewords": stored_counts(joined),
        "huge row lengths": {"row_codewords": torch.full((rows,), 65535, dtype=torch.uint16)},
        "huge row lengths above a huge least one": {
            "row_codewords": torch.full((rows,), 65535, dtype=torch.uint16),
            "fewest_codewords": 65535,
        },
        "one more for each row": {"fewest_codewords": fewest + 1},
        "one less for each row": {"fewest_codewords": fewest - 1},
        "a least count below zero": {"fewest_codewords": -1},
        "a least count beyond 16 bits": {"fewest_codewords": 65536},
        "a least count beyond 64 bits": {"fewest_codewords": 1 << 70},
        "a least count that is no integer": {"fewest_codewords": float(fewest)},
        "no rows": {"row_codewords": packed.row_codewords[:0], "levels": packed.levels[:0]},
        "fewer row lengths": {"row_codewords": packed.row_codewords[:-1]},
        "wider": {"columns": packed.columns + 84},
        "narrower": {"columns": 1},
        "no columns": {"columns": 0},
        "too many columns": {"columns": 65536},
        "levels of NaN": {"levels": levels},
        "levels for two-bit digits": {"levels": torch.ones(rows, 3)},
        "levels of one axis": {"levels": torch.ones(rows)},
        "levels of float64": {"levels": packed.levels.double()},
        "signed codes": {"codes": packed.codes.view(torch.int8)},
        "signed row lengths": {"row_codewords": packed.row_codewords.view(torch.int8)},
        "row lengths of 64 bits": {"row_codewords": packed.row_codewords.to(torch.int64)},
        "strided codes": {"codes": packed.codes.repeat_interleave(2)[::2]},
    }


@pytest.mark.parametrize("name", forgeries(sample()[1]))
def test_a_forged_matrix_is_refused(name):
    _, packed = sample()
    validate(unchecked(packed))
    damaged = unchecked(packed, **forgeries(packed)[name])
    for use in (validate, decode, PackedMatrix.dense):
        with pytest.raises(FormatError) as raised:
            use(damaged)
        assert "\n" not in str(raised.value)


def test_a_code_that_stands_for_nothing_is_refused():
    _, packed = sample()
    codes = packed.codes.clone()
    codes[0] = 255
    with pytest.raises(FormatError, match="row 0 uses a code that stands for nothing"):
        validate(unchecked(packed, codes=codes))


def test_set_bits_behind_the_last_codeword_are_refused():
    rng = np.random.default_rng(3)
    packed = encode(draw_digits(rng, [1, 8, 1], (1, 63)), draw_levels(rng, 1, 2), Codebook.fit([1, 8, 1], bits=9))
    assert int(packed.count_codewords()[0]) % 8, "the stream must end inside a byte"
    codes = packed.codes.clone()
    codes[-9] |= 128
    with pytest.raises(FormatError, match="behind its last codeword"):
        validate(unchecked(packed, codes=codes))


kept_sample = functools.cache(sample)


@given(
    codebook=st.sampled_from([TERNARY, TWO_BIT, Codebook.fit([1, 8, 1], bits=11), PAPER]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4),
    target=st.sampled_from(["codes", "row_codewords", "levels"]),
    seed=st.integers(0, 4),
)
@settings(max_examples=100, deadline=None)
def test_flipped_bytes_are_refused_or_decode_within_bounds(codebook, flips, target, seed):
    _, packed = kept_sample(6, 61, codebook, seed)
    damaged = unchecked(packed)
    content = getattr(damaged, target).view(torch.uint8).numpy().reshape(-1)
    for place, mask in flips:
        content[place % len(content)] ^= mask
    try:
        digits, _ = decode(damaged)
    except FormatError:
        return
    assert digits.shape == (6, 61)
    assert codebook.lowest_digit <= int(digits.min())
    assert int(digits.max()) < codebook.lowest_digit + codebook.digits
    again = encode(digits, damaged.levels, codebook)
    if codebook is not PAPER:  # which has other readings than the greedy one
        assert again.count_codewords().tolist() == damaged.count_codewords().tolist()
