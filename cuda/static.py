"""How many instructions the one-token product takes: read from machine code, with no GPU and no disassembler.

For bench/kernels.py and the tests: `gather_variants()` lists kernels as `matmul.gather_kernel` makes them, `walk_loop`
counts the loop that does a product's work, `per_weight` spreads it over the weights.
"""

from __future__ import annotations

import struct

from qmoe_lite.codebook import Codebook
from qmoe_lite.cuda.launch import WARP
from qmoe_lite.cuda.matmul import Variant, choose_variant

COUNTS = (115, 1770, 115)  # P(0) = 0.885
INSTRUCTION_BYTES = 16
_BRANCH, _SHUFFLE, _OPCODE = 0x147, 0x189, 0x1FF  # the opcode's bits that say what it does, not where operands lie
_WALK_SHUFFLES = 6  # five of the scan, one of its end


def gather_variants() -> dict[str, Variant]:
    """Return what the product is compiled for most often, by name: codebooks of 8 to 12 bits, and the paper's."""
    ternary, two_bit = COUNTS, (885, 50, 40, 25)
    limit, columns = 99 << 10, 4096  # what an RTX 30 or 40 has, the least of the GPUs that are supported
    cases = {f"{bits} bits": (Codebook.fit(ternary, bits), 1, 1) for bits in range(8, 13)}
    cases |= {f"10 bits, {tokens} tokens": (Codebook.fit(ternary), 1, tokens) for tokens in (2, 4)}
    cases |= {f"10 bits, 2 levels, {tokens} tokens": (Codebook.fit(ternary), 2, tokens) for tokens in (1, 4)}
    cases |= {f"10 bits, two-bit digits, {tokens} tokens": (Codebook.fit(two_bit), 3, tokens) for tokens in (1, 4)}
    cases |= {"10 bits, 4 nonzeros": (Codebook.fit((150, 700, 150)), 1, 1)}
    cases |= {"10 bits, 7 nonzeros": (Codebook.fit((1, 1, 1)), 1, 1)}
    cases |= {"paper, 2 levels": (Codebook.paper(), 2, 1)}
    variants = {name: choose_variant(*case, columns, limit) for name, case in cases.items()}
    return variants | {"10 bits, x too wide": choose_variant(Codebook.fit(ternary), 1, 1, 65535, limit)}


def loops(cubin: bytes, name: str, capability: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (instructions, shuffles) of each loop of a kernel: what a branch that goes back spans.

    Parameters
    ----------
    cubin : bytes
        Machine code, for 8.0 to 9.0.
    name : str
        The kernel's, as `launch.entry_name` gives it.
    capability : (int, int)
        That it was made for.
    """
    code = _section(cubin, f".text.{name}")
    words = [int.from_bytes(code[i : i + INSTRUCTION_BYTES], "little") for i in range(0, len(code), INSTRUCTION_BYTES)]
    found = []
    for place, word in enumerate(words):
        if word & _OPCODE == _BRANCH:
            begin = place + 1 + _distance(word, capability) // INSTRUCTION_BYTES
            if 0 <= begin < place:
                span = words[begin : place + 1]
                found.append((len(span), sum(each & _OPCODE == _SHUFFLE for each in span)))
    return found


def walk_loop(cubin: bytes, name: str, capability: tuple[int, int]) -> int:
    """Return the instructions of a gather kernel's loop over its codewords, 32 * `Variant.each` of them a turn."""
    return min(size for size, shuffles in loops(cubin, name, capability) if shuffles >= _WALK_SHUFFLES)


def per_weight(instructions: int, variant: Variant, codebook: Codebook, columns: int | None = None) -> float:
    """Return the warp instructions a weight, given those of the loop.

    Parameters
    ----------
    instructions : int
        What `walk_loop` gave.
    variant : Variant
        Of the kernel; its tokens are not counted as weights.
    codebook : Codebook
        Its mean codeword is taken.
    columns : int, optional
        Of a row; its last turn counts in full. By default as of a row without an end.
    """
    length = codebook.bits / codebook.expected_bits_per_weight()
    turn = WARP * variant.each
    if columns is None:
        return instructions / (turn * length)
    return instructions * -(-columns // (turn * length)) / columns


def _distance(word: int, capability: tuple[int, int]) -> int:
    """Return how many bytes behind the next instruction a branch leads to."""
    high = word >> 34 & (1 << 48) - 1
    high -= (high & 1 << 47) << 1
    return 4 * (high if capability < (9, 0) else high << 8 | word >> 16 & 0xFF)


def _section(cubin: bytes, name: str) -> bytes:
    offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if cubin[start : cubin.index(b"\0", start)].decode() == name:
            return cubin[header[4] : header[4] + header[5]]
    raise KeyError(name)
