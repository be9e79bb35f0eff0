"""Slow, obvious references for grid.py, hessian.py and solver.py: float64, one row and one column at a time.

Imports numpy only. GPTQ is written without Cholesky factors, inverses or recursions: before each column is rounded, the
columns left are set to the values that minimise the error, given what was rounded before.
"""

import numpy as np


def ternary_levels(row):
    """Return [low, high]: the row's minimum and maximum, clamped to either side of 0."""
    return [min([0.0, *map(float, row)]), max([0.0, *map(float, row)])]


def round_ternary(value, levels):
    """Return (digit, weight) of one number: strictly beyond half a level that is not 0, that level; else 0."""
    low, high = levels
    if high > 0 and value > high / 2:
        return 1, high
    if low < 0 and value < low / 2:
        return -1, low
    return 0, 0.0


def two_bit_affine(row):
    """Return (scale, zero_point) of the row's four evenly spaced values."""
    low, high = ternary_levels(row)
    scale = (high - low) / 3
    return scale, (round(-low / scale) if scale > 0 else 0)


def round_two_bit(value, affine):
    """Return (digit, weight) of one number: 0 is the zero weight, 1 to 3 the other values ascending."""
    scale, zero_point = affine
    if scale == 0:
        return 0, 0.0
    q = min(max(round(value / scale) + zero_point, 0), 3)
    digit = 0 if q == zero_point else q + 1 if q < zero_point else q
    return digit, scale * (q - zero_point)


def nearest_value(value, values):
    """Return the entry of `values` nearest to a number; of two as near, the one nearer to zero."""
    return min(values, key=lambda candidate: (abs(value - candidate), abs(candidate)))


GRIDS = {
    "ternary": (ternary_levels, round_ternary),
    "two_bit": (two_bit_affine, round_two_bit),
}


def dampen(hessian, dampening):
    """Add a fraction of the mean diagonal to the diagonal of one matrix."""
    damped = np.array(hessian, dtype=np.float64)
    extra = dampening * sum(float(damped[i, i]) for i in range(len(damped))) / len(damped)
    for i in range(len(damped)):
        damped[i, i] += extra
    return damped


def answers(hessian):
    """Return, for each column k, how far it best moves per unit of error in each column before it."""
    return [np.linalg.solve(hessian[k:, k:], -hessian[k:, :k])[0] for k in range(len(hessian))]


def gptq_row(row, moves, levels, round_one):
    """Return (digits, weights) of one row, given `answers` of its dampened Hessian."""
    digits, done, errors = [], [], []
    for k in range(len(row)):
        best = float(row[k]) + sum(float(moves[k][i]) * errors[i] for i in range(k))
        digit, value = round_one(best, levels)
        digits.append(digit)
        done.append(value)
        errors.append(value - float(row[k]))
    return digits, done


def gptq(weight, hessian, grid, dampening, levels=None):
    """Return digits and weights, both (E, R, C), for weight and hessian (E, C, C); fits levels unless given."""
    fit, round_one = GRIDS[grid]
    digits, weights = np.zeros(np.shape(weight), np.int8), np.zeros(np.shape(weight))
    for e in range(len(weight)):
        moves = answers(dampen(hessian[e], dampening))
        for r in range(len(weight[e])):
            chosen = fit(weight[e][r]) if levels is None else levels[e][r]
            digits[e, r], weights[e, r] = gptq_row(weight[e][r], moves, chosen, round_one)
    return digits, weights


def relative_error(weight, quantised, hessian):
    """Return tr(D H D^T) / tr(W H W^T) of one matrix, D = weight - quantised."""
    lost = whole = 0.0
    for w, q in zip(np.asarray(weight, float), np.asarray(quantised, float), strict=True):
        d = w - q
        lost += float(d @ np.asarray(hessian, float) @ d)
        whole += float(w @ np.asarray(hessian, float) @ w)
    return lost / whole if whole > 0 else 0.0


def gram(x):
    """Return X^T X, entry by entry."""
    x = np.asarray(x, dtype=np.float64)
    columns = x.shape[1]
    return np.array([[float((x[:, i] * x[:, j]).sum()) for j in range(columns)] for i in range(columns)])
