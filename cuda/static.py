"""How many instructions the one-token product takes: read from machine code, with no GPU and no disassembler.

For bench/kernels.py and the tests: `gather_variants()` lists kernels as `gather.gather_kernel` makes them, `row_loops`
counts the loops that do a product's work, `per_weight` spreads them over the weights.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.cuda.launch import WARP
from qmoe_lite.cuda.packets import codewords_each
from qmoe_lite.cuda.variants import Variant, choose_lanes, choose_variant, turns

COUNTS = (115, 1770, 115)  # P(0) = 0.885
INSTRUCTION_BYTES = 16
MANY_ROWS = 1 << 16  # so that every multiprocessor has enough of them
_OPCODE = 0x1FF  # the bits that say what an instruction does, not where its operands lie
_BRANCH, _LOAD_GLOBAL, _LOAD_SHARED = 0x147, 0x181, 0x184
_WIDTH_PLACE, _WIDTH_128 = 73, 6  # of a load


@dataclass(frozen=True)
class Loops:
    """Instructions of a one-matrix kernel.

    Attributes
    ----------
    packet : int
        Of its loop over packets.
    shared : int
        Loads from shared memory among them.
    row : int
        Of its loop over rows, without what walks packets.
    """

    packet: int
    shared: int
    row: int


def gather_variants() -> dict[str, Variant]:
    """Return what the product is compiled for most often, by name: codebooks of 8 to 12 bits, and the paper's."""
    two_bit = Codebook.fit((885, 50, 40, 25))
    limit, columns = 99 << 10, 4096  # what an RTX 30 or 40 has, the least of the GPUs that are supported
    cases: dict[str, tuple[tuple[Codebook, ...], int, int, str | None]] = {
        f"{bits} bits": ((Codebook.fit(COUNTS, bits),), 2, 1, None) for bits in range(8, 13)
    }
    usual = Codebook.fit(COUNTS)
    cases["10 bits, symmetric"] = (usual,), 1, 1, None
    cases["10 bits, 4 tokens"] = (usual,), 2, 4, None
    cases["gate and up, silu"] = (usual, usual), 2, 1, "silu"
    cases["10 bits, two-bit digits"] = (two_bit,), 3, 1, None
    cases["10 bits, 4 nonzeros"] = (Codebook.fit((150, 700, 150)),), 1, 1, None
    cases["10 bits, 7 nonzeros"] = (Codebook.fit((1, 1, 1)),), 1, 1, None
    cases["paper"] = (Codebook.paper(),), 2, 1, None
    found = {
        name: choose_variant(books, levels, columns, tokens, activation, limit)
        for name, (books, levels, tokens, activation) in cases.items()
    }
    return {name: variant for name, variant in found.items() if variant is not None}


def loops(cubin: bytes, name: str, capability: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the numbers of the first and last instruction of each loop of a kernel: what a branch back spans.

    Parameters
    ----------
    cubin : bytes
        Machine code, for 8.0 to 9.0.
    name : str
        The kernel's, as `launch.entry_name` returns it.
    capability : (int, int)
        That it was made for.
    """
    found = []
    for place, word in enumerate(machine_words(cubin, name)):
        if word & _OPCODE == _BRANCH:
            begin = place + 1 + _distance(word, capability) // INSTRUCTION_BYTES
            if 0 <= begin < place:
                found.append((begin, place))
    return found


def machine_words(cubin: bytes, name: str) -> list[int]:
    """Return a kernel's instructions, 128 bits each."""
    code = section(cubin, f".text.{name}")
    return [int.from_bytes(code[i : i + INSTRUCTION_BYTES], "little") for i in range(0, len(code), INSTRUCTION_BYTES)]


def is_wide_load(word: int) -> bool:
    """Return whether an instruction loads 128 bits from global memory."""
    return word & _OPCODE == _LOAD_GLOBAL and word >> _WIDTH_PLACE & 7 == _WIDTH_128


def is_shared_load(word: int) -> bool:
    """Return whether an instruction loads from shared memory."""
    return word & _OPCODE == _LOAD_SHARED


def row_loops(cubin: bytes, name: str, capability: tuple[int, int]) -> Loops:
    """Return the instructions of a one-matrix kernel's loops.

    The loop over packets loads one and has no loop inside; the other one that loads packets, for activations that are
    not finite, walks columns inside and counts for nothing.
    """
    words, found = machine_words(cubin, name), loops(cubin, name, capability)

    def inside(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and other[0] <= one[0] and one[1] <= other[1]

    def size(loop: tuple[int, int]) -> int:
        return loop[1] - loop[0] + 1

    walks = [loop for loop in found if sum(map(is_wide_load, words[loop[0] : loop[1] + 1])) == 1]
    packets = [loop for loop in walks if not any(inside(each, loop) for each in found)]
    assert len(packets) == 1, f"{name} has {len(packets)} loops over packets; expected one"
    (first, last) = packets[0]
    row = min((loop for loop in found if all(inside(each, loop) for each in walks)), key=size)
    shared = sum(map(is_shared_load, words[first : last + 1]))
    return Loops(last - first + 1, shared, size(row) - sum(map(size, walks)))


def per_weight(of: Loops, codebook: Codebook, columns: int) -> tuple[float, float]:
    """Return the warp instructions a weight of a matrix with many rows, and the loads from shared memory among them.

    What a row costs besides its packets is counted, and a lane without a packet in its last turn as if it had one.

    Parameters
    ----------
    of : Loops
        What `row_loops` returned.
    codebook : Codebook
        Its mean codeword is taken.
    columns : int
        Of a row.
    """
    return spread(of, packet_weights(codebook), columns)


def spread(of: Loops, weights_each: float, columns: int) -> tuple[float, float]:
    """As `per_weight`, of packets that hold so many weights on average."""
    packets = columns / weights_each
    lanes = choose_lanes(packets, MANY_ROWS, 1)
    times, share = turns(packets, lanes), lanes / WARP / columns
    return (times * of.packet + of.row) * share, times * of.shared * share


def packet_weights(codebook: Codebook) -> float:
    """Return how many weights a packet holds on average."""
    return codewords_each(codebook.bits) * codebook.bits / codebook.expected_bits_per_weight()


def _distance(word: int, capability: tuple[int, int]) -> int:
    """Return how many bytes behind the next instruction a branch leads to."""
    high = word >> 34 & (1 << 48) - 1
    high -= (high & 1 << 47) << 1
    return 4 * (high if capability < (9, 0) else high << 8 | word >> 16 & 0xFF)


def section(cubin: bytes, name: str) -> bytes:
    """Return a section of an ELF file."""
    offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if cubin[start : cubin.index(b"\0", start)].decode() == name:
            return cubin[header[4] : header[4] + header[5]]
    raise KeyError(name)
