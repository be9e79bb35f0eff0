"""A dictionary's trees of digit strings: read from the kinds of their nodes, and laid out for the kernels.

A node of kind t may be continued by the digits nearer to zero than t; its string is a codeword unless t is K + 1, every
digit. Children stand in the order 0, -1, +1, -2, ..: the rank of a digit. A class is a range of kinds; a string of
class c is followed by one of tree c, whose first digits are those at least as large as the class's smallest kind.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

MOST_DIGITS = 32  # of a string: what a table's row holds
FAULTS = {
    1: "they end early",
    2: "a node has a kind that there is not",
    3: "a string is too long",
    4: "a class has more codewords than numbers",
    5: "there is data behind them",
}


class Trees(NamedTuple):
    """Nodes of all trees, children of a node side by side; first come the trees' first digits.

    Attributes
    ----------
    kinds, numbers, lengths, trees, first_children : int32 arrays, shape (N,)
        A node's kind, its codeword or -1, digits of its string, its tree, its first child.
    strings : int8 array, shape (N, 32)
        Digits, zeros behind.
    roots : int32 array, shape (classes,)
        Node of the digit of rank 0 below each tree's root, were there one.
    """

    kinds: NDArray[np.int32]
    numbers: NDArray[np.int32]
    lengths: NDArray[np.int32]
    trees: NDArray[np.int32]
    first_children: NDArray[np.int32]
    strings: NDArray[np.int8]
    roots: NDArray[np.int32]


def read_trees(
    kinds: NDArray[np.uint8], clip: int, longest: int, starts: NDArray[np.int64], quotas: NDArray[np.int64]
) -> tuple[int, Trees]:
    """Read trees from the kinds of their nodes in preorder; safe on any bytes.

    Parameters
    ----------
    kinds : uint8 array
        One a node.
    clip : int
        K: digits are -K to K.
    longest : int
        Digits of the longest string, at most 32.
    starts : int64 array, shape (classes,)
        Smallest kind of each class, ascending from 0, at most K.
    quotas : int64 array, shape (classes,)
        Codewords of each class; those of a class are numbered one after another, a tree's own in preorder.

    Returns
    -------
    fault : int
        A key of FAULTS or 0.
    trees : Trees
        Of no meaning beside a fault.
    """
    n = len(kinds)
    columns = np.zeros((5, n), dtype=np.int32)
    strings = np.zeros((n, MOST_DIGITS), dtype=np.int8)
    roots = np.zeros(len(starts), dtype=np.int32)
    fault = _read_kernel(kinds, clip, longest, starts, quotas, columns, strings, roots)
    own, numbers, lengths, trees, first_children = columns
    return int(fault), Trees(own, numbers, lengths, trees, first_children, strings, roots)


@njit(cache=True, error_model="numpy")
def _read_kernel(
    kinds: NDArray[np.uint8],
    clip: int,
    longest: int,
    starts: NDArray[np.int64],
    quotas: NDArray[np.int64],
    columns: NDArray[np.int32],
    strings: NDArray[np.int8],
    roots: NDArray[np.int32],
) -> int:
    """Fill what `read_trees` returns; a node takes its place when its parent is read, so a forged kind finds none."""
    n = len(kinds)
    own, numbers, lengths, trees, first_children = columns[0], columns[1], columns[2], columns[3], columns[4]
    numbers[:] = -1
    free = 0
    for c in range(len(starts)):
        skipped = 2 * starts[c] - 1 if starts[c] > 0 else 0
        roots[c] = free - skipped
        free += 2 * clip + 1 - skipped
    if free > n:
        return 1
    waiting = np.empty(n, dtype=np.int64)
    place = 0
    for c in range(len(starts)):
        used = np.zeros(len(quotas), dtype=np.int64)
        depth = 0
        for rank in range(2 * clip, (2 * starts[c] - 1 if starts[c] > 0 else 0) - 1, -1):
            node = roots[c] + rank
            strings[node, 0] = (rank + 1) // 2 if rank % 2 == 0 else -((rank + 1) // 2)
            lengths[node] = 1
            waiting[depth] = node
            depth += 1
        while depth > 0:
            depth -= 1
            node = waiting[depth]
            kind = np.int64(kinds[place])
            place += 1
            if kind > clip + 1:
                return 2
            if kind > 0 and lengths[node] >= longest:
                return 3
            own[node] = kind
            trees[node] = c
            if kind <= clip:
                own_class, below = 0, 0
                for k in range(1, len(starts)):
                    if kind >= starts[k]:
                        own_class = k
                        below += int(quotas[k - 1])
                if used[own_class] >= quotas[own_class]:
                    return 4
                numbers[node] = below + used[own_class]
                used[own_class] += 1
            children = int(2 * kind - 1) if kind > 0 else 0
            if free + children > n:
                return 1
            first_children[node] = free
            for rank in range(children - 1, -1, -1):
                child = free + rank
                strings[child] = strings[node]
                strings[child, lengths[node]] = (rank + 1) // 2 if rank % 2 == 0 else -((rank + 1) // 2)
                lengths[child] = lengths[node] + 1
                waiting[depth] = child
                depth += 1
            free += children
    return 0 if place == n else 5


def window_tables(
    trees: Trees, bits: int, width: int, quarters: tuple[int, ...]
) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Lay the strings out by window: a codeword above the two top bits of the one before it, which tell the tree.

    Returns
    -------
    digits : int8 array, shape (4 * 2**bits, width)
        Zeros behind a string, and where a window occurs in no stream.
    lengths : uint8 array, shape (4 * 2**bits,)
        Digits of the string; 0 where a window occurs in no stream.
    """
    digits = np.zeros((4 << bits, width), dtype=np.int8)
    lengths = np.zeros(4 << bits, dtype=np.uint8)
    tree_before = np.repeat(np.arange(len(quarters)), quarters)
    for top in range(4):
        nodes = np.flatnonzero((trees.numbers >= 0) & (trees.trees == tree_before[top]))
        windows = trees.numbers[nodes] << 2 | top
        digits[windows] = trees.strings[nodes, :width]
        lengths[windows] = trees.lengths[nodes]
    return digits, lengths


def encoder_entries(
    trees: Trees, clip: int, starts: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
    """Lay the nodes out for the encoder; the last one stands for a row's begin.

    Returns
    -------
    entries : uint64 array, shape (N + 1,)
        Bits 0 to 15: first child. 16 to 23: number of children. 24 to 39: codeword. 40 to 55: the node that a digit of
        rank 0 would lead to after this codeword. A digit of a rank below the number of children leads to first child +
        rank; any other ends the string and leads to the last field + rank.
    tails : uint16 array, shape (N + 1,)
        Codeword of class 0 whose string begins with the node's: what ends a row there.
    """
    n = len(trees.kinds)
    following = trees.roots[np.searchsorted(starts, trees.kinds, side="right") - 1].astype(np.uint64)
    children = np.maximum(2 * trees.kinds - 1, 0).astype(np.uint64)
    entries = np.zeros(n + 1, dtype=np.uint64)
    entries[:n] = (
        trees.first_children.astype(np.uint64)
        | children << np.uint64(16)
        | np.maximum(trees.numbers, 0).astype(np.uint64) << np.uint64(24)
        | following << np.uint64(40)
    )
    entries[n] = (2 * clip + 1) << 16
    ends = np.arange(n)
    last_of_class_0 = starts[1] - 1 if len(starts) > 1 else clip
    while (inner := trees.kinds[ends] > last_of_class_0).any():  # a child is no longer than the longest string
        ends = np.where(inner, trees.first_children[ends], ends)
    return entries, np.append(trees.numbers[ends], 0).astype(np.uint16)
