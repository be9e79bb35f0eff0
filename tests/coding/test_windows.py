from __future__ import annotations

import naive
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.exceptions import Exceptions, block_rows, count_exceptions
from qmoe_lite.coding.stream import row_starts
from qmoe_lite.coding.windows import Stream, decode_dense_rows, decode_rows, encode
from qmoe_lite.coding.windows_check import check
from qmoe_lite.errors import FormatError

DICTIONARIES = {
    "ternary": Dictionary.fit_counts([800, 150], bits=9, clip=1, longest=16),
    "lowest": Dictionary.fit_counts([9000, 900, 20], bits=10, longest=32),
    "low": Dictionary.fit_counts([500, 200, 30, 4], bits=9),
    "middle": Dictionary.fit_counts([400, 500, 260, 90, 20, 4], bits=10, longest=8),
    "high": Dictionary.fit_counts([90, 170, 150, 120, 90, 60, 35, 20, 9, 4, 2, 1, 1], bits=11),
    "one digit a string": Dictionary.fit_counts([5, 5, 5], bits=9, longest=1),
}
each_dictionary = pytest.mark.parametrize("dictionary", DICTIONARIES.values(), ids=DICTIONARIES)


def write(digits, dictionary):
    return encode(digits, dictionary.bits, dictionary.clip, *dictionary.encoder)


def read(stream, dictionary, columns, first=0, rows=None):
    starts = row_starts(stream.row_codewords)
    out = np.full((len(starts) - 1 - first if rows is None else rows, columns), 99, dtype=np.int16)
    tables = dictionary.bits, dictionary.digits_table, dictionary.lengths
    decode_rows(stream.codes, starts, *tables, stream.exceptions, first, out)
    return out


def validate(stream, dictionary, columns):
    own = dictionary.bits, dictionary.clip, dictionary.lengths, dictionary.quarters[0]
    check(stream.codes, stream.row_codewords, columns, *own, stream.exceptions)


def places(exceptions, columns):
    """Exceptions as (row, column, value)."""
    found, per = [], block_rows(columns)
    for block in range(len(exceptions.starts) - 1):
        for k in range(exceptions.starts[block], exceptions.starts[block + 1]):
            row, column = divmod(int(exceptions.positions[k]), columns)
            found.append((block * per + row, column, int(exceptions.values[k])))
    return found


def agrees_with_naive(digits, dictionary):
    columns = digits.shape[1]
    args = dictionary.kinds, dictionary.bits, dictionary.clip, dictionary.starts, dictionary.quarters
    trees, class_of = naive.window_trees(*args)
    codes, row_codewords, exceptions = naive.encode_windows(digits, trees, class_of, dictionary.bits, dictionary.clip)
    stream = write(digits, dictionary)
    assert stream.codes.tobytes() == codes
    assert stream.row_codewords.tolist() == row_codewords
    assert places(stream.exceptions, columns) == exceptions
    assert count_exceptions(digits, dictionary.clip) == len(exceptions)
    back = naive.decode_windows(codes, row_codewords, trees, class_of, dictionary.bits, columns, exceptions)
    assert back == digits.tolist()
    validate(stream, dictionary, columns)
    assert (read(stream, dictionary, columns) == digits).all()


def draw(rows, columns, spread=1.5, seed=3):
    return np.rint(np.random.default_rng(seed).standard_t(5, (rows, columns)) * spread).astype(np.int16)


@each_dictionary
@pytest.mark.parametrize("shape", [(1, 1), (1, 27), (5, 1), (17, 63), (3, 64), (6, 1000), (70, 28)], ids=str)
def test_bytes_and_digits_equal_the_naive_ones(dictionary, shape):
    agrees_with_naive(draw(*shape), dictionary)


@each_dictionary
@pytest.mark.parametrize("value", [0, 1, -1, 5, -700, 32767, -32767])
def test_rows_of_one_value(dictionary, value):
    agrees_with_naive(np.full((3, 29), value, dtype=np.int16), dictionary)


@each_dictionary
def test_the_widest_matrix(dictionary):
    digits = draw(2, 65535)
    digits[0, 65534], digits[1, 0] = 300, -300
    stream = write(digits, dictionary)
    validate(stream, dictionary, 65535)
    assert (read(stream, dictionary, 65535) == digits).all()


@pytest.mark.slow
@given(st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_digits_come_back(data):
    dictionary = data.draw(st.sampled_from(list(DICTIONARIES.values())))
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 90))
    digit = st.one_of(st.integers(-2, 2), st.integers(-20, 20), st.integers(-32767, 32767))
    row = st.lists(digit, min_size=columns, max_size=columns)
    agrees_with_naive(np.array(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=np.int16), dictionary)


@each_dictionary
def test_rows_can_be_read_alone(dictionary):
    digits = draw(300, 777, 2.0)
    digits[100] = 900
    stream = write(digits, dictionary)
    for first, rows in ((0, 1), (100, 1), (83, 90), (299, 1)):
        assert (read(stream, dictionary, 777, first, rows) == digits[first : first + rows]).all()


@each_dictionary
def test_dense_rows_are_digit_times_step_times_scale(dictionary):
    digits = draw(40, 333, 3.0)
    digits[7, 11] = -3000
    stream, rng = write(digits, dictionary), np.random.default_rng(5)
    steps, scales = rng.random(40, dtype=np.float32), rng.random(333, dtype=np.float32)
    out = np.empty((21, 333), dtype=np.float32)
    tables = dictionary.bits, dictionary.digits_table, dictionary.lengths
    starts = row_starts(stream.row_codewords)
    decode_dense_rows(stream.codes, starts, *tables, stream.exceptions, steps, scales, 5, out)
    assert (out == digits[5:26].astype(np.float32) * steps[5:26, None] * scales).all()


@each_dictionary
def test_same_bytes_for_any_number_of_threads(dictionary):
    digits = draw(67, 501, 2.5)
    before, results = numba.get_num_threads(), []
    try:
        for threads in (1, before):
            numba.set_num_threads(threads)
            stream = write(digits, dictionary)
            parts = (stream.codes, stream.row_codewords, *stream.exceptions, read(stream, dictionary, 501))
            results.append([part.tobytes() for part in parts])
    finally:
        numba.set_num_threads(before)
    assert results[0] == results[1]


DIGITS = draw(40, 3000, 3.0)  # two blocks of exceptions
MIDDLE = DICTIONARIES["middle"]
FORGERIES = [
    "leading bits",
    "padding",
    "spare bits",
    "short",
    "empty",
    "fewer codewords",
    "more codewords",
    "no codewords",
    "negative",
    "huge",
    "starts fall",
    "starts negative",
    "starts beyond",
    "starts few",
    "no starts",
    "values few",
    "zero",
    "order",
    "outside",
    "beyond the last row",
    "too large",
]


def forged(what):
    stream = write(DIGITS, MIDDLE)
    codes, counts, (starts, positions, values) = stream.codes.copy(), stream.row_codewords.copy(), stream.exceptions
    starts, positions, values = starts.copy(), positions.copy(), values.copy()
    end = int(counts.sum()) * MIDDLE.bits + 2
    match what:
        case "leading bits":
            codes[0] |= 1
        case "padding":
            codes[-1] = 1
        case "spare bits":
            codes[end // 8] |= 128
        case "short":
            codes = codes[:-1]
        case "empty":
            codes = codes[:0]
        case "fewer codewords":
            counts[3] -= 1
            counts[4] += 1
        case "more codewords":
            counts[3] += 1
            counts[4] -= 1
        case "no codewords":
            counts[0] = 0
        case "negative":
            counts[0] = -5
        case "huge":
            counts[0] = 2**62
        case "starts fall":
            starts[1] = starts[2] + 1
        case "starts negative":
            starts[0] = -1
        case "starts beyond":
            starts[-1] += 1
        case "starts few":
            starts = starts[:-1]
        case "no starts":
            starts = starts[:0]
        case "values few":
            values = values[:-1]
        case "zero":
            values[5] = 0
        case "order":
            positions[[3, 4]] = positions[[4, 3]]
        case "outside":
            positions[starts[1] - 1] = 65535
        case "beyond the last row":
            positions[-1] = 19 * 3000
        case "too large":
            positions = np.full(300, 7, dtype=np.uint16)
            values = np.full(300, 127, dtype=np.int8)
            starts[:] = 0, 300, 300
    return Stream(codes, counts, Exceptions(starts, positions, values))


@pytest.mark.parametrize("what", FORGERIES)
def test_forged_streams_are_refused_in_one_line(what):
    with pytest.raises(FormatError) as caught:
        validate(forged(what), MIDDLE, 3000)
    assert "\n" not in str(caught.value)


@given(st.binary(min_size=60, max_size=60), st.sampled_from(list(DICTIONARIES.values())))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_bytes_are_refused_or_decode_to_the_whole_width(data, dictionary):
    count = (8 * 60 - 2) // dictionary.bits
    codes = np.frombuffer(data + bytes(8), dtype=np.uint8).copy()
    codes[0] &= 252
    end = count * dictionary.bits + 2
    codes[end // 8 :] &= 255 if end % 8 == 0 else 0
    if end % 8:
        codes[end // 8] = data[end // 8] & (1 << end % 8) - 1
    codes = codes[: (end + 7) // 8 + 8]
    codes[-8:] = 0
    nothing = Exceptions(np.zeros(2, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.int8))
    stream = Stream(codes, np.array([count]), nothing)
    trees, class_of = naive.window_trees(
        dictionary.kinds, dictionary.bits, dictionary.clip, dictionary.starts, dictionary.quarters
    )
    for columns in range(count, 9 * count, 20):
        try:
            validate(stream, dictionary, columns)
        except FormatError:
            continue
        back = naive.decode_windows(codes.tobytes(), [count], trees, class_of, dictionary.bits, columns, [])
        assert read(stream, dictionary, columns).tolist() == back
        assert len(back[0]) == columns


def test_a_flipped_bit_is_refused_or_decodes_to_the_whole_width():
    stream = write(draw(4, 50), MIDDLE)
    args = MIDDLE.kinds, MIDDLE.bits, MIDDLE.clip, MIDDLE.starts, MIDDLE.quarters
    trees, class_of = naive.window_trees(*args)
    exceptions, accepted = places(stream.exceptions, 50), 0
    for bit in range(8 * (len(stream.codes) - 8)):
        codes = stream.codes.copy()
        codes[bit // 8] ^= 1 << bit % 8
        try:
            validate(Stream(codes, stream.row_codewords, stream.exceptions), MIDDLE, 50)
        except FormatError:
            continue
        accepted += 1
        counts = stream.row_codewords.tolist()
        back = naive.decode_windows(codes.tobytes(), counts, trees, class_of, MIDDLE.bits, 50, exceptions)
        assert read(Stream(codes, stream.row_codewords, stream.exceptions), MIDDLE, 50).tolist() == back
    assert 0 < accepted < 8 * len(stream.codes)
