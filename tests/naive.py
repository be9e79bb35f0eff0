"""Slow, obvious references: loops over Python numbers, numpy only (zstandard for its frames), nothing from the library.

Codes: Tunstall in fractions, the published dictionary off its heap, the stream bit by bit, products weight by weight.
Solver: float64, one row and one column at a time, without Cholesky factors, inverses or recursions: before each column
is rounded, the columns left are set to the values that minimise the error, given what was rounded before.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import struct
import zlib
from fractions import Fraction

import numpy as np
import zstandard

ALPHABETS = {3: (-1, 0, 1), 4: (0, 1, 2, 3)}
LONGEST = {3: 84, 4: 63}


def tunstall(counts, bits):
    """Digit strings (tuples) by code: split the most probable leaf until no further split fits 2**bits leaves."""
    alphabet = ALPHABETS[len(counts)]
    counts = [max(count, 1) for count in counts]
    shares = {digit: Fraction(count, sum(counts)) for digit, count in zip(alphabet, counts, strict=True)}
    leaves = {(): Fraction(1)}
    while len(leaves) + len(alphabet) - 1 <= 2**bits:
        open_leaves = [
            leaf for leaf in leaves if len(leaf) < LONGEST[len(counts)] and sum(digit != 0 for digit in leaf) < 7
        ]
        if not open_leaves:
            break
        best = min(open_leaves, key=lambda leaf: (-leaves[leaf], len(leaf), leaf))
        probability = leaves.pop(best)
        for digit in alphabet:
            leaves[(*best, digit)] = probability * shares[digit]
    return sorted(leaves)


@functools.cache
def paper_dictionary():
    """Digit strings (tuples) of the paper's dictionary by code, popped off a heap of lists of pairs as published."""
    share = [0.885, (1 - 0.885) / 2, (1 - 0.885) / 2]  # 0 = zero, 1 = the row's minimum, 2 = its maximum
    meaning = [0, -1, 1]
    heap, popped = [(-1.0, [])], []
    while len(popped) < 65537:
        key, pairs = heapq.heappop(heap)
        popped.append(pairs)
        if len(pairs) < 14:
            for pair in range(9):
                heapq.heappush(heap, (key * (share[pair % 3] * share[pair // 3]), [*pairs, pair]))
    return [tuple(meaning[x] for pair in pairs for x in (pair % 3, pair // 3)) for pairs in popped[1:]]


@functools.cache
def paper_codes():
    """Code of each string of the paper's dictionary."""
    return {string: code for code, string in enumerate(paper_dictionary())}


def published_table(strings):
    """Bytes of the decode table as published: two words a string, 7 pairs each in 4 bits, above 4 bits of count."""
    number = {0: 0, -1: 1, 1: 2}
    table = []
    for string in strings:
        pairs = [number[string[i]] + 4 * number[string[i + 1]] for i in range(0, len(string), 2)]
        for half in (pairs[:7], pairs[7:]):
            table.append(len(pairs) + sum(pair << (4 + 4 * i) for i, pair in enumerate(half)))
    return b"".join(word.to_bytes(4, "little") for word in table)


def encode_pairs(digits):
    """Codes (bytes) and codewords per row by the paper's dictionary: at each place the longest string that fits."""
    codes, row_codewords = b"", []
    for row in digits.tolist():
        row = row + [0] * (len(row) % 2)
        place, count = 0, 0
        while place < len(row):
            length = next(n for n in range(28, 0, -2) if tuple(row[place : place + n]) in paper_codes())
            length = min(length, len(row) - place)
            codes += paper_codes()[tuple(row[place : place + length])].to_bytes(2, "little")
            place += length
            count += 1
        row_codewords.append(count)
    return codes + bytes(8), row_codewords


def entry(string, n_digits):
    """Table entry of a digit string, byte by byte."""
    slot = {3: {1: 0, -1: 1}, 4: {1: 0, 2: 1, 3: 2}}[n_digits]
    content = [len(string)] + [n_digits * i + slot[digit] for i, digit in enumerate(string) if digit != 0]
    content += [n_digits - 1] * (8 - len(content))
    return sum(byte << (8 * i) for i, byte in enumerate(content))


def strings_of(entries, n_digits):
    """Digit strings (tuples) that table entries stand for."""
    digit = {3: [1, -1, 0], 4: [1, 2, 3, 0]}[n_digits]
    strings = []
    for number in entries:
        length, *fields = number.to_bytes(8, "little")
        string = [0] * length
        for field in fields:
            if field != n_digits - 1:
                string[field // n_digits] = digit[field % n_digits]
        strings.append(tuple(string))
    return strings


def rank_digit(rank):
    """The digit that stands in this place of 0, -1, +1, -2, .."""
    return (rank + 1) // 2 * (-1 if rank % 2 else 1)


def window_trees(kinds, bits, clip, starts, quarters):
    """For each tree a dict from digit string (tuple) to codeword, None where it is none; and a codeword's class."""
    kinds = iter(kinds)
    bounds = [sum(quarters[:c]) * 2**bits // 4 for c in range(len(starts) + 1)]
    trees = []

    def read(string, tree, numbers):
        kind = next(kinds)
        own = max(c for c in range(len(starts)) if kind >= starts[c])
        tree[string] = None
        if kind <= clip:
            tree[string] = bounds[own] + numbers[own]
            numbers[own] += 1
            assert tree[string] < bounds[own + 1]
        for rank in range(2 * kind - 1):
            read((*string, rank_digit(rank)), tree, numbers)

    for start in starts:
        tree, numbers = {}, [0] * len(starts)
        for digit in map(rank_digit, range(2 * clip + 1)):
            if abs(digit) >= start:
                read((digit,), tree, numbers)
        trees.append(tree)
    assert not list(kinds)
    return trees, lambda codeword: max(c for c in range(len(starts)) if codeword >= bounds[c])


def encode_windows(digits, trees, class_of, bits, clip):
    """Codes (bytes), codewords per row, and exceptions as (row, column, value): string after string."""
    stream, row_codewords, exceptions = "00", [], []
    for row, values in enumerate(digits.tolist()):
        clipped = [max(-clip, min(clip, value)) for value in values]
        for column, value in enumerate(values):
            excess = abs(value) - clip
            while excess > 0:
                exceptions.append((row, column, min(excess, 127) * (1 if value > 0 else -1)))
                excess -= 127
        place, count, tree = 0, 0, 0
        while place < len(clipped):
            length = 1
            while tuple(clipped[place : place + length + 1]) in trees[tree] and place + length < len(clipped):
                length += 1
            string = tuple(clipped[place : place + length])
            place += length
            if place == len(clipped):
                while trees[tree][string] is None or class_of(trees[tree][string]) != 0:
                    string = (*string, 0)
            codeword = trees[tree][string]
            stream += format(codeword, f"0{bits}b")[::-1]
            tree = class_of(codeword)
            count += 1
        row_codewords.append(count)
    stream += "0" * (-len(stream) % 8)
    return (
        bytes(int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)) + bytes(8),
        row_codewords,
        exceptions,
    )


def decode_windows(codes, row_codewords, trees, class_of, bits, columns, exceptions):
    """Digits (lists) by the description: two bits, then codeword after codeword; each tells the tree of the next."""
    stream = "".join(format(byte, "08b")[::-1] for byte in codes)
    strings = [{codeword: string for string, codeword in tree.items() if codeword is not None} for tree in trees]
    place, rows = 2, []
    for count in row_codewords:
        row, tree = [], 0
        for _ in range(count):
            codeword = int(stream[place : place + bits][::-1], 2)
            row += strings[tree][codeword]
            tree = class_of(codeword)
            place += bits
        rows.append(row[:columns])
    for row, column, value in exceptions:
        rows[row][column] += value
    return rows


def begins_alike(a, b):
    """Whether the shorter list is how the longer one begins."""
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]


def encode(digits, strings, bits):
    """Codes (bytes) and codewords per row: at each place the one string that fits; at the end the first that would."""
    stream, row_codewords = [], []
    for row in digits.tolist():
        place, count = 0, 0
        while place < len(row):
            code = next(i for i, string in enumerate(strings) if begins_alike(row[place:], list(string)))
            stream += [(code >> i) & 1 for i in range(bits)]
            place += len(strings[code])
            count += 1
        row_codewords.append(count)
    stream += [0] * (-len(stream) % 8)
    codes = [sum(stream[8 * i + j] << j for j in range(8)) for i in range(len(stream) // 8)]
    return bytes(codes) + bytes(8), row_codewords


def decode(codes, row_codewords, strings, bits, columns):
    """Digits, list of rows, cut at the width."""
    stream = [(byte >> j) & 1 for byte in codes for j in range(8)]
    rows, place = [], 0
    for count in row_codewords:
        row = []
        for _ in range(count):
            row += strings[sum(stream[place + j] << j for j in range(bits))]
            place += bits
        rows.append(row[:columns])
    return rows


def digits_of_packets(words, starts, strings, bits, columns):
    """Digits, list of rows, of packets (four words of 32 bits each): each packet's begin at the column it says."""
    rows = []
    for first, stop in itertools.pairwise(starts):
        row = [None] * columns
        for quad in words[first:stop]:
            packet = sum(int(word) << 32 * i for i, word in enumerate(quad))
            column = packet & 0xFFFF
            for number in range(112 // bits):
                for digit in strings[packet >> 16 + bits * number & (1 << bits) - 1]:
                    if column < columns:
                        assert row[column] is None, "two packets hold one column"
                        row[column] = digit
                    column += 1
        rows.append(row)
    return rows


def dequantize(digits, levels):
    """Float64 matrix; levels (R, 1), (R, 2) for ternary or (R, 3) for two-bit digits."""
    dense = np.zeros(digits.shape)
    for row in range(digits.shape[0]):
        own = [float(level) for level in levels[row]]
        value = {1: {1: own[0], -1: -own[0]}, 2: {-1: own[0], 1: own[-1]}, 3: dict(enumerate(own, 1))}[len(own)]
        for column in range(digits.shape[1]):
            digit = int(digits[row, column])
            dense[row, column] = value[digit] if digit else 0.0
    return dense


def matmul(digits, levels, x):
    """y (T, R) in float64, one product at a time."""
    dense = dequantize(digits, levels)
    y = np.zeros((len(x), len(dense)))
    for token in range(len(x)):
        for row in range(len(dense)):
            for column in range(dense.shape[1]):
                y[token, row] += dense[row, column] * float(x[token, column])
    return y


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


def round_scale(number):
    """Return the nearest number with 5 significant bits (4 of a mantissa are stored); of two as near, the larger."""
    if number == 0:
        return 0.0
    mantissa, exponent = np.frexp(number)
    return float(np.ldexp(float(int(mantissa * 32 + 0.5)), exponent - 5))


def pack_scales(numbers):
    """Return the bytes of one expert's steps or scales, each 0 or a positive bfloat16, and the bits of each number."""
    patterns = [struct.unpack(">H", struct.pack(">f", number)[:2])[0] for number in numbers]
    smallest = min([p for p in patterns if p], default=0x7FFF)
    shift = 0
    while any(p > smallest for p in patterns) and all((p - smallest) % (2 << shift) == 0 for p in patterns if p):
        shift += 1
    return [smallest & 255, smallest >> 8, shift], [p and ((p - smallest) >> shift) + 1 for p in patterns]


def pack_numbers(numbers, bits):
    """Return numbers of so many bits each as bytes, least significant bit first."""
    stream = "".join(format(number, f"0{bits}b")[::-1] for number in numbers)
    return [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]


def uniform_step(row, step):
    """Return a row's step, float64: so many times the root mean square of its weights."""
    return step * (sum(float(x) ** 2 for x in row) / len(row)) ** 0.5


def important_steps(weight, importance, step):
    """Return the steps of a matrix's rows: halfway between those of their RMS and those of what an error counts."""
    sizes = [uniform_step(row, step) for row in weight]
    counts = [max(float(each), 1e-4 * sum(map(float, importance)) / len(importance)) for each in importance]
    both = [(size, count) for size, count in zip(sizes, counts, strict=True) if size > 0 and count > 0]
    middle = np.exp(sum(np.log(size * count**0.5) for size, count in both) / max(len(both), 1))
    found = []
    for size, count in zip(sizes, counts, strict=True):
        moved = (middle / (size * count**0.5)) ** 0.5 if size > 0 and count > 0 else 1.0
        found.append(size * min(max(moved, 0.25), 4.0))
    return found


def round_uniform(value, step, dead_zone):
    """Return (digit, weight): the multiple of the step that is nearest, or nearer to zero within the dead zone."""
    if step == 0:
        return 0, 0.0
    size = min(int(abs(value) / step + 0.5 - dead_zone), 32767)
    digit = size if value > 0 else -size
    return digit, digit * step


def uniform_scales(damped):
    """Return each column's scale: what its error costs when those after it make up for it, over what one does."""
    costs = []
    for c in range(len(damped)):
        first = [1.0] + [0.0] * (len(damped) - c - 1)
        costs.append(1 / np.linalg.solve(damped[c:, c:], first)[0])
    middle = np.exp(sum(np.log(cost) for cost in costs) / len(costs))
    return [round_scale(min(max((middle / cost) ** 0.5, 1 / 1024), 1024.0)) for cost in costs]


def uniform_gptq(weight, hessian, step, dead_zone, dampening, rounded=True):
    """Return digits and weights (E, R, C), steps (E, R) and column scales (E, C); steps of few bits if `rounded`."""
    digits, weights = np.zeros(np.shape(weight), int), np.zeros(np.shape(weight))
    steps, scales = np.zeros(np.shape(weight)[:2]), np.zeros((len(weight), np.shape(weight)[2]))
    for e in range(len(weight)):
        order = sorted(range(len(hessian[e])), key=lambda c: -hessian[e][c][c])  # act-order: ties as they stand
        damped = dampen(hessian[e], dampening)[np.ix_(order, order)]
        moves, scales[e, order] = answers(damped), uniform_scales(damped)
        for r, row in enumerate(np.asarray(weight[e], float)):
            steps[e, r] = uniform_step(row, step)
            if rounded:
                steps[e, r] = round_scale(steps[e, r])
            errors = []
            for k, c in enumerate(order):
                best = row[c] + sum(float(moves[k][i]) * errors[i] for i in range(k))
                digits[e, r, c], weights[e, r, c] = round_uniform(best, steps[e, r] * scales[e, c], dead_zone)
                errors.append(weights[e, r, c] - row[c])
    return digits, weights, steps, scales


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


def fading_cache(slots, half_life, requests):
    """Hits of a cache that lets go of the expert whose uses, each halved every `half_life` steps, add up to least.

    `requests` are lists of experts, one list a step; of one step's experts none is let go for another. Exact: Python's
    fractions for whole half-lives; a half-life of 0 is LRU, None is LFU.
    """
    from fractions import Fraction

    held, uses, hits = [], {}, 0
    for now, wanted in enumerate(requests):
        for expert in wanted:
            uses.setdefault(expert, []).append(now)
        there = [expert for expert in wanted if expert in held]
        hits += len(there)
        for expert in wanted:
            if expert in held:
                continue
            if len(held) == slots:
                candidates = [e for e in held if e not in wanted]
                if not candidates:
                    break

                def worth(e, now=now):
                    if half_life is None:
                        return len(uses[e])
                    if half_life == 0:
                        return max(uses[e])
                    return sum(Fraction(1, 2 ** (now - t)) for t in uses[e])  # half_life 1

                held.remove(min(candidates, key=worth))
            held.append(expert)
    return hits


def unpack(packed):
    """Files of a pack file, name to bytes, read as FORMAT.md says: streams of bytes of one significance, rotated."""

    def number(place, size=4):
        return int.from_bytes(packed[place : place + size], "little")

    assert packed[:8] == b"QMOEPACK"
    assert number(8) == 1
    place = 20 + number(12)
    assert zlib.crc32(packed[20:place]) == number(16)
    files, frames = {}, 0
    for entry in json.loads(packed[20:place])["files"]:
        content = b""
        while len(content) < entry["size"]:
            length, follow, crc, word = number(place), number(place + 4), number(place + 8), number(place + 12, 1)
            streams, at = [], place + 16
            for _ in range(word):
                size = number(at)
                stream = packed[at + 4 : at + 4 + size % 2**31]
                at += 4 + size % 2**31
                streams.append(stream if size >= 2**31 else zstandard.ZstdDecompressor().decompress(stream))
            place += 16 + follow
            assert not any(packed[at:place])
            raw = streams[0] if word == 1 else b""
            if word > 1:
                for digits in zip(*streams, strict=True):
                    value = int.from_bytes(digits, "big")
                    raw += (value >> 1 | value % 2 << 8 * word - 1).to_bytes(word, "little")
            assert len(raw) == length
            assert zlib.crc32(raw, frames) == crc
            content, frames = content + raw, frames + 1
        assert len(content) == entry["size"]
        files[entry["name"]] = content
    assert place == len(packed)
    return files
