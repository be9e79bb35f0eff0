"""The few-token product's kernels: right in the emulator, small in machine code."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from checks import naive_packets, run_experts

pytest.importorskip("greenlet", reason="the emulator runs one greenlet a thread; pip install 'qmoe-lite[dev]'")

import emulator

from qmoe_lite.checkpoint.format import pack_experts
from qmoe_lite.coding import codec as cpu_codec
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.cuda import experts as experts_twin
from qmoe_lite.cuda import gather, launch, matmul, packets, static, variants

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
    monkeypatch.setattr(gather, "WARPS", (1, 2))


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


@pytest.mark.slow
@pytest.mark.parametrize("limit", [96 << 10, 8 << 10], ids=["table and x held", "x held"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("name", list(CODEBOOKS))
def test_every_variant_gives_the_naive_product(emulated, monkeypatch, name, tokens, limit):
    codebook, width = CODEBOOKS[name]
    monkeypatch.setattr(launch, "shared_limit", lambda device: limit)
    digits, levels, packed = draw(codebook, width, (3, 331), seed=tokens)
    x = torch.randn(tokens, 331)
    assert_close(matmul.decode_matmul(packed, x), digits, levels, x)


def test_what_is_held_follows_from_what_fits():
    def held(codebook, columns, limit):
        variant = variants.choose_variant((codebook,), 1, columns, 4, None, limit)
        if variant is None:
            return None
        assert variant.shared_bytes(variants.padded_columns((codebook,), columns)) <= limit
        return variant.tokens, variant.books[0].held

    assert held(TERNARY, 4096, 227 << 10) == (4, True)
    assert held(TERNARY, 14336, 227 << 10) == (2, True)
    assert held(TERNARY, 14336, 99 << 10) == (1, True)
    assert held(TERNARY, 65535, 227 << 10) is None
    assert held(Codebook.paper(), 4096, 99 << 10) == (4, False)


def test_activations_too_wide_for_shared_memory_meet_decoded_tiles(emulated, monkeypatch):
    digits, levels, packed = draw(TERNARY, 2, (4, 700))
    monkeypatch.setattr(launch, "shared_limit", lambda device: 2048)
    monkeypatch.setattr(gather, "gather_kernel", None)
    x = torch.randn(2, 700)
    assert_close(matmul.decode_matmul(packed, x), digits, levels, x)


@pytest.mark.parametrize("columns", [1, 29, 331])
@pytest.mark.parametrize("name", list(CODEBOOKS))
def test_packets_are_those_of_the_description(emulated, name, columns):
    codebook, width = CODEBOOKS[name]
    _, _, packed = draw(codebook, width, (5, columns), seed=columns)
    made = packets.make_packets(packed)
    words, starts = naive_packets(packed)
    assert made.words.tolist() == words
    assert made.starts.tolist() == starts
    assert (made.experts, made.rows, made.columns) == (1, 5, columns)
    most = packets.most_packets(codebook.bits, packets.codewords_each(codebook.bits), packed.codes.numel(), 5)
    assert len(words) <= most <= len(words) + 5 + 1 + 64 // codebook.bits // packets.codewords_each(codebook.bits)
    assert made.packets_each == len(words) / 5


def in_slots(matrices, size, order):
    """Packets of matrices that lie in slots of poison, `size` bytes each: matrix i in slot order[i]."""
    memory = torch.full((size * (max(order) + 1),), 0xA5, dtype=torch.uint8)
    made = [packets.make_packets(packed) for packed in matrices]
    levels, rows = made[0].levels, made[0].rows
    starts_at = 16 * max(len(each.words) for each in made)
    levels_at = starts_at + 4 * (rows + 1) + 12
    for each, slot in zip(made, order, strict=True):
        for begin, part in ((0, each.words), (starts_at, each.starts), (levels_at, each.levels)):
            data = part.contiguous().view(-1).view(torch.uint8)
            memory[slot * size + begin :][: len(data)] = data
    assert levels_at + levels.nbytes <= size
    return packets.Packets(
        words=memory.view(torch.uint32).view(-1, 4),
        starts=memory[starts_at:].view(torch.int32),
        levels=memory[levels_at:].view(levels.dtype),
        codebook=made[0].codebook,
        experts=max(order) + 1,
        rows=rows,
        columns=made[0].columns,
        levels_each=levels.shape[1],
        packets_each=sum(len(each.words) for each in made) / len(made) / rows,
        strides=(size // 16, size // 4, size // levels.element_size()),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        *itertools.product(CODEBOOKS, [(1, 1), (5, 29), (3, 331)], [torch.float32, torch.bfloat16, torch.float16]),
        *itertools.product(("ternary-10", "paper"), [(37, 700)], [torch.float32]),
    ],
    ids=str,
)
def test_decoded_packets_are_the_naive_matrix(emulated, monkeypatch, name, shape, dtype):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(packets, "BLOCKS", 2)
    codebook, width = CODEBOOKS[name]
    drawn = [draw(codebook, width, shape, seed=e) for e in range(2)]
    matrices = [cpu_codec.encode(digits, levels.to(dtype), codebook) for digits, levels, _ in drawn]
    strings = naive.strings_of(codebook.table.tolist(), codebook.digits)
    made = [packets.stack_packets(pack_experts(matrices), codebook, shape[1]), in_slots(matrices, 1 << 15, (2, 0))]
    for stack, places in zip(made, ((0, 1), (2, 0)), strict=True):
        for place, packed, (digits, _, _) in zip(places, matrices, drawn, strict=True):
            words, starts = naive_packets(packed)
            assert naive.digits_of_packets(words, starts, strings, codebook.bits, shape[1]) == digits.tolist()
            dense = torch.from_numpy(naive.dequantize(digits, packed.levels.tolist()))
            for first in {0, shape[0] // 2}:
                for out_dtype in {dtype, torch.float32}:
                    out = torch.zeros(shape[0] - first, shape[1], dtype=out_dtype)
                    packets.decode_packets(stack, place, first, out)
                    assert torch.equal(out, dense[first:].to(out_dtype))


def test_many_tokens_meet_the_packets_that_exist(emulated, monkeypatch):
    digits, levels, packed = draw(TERNARY, 2, (4, 200))
    x = torch.randn(3, 200)
    monkeypatch.setattr(matmul, "GATHERED_TOKENS", 2)
    from_codes = matmul.decode_matmul(packed, x)
    matmul.decode_matmul(packed, x[:1])
    monkeypatch.setattr(matmul, "decode_rows", None)
    assert torch.equal(matmul.decode_matmul(packed, x), from_codes)
    assert_close(from_codes, digits, levels, x)


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


def test_packets_are_made_once_a_matrix(emulated, monkeypatch):
    _, _, packed = draw(TERNARY, 1, (3, 64))
    first = matmul.decode_matmul(packed, torch.ones(64))
    monkeypatch.setattr(matmul, "make_packets", None)
    assert torch.equal(matmul.decode_matmul(packed, torch.ones(64)), first)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ["ternary-10-two-levels", "seven-fields"])
def test_any_number_of_lanes_may_share_a_row(emulated, monkeypatch, name, lanes):
    codebook, width = CODEBOOKS[name]
    monkeypatch.setattr(gather, "choose_lanes", lambda *_: lanes)
    digits, levels, packed = draw(codebook, width, (37, 700))
    x = torch.randn(1, 700)
    assert_close(matmul.decode_matmul(packed, x), digits, levels, x)


def test_lanes_are_few_where_rows_are_many_and_many_where_rows_are_few():
    assert variants.choose_lanes(25, 14336, 132) in (4, 8)
    assert variants.choose_lanes(25, 14336, 1) == 2
    assert variants.choose_lanes(86, 500, 132) == 32
    assert variants.choose_lanes(1, 768, 132) == 2


EXPERTS, WIDE, NARROW = 5, 60, 21  # columns of x, rows of the first projections
BOOKS = {
    "gate_proj": TERNARY,
    "up_proj": Codebook.fit(static.COUNTS, bits=8),
    "down_proj": Codebook.fit([150, 700, 150]),
    "two-bit": CODEBOOKS["two-bit"][0],
}
TORCH_ACTIVATIONS = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def draw_layer(shapes, width=2):
    """Packets of each projection, and its dense matrices (E, R, C) in float64."""
    layer = {}
    for i, (name, shape) in enumerate(shapes.items()):
        drawn = [draw(BOOKS["two-bit" if width == 3 else name], width, shape, seed=10 * i + e) for e in range(EXPERTS)]
        matrices = [packed for _, _, packed in drawn]
        stored = pack_experts(matrices)
        if i == 0:  # as where one row is much longer than another
            stored["row_codewords"] = stored["row_codewords"].to(torch.uint16)
        made = packets.stack_packets(stored, matrices[0].codebook, shape[1])
        dense = [naive.dequantize(digits, levels.tolist()) for digits, levels, _ in drawn]
        layer[name] = made, torch.from_numpy(np.array(dense))
    return layer


def naive_experts(first, last, inside, x, index, weights):
    """Each token through each of its experts, one after another, in float64."""
    out = torch.zeros(len(x), last.shape[1], dtype=torch.float64)
    for token, (experts, factors) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, factor in zip(experts, factors, strict=True):
            if 0 <= expert < EXPERTS:
                inner = inside([matrices[expert] @ x[token].double() for matrices in first])
                out[token] += factor * (last[expert] @ inner)
    return out


def draw_routing(tokens, slots):
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:slots] for _ in range(tokens)])
    index[0, 0] = -1  # dropped
    index[-1, -1] = EXPERTS  # no expert's number
    return index, torch.rand(tokens, slots, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "tokens", "slots", "dtype"),
    [
        ("relu", 1, 3, torch.float32),
        ("silu", 9, 2, torch.bfloat16),
        ("silu", 2, 2, torch.float32),
        ("gelu", 3, 1, torch.float16),
        ("gelu_tanh", 12, 1, torch.float32),
    ],
    ids=str,
)
def test_a_layer_s_experts_are_the_naive_ones(emulated, activation, tokens, slots, dtype):
    layer = draw_layer({"gate_proj": (NARROW, WIDE), "up_proj": (NARROW, WIDE), "down_proj": (WIDE, NARROW)})
    (gate, gates), (up, ups), (down, downs) = layer.values()
    x = torch.randn(tokens, WIDE).to(dtype)
    index, weights = draw_routing(tokens, slots)
    torch_activation = TORCH_ACTIVATIONS[activation]
    expected = naive_experts([gates, ups], downs, lambda y: torch_activation(y[0]) * y[1], x, index, weights)
    y = run_experts([gate, up], down, activation, x, index, weights)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    apart = run_experts([gate, up], down, lambda y: torch_activation(y[0]) * y[1], x, index, weights)
    torch.testing.assert_close(apart, y, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("width", [1, 3])
def test_a_layer_without_gates_is_the_naive_one(emulated, width):
    layer = draw_layer({"gate_proj": (NARROW, WIDE), "down_proj": (WIDE, NARROW)}, width)
    (wi, wis), (wo, wos) = layer.values()
    x = torch.randn(12, WIDE)
    index, weights = draw_routing(12, 1)
    expected = naive_experts([wis], wos, lambda y: torch.relu(y[0]), x, index, weights)
    y = run_experts([wi], wo, "relu", x, index, weights)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_token_s_result_does_not_depend_on_the_others(emulated):
    layer = draw_layer({"gate_proj": (NARROW, WIDE), "up_proj": (NARROW, WIDE), "down_proj": (WIDE, NARROW)})
    (gate, _), (up, _), (down, _) = layer.values()
    x = torch.randn(6, WIDE)
    index, weights = draw_routing(6, 2)
    whole = run_experts([gate, up], down, "silu", x, index, weights)
    some = run_experts([gate, up], down, "silu", x[2:4].contiguous(), index[2:4], weights[2:4])
    assert torch.equal(whole[2:4], some)


@pytest.mark.slow
def test_experts_in_slots_take_their_turns_and_give_the_same_bytes(emulated):
    """Slots lie in any order among poison, not every turn has every expert, and nothing is read of an empty slot."""
    shapes = {"gate_proj": (NARROW, WIDE), "up_proj": (NARROW, WIDE), "down_proj": (WIDE, NARROW)}
    (gate, _), (up, _), (down, _) = draw_layer(shapes).values()
    order = (4, 1, 6, 3, 0)
    slots = []
    for i, (name, shape) in enumerate(shapes.items()):
        matrices = [draw(BOOKS[name], 2, shape, seed=10 * i + e)[2] for e in range(EXPERTS)]
        slots.append(in_slots(matrices, 1 << 13, order))
    activation, torch_activation = "silu", lambda y: torch.nn.functional.silu(y[0]) * y[1]
    for tokens, k in ((1, 2), (9, 3)):
        x = torch.randn(tokens, WIDE)
        index, weights = draw_routing(tokens, k)
        for own in (activation, torch_activation):
            whole = run_experts([gate, up], down, own, x, index, weights)
            for turns in ((range(EXPERTS),), ((3,), (0, 4), (2, 1)), ((1, 2), (0,))):
                call = experts_twin.ExpertsCall(slots[:2], slots[2], own, x, index, weights, EXPERTS)
                assert call.fits
                for turn in turns:
                    places = torch.full((EXPERTS,), -1, dtype=torch.int32)
                    for expert in turn:
                        places[expert] = order[expert]
                    call.gather(places)
                present = torch.isin(index, torch.tensor([expert for turn in turns for expert in turn]))
                some = run_experts([gate, up], down, own, x, torch.where(present, index, -1), weights)
                assert torch.equal(call.total(), some)
                assert not call.total()[~present.any(1)].any(), "to the last bit: poison is a tiny number"
                if present.sum() == ((index >= 0) & (index < EXPERTS)).sum():
                    assert torch.equal(some, whole)


def test_many_tokens_of_some_experts_are_decoded_in_between(emulated):
    shapes = {"gate_proj": (NARROW, WIDE), "up_proj": (NARROW, WIDE), "down_proj": (WIDE, NARROW)}
    (gate, gates), (up, ups), (down, downs) = draw_layer(shapes).values()
    x = torch.randn(11, WIDE)
    index, weights = draw_routing(11, 3)

    def inside(y):
        return torch.nn.functional.silu(y[0]) * y[1]

    expected = naive_experts([gates, ups], downs, inside, x, index, weights)
    counts = [int((index == expert).sum()) for expert in range(EXPERTS)]
    ends = np.cumsum(counts).tolist()
    call = experts_twin.ExpertsCall([gate, up], down, "silu", x, index, weights, EXPERTS)
    for expert in (2, 0):
        call.decode(expert, slice(ends[expert] - counts[expert], ends[expert]), inside)
    call.gather(torch.tensor([-1, 1, -1, 3, 4], dtype=torch.int32))
    torch.testing.assert_close(call.total().double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_layer_wider_than_shared_memory_is_left_to_the_caller(emulated, monkeypatch):
    layer = draw_layer({"gate_proj": (NARROW, WIDE), "up_proj": (NARROW, WIDE), "down_proj": (WIDE, NARROW)})
    (gate, _), (up, _), (down, _) = layer.values()
    monkeypatch.setattr(launch, "shared_limit", lambda device: 256)
    assert run_experts([gate, up], down, "silu", torch.randn(1, WIDE), *draw_routing(1, 2)) is None


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda compiles the kernels"
)


def compiled(variant, capability, signature=0):
    from qmoe_lite.bench import kernels

    kernel = gather.gather_kernel(variant)
    return kernels.compiled(kernel, kernel.signatures[signature], capability)


def nvdisasm():
    """Path of the disassembler, from its wheel or the toolkit; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations
    in_wheel = [path for folder in folders for path in Path(folder).glob("*/bin/nvdisasm")]
    return str(in_wheel[0]) if in_wheel else shutil.which("nvdisasm")


BOTH = "gate and up, silu"  # the largest; the others are compiled for 8.0 by the tests of `bench kernels`


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "capability"), [*((n, (9, 0)) for n in static.gather_variants()), (BOTH, (8, 0))])
def test_variant_fits_the_gpu(name, capability):
    from qmoe_lite.bench import kernels

    code = compiled(static.gather_variants()[name], capability)
    found = kernels.resources(code)
    assert ".f64" not in code.ptx
    assert ".local" not in code.ptx
    assert 0 < found.registers <= MOST_REGISTERS
    assert found.stack == 0
    assert not re.search(r"cvt\.\w+\.f32\.[su]64", code.ptx)


@pytest.mark.slow
@needs_compiler
def test_half_precision_compiles_to_the_same_loop():
    variant = static.gather_variants()["10 bits"]
    signatures = gather.gather_kernel(variant).signatures
    numbers = [0, *(i for i, each in enumerate(signatures) if each.count("float16*") == 4)]  # levels twice, x and y
    assert len(numbers) == 2
    codes = [compiled(variant, (8, 0), number) for number in numbers]
    sizes = [static.row_loops(code.cubin, code.name, (8, 0)).packet for code in codes]
    assert abs(sizes[0] - sizes[1]) <= 4


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("bits", range(8, 13))
def test_a_weight_takes_few_instructions(bits):
    codebook = Codebook.fit(static.COUNTS, bits)
    code = compiled(static.gather_variants()[f"{bits} bits"], (9, 0))
    of = static.row_loops(code.cubin, code.name, (9, 0))
    each = packets.codewords_each(bits)
    assert of.packet > 8 * each  # a loop that does less than it must was miscounted
    assert of.shared == each * (1 + len(codebook.fields))
    assert of.row > 40
    for columns in (768, 2048, 4096, 14336):
        instructions, shared = static.per_weight(of, codebook, columns)
        assert shared < instructions <= MOST_PER_WEIGHT


@pytest.mark.slow
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
    found = static.loops(code.cubin, code.name, capability)
    assert sorted(last - first + 1 for first, last in found) == sorted(spans)
    words = static.machine_words(code.cubin, code.name)
    assert sum(map(static.is_wide_load, words)) == text.count("LDG.E.128") > 0
