"""The kernels of codes of windows: right in the emulator, small in machine code."""

from __future__ import annotations

import functools
import importlib.util
import re

import numpy as np
import pytest
import torch

pytest.importorskip("greenlet", reason="the emulator runs one greenlet a thread; pip install 'qmoe-lite[dev]'")

import emulator
from checks import naive_window_packets, naive_windows

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.windows import encode
from qmoe_lite.cuda import launch, window_packets, windows, windows_product
from qmoe_lite.errors import DtypeError, ShapeError

BITS, SPREADS = 10, {8: 1.2, 16: 0.3, 32: 0.3}  # standard deviation of digits by the width that their dictionary has
MOST_REGISTERS, MOST_PER_WEIGHT = 128, 0.30


@pytest.fixture
def emulated(monkeypatch):
    emulator.install(monkeypatch, seed=7)
    monkeypatch.setattr(windows_product, "WARPS", (1, 2))
    monkeypatch.setattr(windows, "WARPS", 2)


@functools.cache
def dictionary_of(width, bits=BITS):
    rng = np.random.default_rng(width)
    digits = np.rint(rng.normal(0, SPREADS[width], 20000)).astype(np.int16)
    return Dictionary.fit(digits, bits, clip=4 if width == 8 else 2, longest=width)


def draw_digits(width, experts, rows, columns, seed=0, rare=0.01):
    """Digits (E, R, C) of which some are beyond the clip, one of them by several exceptions."""
    rng = np.random.default_rng(seed)
    digits = np.rint(rng.normal(0, SPREADS[width], (experts, rows, columns))).astype(np.int16)
    outliers = rng.random(digits.shape) < rare
    digits[outliers] = rng.integers(-300, 301, int(outliers.sum()))
    if rare and rows:
        digits[0, -1, -1] = 1000
    return digits


def naive_digits(windows, stream, dictionary, columns):
    """Digits (R, C), one window and one exception after another."""
    table, lengths = dictionary.digits_table.tolist(), dictionary.lengths.tolist()
    rows = [[d for window in row for d in table[window][: lengths[window]]][:columns] for row in windows]
    starts, positions, values = stream.exceptions
    each = max(1, 65536 // columns)
    for block in range(len(starts) - 1):
        for i in range(starts[block], starts[block + 1]):
            row, column = divmod(int(positions[i]), columns)
            rows[block * each + row][column] += int(values[i])
    return np.array(rows, dtype=np.int64).reshape(-1, columns)


class Case:
    """Matrices of digits, their streams and their packets."""

    def __init__(self, digits, dictionary, scaled=True, seed=0):
        rng = np.random.default_rng(seed)
        experts, rows, columns = digits.shape
        self.digits, self.dictionary = digits, dictionary
        self.streams = [encode(own, dictionary.bits, dictionary.clip, *dictionary.encoder) for own in digits]
        self.steps = rng.uniform(0.5, 2, (experts, rows)).astype(np.float32)
        self.scales = rng.uniform(0.5, 2, (experts, columns)).astype(np.float32) if scaled else None
        sizes = np.cumsum([0, *(len(stream.codes) for stream in self.streams)])
        before = np.cumsum([0, *(len(stream.exceptions.positions) for stream in self.streams)])
        starts = np.array([s.exceptions.starts + b for s, b in zip(self.streams, before, strict=False)], dtype=np.int32)
        exceptions = [np.concatenate([s.exceptions[part] for s in self.streams]) for part in (1, 2)]
        self.packets = window_packets.make_window_packets(
            torch.from_numpy(np.concatenate([stream.codes for stream in self.streams])),
            torch.from_numpy(sizes[:-1].astype(np.int64)),
            torch.from_numpy(np.array([stream.row_codewords for stream in self.streams])),
            torch.from_numpy(self.steps),
            None if self.scales is None else torch.from_numpy(self.scales),
            (torch.from_numpy(starts), *map(torch.from_numpy, exceptions)),
            dictionary,
            columns,
        )

    def weights(self, expert):
        """Weights in float32 as the description says."""
        dense = self.digits[expert].astype(np.float32) * self.steps[expert, :, None]
        return dense if self.scales is None else dense * self.scales[expert]

    def assert_product(self, y, expert, x, tolerance=1e-5):
        """Error against the sum of the products' sizes, which bounds what rounding in float32 can do."""
        weights, x = self.weights(expert).astype(np.float64), x.double().numpy()
        assert (np.abs(y.double().numpy() - x @ weights.T) <= tolerance * (np.abs(x) @ np.abs(weights).T)).all()


SHAPES = [(1, 1), (7, 1), (1, 63), (5, 63), (3, 1000), (70, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
def test_packets_and_digits_are_those_of_the_slow_reference(emulated, rows, columns, width):
    dictionary = dictionary_of(width)
    case = Case(draw_digits(width, 2, rows, columns, seed=columns), dictionary)
    words, starts = [], [0]
    for expert, stream in enumerate(case.streams):
        read = naive_windows(stream.codes, stream.row_codewords, dictionary)
        own_words, own_starts = naive_window_packets(read, dictionary)
        starts += [len(words) + start for start in own_starts[1:]]
        words += own_words
        assert (naive_digits(read, stream, dictionary, columns) == case.digits[expert]).all()
        assert (windows.decode_digits(case.packets, expert).numpy() == case.digits[expert]).all()
    assert case.packets.words.tolist() == words
    assert case.packets.starts.tolist() == starts
    assert case.packets.packets_each == len(words) / (2 * rows)


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("bits", [9, 11, 12])
def test_other_widths_of_codewords(emulated, bits, width):
    case = Case(draw_digits(width, 1, 3, 300), dictionary_of(width, bits))
    [stream] = case.streams
    words, _ = naive_window_packets(naive_windows(stream.codes, stream.row_codewords, case.dictionary), case.dictionary)
    assert case.packets.words.tolist() == words
    assert (windows.decode_digits(case.packets).numpy() == case.digits[0]).all()
    x = torch.randn(2, 300)
    case.assert_product(windows_product.multiply(case.packets, 0, x), 0, x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_weights_are_digits_times_steps_times_scales(emulated, width, scaled, dtype):
    case = Case(draw_digits(width, 2, 4, 150), dictionary_of(width), scaled)
    for expert in range(2):
        expected = torch.from_numpy(case.weights(expert)).to(dtype)
        assert torch.equal(windows.decode_weights(case.packets, expert, dtype), expected)
        part = torch.empty((2, 150), dtype=dtype)
        windows.decode_window_rows(case.packets, expert, 1, part)
        assert torch.equal(part, expected[1:3])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
def test_product_is_the_naive_one(emulated, rows, columns, width, tokens):
    case = Case(draw_digits(width, 2, rows, columns, seed=tokens), dictionary_of(width), scaled=tokens != 2)
    x = torch.randn(tokens, columns)
    for expert in range(2):
        case.assert_product(windows_product.multiply(case.packets, expert, x), expert, x)
    half = windows_product.multiply(case.packets, 1, x.bfloat16())
    case.assert_product(half, 1, x.bfloat16(), 2**-7)  # x times its scale, and the result, are rounded


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [2, 4, 8, 16, 32])
def test_any_number_of_lanes_may_share_a_row(emulated, monkeypatch, lanes):
    monkeypatch.setattr(windows_product, "choose_lanes", lambda *_: lanes)
    case = Case(draw_digits(8, 1, 37, 400), dictionary_of(8))
    x = torch.randn(1, 400)
    case.assert_product(windows_product.multiply(case.packets, 0, x), 0, x)


@pytest.mark.parametrize("limit", [64 << 10, 24 << 10, 9 << 10], ids=["held", "4 tokens", "1 token"])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_x_and_table_are_held_as_they_fit(emulated, monkeypatch, tokens, limit):
    monkeypatch.setattr(launch, "shared_limit", lambda device: limit)
    case = Case(draw_digits(8, 1, 3, 1000), dictionary_of(8))
    x = torch.randn(tokens, 1000)
    case.assert_product(windows_product.multiply(case.packets, 0, x), 0, x)


def test_what_is_held_follows_from_what_fits():
    def held(width, columns, limit, tokens=4, bits=BITS, half=False):
        dictionary = dictionary_of(width, bits)
        variant = windows_product.choose_window_variant(dictionary, columns, tokens, limit, half=half)
        if variant is None:
            return None
        padded = columns + window_packets.columns_behind(dictionary)
        assert variant.shared_bytes(padded) <= limit
        return variant.tokens, variant.span, variant.held

    assert held(8, 4096, 227 << 10) == (4, 1, True)
    assert held(8, 4096, 227 << 10, tokens=2) == (2, 2, True)
    assert held(8, 4096, 227 << 10, tokens=1) == (1, 4, True)
    assert held(8, 5000, 98 << 10) == (2, 1, True)
    assert held(8, 14336, 98 << 10) == (1, 1, True)
    assert held(16, 4096, 98 << 10, tokens=1) == (1, 2, True)
    assert held(32, 4096, 98 << 10, tokens=1) == (1, 2, False), "so that two blocks fit"
    assert held(32, 4096, 227 << 10, tokens=1) == (1, 4, True)
    assert held(8, 4096, 98 << 10, bits=12) == (4, 1, False)
    assert held(8, 65535, 227 << 10) is None
    assert held(8, 4096, 227 << 10, tokens=1, half=True) == (1, 8, True)
    assert held(8, 8192, 227 << 10, tokens=1, half=True) == (1, 4, True), "so that two blocks fit"
    assert held(8, 14336, 227 << 10, tokens=1, half=True) == (1, 4, True)
    assert held(8, 4096, 227 << 10, tokens=4, half=True) == (4, 2, True)


def test_activations_too_wide_for_shared_memory_meet_decoded_tiles(emulated, monkeypatch):
    monkeypatch.setattr(launch, "shared_limit", lambda device: 2048)
    monkeypatch.setattr(windows_product, "window_kernel", None)
    case = Case(draw_digits(8, 1, 4, 700), dictionary_of(8))
    x = torch.randn(2, 700)
    case.assert_product(windows_product.multiply(case.packets, 0, x), 0, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 20])
def test_few_and_many_tokens_in_the_dtype_of_x(emulated, monkeypatch, tokens, dtype):
    monkeypatch.setattr(windows_product, "TILE_VALUES", 3 * 90)
    case = Case(draw_digits(8, 2, 8, 90, rare=0), dictionary_of(8))
    x = torch.randn(tokens, 90).to(dtype)
    y = windows_product.multiply(case.packets, 1, x)
    assert y.dtype == dtype
    case.assert_product(y, 1, x, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype])


@pytest.mark.parametrize("width", [8, 16, 32])
def test_digits_of_zero_and_one_value(emulated, width):
    for value in (0, 1, -2):
        case = Case(np.full((1, 3, 77), value, dtype=np.int16), dictionary_of(width))
        assert (windows.decode_digits(case.packets).numpy() == value).all()
        x = torch.randn(1, 77)
        case.assert_product(windows_product.multiply(case.packets, 0, x), 0, x)


@pytest.mark.slow
def test_exceptions_fill_rows_and_add_up(emulated):
    """Rows fill several blocks of exceptions, and one digit takes many of them."""
    digits = draw_digits(8, 2, 3, 33000, rare=0)
    digits[:, :, ::2000] = 31
    digits[1, 2, 7] = -32000
    case = Case(digits, dictionary_of(8))
    for expert in range(2):
        assert (windows.decode_digits(case.packets, expert).numpy() == digits[expert]).all()


def test_groups_name_experts_and_their_places(emulated):
    """Pairs of a token and an expert, some dropped; an expert in no place leaves its rows alone."""
    case = Case(draw_digits(8, 3, 6, 50), dictionary_of(8))
    x = torch.randn(3, 50)
    variant = windows_product.WindowVariant(BITS, 8, True, 2, 2)
    groups = torch.tensor([0, 1, 2, 2], dtype=torch.int32), torch.tensor([0, 3, 4, -1, 1, 5, -1, -1], dtype=torch.int32)
    y = torch.full((6, 6), 77.0)
    places = torch.tensor([0, -1, 2], dtype=torch.int32)
    windows_product.multiply_groups(case.packets, places, variant, x, groups, 2, y)
    for pair, expert in ((0, 0), (3, 0), (1, 2), (5, 2)):
        token = pair // 2
        case.assert_product(y[pair : pair + 1], expert, x[token : token + 1])
    assert (y[[2, 4]] == 77).all()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu", None])
@pytest.mark.parametrize("widths", [(8, 8), (8, 32), (16, 8)])
def test_two_matrices_meet_x_in_one_launch(emulated, widths, activation):
    """The first one's product, or the activation of it, times the second one's, as each alone gives, bit for bit."""
    gate, up = (Case(draw_digits(w, 2, 9, 130, seed=w, rare=0.05), dictionary_of(w), seed=1) for w in widths)
    pairs, groups = torch.arange(4, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    x, places, weights = torch.randn(2, 130), torch.tensor([1, 0], dtype=torch.int32), torch.rand(4)
    chosen = [dictionary_of(width) for width in widths]
    variant = windows_product.choose_window_variant(chosen[0], 130, 2, 1 << 20, chosen[1], activation)
    assert (variant.tokens, variant.held) == (2, True)
    y = torch.empty(4, 9)
    given = places, variant, x, (groups, pairs), 2, y, weights
    windows_product.multiply_groups(gate.packets, *given, other=up.packets)
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, None: lambda z: z}[activation]
    for pair in range(4):
        alone = [
            windows_product.multiply(each.packets, int(places[pair // 2]), x[pair // 2][None]) for each in (gate, up)
        ]
        expected = act(alone[0]) * alone[1] * weights[pair]
        if activation is None:
            assert torch.equal(y[pair], expected[0])
        torch.testing.assert_close(y[pair], expected[0], rtol=1e-5, atol=1e-6)


def test_a_token_s_result_does_not_depend_on_the_others(emulated):
    case = Case(draw_digits(8, 1, 9, 120), dictionary_of(8))
    x = torch.randn(4, 120)
    whole = windows_product.multiply(case.packets, 0, x)
    for token in range(4):
        assert torch.equal(windows_product.multiply(case.packets, 0, x[token : token + 1]), whole[token : token + 1])


def test_no_tokens_and_bad_arguments(emulated):
    case = Case(draw_digits(8, 1, 2, 30), dictionary_of(8))
    assert windows_product.multiply(case.packets, 0, torch.ones(0, 30)).shape == (0, 2)
    with pytest.raises(ShapeError, match="expected"):
        windows_product.multiply(case.packets, 0, torch.ones(1, 31))
    with pytest.raises(DtypeError, match="expected"):
        windows_product.multiply(case.packets, 0, torch.ones(1, 30, dtype=torch.float64))
    with pytest.raises(DtypeError, match="expected"):
        windows.decode_weights(case.packets, 0, torch.float64)
    assert case.packets.nbytes > 0


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda compiles the kernels"
)
VARIANTS = {
    "9 bits": (9, 8, True, 1, 4),
    "10 bits": (10, 8, True, 1, 4),
    "10 bits, x once": (10, 8, True, 1, 1),
    "10 bits, 2 tokens": (10, 8, True, 2, 2),
    "11 bits": (11, 8, True, 1, 4),
    "12 bits, table not held": (12, 8, False, 1, 2),
    "16 digits": (10, 16, True, 1, 2),
    "16 digits, 4 tokens": (10, 16, True, 4, 1),
    "32 digits": (10, 32, True, 1, 4),
    "32 digits, 4 tokens, table not held": (10, 32, False, 4, 1),
    "gate and up": (10, 8, True, 1, 4, (10, 8), "silu"),
    "gate and up, 4 tokens": (10, 16, True, 4, 1, (10, 32), "gelu"),
    "x in bfloat16": (10, 8, True, 1, 8, None, None, True),
    "x in bfloat16, 4 tokens": (10, 8, True, 4, 2, None, None, True),
}
ONE_MATRIX = [name for name, settings in VARIANTS.items() if settings[5:6] in ((), (None,))]


def compiled(name, capability):
    from qmoe_lite.bench import kernels

    kernel = windows_product.window_kernel(windows_product.WindowVariant(*VARIANTS[name]))
    return kernels.compiled(kernel, kernel.signatures[0], capability)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_variant_fits_the_gpu(name, capability):
    from qmoe_lite.bench import kernels

    code = compiled(name, capability)
    found = kernels.resources(code)
    assert ".f64" not in code.ptx
    assert ".local" not in code.ptx
    assert 0 < found.registers <= MOST_REGISTERS
    assert found.stack == 0
    assert not re.search(r"cvt\.\w+\.f32\.[su]64", code.ptx)
    assert kernels.widest_load(code.ptx) == 16


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ONE_MATRIX)
def test_a_codeword_takes_the_loads_that_it_must(name):
    from qmoe_lite.cuda import static

    code = compiled(name, (9, 0))
    bits, width, held, _, span = VARIANTS[name][:5]
    of = static.row_loops(code.cubin, code.name, (9, 0))
    entry = held * max(1, width // 16)  # one load gives up to 16 digits
    assert of.shared == window_packets.codewords_each(bits) * (entry + width // span)
    assert of.packet > 3 * width * window_packets.codewords_each(bits)  # a loop that does less was miscounted
    assert of.row > 40


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_a_weight_takes_few_instructions_at_two_bits(capability):
    from qmoe_lite.bench import kernels

    for columns in (768, 2048, 4096, 14336):
        instructions, shared = kernels.window_per_weight("windows: 2 bits", capability, columns)
        assert shared < instructions <= MOST_PER_WEIGHT
