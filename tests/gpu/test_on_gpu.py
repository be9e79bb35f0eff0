"""The CUDA twins on a GPU against float64 references and the CPU's bytes: fresh inputs at each run, poisoned memory.

A failure shows the seed; QMOE_TEST_SEED repeats it. `python bench/gpu.py` runs this file before it measures.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import naive
import numpy as np
import pytest
import torch
from checks import draw_digits, naive_packets, run_experts
from torch.nn import functional

import qmoe_lite as qm
from qmoe_lite.coding import codec as cpu_codec
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.cuda import codec, gather, launch, matmul, packets, solver, variants
from qmoe_lite.cuda import experts as experts_twin
from qmoe_lite.errors import FormatError, SettingError
from qmoe_lite.quantization import solver as cpu_solver
from qmoe_lite.quantization.grid import MinMaxTernary, MinMaxTwoBit, UniformGrid
from qmoe_lite.quantization.hessian import factorise
from qmoe_lite.quantization.rounding import RoundingTable

if not launch.available():
    pytest.skip(f"needs a GPU: {launch.reason()}", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
SEED = int(os.environ.get("QMOE_TEST_SEED", random.SystemRandom().getrandbits(31)))
POISON = 0xA5

TERNARY = Codebook.fit([115, 1770, 115])
SHORT = Codebook.fit([115, 1770, 115], bits=8)
EVEN = Codebook.fit([1, 1, 1], bits=8)  # short codewords: a row has many warps' worth
TWO_BIT = Codebook.fit([885, 50, 40, 25])
WIDE = Codebook.fit([9, 9, 9, 9], bits=12)
SPARSE = Codebook.fit([25, 950, 25], bits=12)  # up to 84 weights a codeword
PAPER = Codebook.paper()  # a table of 512 KiB: not in shared memory
CODEBOOKS = [TERNARY, SHORT, EVEN, TWO_BIT, WIDE, SPARSE, PAPER]
SMALL = [(1, 1), (3, 27), (5, 28), (1, 29), (9, 63), (2, 250)]
LARGE = [(1, 65535), (33, 1000), (257, 4096), (768, 2048), (1000, 777), (4099, 130)]
GRIDS = {"ternary": MinMaxTernary(), "two_bit": MinMaxTwoBit()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of a result to the dtype of x
FLOAT32 = 1e-5  # error of a float32 sum, over the sum of its terms' sizes


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote is poison: what torch.empty gives, and what freed tensors left behind."""
    sys.stderr.write(f"QMOE_TEST_SEED={SEED}\n")
    torch.manual_seed(SEED)
    rng.cache_clear()
    empty = torch.empty

    def filled(*arguments, **settings):
        tensor = empty(*arguments, **settings)
        if tensor.ndim and tensor.numel():
            tensor.view(torch.uint8).fill_(POISON)
        return tensor

    left = [filled(size, dtype=torch.uint8, device=DEVICE) for size in [512] * 64 + [1 << 16] * 16 + [8 << 20] * 4]
    del left
    monkeypatch.setattr(torch, "empty", filled)
    yield
    torch.cuda.synchronize()  # an error of this test shows here, not in the next


@functools.cache
def rng():
    return np.random.default_rng(SEED)


@functools.cache
def strings(codebook):
    return naive.tunstall(codebook.counts, codebook.bits)


def draw(codebook, shape):
    """Digits as likely as the codebook takes them to be; a row of zeros, and one of each digit at either end."""
    digits = draw_digits(rng(), codebook.counts, shape)
    for row, digit in enumerate([0, codebook.lowest_digit, codebook.lowest_digit + codebook.digits - 1]):
        if shape[0] > row + 1:
            digits[row] = digit
    return digits


def draw_levels(codebook, rows, width=None, dtype=torch.float32):
    """Levels (R, L), none near 0 and each row's its own."""
    shape = rows, width or codebook.digits - 1
    return torch.from_numpy(rng().uniform(0.25, 2, shape) * rng().choice([-1, 1], shape)).to(dtype)


def pack(codebook, shape, width=None, dtype=torch.float32):
    """Return digits, a matrix packed on the CPU, the same on the GPU, and its weights in float64."""
    digits, levels = draw(codebook, shape), draw_levels(codebook, shape[0], width, dtype)
    packed = cpu_codec.encode(digits, levels, codebook)
    own = levels.double().numpy()
    if codebook.digits == 3:
        by_digit = np.stack([own[:, 0] if own.shape[1] == 2 else -own[:, 0], 0 * own[:, 0], own[:, -1]], 1)
    else:
        by_digit = np.concatenate([0 * own[:, :1], own], 1)
    dense = np.take_along_axis(by_digit, digits.astype(np.int64) - codebook.lowest_digit, 1)
    return digits, packed, packed.to(DEVICE), torch.from_numpy(dense)


def assert_product(y, dense, x):
    """Compare y (.., R) with the float64 product of dense (R, C) and x (.., C), all read as float64."""
    y64, x64 = y.double().cpu(), x.double().cpu()
    expected = x64 @ dense.T
    bound = FLOAT32 * (x64.abs() @ dense.abs().T) + ROUNDING[y.dtype] * expected.abs() + 1e-30
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    worst = ((y64 - expected).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=repr)
def test_encode_gives_the_cpu_s_bytes(codebook, shape):
    digits, packed, _, _ = pack(codebook, shape)
    ours = codec.encode(torch.from_numpy(digits).to(DEVICE), packed.levels.to(DEVICE), codebook)
    assert ours.device == DEVICE
    assert torch.equal(ours.codes.cpu(), packed.codes)
    assert torch.equal(ours.count_codewords().cpu(), packed.count_codewords())
    assert torch.equal(ours.row_codewords.cpu(), packed.row_codewords)
    assert ours.fewest_codewords == packed.fewest_codewords
    assert torch.equal(ours.levels.cpu(), packed.levels)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("codebook", [SHORT, EVEN, TWO_BIT], ids=repr)
def test_encode_gives_the_slow_reference_s_bytes(codebook, shape):
    digits = draw(codebook, shape)
    levels = draw_levels(codebook, shape[0]).to(DEVICE)
    ours = codec.encode(torch.from_numpy(digits).to(DEVICE), levels, codebook)
    codes, row_codewords = naive.encode(digits, strings(codebook), codebook.bits)
    assert ours.codes.cpu().numpy().tobytes() == codes
    assert ours.count_codewords().tolist() == row_codewords


@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=repr)
def test_decode_gives_the_digits_back(codebook, shape):
    digits, packed, on_gpu, _ = pack(codebook, shape)
    found, levels = codec.decode(on_gpu)
    assert torch.equal(found.cpu(), torch.from_numpy(digits))
    assert torch.equal(levels.cpu(), packed.levels)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 63), (257, 1000)], ids=str)
@pytest.mark.parametrize(("codebook", "width"), [(TERNARY, 1), (EVEN, 2), (TWO_BIT, 3), (PAPER, 2)], ids=str)
def test_every_weight_is_its_digit_s_level(codebook, width, shape, dtype):
    digits, packed, on_gpu, dense = pack(codebook, shape, width)
    found = codec.decode_dense(on_gpu, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), dense.to(dtype))
    if dense.numel() < 1000:
        assert np.array_equal(dense.numpy(), naive.dequantize(digits, packed.levels.tolist()))


@pytest.mark.parametrize("tokens", [None, 1, 3, 5])
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize(("codebook", "width"), [(SHORT, 1), (EVEN, 2), (TWO_BIT, 3)], ids=str)
def test_product_equals_the_slow_reference_s(codebook, width, shape, tokens):
    digits, packed, on_gpu, _ = pack(codebook, shape, width)
    x = torch.randn(shape[1]) if tokens is None else torch.randn(tokens, shape[1])
    y = matmul.decode_matmul(on_gpu, x.to(DEVICE)).cpu()
    whole = x.numpy().reshape(-1, shape[1])
    reference = naive.matmul(digits, packed.levels.tolist(), whole)
    sizes = np.abs(whole) @ np.abs(naive.dequantize(digits, packed.levels.tolist())).T
    assert y.shape == (*x.shape[:-1], shape[0])
    assert (np.abs(y.numpy().reshape(-1, shape[0]) - reference) <= FLOAT32 * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [None, 1, 2, 3, 4, 5, 8, 17, 64, 256])
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=repr)
def test_product_equals_the_float64_one_for_any_number_of_tokens(codebook, tokens, dtype):
    _, _, on_gpu, dense = pack(codebook, (131, 1003))
    x = torch.randn((1003,) if tokens is None else (tokens, 1003)).to(dtype)
    assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE)), dense, x)


@pytest.mark.parametrize("level_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("codebook", [TERNARY, PAPER], ids=repr)
def test_product_of_a_large_matrix_equals_the_float64_one(codebook, shape, level_dtype):
    _, _, on_gpu, dense = pack(codebook, shape, 2, level_dtype)
    for tokens in (1, 6):
        x = torch.randn(tokens, shape[1]).bfloat16()
        assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE)), dense, x)


def test_x_may_have_strides_and_no_tokens():
    _, _, on_gpu, dense = pack(TERNARY, (40, 300))
    x = torch.randn(300, 6)
    assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE).T), dense, x.T)
    assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE)[:, 2]), dense, x[:, 2])
    assert matmul.decode_matmul(on_gpu, x.to(DEVICE)[:, :0].T).shape == (0, 40)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_activations_that_are_not_finite_spread_as_in_a_dense_product(value, tokens):
    _, _, on_gpu, dense = pack(EVEN, (70, 333))
    x = torch.randn(tokens, 333)
    x[0, 40] = value
    y = matmul.decode_matmul(on_gpu, x.to(DEVICE)).cpu()
    assert torch.equal(y.isnan(), (x.double() @ dense.T).isnan())


def test_the_same_call_gives_the_same_bits_again():
    digits, _, on_gpu, _ = pack(TERNARY, (515, 2050))
    x = torch.randn(1, 2050, device=DEVICE)
    weight, factor, table = problem(2, 100, 128)
    first = None
    for _ in range(20):
        again = [
            matmul.decode_matmul(on_gpu, x),
            codec.decode_dense(on_gpu),
            codec.encode(torch.from_numpy(digits).to(DEVICE), on_gpu.levels, TERNARY).codes,
            *solver.solve_block(weight, factor, table),
        ]
        first = again if first is None else first
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def problem(experts, rows, columns, grid="ternary"):
    """Weights, upper factors and a rounding table, on the GPU."""
    weight, hessian = weights_and_hessians(experts, rows, columns)
    damped = hessian.double() + 0.1 * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    table = GRIDS[grid].rounding(GRIDS[grid].fit(weight.to(DEVICE)))
    return weight.to(DEVICE), factor.to(DEVICE), table


def weights_and_hessians(experts, rows, columns):
    """Weights and the Hessians of correlated inputs, on the CPU."""
    weight = torch.randn(experts, rows, columns)
    mixing = torch.randn(experts, columns, columns) / columns**0.5 + torch.eye(columns)
    x = (torch.randn(experts, 3 * columns + 4, columns) + 0.5) @ mixing
    return weight, x.mT @ x / (3 * columns + 4)


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 29), (1, 33, 64), (2, 1, 128), (2, 97, 300)], ids=str)
def test_a_block_is_the_float64_recursion(name, shape):
    weight, factor, table = problem(*shape, name)
    before = weight.clone()
    digits, errors = solver.solve_block(weight, factor, table)
    assert torch.equal(weight, before)
    expected, scaled = recursion(*(part.double().cpu() for part in (weight, factor)), table)
    same = (digits.cpu() == expected).all(-1)  # one weight near a threshold changes the rest of its row
    assert same.float().mean() >= 0.99 or (~same).sum() <= 1
    torch.testing.assert_close(errors.double().cpu()[same], scaled[same], rtol=1e-3, atol=1e-4)


def recursion(weight, factor, table):
    """Digits (E, R, B) and scaled errors of weight (E, R, B), column by column in float64."""
    rest, digits = weight.clone(), torch.zeros(weight.shape, dtype=torch.int8)
    values, thresholds = table.values.double().cpu(), table.thresholds.double().cpu()
    symbols = table.digits.cpu()
    for column in range(weight.shape[-1]):
        index = (rest[..., column, None] > thresholds).sum(-1, keepdim=True)
        digits[..., column] = symbols.gather(-1, index)[..., 0]
        error = (rest[..., column] - values.gather(-1, index)[..., 0]) / factor[:, None, column, column]
        rest[..., column + 1 :] -= error[..., None] * factor[:, None, column, column + 1 :]
        rest[..., column] = error
    return digits, rest


def test_a_block_may_be_a_part_of_its_matrix():
    weight, factor, table = problem(3, 40, 128)
    wide = torch.randn(3, 40, 300, device=DEVICE)
    wide[:, :, 100:228] = weight
    whole = solver.solve_block(weight, factor, table)
    for part in (wide[:, :, 100:228], weight.mT.contiguous().mT):
        ours = solver.solve_block(part, factor.mT.contiguous().mT, table)
        assert all(torch.equal(one, other) for one, other in zip(ours, whole, strict=True))


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize(("rows", "columns", "block"), [(1, 1, 128), (33, 27, 8), (2, 28, 28), (3, 63, 29)])
def test_gptq_finds_the_slow_reference_s_digits(name, rows, columns, block):
    weight, hessian = weights_and_hessians(2, rows, columns)
    result = cpu_solver.gptq(weight.to(DEVICE), hessian.to(DEVICE), GRIDS[name], dampening=0.05, block_size=block)
    assert result.digits.device == DEVICE
    digits, values = naive.gptq(weight.numpy(), hessian.numpy(), name, 0.05)
    same = result.digits.cpu().numpy() == digits
    assert same.mean() >= 0.99 or (~same).sum() <= columns
    np.testing.assert_allclose(result.weight.cpu().numpy()[same], values[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("shape", [(1, 768, 384), (5, 130, 1000), (16, 64, 513)], ids=str)
def test_gptq_finds_the_cpu_s_digits(name, shape):
    weight, hessian = weights_and_hessians(*shape)
    ours = cpu_solver.gptq(weight.to(DEVICE), hessian.to(DEVICE), GRIDS[name])
    cpu = cpu_solver.gptq(weight, hessian, GRIDS[name])
    assert ours.hessian_class == cpu.hessian_class
    assert (ours.digits.cpu() == cpu.digits).float().mean() >= 0.995
    torch.testing.assert_close(ours.levels.cpu(), cpu.levels)
    torch.testing.assert_close(ours.error.cpu(), cpu.error, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 768, 384), (5, 130, 1000)], ids=str)
def test_gptq_finds_the_cpu_s_uniform_digits(shape):
    weight, hessian = weights_and_hessians(*shape)
    grid = UniformGrid(1.0, level_dtype=torch.bfloat16)
    ours = cpu_solver.gptq(weight.to(DEVICE), hessian.to(DEVICE), grid)
    cpu = cpu_solver.gptq(weight, hessian, grid)
    assert (ours.digits.cpu() == cpu.digits).float().mean() >= 0.98
    assert (ours.column_scales.cpu() == cpu.column_scales).float().mean() >= 0.98
    assert torch.equal(ours.levels.cpu(), cpu.levels)
    torch.testing.assert_close(ours.error.cpu(), cpu.error, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("columns", [1, 29, 300])
def test_hessians_are_factorised_as_on_the_cpu(columns, ordered):
    _, hessian = weights_and_hessians(4, 1, columns)
    hessian[1] = -hessian[1]
    hessian[2, 0, 0] = torch.nan
    order = torch.stack([torch.randperm(columns) for _ in range(4)]) if ordered else None
    ours, info = factorise(hessian.to(DEVICE), 0.1, order=None if order is None else order.to(DEVICE))
    cpu, expected = factorise(hessian, 0.1, order=order)
    assert torch.equal(info, expected)
    for start in range(0, columns, 128):  # below the diagonal of blocks lies anything
        part = slice(start, start + 128)
        torch.testing.assert_close(
            ours[:, : start + 128, part].cpu(), cpu[:, : start + 128, part], rtol=1e-3, atol=1e-4
        )


def test_an_order_takes_no_more_memory_than_the_hessians():
    _, hessian = weights_and_hessians(8, 1, 512)
    hessian = hessian.to(DEVICE)
    order = torch.arange(512, device=DEVICE).flip(0).expand(8, -1)
    peaks = []
    for own in (None, order):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        factorise(hessian, 0.1, order=own)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0] + hessian.nbytes // 2


def test_errors_are_rounded_as_quotients():
    weight = torch.randn(50, 100, 1) * 10.0 ** torch.randint(-9, 9, (50, 1, 1))
    factor = (1 + torch.rand(50, 1, 1)) * 2.0 ** torch.randint(-9, 9, (50, 1, 1))
    nothing = torch.zeros(50, 100, 1, device=DEVICE)
    table = RoundingTable(nothing, nothing[..., :0], nothing.to(torch.int8))
    _, errors = solver.solve_block(weight.to(DEVICE), factor.to(DEVICE), table)
    assert torch.equal(errors.cpu(), weight / factor)


def test_a_wide_block_is_multiplied_in_full_float32_whatever_is_allowed(monkeypatch):
    weight, factor, table = problem(2, 40, 300)
    expected = solver.solve_block(weight, factor, table)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = solver.solve_block(weight, factor, table)
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_public_functions_take_the_twins():
    digits, packed, on_gpu, dense = pack(TERNARY, (33, 500))
    x = torch.randn(2, 500)
    ours = qm.encode(torch.from_numpy(digits).to(DEVICE), packed.levels.to(DEVICE), TERNARY)
    assert ours.device == DEVICE
    assert torch.equal(ours.codes.cpu(), packed.codes)
    read = dataclasses.replace(on_gpu, _validated=False)
    assert torch.equal(qm.decode(read)[0].cpu(), torch.from_numpy(digits))
    assert read._validated
    assert torch.equal(on_gpu.dense(torch.float64).cpu(), dense)
    assert_product(qm.decode_matmul(on_gpu, x.to(DEVICE)), dense, x)
    with pytest.raises(SettingError, match="x is on cpu"):
        qm.decode_matmul(on_gpu, x)
    with pytest.raises(SettingError, match="the matrix on the CPU"):
        qm.decode_matmul(packed, x.to(DEVICE))
    damaged = dataclasses.replace(read, codes=read.codes.clone().fill_(255), _validated=False)
    with pytest.raises(FormatError):
        qm.decode(damaged)


def test_a_thread_of_its_own_may_launch():
    _, _, on_gpu, dense = pack(TERNARY, (33, 500))
    with ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(codec.decode_dense, on_gpu, torch.float64) for _ in range(16)]:
            assert torch.equal(found.result().cpu(), dense)


def test_a_compiled_kernel_is_found_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    digits, _, on_gpu, _ = pack(TERNARY, (33, 500))
    for compiled in (1, 0):
        kernel = launch.Kernel(codec._decode_kernel.py_func, codec._decode_kernel.signatures)
        calls, ptx = [], kernel.ptx
        kernel.ptx = lambda *arguments, calls=calls, ptx=ptx: calls.append(1) or ptx(*arguments)
        monkeypatch.setattr(codec, "_decode_kernel", kernel)
        assert torch.equal(codec.decode(on_gpu)[0].cpu(), torch.from_numpy(digits))
        assert len(calls) == compiled
    assert list(tmp_path.rglob("*"))


def later(stream, *changes):
    """On `stream`, after some milliseconds, copy each second tensor over the first; the host goes on at once."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, source in changes:
            target.copy_(source)


def test_work_is_done_on_the_current_stream():
    digits, packed, on_gpu, dense = pack(TERNARY, (64, 1000))
    levels, x = on_gpu.levels.clone(), torch.randn(2, 1000, device=DEVICE)
    empty_x, raw = torch.zeros_like(x), torch.zeros(64, 1000, dtype=torch.int8, device=DEVICE)
    weight, factor, table = problem(2, 64, 128)
    zero_weight = torch.zeros_like(weight)
    expected = solver.solve_block(weight, factor, table)
    matmul.decode_matmul(on_gpu, x)  # what is made once for a matrix is made from its true levels
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    given = torch.from_numpy(digits).to(DEVICE)
    on_gpu.levels.zero_()
    torch.cuda.synchronize()
    later(stream, (on_gpu.levels, levels))
    with torch.cuda.stream(stream):
        found = codec.decode_dense(on_gpu, torch.float64)
    later(stream, (empty_x, x), (raw, given), (zero_weight, weight))
    with torch.cuda.stream(stream):
        solved = solver.solve_block(zero_weight, factor, table)
        y = matmul.decode_matmul(on_gpu, empty_x)
        ours = codec.encode(raw, levels, TERNARY)
    stream.synchronize()
    assert torch.equal(found.cpu(), dense)
    assert all(torch.equal(one, other) for one, other in zip(solved, expected, strict=True))
    assert_product(y, dense, x)
    assert torch.equal(ours.codes.cpu(), packed.codes)


def test_two_streams_do_not_disturb_each_other():
    made = [pack(book, (300, 2000)) for book in (TERNARY, TWO_BIT)]
    inputs = [[torch.randn(1, 2000, device=DEVICE) for _ in range(20)] for _ in made]
    streams = [torch.cuda.Stream() for _ in made]
    for (_, _, on_gpu, _), x in zip(made, inputs, strict=True):
        matmul.decode_matmul(on_gpu, x[0])
    torch.cuda.synchronize()
    results = [[], []]
    for turn in range(20):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                on_gpu = made[which][2]
                results[which].append((matmul.decode_matmul(on_gpu, inputs[which][turn]), codec.decode_dense(on_gpu)))
    torch.cuda.synchronize()
    for (_, _, _, dense), x, found in zip(made, inputs, results, strict=True):
        for one, (y, decoded) in zip(x, found, strict=True):
            assert_product(y, dense, one)
            assert torch.equal(decoded.double().cpu(), dense)


def captured(call):
    """Record `call` in a CUDA graph after a first run; return the graph and the tensors that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_the_product_can_be_captured_in_a_graph(tokens):
    _, _, on_gpu, dense = pack(TERNARY, (515, 1000))
    x = torch.randn(tokens, 1000, device=DEVICE).bfloat16()
    graph, y = captured(lambda: matmul.decode_matmul(on_gpu, x))
    for _ in range(3):
        x.copy_(torch.randn(tokens, 1000))
        graph.replay()
        torch.cuda.synchronize()
        assert_product(y, dense, x)


def test_decoding_and_a_block_can_be_captured_in_a_graph():
    _, _, on_gpu, dense = pack(TERNARY, (65, 1000))
    weight, factor, table = problem(2, 40, 128)
    expected = solver.solve_block(weight, factor, table)
    graph, found = captured(lambda: [codec.decode_dense(on_gpu), *solver.solve_block(weight, factor, table)])
    for tensor in found:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0].double().cpu(), dense)
    assert all(torch.equal(one, other) for one, other in zip(found[1:], expected, strict=True))


@pytest.mark.parametrize("library", ["cupy", "numba"])
def test_arrays_of_other_libraries_are_taken(library):
    _, _, on_gpu, dense = pack(TERNARY, (33, 500))
    x = torch.randn(2, 500)
    if library == "cupy":
        array = pytest.importorskip("cupy").asarray(x.numpy())
    else:
        array = importlib.import_module("numba.cuda").to_device(x.numpy())
    assert_product(matmul.decode_matmul(on_gpu, array), dense, x)


def test_the_second_gpu_is_used_where_the_arrays_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    digits, packed, on_gpu, dense = pack(TERNARY, (33, 500))
    x = torch.randn(2, 500)
    assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE)), dense, x)
    y = matmul.decode_matmul(packed.to(other), x.to(other))
    assert y.device == other
    assert_product(y, dense, x)
    ours = codec.encode(torch.from_numpy(digits).to(other), packed.levels.to(other), TERNARY)
    assert torch.equal(ours.codes.cpu(), packed.codes)


@pytest.mark.parametrize("shape", [*SMALL, (70, 1000)], ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=repr)
def test_packets_are_those_of_the_description(codebook, shape):
    _, packed, on_gpu, _ = pack(codebook, shape)
    made = packets.make_packets(on_gpu)
    words, starts = naive_packets(packed)
    assert made.words.view(torch.int32).cpu().numpy().view(np.uint32).tolist() == words
    assert made.starts.tolist() == starts


@pytest.mark.parametrize("lanes", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("warps", [1, 3, 16])
def test_any_number_of_lanes_may_share_a_row_and_of_warps_a_block(monkeypatch, lanes, warps):
    monkeypatch.setattr(gather, "choose_lanes", lambda *_: lanes)
    monkeypatch.setattr(gather, "WARPS", (warps, warps))
    for codebook, width in ((TERNARY, 2), (TWO_BIT, 3)):
        _, _, on_gpu, dense = pack(codebook, (257, 3001), width)
        for tokens in (1, 3):
            x = torch.randn(tokens, 3001)
            assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE)), dense, x)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_block_may_ask_for_more_shared_memory_than_it_has_at_once(tokens):
    columns = 12_000 if tokens == 1 else 4_000
    _, _, on_gpu, dense = pack(TERNARY, (40, columns))
    needed = variants.Book(TERNARY.bits, len(TERNARY.fields)).shared_bytes + 4 * tokens * columns
    assert launch.SHARED_BYTES < needed < launch.shared_limit(DEVICE)
    x = torch.randn(tokens, columns)
    assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE)), dense, x)


def test_x_that_shared_memory_cannot_hold_meets_decoded_tiles(monkeypatch):
    monkeypatch.setattr(gather, "gather_kernel", None)
    monkeypatch.setattr(launch, "shared_limit", lambda device: 48 << 10)
    _, _, on_gpu, dense = pack(TERNARY, (3, 65535))
    x = torch.randn(2, 65535)
    assert_product(matmul.decode_matmul(on_gpu, x.to(DEVICE)), dense, x)


EXPERTS, OUTSIDE, INSIDE, SLOTS = 6, 300, 129, 3
BOOKS = {1: (TERNARY, SHORT, SPARSE), 2: (SHORT, TERNARY, EVEN), 3: (TWO_BIT, Codebook.fit([8, 1, 1, 1], 8), TWO_BIT)}
ACTIVATIONS = {
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}
HIDDEN_ACT = {"gelu_tanh": "gelu_new"}  # what configurations call it


@functools.cache
def layer(width, count=3):
    """Packed experts (on the CPU) of gate, up and last projection, or of two of them, and their dense matrices."""
    shapes = [(INSIDE, OUTSIDE)] * (count - 1) + [(OUTSIDE, INSIDE)]
    drawn = []
    for codebook, shape in zip(BOOKS[width][3 - count :], shapes, strict=True):
        made = [pack(codebook, shape, width) for _ in range(EXPERTS)]
        drawn.append(([packed for _, packed, _, _ in made], torch.stack([dense for *_, dense in made])))
    return drawn


def needed(name):
    """Return a module of the library that needs packages which the kernels do not; skip the test without them."""
    return pytest.importorskip(f"qmoe_lite.{name}", exc_type=ImportError)


def layer_packets(width, count=3):
    """Return the packets of the same layer's projections, and their dense matrices."""
    pack_experts = needed("checkpoint.format").pack_experts
    found = []
    for matrices, dense in layer(width, count):
        stored = {name: part.to(DEVICE) for name, part in pack_experts(matrices).items()}
        found.append((packets.stack_packets(stored, matrices[0].codebook, matrices[0].columns), dense))
    return found


def draw_routing(tokens):
    """Experts and weights; some pairs dropped: -1, or a number that no expert has."""
    index = torch.rand(tokens, EXPERTS).argsort(1)[:, :SLOTS]
    index[0, 0] = -1
    index[-1, -1] = EXPERTS
    return index, torch.rand(tokens, SLOTS)


def dense_experts(first, last, activation, x, index, weights):
    """Each token through each of its experts in float64; and what the sums of sizes come to."""
    out, sizes = (torch.zeros(len(x), last.shape[1], dtype=torch.float64) for _ in range(2))
    x, weights = x.double().cpu(), weights.double().cpu()
    for token, chosen in enumerate(index.tolist()):
        for slot, expert in enumerate(chosen):
            if 0 <= expert < EXPERTS:
                gate, *others = (matrices[expert] @ x[token] for matrices in first)
                bounds = [matrices[expert].abs() @ x[token].abs() for matrices in first]
                inside = activation(gate)
                for other in others:
                    inside = inside * other
                out[token] += weights[token, slot] * (last[expert] @ inside)
                sizes[token] += weights[token, slot] * (last[expert].abs() @ functools.reduce(torch.mul, bounds))
    return out, sizes


def assert_experts(y, expected):
    out, sizes = expected
    bound = 2 * FLOAT32 * sizes + ROUNDING[y.dtype] * out.abs() + 1e-30
    worst = ((y.double().cpu() - out).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(1, torch.float32), (2, torch.bfloat16), (2, torch.float16), (3, torch.bfloat16), (3, torch.float32)],
    ids=str,
)
def test_a_layer_s_experts_are_the_dense_ones(width, dtype, activation, tokens):
    (gate, gates), (up, ups), (down, downs) = layer_packets(width)
    assert gate.codebook.bits != up.codebook.bits
    x = (torch.randn(tokens, OUTSIDE) / 8).to(dtype)
    index, weights = draw_routing(tokens)
    on_gpu = x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)
    expected = dense_experts([gates, ups], downs, ACTIVATIONS[activation], x, index, weights)
    assert_experts(run_experts([gate, up], down, activation, *on_gpu), expected)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("width", [1, 3])
def test_a_layer_without_gates_or_with_torch_s_activation_is_the_dense_one(width, tokens):
    (wi, wis), (wo, wos) = layer_packets(width, count=2)
    x = torch.randn(tokens, OUTSIDE).bfloat16()
    index, weights = draw_routing(tokens)
    on_gpu = x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)
    expected = dense_experts([wis], wos, torch.relu, x, index, weights)
    assert_experts(run_experts([wi], wo, "relu", *on_gpu), expected)
    assert_experts(run_experts([wi], wo, lambda outputs: torch.relu(outputs[0]), *on_gpu), expected)


def test_a_token_s_bytes_do_not_depend_on_the_others():
    (gate, _), (up, _), (down, _) = layer_packets(2)
    index, weights = (part.to(DEVICE) for part in draw_routing(40))
    x = torch.randn(40, OUTSIDE, device=DEVICE).bfloat16()
    whole = run_experts([gate, up], down, "silu", x, index, weights)
    for start, stop in ((0, 1), (5, 8), (17, 40)):
        some = [part[start:stop].contiguous() for part in (x, index, weights)]
        assert torch.equal(run_experts([gate, up], down, "silu", *some), whole[start:stop])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_flawed_token_spreads_through_its_experts_alone(value):
    (gate, gates), (up, ups), (down, downs) = layer_packets(2)
    x = torch.randn(7, OUTSIDE)
    x[3, 11] = value
    index, weights = draw_routing(7)
    y = run_experts([gate, up], down, "silu", x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)).cpu()
    out, _ = dense_experts([gates, ups], downs, functional.silu, x, index, weights)
    assert torch.equal(y.isfinite(), out.isfinite())
    assert not y[3].isfinite().any()
    assert y[[0, 1, 2, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_layer_can_be_captured_in_a_graph_and_routed_anew(tokens):
    (gate, gates), (up, ups), (down, downs) = layer_packets(2)
    x = torch.randn(tokens, OUTSIDE, device=DEVICE).bfloat16()
    index, weights = (part.to(DEVICE) for part in draw_routing(tokens))
    graph, y = captured(lambda: run_experts([gate, up], down, "silu", x, index, weights))
    for _ in range(3):
        x.copy_(torch.randn(tokens, OUTSIDE))
        for part, drawn in zip((index, weights), draw_routing(tokens), strict=True):
            part.copy_(drawn)
        graph.replay()
        torch.cuda.synchronize()
        assert_experts(y, dense_experts([gates, ups], downs, functional.silu, x, index.cpu(), weights))


def test_a_layer_wider_than_shared_memory_is_left_to_the_caller(monkeypatch):
    (gate, _), (up, _), (down, _) = layer_packets(2)
    monkeypatch.setattr(launch, "shared_limit", lambda device: 1024)
    index, weights = (part.to(DEVICE) for part in draw_routing(2))
    x = torch.randn(2, OUTSIDE, device=DEVICE)
    assert run_experts([gate, up], down, "silu", x, index, weights) is None


def packed_experts(width, activation):
    """Return a layer's module as a loaded model has it, on the GPU."""
    sizes = {"hidden_size": OUTSIDE, "moe_intermediate_size": INSIDE, "num_experts": EXPERTS, "num_hidden_layers": 1}
    sparse = {"mlp_only_layers": [], "decoder_sparse_step": 1, "num_experts_per_tok": SLOTS}
    own = pytest.importorskip("transformers").AutoConfig
    config = own.for_model("qwen3_moe", hidden_act=HIDDEN_ACT.get(activation, activation), **sizes, **sparse)
    experts_module, family = needed("models.experts"), needed("models.family").family_of("qwen3_moe")
    place = family.layers(config)[0]
    parts = dict(zip(place.projections, layer(width), strict=True))
    books = {name: matrices[0].codebook for name, (matrices, _) in parts.items()}
    experts = experts_module.PackedExperts(family, place, books, config)
    for name, (matrices, _) in parts.items():
        experts.fill(name, needed("checkpoint.format").pack_experts(matrices))
    return experts.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("width", "activation"), [(1, "silu"), (2, "gelu"), (3, "gelu_tanh"), (2, "relu")])
def test_packed_experts_on_a_gpu_are_the_dense_ones(width, activation, tokens, dtype):
    experts = packed_experts(width, activation)
    x = (torch.randn(tokens, OUTSIDE) / 8).to(dtype)
    index, weights = draw_routing(tokens)
    with torch.no_grad():
        y = experts(x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))
    first, last = [dense for _, dense in layer(width)[:2]], layer(width)[2][1]
    assert y.dtype == dtype
    assert y.device == DEVICE
    assert_experts(y, dense_experts(first, last, ACTIVATIONS[activation], x, index, weights))


def test_packed_experts_one_after_another_give_the_same(monkeypatch):
    experts = packed_experts(2, "silu")
    x = torch.randn(40, OUTSIDE, device=DEVICE)
    index, weights = (part.to(DEVICE) for part in draw_routing(40))
    with torch.no_grad():
        together = experts(x, index, weights)
        monkeypatch.setattr(experts_twin, "GATHERED_PAIRS", 0)
        monkeypatch.setattr(matmul, "GATHERED_TOKENS", 0)
        apart = experts(x, index, weights)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5 * float(together.abs().max()))
    (gradient,) = torch.autograd.grad(experts(x.requires_grad_(), index, weights).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_packed_experts_can_be_captured_in_a_graph():
    experts = packed_experts(2, "silu")
    x = torch.randn(3, OUTSIDE, device=DEVICE).bfloat16()
    index, weights = (part.to(DEVICE) for part in draw_routing(3))
    with torch.no_grad():
        graph, y = captured(lambda: experts(x, index, weights))
    x.copy_(torch.randn(3, OUTSIDE))
    index.copy_(draw_routing(3)[0])
    graph.replay()
    torch.cuda.synchronize()
    first, last = [dense for _, dense in layer(2)[:2]], layer(2)[2][1]
    assert_experts(y, dense_experts(first, last, functional.silu, x, index.cpu(), weights))


SMALL_MODEL = {
    **{"hidden_size": 264, "moe_intermediate_size": 136, "num_experts": 8, "num_experts_per_tok": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A compressed model of two layers, and the bytes of all slots that its experts need on a GPU."""
    models, offload = needed("bench._parts.offload"), needed("offload.runner")
    path = tmp_path_factory.mktemp("model")
    models.make_models(path / "models", SMALL_MODEL, 2, 96, seed=0)
    model = qm.load(path / "models" / "packed", device="cpu")
    runner = offload.attach(model, devices=["cuda:0"], remember=False)
    size = runner.statistics.cache_bytes
    runner.close()
    return path / "models" / "packed", size


def offloaded(path, cache, where=DEVICE, **options):
    """The model with so many bytes of slots on the GPU, itself there or on the CPU; and its runner."""
    model = qm.load(path, device="cpu", **options)
    runner = needed("offload.runner").attach(model, devices=["cuda:0"], expert_cache=cache, remember=False)
    return model.to(where), runner


def logits_of(model, tokens, where=DEVICE):
    """Logits of a prompt, then of four tokens one by one."""
    ids = torch.randint(0, 96, (1, tokens + 4), generator=torch.Generator().manual_seed(1)).to(where)
    with torch.no_grad():
        return torch.cat([model(input_ids=part).logits[0] for part in (ids[:, :tokens], *ids[:, tokens:].split(1, 1))])


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("slots", [1, 3, 8, 16])
def test_experts_from_slots_give_the_bits_of_a_model_that_is_there(model_directory, monkeypatch, slots, tokens):
    path, size = model_directory
    monkeypatch.setattr(experts_twin, "GATHERED_PAIRS", 256)  # the long prompt's experts are decoded
    expected = logits_of(qm.load(path, device="cuda"), tokens)
    model, runner = offloaded(path, size // 16 * slots)
    for _ in range(3):
        assert torch.equal(logits_of(model, tokens), expected)
    found = runner.statistics
    assert found.cache_bytes == size // 16 * slots
    assert found.misses > 0
    assert found.copied_bytes > 0
    assert found.copy_stall_seconds >= 0
    assert (found.hits > found.misses) or slots < 16
    runner.close()


def test_a_model_on_the_cpu_has_its_experts_on_the_gpu(model_directory):
    path, size = model_directory
    expected = logits_of(qm.load(path, device="cpu", dtype=torch.float32), 9, "cpu")
    model, runner = offloaded(path, size // 2, "cpu", dtype=torch.float32)
    found = logits_of(model, 9, "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    model(input_ids=torch.arange(9)[None]).logits.square().sum().backward()
    assert weight.grad.abs().sum() > 0
    runner.close()


def test_a_model_on_the_gpu_learns_around_experts_that_are_not_there(model_directory):
    path, size = model_directory
    gradients = []
    for model in (qm.load(path, device="cuda"), offloaded(path, size // 2)[0]):
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        model(input_ids=torch.arange(9, device=DEVICE)[None]).logits.float().square().sum().backward()
        gradients.append(weight.grad.float())
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * float(gradients[0].abs().max()))


def test_out_of_memory_in_the_middle_goes_on_with_fewer_slots(model_directory, monkeypatch):
    path, size = model_directory
    expected = logits_of(qm.load(path, device="cuda"), 5)
    model, runner = offloaded(path, size // 2)
    device, calls = runner._tiers[0].device, iter(range(10**6))
    begin = device.begin

    def failing(*given):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return begin(*given)

    monkeypatch.setattr(device, "begin", failing)
    assert torch.equal(logits_of(model, 5), expected)
    assert runner.statistics.notes == ["cuda:0 ran out of memory: its cache now holds 4 experts instead of 8."]
    runner.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, (257, 1000)], ids=str)
@pytest.mark.parametrize(("codebook", "width"), [(TERNARY, 1), (EVEN, 2), (TWO_BIT, 3), (SPARSE, 1), (PAPER, 2)])
def test_decoded_packets_are_the_levels_of_the_digits(codebook, width, shape, dtype):
    _, _, on_gpu, dense = pack(codebook, shape, width, dtype)
    made = packets.make_packets(on_gpu)
    for first in {0, shape[0] // 2}:
        for out_dtype in {dtype, torch.float32}:
            out = torch.zeros(shape[0] - first, shape[1], dtype=out_dtype, device=DEVICE)
            packets.decode_packets(made, 0, first, out)
            assert torch.equal(out.cpu(), dense[first:].to(out_dtype))
