"""Which clip, classes and longest string serve digits best: a search that looks at each setting for a few rounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.coding.growth import grow_trees

EXCEPTION_BITS = 24  # stored for each exception: 16 of its place, 8 of its value
LARGEST_CLIP = 30
_EXCESS = 127  # what one exception adds at most
_LEAST_CHANCE = 1e-9  # of a size of digit, so that sums of chances keep some precision
# of the longest string, and of the head behind which a string has only zeros; times the fewest bits that are enough:
# one token's product is a third faster with heads of 8 than of 16
_LENGTHS = ((8, 8, 1.005), (16, 8, 1.0125), (16, 16, 1.05), (32, 32, 1.0))
_STARTS = (0.3, 0.05)  # of growth: the better result is taken
_QUICK_ROUNDS, _ROUNDS = 6, 24  # in which prices settle: to compare settings, for the trees themselves

_Shape = tuple[tuple[int, ...], tuple[int, ...]]  # starts and quarters of the classes
_SHAPES: tuple[_Shape, ...] = (  # from few bits to many
    ((0, 1), (1, 3)),
    ((0, 1), (2, 2)),
    ((0, 1, 2), (2, 1, 1)),
    ((0, 1), (3, 1)),
    ((0, 2), (3, 1)),
    ((0, 3), (3, 1)),
    ((0,), (4,)),
)


def fit_trees(
    sizes: NDArray[np.int64], bits: int, clip: int | None, longest: int | None
) -> tuple[int, int, tuple[int, ...], tuple[int, ...], bytes]:
    """Find the trees that take the fewest bits: the classes first, then the clip, then the longest string.

    Parameters
    ----------
    sizes : int64 array, not all zero
        How many digits have the size 0, 1, 2, ..
    bits : int
        Of a codeword.
    clip, longest : int or None
        None: to be found.

    Returns
    -------
    clip, longest, starts, quarters, kinds
        As for `Dictionary`.
    """
    known: dict[tuple[int, _Shape, int, int], float] = {}

    def cost(k: int, shape: _Shape, length: int, head: int) -> float:
        key = k, shape, length, head
        if key not in known:
            known[key] = bits / _grow(sizes, bits, *key, _QUICK_ROUNDS)[0] + exception_bits(sizes, k)
        return known[key]

    length = head = longest or _LENGTHS[-1][0]
    k = clip or _first_clip(sizes)
    shape = min(_shapes(k), key=lambda shape: cost(k, shape, length, head))
    if clip is None:
        most = min(max(len(sizes) - 1, 1), LARGEST_CLIP)
        for direction in (1, -1):
            while 1 <= k + direction <= most and shape in _shapes(k + direction):
                if cost(k + direction, shape, length, head) >= cost(k, shape, length, head):
                    break
                k += direction
    if longest is None:
        fewest = min(cost(k, shape, *each) for *each, _ in _LENGTHS)
        length, head = next((n, few) for n, few, most in _LENGTHS if cost(k, shape, n, few) <= most * fewest)
    _, kinds = _grow(sizes, bits, k, shape, length, head, _ROUNDS)
    return k, length, *shape, kinds.tobytes()


def least_bits(sizes: NDArray[np.int64]) -> float:
    """Return the bits a digit that no trees for such digits go below: the entropy of what is left by exceptions."""
    most = min(max(len(sizes) - 1, 1), LARGEST_CLIP)
    return min(_entropy(digit_chances(sizes, clip)) + exception_bits(sizes, clip) for clip in range(1, most + 1))


def _entropy(single: NDArray[np.float64]) -> float:
    """Return the entropy of a digit, in bits, from the probabilities that `digit_chances` returns."""
    return float(-(np.where(np.arange(len(single)) > 0, 2.0, 1.0) * single) @ np.log2(single))


def _shapes(clip: int) -> list[_Shape]:
    """Return the starts and quarters that are tried: those that were best somewhere from 0.4 to 4 bits."""
    return [(starts, quarters) for starts, quarters in _SHAPES if starts[-1] <= clip]


def _first_clip(sizes: NDArray[np.int64]) -> int:
    """Return the least clip that leaves few exceptions: where the search begins."""
    most = min(max(len(sizes) - 1, 1), LARGEST_CLIP)
    return next((clip for clip in range(1, most) if exception_bits(sizes, clip) < 0.01), most)


def _grow(
    sizes: NDArray[np.int64], bits: int, clip: int, shape: _Shape, longest: int, head: int, rounds: int
) -> tuple[float, NDArray[np.uint8]]:
    """Grow trees: digits a codeword, and the kinds."""
    starts, quarters = shape
    quotas = np.array(quarters) << bits >> 2
    single = digit_chances(sizes, clip)
    grown = [grow_trees(single, np.array(starts), quotas, longest, head, rounds, start) for start in _STARTS]
    return max(grown, key=lambda trees: trees[0])


def digit_chances(sizes: NDArray[np.int64], clip: int) -> NDArray[np.float64]:
    """Return the probability of 0, and of one digit of each size up to the clip, larger ones counted there."""
    counts = np.zeros(clip + 1)
    counts[: min(len(sizes), clip + 1)] = sizes[: clip + 1]
    counts[clip] += sizes[clip + 1 :].sum()
    counts = np.maximum(counts, max(0.5, _LEAST_CHANCE * counts.sum()))
    counts /= counts.sum()
    counts[1:] /= 2
    return counts


def exception_bits(sizes: NDArray[np.int64], clip: int) -> float:
    """Return the bits a digit that exceptions take."""
    excess = np.maximum(np.arange(len(sizes)) - clip, 0)
    return float(EXCEPTION_BITS * (sizes * -(-excess // _EXCESS)).sum() / sizes.sum())
