"""Inputs and comparisons that several test files share."""

from __future__ import annotations

import numpy as np


def draw_digits(rng, shares, shape):
    """Independent digits, int8: -1, 0, +1 where there are three shares, 0 to 3 where there are four."""
    shares = np.asarray(shares, dtype=float)
    lowest = -1 if len(shares) == 3 else 0
    return (rng.choice(len(shares), size=shape, p=shares / shares.sum()) + lowest).astype(np.int8)


def naive_packets(packed):
    """Words (packets, 4) and row starts by the format's description, one codeword after another."""
    book, bits = packed.codebook, packed.codebook.bits
    stream = int.from_bytes(packed.codes.numpy().tobytes(), "little")
    lengths = [int(entry) & 255 for entry in book.table]
    shortest = min(range(len(lengths)), key=lambda code: (lengths[code] == 0, lengths[code]))
    words, starts, at = [], [0], 0
    for count in packed.count_codewords().tolist():
        codes = [stream >> bits * (at + i) & (1 << bits) - 1 for i in range(count)]
        at += count
        column, each = 0, 112 // bits
        codes += [shortest] * (-count % each)
        for first in range(0, len(codes), each):
            own = codes[first : first + each]
            packet = column + sum(code << 16 + bits * i for i, code in enumerate(own))
            words.append([packet >> 32 * i & 0xFFFFFFFF for i in range(4)])
            column += sum(lengths[code] for code in own)
        starts.append(len(words))
    return words, starts


def run_experts(first, last, activation, x, index, weights):
    """Send tokens through all experts of a layer on a GPU in one turn; None where shared memory is too small."""
    from qmoe_lite.cuda.experts import ExpertsCall

    call = ExpertsCall(first, last, activation, x, index, weights, last.experts)
    if not call.fits:
        return None
    call.gather()
    return call.total()
