from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch

from qmoe_lite.coding import window_kernels, windows_product
from qmoe_lite.coding.trees import MOST_DIGITS
from qmoe_lite.coding.windows_product import WindowStack, multiply_windows
from qmoe_lite.errors import NotFiniteError

PADDING_BYTES = 8


def read_only(array):
    array.flags.writeable = False  # as a dictionary's: another type to numba, and another variant of each kernel
    return array


def draw_tables(seed, bits=10, longest=8, clip=5, held=32):
    """Any string of 1 to `longest` digits for each window, zeros behind `held`: what kernels need of a dictionary."""
    rng = np.random.default_rng(seed)
    width = next(width for width in (8, 16, 32) if longest <= width)
    lengths = rng.integers(1, longest + 1, 4 << bits).astype(np.uint8)
    digits = rng.integers(-clip, clip + 1, (4 << bits, width)).astype(np.int8)
    digits[np.arange(width) >= np.minimum(lengths, held)[:, None]] = 0
    heads = digits if held >= width else np.ascontiguousarray(digits[:, : max(8, held)])
    digits, heads, lengths = map(read_only, (digits, heads, lengths))
    return SimpleNamespace(bits=bits, digits_table=digits, heads_table=heads, lengths=lengths)


def draw_codewords(rng, tables, rows, columns):
    """Draw rows of codewords that fill `columns` digits and end in class 0; codewords, and their number by row."""
    codewords, counts, before = [], [], 0
    for _ in range(rows):
        place, first = 0, len(codewords)
        while place < columns:
            codeword = int(rng.integers(1 << tables.bits))
            top = before >> (tables.bits - 2)
            if place + int(tables.lengths[codeword << 2 | top]) >= columns:
                codeword &= (1 << (tables.bits - 1)) - 1  # of class 0
            place += int(tables.lengths[codeword << 2 | top])
            codewords.append(codeword)
            before = codeword
        counts.append(len(codewords) - first)
    return codewords, np.array(counts)


def write_stream(codewords, bits):
    flat = (np.array(codewords, dtype=np.int64)[:, None] >> np.arange(bits)) & 1
    stream = np.packbits(np.concatenate([[0, 0], flat.ravel()]).astype(np.uint8), bitorder="little")
    return np.concatenate([stream, np.zeros(PADDING_BYTES, dtype=np.uint8)])


def read_digits(codes, tables, counts, columns):
    """Decode window after window: int64 digits (R, C)."""
    stream = np.unpackbits(codes, bitorder="little").astype(np.int64)
    weights, rows, at = 1 << np.arange(tables.bits + 2), [], 0
    for count in counts:
        digits = []
        for _ in range(count):
            window = int(stream[at : at + tables.bits + 2] @ weights)
            digits.extend(tables.digits_table[window, : tables.lengths[window]])
            at += tables.bits
        rows.append(digits[:columns])
    return np.array(rows, dtype=np.int64)


def draw_exceptions(rng, rows, columns, share):
    """Exceptions by matrix: starts of blocks, positions, values, and what they add up to by weight."""
    block_rows = max(1, 65536 // columns)
    added = np.zeros((rows, columns), dtype=np.int64)
    starts, positions, values = [0], [], []
    for first in range(0, rows, block_rows):
        places = min(block_rows, rows - first) * columns
        own = np.sort(rng.integers(0, places, rng.binomial(places, share)))  # one place may come several times
        value = rng.integers(-128, 128, len(own))
        np.add.at(added[first : first + block_rows].reshape(-1), own, value)
        positions.extend(own)
        values.extend(value)
        starts.append(len(positions))
    return starts, positions, values, added


def draw_stack(tables, experts, rows, columns, seed=0, exceptions=0.01, scaled=True, spread=np.uint8):
    """A stack, and its weights as float64 (E, R, C)."""
    rng = np.random.default_rng(seed)
    codes, offsets, counts, digits, starts, positions, values = [], [], [], [], [], [], []
    for _ in range(experts):
        codewords, own = draw_codewords(rng, tables, rows, columns)
        offsets.append(sum(map(len, codes)))
        codes.append(write_stream(codewords, tables.bits))
        counts.append(own)
        own_starts, own_positions, own_values, added = draw_exceptions(rng, rows, columns, exceptions)
        digits.append(read_digits(codes[-1], tables, own, columns) + added)
        starts.append(np.array(own_starts) + len(positions))
        positions.extend(own_positions)
        values.extend(own_values)
    counts = np.array(counts)
    fewest = counts.min(1)
    steps = rng.uniform(0.5, 2, (experts, rows)).astype(np.float32)
    scales = rng.uniform(0.5, 2, (experts, columns)).astype(np.float32) if scaled else None
    stack = WindowStack(
        codes=np.concatenate(codes),
        offsets=np.array(offsets, dtype=np.int64),
        row_codewords=(counts - fewest[:, None]).astype(spread),
        fewest=fewest.astype(np.int32),
        steps=steps,
        column_scales=scales,
        dictionary=tables,
        columns=columns,
        exception_starts=np.array(starts, dtype=np.int32),
        exception_positions=np.array(positions, dtype=np.uint16),
        exception_values=np.array(values, dtype=np.int8),
    )
    weights = np.array(digits) * steps[:, :, None].astype(np.float64)
    return stack, weights if scales is None else weights * scales[:, None]


def draw_x(tokens, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32))


def assert_close(got, weights, x):
    """Error against the sum of the products' sizes, which bounds what rounding in float32 can do."""
    x = x.numpy().astype(np.float64)
    assert (np.abs(got.numpy() - x @ weights.T) <= 1e-5 * (np.abs(x) @ np.abs(weights).T)).all()


SHORT, LONG = draw_tables(1), draw_tables(2, longest=16, clip=1)
LONGEST = draw_tables(3, longest=32, clip=1)


@pytest.mark.parametrize("columns", [1, 63, 1000])
@pytest.mark.parametrize(
    ("tables", "tokens"),
    [
        *(pytest.param(SHORT, tokens, id=f"8 digits-{tokens}") for tokens in [1, 2, 3, 4, 5, 8, 9, 17, 64]),
        # kernels of their own, compiled for seconds each: one token, and in turn other numbers of them
        *(pytest.param(LONG, tokens, id=f"16 digits-{tokens}", marks=pytest.mark.slow) for tokens in [1, 4, 8, 16]),
        *(pytest.param(LONGEST, tokens, id=f"32 digits-{tokens}", marks=pytest.mark.slow) for tokens in [1, 2, 17]),
    ],
)
def test_product_equals_the_dense_one(tables, columns, tokens):
    stack, weights = draw_stack(tables, 1, 13, columns, seed=columns)
    x = draw_x(tokens, columns)
    assert_close(multiply_windows([stack], x, [0], [0, tokens])[0], weights[0], x)


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_skip_the_zeros_behind_heads(tokens):
    tables = draw_tables(4, longest=16, clip=2, held=8)
    assert tables.heads_table.shape[1] < tables.digits_table.shape[1]
    stack, weights = draw_stack(tables, 1, 13, 1000)
    x = draw_x(tokens, 1000)
    assert_close(multiply_windows([stack], x, [0], [0, tokens])[0], weights[0], x)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_that_fill_the_positions_of_exceptions(tokens):
    stack, weights = draw_stack(SHORT, 1, 3, 65535, exceptions=0.001, spread=np.uint16)
    x = draw_x(tokens, 65535)
    assert_close(multiply_windows([stack], x, [0], [0, tokens])[0], weights[0], x)


@pytest.mark.parametrize("rows", [1, 48, 49, 200])
@pytest.mark.parametrize("tokens", [1, 6])
def test_numbers_of_rows(rows, tokens):
    stack, weights = draw_stack(SHORT, 1, rows, 1, seed=rows, exceptions=0.2, scaled=False)
    x = draw_x(tokens, 1)
    assert_close(multiply_windows([stack], x, [0], [0, tokens])[0], weights[0], x)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [9, 11, 12])
@pytest.mark.parametrize("tokens", [1, 16])
def test_other_widths_of_codewords(bits, tokens):
    stack, weights = draw_stack(draw_tables(bits, bits), 1, 5, 700)
    x = draw_x(tokens, 700)
    assert_close(multiply_windows([stack], x, [0], [0, tokens])[0], weights[0], x)


@pytest.mark.parametrize("tokens", [1, 40])
def test_rows_of_zeros(tokens):
    stack, _ = draw_stack(draw_tables(3, held=0), 1, 9, 300, exceptions=0)
    assert not multiply_windows([stack], draw_x(tokens, 300), [0], [0, tokens])[0].any()


def test_stacks_and_experts():
    gate, gates = draw_stack(SHORT, 5, 70, 200, seed=1)
    up, ups = draw_stack(SHORT, 5, 33, 200, seed=2)
    up = dataclasses.replace(up, column_scales=gate.column_scales)
    ups = ups / draw_stack(SHORT, 5, 33, 200, seed=2)[0].column_scales[:, None] * gate.column_scales[:, None]
    bounds = [0, 1, 4, 4, 304, 310]
    x = draw_x(310, 200)
    both = multiply_windows([gate, up], x, [0, 1, 2, 3, 4], bounds)
    for expert in range(5):
        own = slice(bounds[expert], bounds[expert + 1])
        for y, weights, stack in zip(both, (gates, ups), (gate, up), strict=True):
            assert_close(y[own], weights[expert], x[own])
            alone = multiply_windows([stack], x[own].contiguous(), [expert], [0, own.stop - own.start])[0]
            assert torch.equal(y[own], alone)


def test_jobs_are_laid_out_in_parts(monkeypatch):
    stack, weights = draw_stack(SHORT, 3, 20, 150)
    monkeypatch.setattr(windows_product, "LAID_BYTES", 40_000)
    monkeypatch.setattr(windows_product, "JOB_TOKENS", 32)
    x = draw_x(203, 150)
    y = multiply_windows([stack], x, [0, 1, 2], [0, 100, 103, 203])[0]
    for expert, own in enumerate([slice(0, 100), slice(100, 103), slice(103, 203)]):
        assert_close(y[own], weights[expert], x[own])


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_same_bytes_for_any_number_of_threads(tokens):
    stack, _ = draw_stack(SHORT, 2, 150, 700)
    x = draw_x(2 * tokens, 700)
    threads = numba.get_num_threads()
    results = []
    for number in {1, threads}:
        numba.set_num_threads(number)
        results.append(multiply_windows([stack], x, [0, 1], [0, tokens, 2 * tokens])[0])
    numba.set_num_threads(threads)
    assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e33])
@pytest.mark.parametrize("tokens", [1, 9])
def test_what_is_not_finite_is_refused(tokens, value):
    stack, _ = draw_stack(SHORT, 1, 3, 100)
    x = draw_x(tokens, 100)
    x[-1, 77] = value
    with pytest.raises(NotFiniteError):
        multiply_windows([stack], x, [0], [0, tokens])


def test_no_tokens():
    stack, _ = draw_stack(SHORT, 1, 3, 100)
    assert multiply_windows([stack], draw_x(0, 100), [0], [0, 0])[0].shape == (0, 3)


def test_kernels_take_the_longest_strings_of_a_dictionary():
    assert window_kernels.LONGEST == MOST_DIGITS
