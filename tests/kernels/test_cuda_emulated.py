"""The CUDA twins' own Python against the slow references, a GPU emulated thread by thread."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import naive
import numpy as np
import pytest
import torch

pytest.importorskip("greenlet", reason="the emulator runs one greenlet a thread; pip install 'qmoe-lite[dev]'")

import emulator

from qmoe_lite.coding import codec as cpu_codec
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.cuda import codec, gather, launch, matmul
from qmoe_lite.cuda import solver as cuda_solver
from qmoe_lite.cuda.launch import kernel
from qmoe_lite.errors import DigitError, DtypeError, NotFiniteError, SettingError, ShapeError
from qmoe_lite.quantization import solver
from qmoe_lite.quantization.grid import MinMaxTernary, MinMaxTwoBit, UniformGrid
from qmoe_lite.quantization.rounding import RoundingTable

TERNARY = Codebook.fit([115, 1770, 115], bits=8)
EVEN = Codebook.fit([1, 1, 1], bits=8)  # short codewords: rows of more than one warp's worth
TWO_BIT = Codebook.fit([885, 50, 40, 25], bits=8)
CODEBOOKS = [TERNARY, EVEN, TWO_BIT]
NAMES = ["ternary", "even", "two-bit"]
SHAPES = [(1, 1), (3, 27), (5, 28), (1, 29), (9, 63), (2, 250)]
GRIDS = {"ternary": MinMaxTernary(), "two_bit": MinMaxTwoBit()}


def seed_of(request):
    """A number that each test has another of, the same in every run."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def emulated(request, monkeypatch):
    """The twins on CPU tensors, 1 to 4 warps a block and an order of the threads by the test's name."""
    seed = seed_of(request)
    emulator.install(monkeypatch, seed=seed)
    monkeypatch.setattr(codec, "WARPS", 1 + seed % 4)
    monkeypatch.setattr(gather, "WARPS", (1 + seed % 4, 1 + seed % 4))


@functools.cache
def strings(codebook):
    return naive.tunstall(codebook.counts, codebook.bits)


def draw(codebook, shape, seed=0):
    """Digits as likely as the codebook takes them to be; a row of zeros, and one of each digit at either end."""
    rng = np.random.default_rng(seed)
    shares = np.array(codebook.counts) / sum(codebook.counts)
    digits = rng.choice(codebook.digits, size=shape, p=shares) + codebook.lowest_digit
    for row, digit in enumerate([0, codebook.lowest_digit, codebook.lowest_digit + codebook.digits - 1]):
        if shape[0] > row + 1:
            digits[row] = digit
    return digits.astype(np.int8)


def draw_levels(codebook, rows, width=None):
    return torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, width or codebook.digits - 1))).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=NAMES)
def test_encode_gives_the_reference_s_bytes(emulated, codebook, shape):
    digits = draw(codebook, shape)
    packed = codec.encode(torch.from_numpy(digits), draw_levels(codebook, shape[0]), codebook)
    codes, row_codewords = naive.encode(digits, strings(codebook), codebook.bits)
    assert packed.codes.numpy().tobytes() == codes
    assert packed.count_codewords().tolist() == row_codewords


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_digits_may_begin_at_any_byte(emulated, offset):
    digits = draw(TERNARY, (5, 64))
    given = torch.ones(offset + digits.size, dtype=torch.int8)[offset:].view(5, 64)
    given.copy_(torch.from_numpy(digits))
    ours = codec.encode(given, draw_levels(TERNARY, 5), TERNARY)
    assert torch.equal(ours.codes, cpu_codec.encode(digits, draw_levels(TERNARY, 5), TERNARY).codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=NAMES)
def test_decode_gives_the_digits_that_the_reference_reads(emulated, codebook, shape):
    packed = cpu_codec.encode(draw(codebook, shape), draw_levels(codebook, shape[0]), codebook)
    stream = packed.codes.numpy().tobytes(), packed.count_codewords().tolist()
    reference = naive.decode(*stream, strings(codebook), codebook.bits, shape[1])
    digits, levels = codec.decode(packed)
    assert digits.tolist() == reference
    assert torch.equal(levels, packed.levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("codebook", "width"), [(TERNARY, 1), (EVEN, 2), (TWO_BIT, 3)], ids=NAMES)
def test_every_weight_is_its_digit_s_level(emulated, codebook, width, dtype):
    digits, levels = draw(codebook, (7, 63)), draw_levels(codebook, 7, width)
    dense = codec.decode_dense(cpu_codec.encode(digits, levels, codebook), dtype)
    assert dense.dtype == dtype
    reference = naive.dequantize(digits, levels.to(dtype).double().tolist())
    assert torch.equal(dense.double(), torch.from_numpy(reference))


WIDER = [Codebook.fit([115, 1770, 115]), Codebook.fit([9, 9, 9, 9], bits=12), Codebook.paper()]


@pytest.mark.slow
@pytest.mark.parametrize("codebook", WIDER, ids=repr)
@pytest.mark.parametrize("columns", [29, 1000])
def test_wider_codewords_give_the_cpu_s_bytes_and_digits(emulated, codebook, columns):
    digits, levels = draw(codebook, (4, columns)), draw_levels(codebook, 4)
    ours, cpu = codec.encode(torch.from_numpy(digits), levels, codebook), cpu_codec.encode(digits, levels, codebook)
    assert torch.equal(ours.codes, cpu.codes)
    assert torch.equal(ours.row_codewords, cpu.row_codewords)
    assert ours.fewest_codewords == cpu.fewest_codewords
    assert np.array_equal(codec.decode(ours)[0].numpy(), digits)
    x = torch.randn(columns)
    sizes = np.abs(naive.dequantize(digits, levels.tolist()))
    difference = matmul.decode_matmul(ours, x) - codec.decode_dense(ours, torch.float64) @ x.double()
    assert (np.abs(difference.numpy()) <= 1e-5 * (sizes @ np.abs(x.numpy()))).all()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [None, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("codebook", "width"), [(TERNARY, 1), (EVEN, 2), (TWO_BIT, 3)], ids=NAMES)
def test_product_equals_the_naive_one(emulated, codebook, width, shape, tokens):
    digits, levels = draw(codebook, shape), draw_levels(codebook, shape[0], width)
    packed = cpu_codec.encode(digits, levels, codebook)
    x = torch.randn(shape[1]) if tokens is None else torch.randn(tokens, shape[1])
    y = matmul.decode_matmul(packed, x)
    whole = x.numpy().reshape(-1, shape[1])
    reference = naive.matmul(digits, levels.tolist(), whole)
    sizes = np.abs(naive.dequantize(digits, levels.tolist()))
    assert y.shape == (*x.shape[:-1], shape[0])
    assert (np.abs(y.numpy().reshape(-1, shape[0]) - reference) <= 1e-5 * (np.abs(whole) @ sizes.T)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tokens_meet_decoded_tiles(emulated, monkeypatch, dtype):
    digits, levels = draw(EVEN, (7, 63)), draw_levels(EVEN, 7).to(dtype)
    packed = cpu_codec.encode(digits, levels, EVEN)
    monkeypatch.setattr(gather, "gather_kernel", None)
    monkeypatch.setattr(matmul, "TILE_VALUES", 150)  # tiles of two rows
    x = torch.randn(33, 63).to(dtype)
    y = matmul.decode_matmul(packed, x)
    reference = torch.from_numpy(naive.matmul(digits, levels.tolist(), x.float().numpy()))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), reference.double(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_the_product_s_dtype_is_that_of_x(emulated):
    packed = cpu_codec.encode(draw(EVEN, (3, 28)), draw_levels(EVEN, 3), EVEN)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(28).to(dtype)
        y = matmul.decode_matmul(packed, x)
        assert y.dtype == dtype
        assert torch.equal(y, matmul.decode_matmul(packed, x.float()).to(dtype))
    assert matmul.decode_matmul(packed, torch.empty(0, 28)).shape == (0, 3)


def test_activations_that_are_not_finite_spread_as_in_a_dense_product(emulated):
    packed = cpu_codec.encode(draw(EVEN, (6, 63)), draw_levels(EVEN, 6), EVEN)
    x = torch.randn(63)
    x[40] = torch.inf
    assert torch.equal(matmul.decode_matmul(packed, x).isnan(), (codec.decode_dense(packed) @ x).isnan())


@pytest.fixture
def shuffled(request, monkeypatch):
    """The solver's twin on CPU tensors, its four warps in an order by the test's name."""
    emulator.install(monkeypatch, seed=seed_of(request))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize(("rows", "columns", "block"), [(1, 1, 128), (33, 27, 8), (2, 28, 28), (3, 63, 29)])
def test_every_digit_is_the_slow_reference_s(shuffled, monkeypatch, name, rows, columns, block):
    weight, hessian = problem(2, rows, columns)
    monkeypatch.setattr(solver, "solve_block", cuda_solver.solve_block)
    result = solver.gptq(weight, hessian, GRIDS[name], dampening=0.05, block_size=block)
    digits, values = naive.gptq(weight.numpy(), hessian.numpy(), name, 0.05)
    same = result.digits.numpy() == digits
    assert same.mean() >= 0.999
    np.testing.assert_allclose(result.weight.numpy()[same], values[same], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 29), (1, 33, 64), (2, 1, 128)], ids=str)
def test_a_block_has_the_bits_of_the_cpu_s(shuffled, name, shape):
    weight, factor, table = block_problem(*shape, name)
    before = weight.clone()
    digits, errors = cuda_solver.solve_block(weight, factor, table)
    cpu_digits, cpu_errors = solver.solve_block(weight, factor, table)
    assert torch.equal(digits, cpu_digits)
    assert torch.equal(errors, cpu_errors)
    assert torch.equal(weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 29), (1, 33, 64), (2, 1, 128)], ids=str)
def test_a_uniform_block_has_the_bits_of_the_cpu_s(shuffled, shape):
    weight, factor, _ = block_problem(*shape, "ternary")
    weight[:, 0] = 0
    weight[:, -1, ::3] *= 1e5
    for step in (0.01, 1.2):
        table = UniformGrid(step).rounding(UniformGrid(1.0).fit(weight) * step / 10)
        digits, errors = cuda_solver.solve_block(weight, factor, table)
        cpu_digits, cpu_errors = solver.solve_block(weight, factor, table)
        assert digits.dtype == torch.int16
        assert torch.equal(digits, cpu_digits)
        assert torch.equal(errors, cpu_errors)


def test_every_uniform_digit_is_the_slow_reference_s(shuffled, monkeypatch):
    weight, hessian = problem(2, 3, 63)
    monkeypatch.setattr(solver, "solve_block", cuda_solver.solve_block)
    result = solver.gptq(weight, hessian, UniformGrid(0.8), dampening=0.05, block_size=29)
    digits, *_ = naive.uniform_gptq(weight.numpy(), hessian.numpy(), 0.8, 0.06, 0.05, rounded=False)
    assert (result.digits.numpy() == digits).mean() >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
def test_values_and_thresholds_may_be_any(shuffled, kinds):
    generator = torch.Generator().manual_seed(kinds)
    weight, factor, _ = block_problem(2, 35, 19, "ternary")
    values = torch.randn(2, 35, kinds, generator=generator)
    thresholds = torch.randn(2, 35, kinds - 1, generator=generator).sort().values
    symbols = torch.randint(-128, 128, (2, 35, kinds), dtype=torch.int8, generator=generator)
    table = RoundingTable(values, thresholds, symbols)
    for ours, cpu in zip(
        *(f(weight, factor, table) for f in (cuda_solver.solve_block, solver.solve_block)), strict=True
    ):
        assert torch.equal(ours, cpu)


@pytest.mark.slow
def test_errors_are_rounded_as_quotients(shuffled):
    """A column has no products, so that nothing but the division is left: over many mantissas and some exponents."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 32, 1, generator=generator) * 10.0 ** torch.randint(-9, 9, (40, 1, 1), generator=generator)
    factor = (1 + torch.rand(40, 1, 1, generator=generator)) * 2.0 ** torch.randint(
        -9, 9, (40, 1, 1), generator=generator
    )
    nothing = torch.zeros(40, 32, 1)
    _, errors = cuda_solver.solve_block(
        weight, factor, RoundingTable(nothing, nothing[..., :0], nothing.to(torch.int8))
    )
    assert torch.equal(errors, weight / factor)


def test_parts_of_larger_matrices_are_read_where_they_are(shuffled, monkeypatch):
    weight, factor, table = block_problem(2, 9, 20, "ternary")
    expected = cuda_solver.solve_block(weight, factor, table)
    wide, square = torch.full((2, 50, 9), torch.nan), torch.full((2, 50, 50), torch.nan)
    wide[:, 30:], square[:, 30:, 30:] = weight.mT, factor
    assert all(
        map(torch.equal, cuda_solver.solve_block(weight.mT.contiguous().mT, factor.mT.contiguous().mT, table), expected)
    )
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda tensor: tensor if tensor.is_contiguous() else pytest.fail("a copy")
    )
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    assert all(map(torch.equal, cuda_solver.solve_block(wide[:, 30:].mT, square[:, 30:, 30:], table), expected))


def test_a_block_wider_than_a_tile_is_solved_in_steps(shuffled, monkeypatch):
    weight, factor, table = block_problem(2, 3, 40, "ternary")
    digits, errors = cuda_solver.solve_block(weight, factor, table)
    monkeypatch.setattr(cuda_solver, "COLUMNS", 16)
    stepped_digits, stepped_errors = cuda_solver.solve_block(weight, factor, table)
    assert torch.equal(digits, stepped_digits)
    torch.testing.assert_close(errors, stepped_errors, rtol=1e-4, atol=1e-5)


def block_problem(experts, rows, columns, name):
    """Weights, upper factors and a rounding table."""
    weight, hessian = problem(experts, rows, columns)
    factor = torch.linalg.cholesky(hessian + torch.eye(columns)).mT.contiguous()
    return weight, factor, GRIDS[name].rounding(GRIDS[name].fit(weight))


def problem(experts, rows, columns):
    """Weights and the Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(experts, rows, columns, generator=generator)
    mixing = torch.randn(experts, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = (torch.randn(experts, 3 * columns + 4, columns, generator=generator) + 0.5) @ mixing
    return weight, x.mT @ x / (3 * columns + 4)


def test_bad_arguments_are_refused(emulated):
    digits, levels = torch.from_numpy(draw(EVEN, (3, 28))), draw_levels(EVEN, 3)
    with pytest.raises(DigitError, match="2 at row 1, column 5"):
        codec.encode(digits.index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(2).to(torch.int8)), levels, EVEN)
    with pytest.raises(DtypeError, match="int8"):
        codec.encode(digits.int(), levels, EVEN)
    with pytest.raises(DtypeError, match="float64"):
        codec.encode(digits, levels.double(), EVEN)
    with pytest.raises(ShapeError, match="digits"):
        codec.encode(digits[0], levels, EVEN)
    with pytest.raises(ShapeError, match="3 rows"):
        codec.encode(digits, levels[:2], EVEN)
    with pytest.raises(NotFiniteError, match="row 1"):
        codec.encode(digits, levels.index_fill(0, torch.tensor(1), torch.nan), EVEN)
    packed = cpu_codec.encode(digits, levels, EVEN)
    for call in (codec.decode, codec.decode_dense, lambda p: matmul.decode_matmul(p, torch.zeros(28))):
        with pytest.raises(SettingError, match="validate"):
            call(dataclasses.replace(packed, _validated=False))
    with pytest.raises(DtypeError, match="int32"):
        codec.decode_dense(packed, torch.int32)
    with pytest.raises(ShapeError, match=r"\(28,\)"):
        matmul.decode_matmul(packed, torch.zeros(27))
    with pytest.raises(DtypeError, match="int64"):
        matmul.decode_matmul(packed, torch.zeros(28, dtype=torch.int64))
    weight, factor = torch.zeros(1, 2, 3), torch.eye(3)[None]
    table = MinMaxTernary().rounding(MinMaxTernary().fit(weight))
    with pytest.raises(ShapeError, match="factor"):
        cuda_solver.solve_block(weight, factor[:, :2, :2], table)
    with pytest.raises(ShapeError, match="same E and R"):
        cuda_solver.solve_block(weight[:, :1], factor, table)
    with pytest.raises(ShapeError, match="one fewer"):
        cuda_solver.solve_block(weight, factor, dataclasses.replace(table, thresholds=table.thresholds[..., :1]))
    with pytest.raises(ShapeError, match="steps have shape"):
        cuda_solver.solve_block(weight, factor, UniformGrid(1.0).rounding(torch.ones(1, 3, 1)))


def test_levels_are_the_packed_matrix_s_own(emulated):
    levels = draw_levels(EVEN, 3)
    packed = codec.encode(torch.from_numpy(draw(EVEN, (3, 28))), levels, EVEN)
    levels.zero_()
    assert packed.levels.all()


# what the emulator itself must notice


cuda = launch.cuda


def emulate(function, *arguments, threads=64, **settings):
    emulator.run(kernel("")(function), 1, threads, *arguments, **settings)


def _reverse(values, barrier):
    held = cuda.shared.array(64, np.float32)
    held[cuda.threadIdx.x] = values[cuda.threadIdx.x]
    if barrier:
        cuda.syncthreads()
    values[63 - cuda.threadIdx.x] = held[cuda.threadIdx.x]


def _neighbour(values):
    held = cuda.shared.array(0, np.int32)
    held[cuda.threadIdx.x] = values[cuda.threadIdx.x]
    cuda.syncthreads()
    values[cuda.threadIdx.x] = held[cuda.threadIdx.x ^ 33]


def test_shared_memory_is_shared_by_the_block():
    for seed in range(3):
        values = np.arange(64, dtype=np.int32)
        emulate(_neighbour, values, shared_bytes=256, seed=seed)
        assert values.tolist() == [i ^ 33 for i in range(64)]


def test_a_missing_barrier_shows():
    outcomes = set()
    for seed in range(4):
        values = np.arange(64, dtype=np.float32)
        emulate(_reverse, values, True, seed=seed)
        assert values.tolist() == list(range(63, -1, -1))
        emulate(_reverse, values, False, seed=seed)
        outcomes.add(values.tobytes())
    assert len(outcomes) == 4


def _half_at_the_barrier(values):
    if cuda.threadIdx.x < 32:
        cuda.syncthreads()


def _half_in_the_warp(values):
    if cuda.threadIdx.x % 2:
        values[0] = cuda.shfl_sync(0xFFFFFFFF, values[1], 0)
    else:
        cuda.syncthreads()


def _left_out(values):
    cuda.syncwarp(0xFFFF)


def _absent_lane(values):
    values[cuda.threadIdx.x] = cuda.shfl_xor_sync(0xFFFFFFFF, cuda.threadIdx.x, 1)


def _outside(values):
    values[64] = 0.0


def _negative(values):
    values[cuda.threadIdx.x - 64] = 0.0


@pytest.mark.parametrize(
    ("function", "threads", "message"),
    [
        (_half_at_the_barrier, 64, "deadlock: 32 of 64"),
        (_half_in_the_warp, 64, "deadlock: 64 of 64"),
        (_left_out, 64, "leaves it out"),
        (_absent_lane, 48, "names lane 16 of warp 1, which is absent"),
        (_outside, 64, "index 64 of an array of 64"),
        (_negative, 64, "index -"),
    ],
)
def test_what_a_gpu_would_not_forgive_raises(function, threads, message):
    with pytest.raises(emulator.EmulationError, match=message):
        emulate(function, np.zeros(64, dtype=np.float32), threads=threads)


def _too_large(values):
    values[0] = 300


def test_a_store_that_does_not_fit_raises():
    with pytest.raises(emulator.EmulationError, match="300 does not fit uint8"):
        emulate(_too_large, np.zeros(1, dtype=np.uint8), threads=1)


def _overflow(values):
    values[0] = values[0] * values[0]


def test_an_integer_that_overflows_raises():
    with pytest.raises(FloatingPointError):
        emulate(_overflow, np.array([1 << 20], dtype=np.int32), threads=1)


def _votes(values):
    lane = cuda.laneid
    values[lane] = cuda.ballot_sync(0xFFFFFFFF, lane < 3)
    if cuda.any_sync(0xFFFFFFFF, lane == 7) and not cuda.all_sync(0xFFFFFFFF, lane == 7):
        values[lane] += cuda.shfl_down_sync(0xFFFFFFFF, lane, 2)
    cuda.syncwarp()
    cuda.atomic.add(values, 32, 1)


def test_votes_shuffles_and_atomics_do_what_cuda_s_do():
    values = np.zeros(33, dtype=np.int32)
    emulate(_votes, values, threads=32)
    assert values.tolist() == [7 + (lane + 2 if lane < 30 else lane) for lane in range(32)] + [32]
