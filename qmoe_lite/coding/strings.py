"""The digit strings that codewords stand for, and what is made of them: table entries and the encoder's automaton.

A digit string is `bytes` of symbols (symbol = rank of the digit: -1, 0, +1 or 0, 1, 2, 3); a code is its place in a
tuple. Two ways to choose the strings: a Tunstall code, whose strings are the leaves of a tree, and the dictionary of
QMoE (arXiv:2310.16795), which holds inner nodes too and needs the longest match.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_WEIGHTS = {3: 84, 4: 63}  # per codeword, so that digits * position + slot fits a byte
MAX_NONZEROS = 7  # per codeword, so that an entry fits its uint64
ZERO_SYMBOL = {3: 1, 4: 0}
PAPER_COUNTS, PAPER_BITS, PAPER_PAIRS = (115, 1770, 115), 16, 14  # P(0) = 0.885; at most 14 pairs a codeword
_SLOT_OF_SYMBOL = {3: (1, 2, 0), 4: (3, 0, 1, 2)}


class Automaton(NamedTuple):
    """The encoder's state machine: one step a digit, longest match first.

    Attributes
    ----------
    next_state : int32 array, shape (states * digits,)
        State after `state + symbol`; states are multiples of `digits`, the start is 0. A zero that completes no
        codeword leads to the state that comes next in number.
    emitted : int32 array, shape (states * digits,)
        Code that this step completes, or -1.
    tail_code : int32 array, shape (states * digits,)
        At `state`: lowest code whose string begins with what is pending at the row's end; -1 where nothing is.
    """

    next_state: NDArray[np.int32]
    emitted: NDArray[np.int32]
    tail_code: NDArray[np.int32]


class Steps(NamedTuple):
    """The automaton as the CPU walks it: zeros that complete no codeword are passed all at once.

    Attributes
    ----------
    entries : uint64 array, shape (states * 4,)
        Of `state + (digit & 3)`, states being multiples of 4: bits 0 to 15 are the code that is completed, bits 16 to
        23 eight times the zeros (7 at most) that complete none in the next state, bit 24 is 1 if a code is completed,
        bits 32 up are the next state.
    tails : uint16 array, shape (states,)
        As `Automaton.tail_code`; 0 at the start, where nothing is pending.
    """

    entries: NDArray[np.uint64]
    tails: NDArray[np.uint16]


def tunstall_strings(counts: tuple[int, ...], bits: int) -> tuple[bytes, ...]:
    """Leaves of the Tunstall tree in lexicographic order; see `Codebook.fit`."""
    shares = [max(count, 1) for count in counts]
    digits, total = len(counts), sum(shares)
    deepest, zero = MAX_WEIGHTS[digits], ZERO_SYMBOL[digits]
    # a leaf's weight = its probability times total**deepest: an exact integer, so order never depends on rounding
    heap: list[tuple[int, int, bytes]] = [(-(total**deepest), 0, b"")]
    finished: list[bytes] = []
    while heap and len(heap) + len(finished) + digits - 1 <= 1 << bits:
        weight, length, string = heapq.heappop(heap)
        if length == deepest or length - string.count(zero) == MAX_NONZEROS:
            finished.append(string)
            continue
        for symbol, share in enumerate(shares):
            heapq.heappush(heap, (weight // total * share, length + 1, string + bytes([symbol])))
    return tuple(sorted(finished + [string for _, _, string in heap]))


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


def table_entry(string: bytes, digits: int) -> int:
    """Table entry of a digit string; see `Codebook.table`."""
    zero, slots = ZERO_SYMBOL[digits], _SLOT_OF_SYMBOL[digits]
    fields = [digits * i + slots[symbol] for i, symbol in enumerate(string) if symbol != zero]
    fields += [digits - 1] * (MAX_NONZEROS - len(fields))
    return int.from_bytes(bytes([len(string), *fields]), "little")


def build_automaton(strings: tuple[bytes, ...], digits: int) -> Automaton:
    """State machine of a code: its states are what is pending, the proper prefixes of the strings.

    Where no string goes on, the longest string within what is pending is emitted and the rest stays pending; that
    happens in the paper's dictionary only. One code a step suffices there: where a pair beginning with some digit goes
    on, the pair of that digit and zero, the likeliest, does too.
    """
    codes = {string: code for code, string in enumerate(strings)}
    tails = {b"": -1}
    for code, string in enumerate(strings):
        for end in range(len(string) - 1, 0, -1):
            prefix = string[:end]
            if prefix in tails:
                break
            tails[prefix] = codes.get(prefix, code)
    zero = bytes([ZERO_SYMBOL[digits]])
    states: dict[bytes, int] = {}
    for string in (string for string in tails if string[-1:] != zero):
        while string in tails:
            states[string] = digits * len(states)
            string += zero
    next_state, emitted, tail_code = (np.full(digits * len(states), -1, dtype=np.int32) for _ in range(3))
    tail_code[::digits] = [tails[string] for string in states]
    for pending, state in states.items():
        for symbol in range(digits):
            string = pending + bytes([symbol])
            if string in states:
                next_state[state + symbol] = states[string]
            elif string in codes:
                emitted[state + symbol], next_state[state + symbol] = codes[string], 0
            else:
                end = next(end for end in range(len(pending), 0, -1) if pending[:end] in codes)
                emitted[state + symbol], next_state[state + symbol] = codes[pending[:end]], states[string[end:]]
    return Automaton(next_state, emitted, tail_code)


def walk_steps(automaton: Automaton, digits: int) -> Steps:
    """Put what a step of the CPU's walk needs into one word each; see `Steps`."""
    zero = ZERO_SYMBOL[digits]
    emitted = automaton.emitted.reshape(-1, digits).astype(np.int64)
    following = automaton.next_state.reshape(-1, digits).astype(np.int64) // digits
    ends = np.flatnonzero(emitted[:, zero] >= 0)
    states = np.arange(len(emitted))
    zeros = np.minimum(ends[np.searchsorted(ends, states)] - states, 7)
    entries = np.zeros((len(emitted), 4), dtype=np.uint64)
    entries[:, np.arange(-zero, digits - zero)] = (  # -1 is the last column, as -1 & 3 is 3
        emitted.clip(0) | zeros[following] << 19 | (emitted >= 0).astype(np.int64) << 24 | following << 34
    )
    return Steps(entries.ravel(), automaton.tail_code[::digits].clip(0).astype(np.uint16))
