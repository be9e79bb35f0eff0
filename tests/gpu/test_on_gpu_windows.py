"""The CUDA twins of codes of windows on a GPU, as tests/gpu/test_on_gpu.py tests those of codebooks.

A failure shows the seed; QMOE_TEST_SEED repeats it. `python bench/gpu.py` runs this file before it measures.
"""

from __future__ import annotations

import functools
import os
import random
import sys

import numpy as np
import pytest
import torch

import qmoe_lite as qm
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.cuda import launch, windows, windows_product
from qmoe_lite.cuda.window_packets import matrix_packets
from qmoe_lite.errors import DtypeError, ShapeError

if not launch.available():
    pytest.skip(f"needs a GPU: {launch.reason()}", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
SEED = int(os.environ.get("QMOE_TEST_SEED", random.SystemRandom().getrandbits(31)))
# name: bits of a codeword, clip, longest string, standard deviation of the digits
CODES = {"2 bits": (10, 4, 8, 1.2), "1 bit": (10, 2, 16, 0.3), "4 bits": (11, 14, 8, 5.0), "narrow": (9, 2, 8, 1.0)}
SHAPES = [(1, 1), (7, 1), (5, 63), (3, 1000), (70, 9), (257, 2048), (40, 14336)]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of a result to the dtype of x
FLOAT32 = 1e-5  # error of a float32 sum, over the sum of its terms' sizes


@pytest.fixture(autouse=True)
def seeded():
    sys.stderr.write(f"QMOE_TEST_SEED={SEED}\n")
    torch.manual_seed(SEED)
    yield
    torch.cuda.synchronize()  # an error of this test shows here, not in the next


@functools.cache
def dictionary_of(name):
    bits, clip, longest, spread = CODES[name]
    digits = np.rint(np.random.default_rng(1).normal(0, spread, 20000)).astype(np.int16)
    return Dictionary.fit(digits, bits, clip=clip, longest=longest)


def pack(name, shape):
    """Return digits, a matrix packed on the CPU, the same on the GPU, and its weights in float64."""
    rng = np.random.default_rng(SEED)
    digits = np.rint(rng.normal(0, CODES[name][3], shape)).astype(np.int16)
    rare = rng.random(shape) < 0.01
    digits[rare] = rng.integers(-300, 301, int(rare.sum()))
    digits[-1, -1] = 1000
    steps = torch.from_numpy(rng.uniform(0.5, 2, (shape[0], 1))).bfloat16()
    scales = torch.from_numpy(rng.uniform(0.5, 2, shape[1])).bfloat16()
    packed = qm.encode(digits, steps, dictionary_of(name), scales)
    dense = torch.from_numpy(digits.astype(np.float64)) * steps.double() * scales.double()
    return digits, packed, packed.to(DEVICE), dense


def assert_product(y, dense, x):
    """Compare y (.., R) with the float64 product of dense (R, C) and x (.., C), all read as float64.

    Activations times their columns' scales are rounded to bfloat16 where x is; of many tokens, weights to x's dtype.
    """
    y64, x64 = y.double().cpu(), x.double().cpu()
    expected = x64 @ dense.T
    rounded = (
        ROUNDING[x.dtype]
        if x.dtype == torch.bfloat16 or (x.ndim == 2 and len(x) > windows_product.PRODUCT_TOKENS)
        else 0
    )
    bound = (FLOAT32 + rounded) * (x64.abs() @ dense.abs().T) + ROUNDING[y.dtype] * expected.abs() + 1e-30
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    worst = ((y64 - expected).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


@pytest.mark.parametrize("name", list(CODES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_digits_and_weights_are_the_cpu_s(name, shape):
    digits, packed, on_gpu, _ = pack(name, shape)
    packets = matrix_packets(on_gpu)
    np.testing.assert_array_equal(windows.decode_digits(packets).cpu().numpy(), digits)
    found = qm.decode(on_gpu)[0]
    np.testing.assert_array_equal(found.cpu().numpy(), digits)
    for dtype in windows.DENSE_DTYPES:
        assert torch.equal(windows.decode_weights(packets, dtype=dtype).cpu(), packed.dense(dtype)), dtype
    with pytest.raises(DtypeError):
        windows.decode_weights(packets, dtype=torch.int8)


@pytest.mark.parametrize("name", list(CODES))
@pytest.mark.parametrize("tokens", [None, 1, 2, 3, 4, 5, 8, 17, 64])
@pytest.mark.parametrize("shape", [(3, 1000), (257, 2048), (40, 14336)], ids=str)
def test_the_product_is_the_float64_one(name, tokens, shape):
    _, _, packed, dense = pack(name, shape)
    for dtype in ROUNDING if tokens in (None, 4) else (torch.bfloat16,):
        x = torch.randn(shape[1] if tokens is None else (tokens, shape[1]), device=DEVICE).to(dtype)
        assert_product(qm.decode_matmul(packed, x), dense, x)


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (70, 9)], ids=str)
def test_small_products_too(shape):
    _, _, packed, dense = pack("2 bits", shape)
    x = torch.randn(3, shape[1], device=DEVICE)
    assert_product(qm.decode_matmul(packed, x), dense, x)
    assert qm.decode_matmul(packed, x[:0]).shape == (0, shape[0])
    with pytest.raises(ShapeError):
        qm.decode_matmul(packed, torch.randn(3, shape[1] + 1, device=DEVICE))


def test_a_token_s_bytes_are_those_it_has_alone_and_again():
    _, _, packed, _ = pack("2 bits", (257, 2048))
    x = torch.randn(4, 2048, device=DEVICE)
    whole = qm.decode_matmul(packed, x)
    assert torch.equal(whole, qm.decode_matmul(packed, x))
    for token in range(4):
        alone = qm.decode_matmul(packed, x[token])
        torch.testing.assert_close(alone, whole[token], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_the_product_can_be_captured_in_a_graph(tokens):
    _, _, packed, dense = pack("2 bits", (257, 2048))
    x = torch.randn(tokens, 2048, device=DEVICE)
    qm.decode_matmul(packed, x)  # packs and compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = qm.decode_matmul(packed, x)
    x.copy_(torch.randn(tokens, 2048, device=DEVICE))
    graph.replay()
    assert_product(y, dense, x)


@pytest.mark.parametrize("tokens", [1, 4])
def test_where_the_table_does_not_fit_shared_memory(tokens, monkeypatch):
    monkeypatch.setattr(launch, "shared_limit", lambda device: 8 << 10)
    _, _, packed, dense = pack("2 bits", (40, 1000))
    assert windows_product.choose_window_variant(packed.codebook, 1000, 1, 8 << 10).held is False
    x = torch.randn(tokens, 1000, device=DEVICE)
    assert_product(qm.decode_matmul(packed, x), dense, x)
