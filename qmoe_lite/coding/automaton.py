"""The encoder's automaton, made of a code's digit strings: one step a digit, or from nonzero to nonzero."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.coding.alphabet import ALPHABETS


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
    zero = bytes([ALPHABETS[digits].zero_symbol])
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


class SplitTree:
    """The automata of one Tunstall tree at any size, for counting codewords: their codes are all 0.

    Parameters
    ----------
    splits : list of bytes
        The strings that the tree replaces by their extensions, in order.
    digits : int
        Size of the alphabet.
    """

    def __init__(self, splits: list[bytes], digits: int) -> None:
        self._digits = digits
        places = {string: place for place, string in enumerate(splits)}
        symbols, zero = [bytes([symbol]) for symbol in range(digits)], bytes([ALPHABETS[digits].zero_symbol])
        self._extensions = np.array([[places.get(s + symbol, len(splits)) for symbol in symbols] for s in splits])
        # states are numbered so that a zero leads to the next one
        heads, lengths = [places[string.rstrip(zero)] for string in splits], [len(string) for string in splits]
        self._order = np.lexsort((lengths, heads))

    def steps(self, size: int) -> Steps:
        """Return the automaton of the tree's first so many splits as the CPU's encoder walks it."""
        size = min(size, len(self._order))
        order = self._order[self._order < size]
        state_of = np.zeros(len(self._order) + 1, dtype=np.int32)
        state_of[order] = np.arange(len(order)) * self._digits
        extensions = self._extensions[order]
        ends = extensions >= size
        next_state, emitted = np.where(ends, 0, state_of[extensions]), np.where(ends, 0, -1)
        return walk_steps(Automaton(next_state, emitted, np.zeros(ends.size, dtype=np.int32)), self._digits)


def walk_steps(automaton: Automaton, digits: int) -> Steps:
    """Put what a step of the CPU's walk needs into one word each; see `Steps`."""
    zero = ALPHABETS[digits].zero_symbol
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
