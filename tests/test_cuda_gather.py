"""The few-token product's kernels: right in the emulator, small in machine code."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import naive
import numpy as np
import pytest
import torch

pytest.importorskip("greenlet", reason="the emulator runs one greenlet a thread; pip install 'qmoe-lite[dev]'")

import emulator

from qmoe_lite import codec as cpu_codec
from qmoe_lite.codebook import Codebook
from qmoe_lite.cuda import launch, matmul, static

TERNARY = Codebook.fit(static.COUNTS)
CODEBOOKS = {
    "ternary-8": (Codebook.fit(static.COUNTS, bits=8), 1),
    "ternary-10": (TERNARY, 1),
    "ternary-10-two-levels": (TERNARY, 2),
    "ternary-12": (Codebook.fit(static.COUNTS, bits=12), 2),
    "ternary-13": (Codebook.fit(static.COUNTS, bits=13), 1),
    "two-bit": (Codebook.fit([885, 50, 40, 25]), 3),
    "four-fields": (Codebook.fit([150, 700, 150]), 1),
    "seven-fields": (Codebook.fit([1, 1, 1], bits=9), 2),
    "seven-fields-two-bit": (Codebook.fit([1, 1, 1, 1], bits=11), 3),
    "long": (Codebook.fit([1, 998, 1], bits=9), 1),
    "paper": (Codebook.paper(), 2),
}
MOST_REGISTERS, MOST_PER_WEIGHT = 128, 0.12


@pytest.fixture
def emulated(monkeypatch):
    emulator.install(monkeypatch, seed=7)
    monkeypatch.setattr(matmul, "WARPS", 2)


def draw(codebook, width, shape, seed=0):
    rng = np.random.default_rng(seed)
    shares = np.array(codebook.counts) / sum(codebook.counts)
    digits = (rng.choice(codebook.digits, size=shape, p=shares) + codebook.lowest_digit).astype(np.int8)
    digits[-1, -1] = codebook.lowest_digit + codebook.digits - 1  # the last column of the last row counts
    levels = torch.from_numpy(rng.standard_normal((shape[0], width))).float()
    return digits, levels, cpu_codec.encode(digits, levels, codebook)


def assert_close(y, digits, levels, x):
    reference = naive.matmul(digits, levels.tolist(), x.numpy())
    sizes = np.abs(naive.dequantize(digits, levels.tolist()))
    assert (np.abs(y.numpy() - reference) <= 1e-5 * (np.abs(x.numpy()) @ sizes.T)).all()


@pytest.mark.parametrize("limit", [96 << 10, 8 << 10, 0], ids=["table and x held", "x held", "nothing held"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(CODEBOOKS))
def test_every_variant_gives_the_naive_product(emulated, monkeypatch, name, tokens, limit):
    codebook, width = CODEBOOKS[name]
    monkeypatch.setattr(launch, "shared_limit", lambda device: limit)
    digits, levels, packed = draw(codebook, width, (3, 331), seed=tokens)
    x = torch.randn(tokens, 331)
    assert_close(matmul.decode_matmul(packed, x), digits, levels, x)


def test_what_is_held_follows_from_what_fits():
    def held(codebook, columns, limit):
        variant = matmul.choose_variant(codebook, 1, 4, columns, limit)
        assert variant.held == 2 or variant.shared_bytes(columns) <= limit
        return variant.tokens, variant.held

    assert held(TERNARY, 4096, 227 << 10) == (4, 0)
    assert held(TERNARY, 14336, 227 << 10) == (2, 0)
    assert held(TERNARY, 14336, 99 << 10) == (1, 0)
    assert held(TERNARY, 65535, 99 << 10) == (1, 2)
    assert held(Codebook.paper(), 4096, 99 << 10) == (4, 1)


@pytest.mark.parametrize("offset", range(4))
def test_codes_may_begin_at_any_byte(emulated, offset):
    digits, levels, packed = draw(TERNARY, 1, (5, 700))
    room = torch.full((packed.codes.numel() + 8,), 0xFF, dtype=torch.uint8)
    start = (offset - room.data_ptr()) % 4
    codes = room[start : start + packed.codes.numel()]
    codes.copy_(packed.codes)
    moved = dataclasses.replace(packed, codes=codes)
    assert codes.data_ptr() % 4 == offset
    x = torch.randn(1, 700)
    assert_close(matmul.decode_matmul(moved, x), digits, levels, x)


@pytest.mark.parametrize("name", ["ternary-10", "two-bit", "seven-fields", "paper"])
@pytest.mark.parametrize("flaw", [torch.inf, -torch.inf, torch.nan])
def test_one_flawed_activation_spreads_as_in_a_dense_product(emulated, name, flaw):
    codebook, width = CODEBOOKS[name]
    digits, levels, packed = draw(codebook, width, (6, 200))
    x = torch.randn(2, 200)
    digit_column = int(np.flatnonzero((digits != 0).any(0) & (digits == 0).any(0))[0])
    x[1, digit_column] = flaw
    dense = x @ torch.from_numpy(naive.dequantize(digits, levels.tolist())).float().T
    torch.testing.assert_close(matmul.decode_matmul(packed, x), dense, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_the_largest_activations_do_not_overflow(emulated):
    digits, levels = np.zeros((2, 64), dtype=np.int8), torch.full((2, 1), 0.5)
    digits[:, 5] = 1
    packed = cpu_codec.encode(digits, levels, TERNARY)
    x = torch.full((64,), torch.finfo(torch.float32).max)
    assert torch.equal(matmul.decode_matmul(packed, x), x[:2] / 2)


def test_levels_and_row_starts_are_made_once_a_matrix(emulated, monkeypatch):
    _, _, packed = draw(TERNARY, 1, (3, 64))
    first = matmul.decode_matmul(packed, torch.ones(64))
    monkeypatch.setattr(matmul, "row_starts", None)
    assert torch.equal(matmul.decode_matmul(packed, torch.ones(64)), first)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda compiles the kernels"
)


def compiled(variant, capability, signature=0):
    from qmoe_lite.bench import kernels

    kernel = matmul.gather_kernel(variant)
    return kernels.compiled(kernel, kernel.signatures[signature], capability)


def nvdisasm():
    """Path of the disassembler, from its wheel or the toolkit; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations
    in_wheel = [path for folder in folders for path in Path(folder).glob("*/bin/nvdisasm")]
    return str(in_wheel[0]) if in_wheel else shutil.which("nvdisasm")


@needs_compiler
@pytest.mark.parametrize("name", list(static.gather_variants()))
def test_variant_fits_the_gpu(name):
    from qmoe_lite.bench import kernels

    code = compiled(static.gather_variants()[name], (9, 0))
    found = kernels.resources(code)
    assert ".f64" not in code.ptx
    assert ".local" not in code.ptx
    assert 0 < found.registers <= MOST_REGISTERS
    assert found.stack == 0
    assert not re.search(r"cvt\.\w+\.f32\.[su]64", code.ptx)


@needs_compiler
@pytest.mark.parametrize("signature", range(1, 3))
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_half_precision_compiles_to_the_same_loop(capability, signature):
    variant = static.gather_variants()["10 bits"]
    sizes = [
        static.walk_loop(code.cubin, code.name, capability)
        for code in (compiled(variant, capability, number) for number in (0, signature))
    ]
    assert abs(sizes[0] - sizes[1]) <= 2


@needs_compiler
@pytest.mark.parametrize("bits", range(8, 13))
def test_a_weight_takes_few_instructions(bits):
    variant, codebook = static.gather_variants()[f"{bits} bits"], Codebook.fit(static.COUNTS, bits)
    code = compiled(variant, (9, 0))
    instructions = static.walk_loop(code.cubin, code.name, (9, 0))
    assert instructions > 40  # a loop that does less than it must was miscounted
    for columns in (None, 768, 2048, 4096, 14336):
        assert static.per_weight(instructions, variant, codebook, columns) <= MOST_PER_WEIGHT


@needs_compiler
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_loops_are_those_that_the_disassembler_shows(capability, tmp_path):
    tool = nvdisasm()
    if tool is None:
        pytest.skip("nvdisasm is missing; pip install nvidia-cuda-nvdisasm")
    code = compiled(static.gather_variants()["10 bits"], capability)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(code.cubin)
    text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    text = text[text.index(f".text.{code.name}:") :]
    places, labels, branches = 0, {}, []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = places
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            target = re.search(r"\bBRA(?:\.\w+)* .*\((\.L_x_\d+)\)", line)
            if target:
                branches.append((places, target[1]))
            places += 1
    spans = [at + 1 - labels[target] for at, target in branches if labels.get(target, at) < at]
    assert sorted(size for size, _ in static.loops(code.cubin, code.name, capability)) == sorted(spans)
