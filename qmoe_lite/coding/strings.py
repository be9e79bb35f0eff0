"""The digit strings that codewords stand for, and their table entries.

A digit string is `bytes` of symbols (symbol = rank of the digit: -1, 0, +1 or 0, 1, 2, 3); a code is its place in a
tuple. Two ways to choose the strings: a Tunstall code, whose strings are the leaves of a tree, and the dictionary of
QMoE (arXiv:2310.16795), which holds inner nodes too and needs the longest match.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.coding.alphabet import ALPHABETS

MAX_NONZEROS = 7  # per codeword, so that an entry fits its uint64
PAPER_COUNTS, PAPER_BITS, PAPER_PAIRS = (115, 1770, 115), 16, 14  # P(0) = 0.885; at most 14 pairs a codeword


def tunstall_splits(counts: tuple[int, ...], bits: int) -> list[bytes]:
    """Return the strings that a Tunstall tree for codewords of so many bits replaces by their extensions, in order.

    The tree for fewer bits replaces the first of them; see `split_count`.
    """
    shares = [max(count, 1) for count in counts]
    digits, total, most = len(counts), sum(shares), split_count(len(counts), bits)
    deepest, zero = ALPHABETS[digits].longest, ALPHABETS[digits].zero_symbol
    # a leaf's weight = its probability times total**deepest: an exact integer, so order never depends on rounding.
    # An extension weighs less than what it extends: when a weight's turn comes, all strings of that weight are there.
    first = (-(total**deepest), 0)
    heap, groups = [first], {first: [b""]}
    splits = list[bytes]()
    while heap and len(splits) < most:
        weight, length = heapq.heappop(heap)
        strings = groups.pop((weight, length))
        if length == deepest:
            continue
        strings = [string for string in strings if length - string.count(zero) < MAX_NONZEROS]
        strings = sorted(strings)[: most - len(splits)]
        splits += strings
        for symbol, share in enumerate(shares if strings else ()):
            key = (weight // total * share, length + 1)
            if key not in groups:
                groups[key] = []
                heapq.heappush(heap, key)
            last = bytes([symbol])
            groups[key] += [string + last for string in strings]
    return splits


def split_count(digits: int, bits: int) -> int:
    """Return how many strings a Tunstall tree can replace: each by `digits` others, one of which has its codeword."""
    return ((1 << bits) - 1) // (digits - 1)


def tunstall_strings(counts: tuple[int, ...], bits: int) -> tuple[bytes, ...]:
    """Leaves of the Tunstall tree in lexicographic order; see `Codebook.fit`."""
    splits = tunstall_splits(counts, bits)
    extended = (string + bytes([symbol]) for string in splits for symbol in range(len(counts)))
    return tuple(sorted(set(extended).difference(splits)))


def paper_strings() -> tuple[bytes, ...]:
    """The 65,536 strings of the paper's dictionary in the published order; see `Codebook.paper`.

    The published heap pops the most probable sequence, ties by the list of pairs. An extension is less probable than
    what it extends, so its pops are all sequences sorted so, and a level of extensions can be made at once.
    """
    size = 1 << PAPER_BITS
    digit_shares = np.array([0.885, (1 - 0.885) / 2, (1 - 0.885) / 2])  # zero, -1, +1, to the last bit
    pairs = np.arange(9)  # first digit + 3 * second digit
    pair_shares = digit_shares[pairs % 3] * digit_shares[pairs // 3]
    # a key has a decimal place for each pair (its value + 1), so that keys sort as lists of pairs do
    shares, keys = np.ones(1), np.zeros(1, dtype=np.int64)
    all_shares, all_keys = shares[:0], keys[:0]
    for depth in range(PAPER_PAIRS):
        shares = (shares[:, None] * pair_shares).ravel()
        keys = (keys[:, None] + (pairs + 1) * 10 ** (PAPER_PAIRS - 1 - depth)).ravel()
        all_shares, all_keys = np.concatenate([all_shares, shares]), np.concatenate([all_keys, keys])
        least = np.sort(all_shares)[-size] if len(all_shares) > size else 0.0
        shares, keys = shares[shares >= least], keys[shares >= least]
    keys = all_keys[np.lexsort((all_keys, -all_shares))[:size]]
    places = keys[:, None] // 10 ** np.arange(PAPER_PAIRS - 1, -1, -1) % 10
    symbols = np.stack([(places - 1) % 3, (places - 1) // 3], axis=2).reshape(size, -1)
    content = np.array([1, 0, 2], dtype=np.uint8)[symbols].tobytes()  # zero, -1, +1 to ranks
    width = symbols.shape[1]
    lengths = 2 * np.count_nonzero(places, axis=1)
    return tuple(content[i * width : i * width + length] for i, length in enumerate(lengths.tolist()))


def mean_length(strings: tuple[bytes, ...], shares: NDArray[np.float64], whole: bool) -> float:
    """Weights of a codeword, on average over a long row of independent digits.

    Parameters
    ----------
    strings : tuple of bytes
        Digit strings by code.
    shares : float64 array, shape (digits,)
        Probability of each symbol.
    whole : bool
        The strings are leaves (Tunstall). Else they are the paper's: pairs, with every prefix among them.

    Notes
    -----
    After a longest match the next pair is no longer free: it does not extend the match. So the first pair of the
    codewords is a Markov chain of nine states, whose stationary distribution weighs the mean lengths.
    """
    digits = len(shares)
    uses = np.array([[string.count(symbol) for symbol in range(digits)] for string in strings])
    reached = np.prod(shares**uses, axis=1)
    if whole:
        return float(reached @ uses.sum(axis=1))
    pair_shares = np.outer(shares, shares).ravel()
    first, last = (np.array([3 * s[i] + s[i + 1] for s in strings]) for i in (0, -2))
    longer = uses.sum(axis=1) > 2
    entered = np.bincount(first, reached, minlength=9)  # pairs that codewords beginning so take, times P(first)
    gone_on = np.zeros((9, 9))
    np.add.at(gone_on, (first[longer], last[longer]), reached[longer])
    scale = np.divide(1.0, pair_shares, out=np.zeros(9), where=pair_shares > 0)
    steps = (np.outer(entered, pair_shares) - gone_on) * scale[:, None]
    equations = np.vstack([steps.T - np.eye(9), np.ones(9)])
    chances = np.linalg.lstsq(equations, np.eye(10)[9], rcond=None)[0]
    return float(2 * chances @ (entered * scale))


def table_entries(strings: tuple[bytes, ...], digits: int) -> NDArray[np.uint64]:
    """Table entries of digit strings, uint64, shape (strings,); see `Codebook.table`."""
    zero, slots = ALPHABETS[digits].zero_symbol, np.array(ALPHABETS[digits].slot_of_symbol)
    lengths = np.array([len(string) for string in strings])
    symbols = np.frombuffer(b"".join(strings), dtype=np.uint8)
    places = np.flatnonzero(symbols != zero)
    owners = np.repeat(np.arange(len(strings)), lengths)[places]
    positions = places - (np.cumsum(lengths) - lengths)[owners]
    # a string's first nonzero goes into byte 1, the next one into byte 2
    counts = np.bincount(owners, minlength=len(strings))
    ranks = np.arange(len(places)) - (np.cumsum(counts) - counts)[owners]
    entries = np.full((len(strings), 1 + MAX_NONZEROS), digits - 1, dtype=np.uint8)
    entries[:, 0] = lengths
    entries[owners, 1 + ranks] = digits * positions + slots[symbols[places]]
    return entries.view("<u8").ravel().astype(np.uint64)
