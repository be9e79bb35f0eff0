"""Growing the trees of a dictionary for independent digits: where is one codeword more worth most?

A tree begins as its first digits. A node of kind t may be continued by the digits nearer to zero than t; taking it to a
larger kind adds the nodes of the digits between, which is worth the digits that a codeword then stands for on average,
and changes how the string may end: the kind of the last string bounds the next digit from below, so every kind has a
value of its own, from the chain of kinds. The extension worth most per codeword is made first, until the codewords run
out; prices of the classes' codewords are moved until each class uses its share. All of it is repeated until values,
prices and trees agree. Everything is done in one order, equal worths by the node's number: the same trees everywhere
that float64 is the same. A file holds the trees themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from qmoe_lite.coding.chain import follow_chain
from qmoe_lite.coding.inlined import inlined

_HARD = 4  # last rounds, in which no class may exceed its share; the best one is kept
_RAREST = 1e-6  # how often at least a string ends in a kind
_LEAST_COST = 0.05  # of an extension, in codewords: where prices make one nearly free


@inlined(error_model="numpy")
def _sift_up(keys: NDArray[np.float64], items: NDArray[np.int64], last: int, key: float, item: int) -> None:
    """Put an item into a heap of `last` items; the largest key comes first, then the smallest item."""
    i = last
    while i > 0:
        above = (i - 1) >> 1
        if keys[above] > key or (keys[above] == key and items[above] < item):
            break
        keys[i] = keys[above]
        items[i] = items[above]
        i = above
    keys[i] = key
    items[i] = item


@inlined(error_model="numpy")
def _remove_first(keys: NDArray[np.float64], items: NDArray[np.int64], n: int) -> None:
    """Take the first of n items out of a heap."""
    key, item = keys[n - 1], items[n - 1]
    i = 0
    while True:
        below = 2 * i + 1
        if below >= n - 1:
            break
        right = below + 1
        if right < n - 1 and (
            keys[right] > keys[below] or (keys[right] == keys[below] and items[right] < items[below])
        ):
            below = right
        if key > keys[below] or (key == keys[below] and item < items[below]):
            break
        keys[i] = keys[below]
        items[i] = items[below]
        i = below
    keys[i] = key
    items[i] = item


@inlined(error_model="numpy")
def _rank_extensions(
    cumulated: NDArray[np.float64],
    values: NDArray[np.float64],
    prices: NDArray[np.float64],
    classes: NDArray[np.int64],
) -> Any:
    """Order the larger kinds that a node of each kind could be taken to.

    Returns
    -------
    order : int64 array, shape (K + 1, K + 2)
        Larger kinds, best first; then -1.
    worth : float64 array, shape (K + 1, K + 2)
        Digits gained per codeword and unit of the node's probability.
    """
    clip = len(values) - 2
    order = np.full((clip + 1, clip + 2), -1, dtype=np.int64)
    worth = np.zeros((clip + 1, clip + 2))
    for t in range(clip + 1):
        n = 0
        for u in range(t + 1, clip + 2):
            gain = cumulated[u] - cumulated[t] + values[u] - values[t]
            if gain <= 0.0:
                continue
            nodes = 2 * (u - t) - (1 if t == 0 else 0)
            cost = prices[0] * nodes - prices[classes[t]]
            if u <= clip:
                cost += prices[classes[u]]
            ratio = gain / max(cost, _LEAST_COST)
            i = n
            while i > 0 and worth[t, i - 1] < ratio:
                worth[t, i] = worth[t, i - 1]
                order[t, i] = order[t, i - 1]
                i -= 1
            worth[t, i] = ratio
            order[t, i] = u
            n += 1
    return order, worth


@inlined(error_model="numpy")
def _next_fitting(
    order: NDArray[np.int64],
    classes: NDArray[np.int64],
    kind: int,
    rank: int,
    left: int,
    left_0: int,
    zeros_only: bool,
) -> int:
    """Return the rank, from `rank` on, of the first larger kind whose codewords are left, of class 0 too; or -1.

    A node behind whose digits only zeros may follow, `zeros_only`, is taken from kind 0 to kind 1 alone.
    """
    clip = len(order) - 1
    while rank < order.shape[1] and order[kind, rank] >= 0:
        u = order[kind, rank]
        new = 2 * (u - kind) - (1 if kind == 0 else 0)
        kept = 1 if u <= clip else 0
        of_0 = new - (1 if classes[kind] == 0 else 0) + (1 if kept and classes[u] == 0 else 0)
        if new - 1 + kept <= left and (of_0 <= 0 or of_0 <= left_0) and (u == 1 or not zeros_only):
            return rank
        rank += 1
    return -1


@inlined(error_model="numpy")
def _grow_tree(
    first: NDArray[np.float64],
    lowest: int,
    single: NDArray[np.float64],
    order: NDArray[np.int64],
    worth: NDArray[np.float64],
    classes: NDArray[np.int64],
    quotas: NDArray[np.int64],
    hard: bool,
    longest: int,
    head: int,
    nodes: NDArray[np.int64],
    mass: NDArray[np.float64],
    counts: NDArray[np.int64],
) -> int:
    """Grow one tree from the first digits of at least `lowest`, whose probabilities are `first`.

    Behind `head` digits a string goes on with zeros only. `nodes` (parent or -1, digit, depth, kind; columns), `mass`
    and `counts` (codewords of each class) are modified.
    Returns the number of nodes.
    """
    clip = len(single) - 1
    total = quotas.sum()
    room = len(mass)
    keys = np.empty(room)
    items = np.empty(room, dtype=np.int64)
    waiting = 0
    n = 0
    for c in range(len(counts)):
        counts[c] = 0
    for size in range(lowest, clip + 1):
        for sign in range(1 if size == 0 else 2):
            nodes[n, 0] = -1
            nodes[n, 1] = size if sign else -size
            nodes[n, 2] = 1
            nodes[n, 3] = 0
            mass[n] = first[size]
            if order[0, 0] >= 0 and longest > 1:
                _sift_up(keys, items, waiting, mass[n] * worth[0, 0], n * 64)
                waiting += 1
            n += 1
    counts[0] = used = n
    while waiting > 0 and used < total:  # any extension takes a codeword more
        item = items[0]
        _remove_first(keys, items, waiting)
        waiting -= 1
        node, rank = item // 64, item % 64
        t = nodes[node, 3]
        left, left_0 = total - used, quotas[0] - counts[0] if hard else total
        zeros_only = nodes[node, 2] >= head
        chosen = _next_fitting(order, classes, t, rank, left, left_0, zeros_only)
        u = order[t, rank]
        after = classes[u] if u <= clip else 0
        if chosen == rank and hard and after > 0 and after != classes[t] and counts[after] >= quotas[after]:
            chosen = _next_fitting(order, classes, t, rank + 1, left, left_0, zeros_only)
        if chosen != rank:  # the ranks between would not fit later either: codewords of class 0 only become fewer
            if chosen >= 0:
                _sift_up(keys, items, waiting, mass[node] * worth[t, chosen], node * 64 + chosen)
                waiting += 1
            continue
        new = 2 * (u - t) - (1 if t == 0 else 0)
        used += new - 1
        counts[0] += new
        counts[classes[t]] -= 1
        if u <= clip:
            used += 1
            counts[after] += 1
        nodes[node, 3] = u
        depth = nodes[node, 2] + 1
        for size in range(t, u):
            for sign in range(1 if size == 0 else 2):
                nodes[n, 0] = node
                nodes[n, 1] = size if sign else -size
                nodes[n, 2] = depth
                nodes[n, 3] = 0
                mass[n] = mass[node] * single[size]
                if depth < longest and order[0, 0] >= 0:
                    _sift_up(keys, items, waiting, mass[n] * worth[0, 0], n * 64)
                    waiting += 1
                n += 1
        if u <= clip and order[u, 0] >= 0:
            _sift_up(keys, items, waiting, mass[node] * worth[u, 0], node * 64)
            waiting += 1
    return n


@inlined(error_model="numpy")
def _preorder(nodes: NDArray[np.int64], n: int, clip: int, kinds: NDArray[np.uint8]) -> None:
    """Write the kinds of n nodes in preorder, children in the order 0, -1, +1, -2, .."""
    width = 2 * clip + 1
    child = np.full((n + 1, width), -1, dtype=np.int64)
    for i in range(n):
        digit = nodes[i, 1]
        rank = 2 * abs(digit) - (1 if digit < 0 else 0)
        child[nodes[i, 0] + 1, rank] = i
    stack = np.empty(n + width, dtype=np.int64)
    stack[0] = -1
    depth, place = 1, 0
    while depth > 0:
        depth -= 1
        node = stack[depth]
        if node >= 0:
            kinds[place] = nodes[node, 3]
            place += 1
        for rank in range(width - 1, -1, -1):
            if child[node + 1, rank] >= 0:
                stack[depth] = child[node + 1, rank]
                depth += 1


@njit(cache=True, error_model="numpy")
def grow_trees(
    single: NDArray[np.float64],
    starts: NDArray[np.int64],
    quotas: NDArray[np.int64],
    longest: int,
    head: int,
    rounds: int,
    start: float,
) -> tuple[float, NDArray[np.uint8]]:
    """Grow the trees for independent digits.

    Parameters
    ----------
    single : float64 array, shape (K + 1,)
        Probability of the digit 0, and of one digit of each size up to K: +1, +2 and so on. None may be 0.
    starts : int64 array, shape (classes,)
        Smallest kind of each class, ascending from 0.
    quotas : int64 array, shape (classes,)
        Codewords of each class.
    longest : int
        Digits of the longest string.
    head : int
        Digits of a string behind which all are zeros.
    rounds : int
        In which prices settle, before the last few that keep to the quotas.
    start : float
        Price of a codeword of another class than 0, and what ending in kind 1 loses, at first: where it all settles
        depends on it, by up to 2% of the bits.

    Returns
    -------
    digits : float
        That a codeword stands for, on average.
    kinds : uint8 array
        Of the trees' nodes in preorder, one tree after another.
    """
    clip = len(single) - 1
    trees = len(starts)
    total = quotas.sum()
    room = 2 * total + 4 * clip + 4
    cumulated = np.zeros(clip + 2)
    for t in range(clip + 1):
        cumulated[t + 1] = cumulated[t] + single[t] * (1 if t == 0 else 2)
    classes = np.zeros(clip + 1, dtype=np.int64)
    for t in range(clip + 1):
        for c in range(1, trees):
            classes[t] += 1 if t >= starts[c] else 0
    prices = np.full((trees, trees), start)
    for c in range(trees):
        prices[c, 0] = 1.0
    worths = np.zeros(clip + 1)
    for t in range(1, clip + 1):
        worths[t] = -start * (t + 2) / 3
    arriving = np.full(clip + 1, 1.0 / (clip + 1))
    nodes = np.empty((trees, room, 4), dtype=np.int64)
    mass = np.empty((trees, room))
    top = np.empty(room, dtype=np.int64)
    counts = np.zeros((trees, trees), dtype=np.int64)
    sizes = np.zeros(trees, dtype=np.int64)
    best = 0.0
    best_kinds = np.zeros(0, dtype=np.uint8)
    values = np.zeros(clip + 2)
    for turn in range(rounds + _HARD):
        hard = turn >= rounds
        for t in range(clip + 1):
            values[t] = (1.0 - cumulated[t]) * worths[t]
        first = np.zeros((trees, clip + 1))
        gained = np.zeros((trees, clip + 1))
        ends = np.zeros((trees, clip + 1, clip + 1))
        for t in range(clip + 1):
            for size in range(t, clip + 1):
                first[classes[t], size] += max(arriving[t], _RAREST) * single[size] / (1.0 - cumulated[t])
        for c in range(trees):
            weight = 0.0
            for size in range(starts[c], clip + 1):
                weight += first[c, size] * (1 if size == 0 else 2)
            for size in range(clip + 1):
                first[c, size] /= weight
            order, worth = _rank_extensions(cumulated, values, prices[c], classes)
            n = _grow_tree(
                first[c],
                starts[c],
                single,
                order,
                worth,
                classes,
                quotas,
                hard,
                longest,
                head,
                nodes[c],
                mass[c],
                counts[c],
            )
            sizes[c] = n
            for i in range(n):
                top[i] = abs(nodes[c, i, 1]) if nodes[c, i, 0] < 0 else top[nodes[c, i, 0]]
                portion = mass[c, i] / (first[c, top[i]] * (1 if top[i] == 0 else 2))
                gained[c, top[i]] += portion
                t = nodes[c, i, 3]
                if t <= clip:
                    ends[c, top[i], t] += portion * (1.0 - cumulated[t])
            if not hard:
                spent = 0.0
                for k in range(trees):
                    prices[c, k] *= min(max(counts[c, k] / quotas[k], 0.25), 4.0) ** 0.5
                    spent += prices[c, k] * quotas[k] / total
                for k in range(trees):
                    prices[c, k] /= spent
        digits, settled = follow_chain(single, classes, gained, ends, arriving)
        for t in range(clip + 1):
            worths[t] = 0.6 * worths[t] + 0.4 * settled[t]
        if hard and digits > best:
            best = digits
            best_kinds = np.empty(sizes.sum(), dtype=np.uint8)
            place = 0
            for c in range(trees):
                _preorder(nodes[c], sizes[c], clip, best_kinds[place : place + sizes[c]])
                place += sizes[c]
    return best, best_kinds
