"""What the CUDA kernels compile to, and a model of the product's time: nothing here needs a GPU or a driver.

Each kernel is compiled for sm_80 and sm_90 by numba-cuda and linked to machine code; figures are read from its PTX
and from the machine code's ELF file.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import asdict, dataclass
from typing import Any

from qmoe_lite.bench._parts.common import machine_line
from qmoe_lite.bench._parts.gpu_paper import paper_kernel
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.cuda import (
    codec,
    gather,
    launch,
    packets,
    solver,
    static,
    variants,
    window_packets,
    windows,
    windows_product,
)
from qmoe_lite.cuda.static import COUNTS
from qmoe_lite.errors import DeviceError

CAPABILITIES = ((8, 0), (9, 0))
SHAPES = ((14336, 4096), (4096, 14336), (768, 2048), (2048, 768))  # rows x columns: Mixtral 8x7B, Qwen3-30B-A3B
ISSUES = 4  # warp instructions that a multiprocessor issues a cycle: it has four schedulers (8.0 to 9.0)
BANK_CONFLICT = 3.53  # passes of a shared load whose 32 lanes go to random banks: the mean of the fullest one's
SHARED_LIMIT = 98 << 10  # bytes a block may ask for on the smallest of the GPUs (8.6 and 8.9: 99 KiB)
_MODELLED = "product: 2 levels"
# products that are looked at: counts of digits (None: the paper's dictionary), levels a row, tokens
PRODUCTS: dict[str, tuple[tuple[int, ...] | None, int, int]] = {
    _MODELLED: (COUNTS, 2, 1),
    "product: 1 level": (COUNTS, 1, 1),
    "product: 4 tokens": (COUNTS, 2, 4),
    "product: two-bit": ((885, 50, 40, 25), 3, 1),
    "product: paper": (None, 2, 1),
}
# products from codes of windows: counts of sizes of digits, longest string, tokens
WINDOW_PRODUCTS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "windows: 1 bit": ((7661, 2335, 4), 16, 1),
    "windows: 2 bits": ((4215, 4829, 901, 54, 1), 8, 1),
    "windows: 4 tokens": ((4215, 4829, 901, 54, 1), 8, 4),
}
WIDTH = 4096  # columns of a row whose instructions are spread over its weights
_REGISTERS, _FRAME, _STACK = 0x2F, 0x11, 0x12  # attributes of an .nv.info section
_NOP = 0x918
_MODULES = (solver, codec, packets, window_packets)
_PAPER = "the paper's kernel"


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and machine code for one architecture, and the name that both have for it."""

    name: str
    ptx: str
    cubin: bytes


@dataclass(frozen=True)
class Resources:
    """What a kernel asks of a multiprocessor; bytes of stack a thread hold its spilled registers too.

    `shared` is what the code declares, a block: what a launch asks for comes on top.
    """

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class KernelFigures:
    """One kernel on one architecture; warp instructions a weight, row ends included, of one token's product alone."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    shared: int
    float64: int
    widest_load: int
    instructions: int
    instructions_per_weight: float | None


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU: multiprocessors, clock in GHz, memory in GB/s; and the architecture whose code stands for it."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    capability: tuple[int, int]


# NVIDIA's data sheets. Clocks are those of the float32 peak, multiprocessors * 128 * 2 * clock: 66.9 TFLOP/s (H100
# architecture white paper), 38.7 (RTX A6000 data sheet), 82.6 (Ada architecture white paper); bandwidths from the same.
GPUS = (
    Gpu("H100 SXM", 132, 1.98, 3350, (9, 0)),
    Gpu("RTX A6000", 84, 1.80, 768, (8, 0)),
    Gpu("RTX 4090", 128, 2.52, 1008, (8, 0)),
)


@dataclass(frozen=True)
class Estimate:
    """A model of one token's product, in microseconds: bytes over bandwidth, instructions and shared loads over rates.

    `dense` is the time that the bytes of the bfloat16 matrix take. Launch, latency and what a block loads before it
    begins are left out.
    """

    gpu: str
    rows: int
    columns: int
    memory: float
    issue: float
    shared: float
    dense: float

    @property
    def ratio(self) -> float:
        """How many times as fast as reading the bfloat16 matrix."""
        return self.dense / max(self.memory, self.issue, self.shared)


@dataclass(frozen=True)
class KernelsReport:
    """What `measure` found, and where."""

    kernels: tuple[KernelFigures, ...]
    estimates: tuple[Estimate, ...]
    bits_per_weight: float
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure() -> KernelsReport:
    """Compile every kernel for every architecture.

    Raises
    ------
    DeviceError
        A part of the compiler is missing; names what to install.
    """
    missing = _missing_compiler()
    if missing is not None:
        raise DeviceError(missing)
    figures = tuple(
        _figures(kernel, signature, capability) for capability in CAPABILITIES for kernel, signature in all_kernels()
    )
    weights = static.packet_weights(Codebook.fit(COUNTS))
    estimates = tuple(
        estimate(gpu, *shape, weights, *per_weight(_MODELLED, gpu.capability, shape[1]))
        for gpu in GPUS
        for shape in SHAPES
    )
    return KernelsReport(
        figures, estimates, packets.PACKET_BITS / weights, machine_line("numba", "numba-cuda", "nvidia-nvjitlink")
    )


def all_kernels() -> list[tuple[launch.Kernel, str]]:
    """Return the library's kernels with each of their signatures, products with x in bfloat16, and the paper's."""
    kernels = [each for module in _MODULES for each in vars(module).values() if isinstance(each, launch.Kernel)]
    kernels += [windows.decode_kernel(8, True, weights) for weights in (False, True)]
    known = [(kernel, signature) for kernel in dict.fromkeys(kernels) for signature in kernel.signatures]
    products = [*(_gather(_variant(each)) for each in PRODUCTS), *map(window_kernel, WINDOW_PRODUCTS)]
    return [*known, *products, (paper_kernel, paper_kernel.signatures[0])]


def _variant(product: str) -> variants.Variant:
    _, levels, tokens = PRODUCTS[product]
    variant = variants.choose_variant((_codebook(product),), levels, WIDTH, tokens, None, SHARED_LIMIT)
    assert variant is not None
    return variant


def _codebook(product: str) -> Codebook:
    counts = PRODUCTS[product][0]
    return Codebook.paper() if counts is None else Codebook.fit(counts)


def _gather(variant: variants.Variant) -> tuple[launch.Kernel, str]:
    """Return a product's kernel, and its signature for activations in bfloat16."""
    kernel = gather.gather_kernel(variant)
    signature = next(each for each in kernel.signatures if each.count("uint16*") == 4)  # levels, twice, x and y
    return kernel, signature


@functools.cache
def _dictionary(product: str) -> Dictionary:
    counts, longest, _ = WINDOW_PRODUCTS[product]
    return Dictionary.fit_counts(counts, longest=longest)


def window_kernel(product: str) -> tuple[launch.Kernel, str]:
    """Return the kernel of one of `WINDOW_PRODUCTS`, and its signature for activations in bfloat16."""
    tokens = WINDOW_PRODUCTS[product][2]
    variant = variants.choose_window_variant(_dictionary(product), WIDTH, tokens, SHARED_LIMIT, half=True)
    assert variant is not None
    kernel = windows_product.window_kernel(variant)
    return kernel, next(each for each in kernel.signatures if each.count("uint16*") == 2)  # x and y


@functools.lru_cache(maxsize=128)
def _ptx(kernel: launch.Kernel, signature: str) -> str:
    return kernel.ptx(signature)


@functools.lru_cache(maxsize=256)
def compiled(kernel: launch.Kernel, signature: str, capability: tuple[int, int]) -> Compiled:
    """Compile one kernel, once in a process, and link it for a compute capability; needs no GPU."""
    ptx = _ptx(kernel, signature)
    return Compiled(launch.entry_name(ptx), ptx, bytes(launch.link(ptx, capability).code))


def resources(code: Compiled) -> Resources:
    """Read a kernel's registers, stack and shared memory from the ELF file's own tables."""
    cubin = code.cubin
    offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, name_section = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]

    def text(section: int, start: int) -> str:
        start += sections[section][4]
        return cubin[start : cubin.index(b"\0", start)].decode()

    by_name = {text(name_section, section[0]): section for section in sections}
    symbols = by_name[".symtab"]
    found: dict[int, int] = {}
    place, end = by_name[".nv.info"][4], by_name[".nv.info"][4] + by_name[".nv.info"][5]
    while place < end:
        form, attribute, length = struct.unpack_from("<BBH", cubin, place)
        place += 4
        if form == 4:  # a value that has its size before it
            if attribute in (_REGISTERS, _FRAME, _STACK):
                symbol, value = struct.unpack_from("<II", cubin, place)
                symbol_name = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)[0]
                if text(symbols[6], symbol_name) == code.name:
                    found[attribute] = value
            place += length
    shared = by_name.get(f".nv.shared.{code.name}")
    return Resources(found[_REGISTERS], max(found[_FRAME], found[_STACK]), 0 if shared is None else shared[5])


def widest_load(ptx: str) -> int:
    """Return the bytes of the widest load from global memory; 0 where there is none."""
    loads = re.findall(r"\bld\.global(?:\.[a-zA-Z_]\w*|\.L\d::\w+)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx)
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in loads), default=0)


def instructions(code: Compiled) -> int:
    """Count a kernel's instructions, NOPs behind the end left out."""
    return sum(word & 0xFFF != _NOP for word in static.machine_words(code.cubin, code.name))


def per_weight(product: str, capability: tuple[int, int], columns: int) -> tuple[float, float]:
    """Return the warp instructions a weight of a one-token product, and the loads from shared memory among them."""
    code = compiled(*_gather(_variant(product)), capability)
    return static.per_weight(static.row_loops(code.cubin, code.name, capability), _codebook(product), columns)


def window_per_weight(product: str, capability: tuple[int, int], columns: int) -> tuple[float, float]:
    """As `per_weight`, of one of `WINDOW_PRODUCTS`; as if each of its branches were taken."""
    code, dictionary = compiled(*window_kernel(product), capability), _dictionary(product)
    bits = dictionary.expected_bits(WINDOW_PRODUCTS[product][0])  # exceptions too: a packet holds a little more
    weights = window_packets.codewords_each(dictionary.bits) * dictionary.bits / bits
    return static.spread(static.row_loops(code.cubin, code.name, capability), weights, columns)


def paper_per_weight(capability: tuple[int, int]) -> float:
    """Return the warp instructions a weight of the paper's algorithm: of its loop over codewords alone.

    That loads one activation a codeword, and is the loop that takes the fewest instructions for it: others span it.
    """
    code = compiled(paper_kernel, paper_kernel.signatures[0], capability)
    words = static.machine_words(code.cubin, code.name)
    spans = [words[first : last + 1] for first, last in static.loops(code.cubin, code.name, capability)]
    loads = [sum(map(static.is_shared_load, span)) for span in spans]
    codeword = min(len(span) / count for span, count in zip(spans, loads, strict=True) if count)
    return codeword * Codebook.paper().expected_bits_per_weight() / Codebook.paper().bits


def estimate(
    gpu: Gpu, rows: int, columns: int, packet_weights: float, instructions: float, shared_loads: float
) -> Estimate:
    """Model the product of one token.

    Its bytes: packets of 16 that hold `packet_weights`, half of a row's last one empty; a row's start and two bfloat16
    levels, 4 each; x and y.
    """
    weights = rows * columns
    small = 2 * (rows + columns)  # x and y in bfloat16
    packets = rows * (columns / packet_weights + 0.5)
    cycles = gpu.multiprocessors * gpu.clock * 1e3  # a microsecond
    return Estimate(
        gpu.name,
        rows,
        columns,
        memory=(16 * packets + 8 * rows + small) / gpu.bandwidth / 1e3,
        issue=weights * instructions / ISSUES / cycles,
        shared=weights * shared_loads * BANK_CONFLICT / cycles,
        dense=(2 * weights + small) / gpu.bandwidth / 1e3,
    )


def _figures(kernel: launch.Kernel, signature: str, capability: tuple[int, int]) -> KernelFigures:
    code = compiled(kernel, signature, capability)
    of = resources(code)
    product = next((each for each in PRODUCTS if _gather(_variant(each))[0] is kernel), None)
    each = per_weight(product, capability, WIDTH)[0] if product and PRODUCTS[product][2] == 1 else None
    for name, (_, _, tokens) in WINDOW_PRODUCTS.items():
        if window_kernel(name)[0] is kernel:
            product, each = name, window_per_weight(name, capability, WIDTH)[0] if tokens == 1 else None
    if kernel is paper_kernel:
        product, each = _PAPER, paper_per_weight(capability)
    return KernelFigures(
        product or _title(kernel, signature),
        "sm_{}{}".format(*capability),
        of.registers,
        of.stack,
        of.shared,
        code.ptx.count(".f64"),
        widest_load(code.ptx),
        instructions(code),
        each,
    )


def _title(kernel: launch.Kernel, signature: str) -> str:
    """Return a kernel's name, with the types that distinguish this signature from its others."""
    own = signature.split(", ")
    differ = [len(set(kinds)) > 1 for kinds in zip(*(each.split(", ") for each in kernel.signatures), strict=False)]
    kinds = [kind.rstrip("*") for kind, other in zip(own, differ, strict=False) if other]
    if kernel.__name__ == "_block_kernel" and "int16*" in own:
        kinds.append("uniform")  # of its two kernels, the one whose digits are any
    return " ".join([kernel.__name__.strip("_").removesuffix("_kernel"), *dict.fromkeys(kinds)])


def _missing_compiler() -> str | None:
    if launch.cuda is None:
        return launch.reason()
    missing = launch._missing_library()
    return None if missing is None else f"lib{missing} was not found; expected it. Run: pip install 'qmoe-lite[cuda]'"
