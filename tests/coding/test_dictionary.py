from __future__ import annotations

import base64
import copy
import hashlib
import pickle

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_lite.coding.dictionary import Dictionary, count_sizes
from qmoe_lite.coding.fitting import least_bits
from qmoe_lite.errors import CodebookError, DigitError, DtypeError, FormatError, SettingError, ShapeError

COUNTS = [
    [1],
    [0, 5],
    [1000, 300],
    [900, 400, 60, 5],
    [50] * 8,
    [0, 0, 0, 9],
    [10**15, 0, 1],
    [5] * 60,
    [7, 0, 0, 0, 1],
]


def student_digits(step, rows=64, columns=2048):
    rng = np.random.default_rng(7)
    weights = rng.standard_t(8, (rows, columns)) * np.exp(rng.normal(0, 0.25, columns))
    weights /= weights.std()
    return (np.sign(weights) * np.floor(np.abs(weights) / step + 0.44)).astype(np.int16)


def entropy(digits):
    shares = np.unique(digits, return_counts=True)[1] / digits.size
    return -(shares * np.log2(shares)).sum()


def naive_trees(dictionary):
    return naive.window_trees(
        dictionary.kinds, dictionary.bits, dictionary.clip, dictionary.starts, dictionary.quarters
    )


def forge(config, kinds=None, **fields):
    """The config with other fields; `kinds` are packed and hashed."""
    config = dict(config, **fields)
    if kinds is not None:
        each = (config["clip"] + 1).bit_length()
        bits = [kind >> i & 1 for kind in kinds for i in range(each)]
        packed = np.packbits(np.array(bits, dtype=np.uint8), bitorder="little").tobytes()
        trees = base64.b64encode(packed).decode()
        config.update(nodes=len(kinds), trees=trees, sha256=hashlib.sha256(packed).hexdigest())
    return config


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_tables_hold_the_strings_of_the_trees(counts):
    dictionary = Dictionary.fit_counts(counts, bits=9)
    trees, _ = naive_trees(dictionary)
    tree_before = [c for c, share in enumerate(dictionary.quarters) for _ in range(share)]
    expected = {}
    for top in range(4):
        for string, codeword in trees[tree_before[top]].items():
            if codeword is not None:
                expected[codeword << 2 | top] = list(string)
    lengths, table = dictionary.lengths.tolist(), dictionary.digits_table.tolist()
    assert {window: table[window][:n] for window, n in enumerate(lengths) if n} == expected
    assert all(not any(table[window][n:]) for window, n in enumerate(lengths))
    assert dictionary.digits_table.shape == (2048, dictionary.width)
    assert dictionary.digits_table.dtype == np.int8
    assert dictionary.lengths.dtype == np.uint8
    assert dictionary.entries == sum(codeword is not None for tree in trees for codeword in tree.values())


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any), st.sampled_from([9, 10]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_classes_keep_to_their_quotas_and_the_same_counts_give_the_same_trees(counts, bits):
    dictionary = Dictionary.fit_counts(counts, bits)
    trees, class_of = naive_trees(dictionary)
    for tree in trees:
        codewords = [codeword for codeword in tree.values() if codeword is not None]
        assert len(set(codewords)) == len(codewords)
        for own, share in enumerate(dictionary.quarters):
            assert sum(class_of(codeword) == own for codeword in codewords) <= share * 2**bits // 4
        assert max(map(len, tree)) <= dictionary.longest
    assert Dictionary.fit_counts(counts, bits) == dictionary


def test_strings_of_a_middle_rate_have_only_zeros_behind_their_heads():
    counts = [5600, 4000, 380, 20]
    dictionary = Dictionary.fit_counts(counts)
    assert (dictionary.longest, dictionary.width, dictionary.heads_table.shape[1]) == (16, 16, 8)
    assert dictionary.lengths.max() > 8
    assert not dictionary.digits_table[:, 8:].any()
    assert (dictionary.heads_table == dictionary.digits_table[:, :8]).all()
    free = Dictionary.fit_counts(counts, clip=dictionary.clip, longest=16)
    assert free.heads_table is free.digits_table
    assert 1.0 < dictionary.expected_bits(counts) / free.expected_bits(counts) < 1.0125


@pytest.mark.parametrize("bits", [9, 10, 11, 12])
@pytest.mark.parametrize(("clip", "longest"), [(1, 1), (1, 16), (2, 17), (2, 32), (3, 8), (30, 5), (None, 3)])
def test_settings_are_taken_as_given(bits, clip, longest):
    dictionary = Dictionary.fit_counts([800, 500, 100, 20, 3], bits, clip=clip, longest=longest)
    assert dictionary.bits == bits
    assert dictionary.longest == longest
    assert clip is None or dictionary.clip == clip
    assert (dictionary.lengths <= longest).all()
    assert dictionary.width == (8 if longest <= 8 else 16 if longest == 16 else 32)


@pytest.mark.parametrize(
    ("step", "bits", "least", "most"),
    [
        (2.7, 10, 0.6, 1.075),
        (2.2, 10, 0.85, 1.075),
        (1.9, 10, 1.05, 1.075),
        (1.55, 10, 1.35, 1.045),
        (1.25, 10, 1.6, 1.045),
        (0.9, 10, 2.1, 1.045),
        (0.76, 10, 2.3, 1.045),
        (0.6, 10, 2.65, 1.06),
        (0.45, 10, 3.1, 1.06),
        (0.3, 12, 3.65, 1.06),
        (0.25, 11, 3.9, 1.06),
    ],
)
def test_bits_over_the_entropy(step, bits, least, most):
    digits = student_digits(step)
    dictionary = Dictionary.fit(digits, bits)
    assert least < entropy(digits) < least + 0.15
    assert dictionary.rate(digits) <= most * entropy(digits)
    assert dictionary.expected_bits(count_sizes(digits)) == pytest.approx(dictionary.rate(digits), rel=0.01)
    assert least_bits(count_sizes(digits)) < dictionary.expected_bits(count_sizes(digits))
    assert least_bits(count_sizes(digits)) == pytest.approx(entropy(np.abs(digits)) + (digits != 0).mean(), rel=0.02)
    assert len(dictionary.kinds) >= 1 << bits, "a dictionary takes a byte a codeword, or more"


def test_rate_counts_codewords_tails_and_exceptions():
    digits = student_digits(0.6, 5, 63)
    digits[2, 5], digits[4, 62] = 700, -31
    dictionary = Dictionary.fit_counts([100, 60, 30, 9], clip=3)
    trees, class_of = naive_trees(dictionary)
    _, row_codewords, exceptions = naive.encode_windows(digits, trees, class_of, dictionary.bits, 3)
    assert dictionary.rate(digits) == (10 * sum(row_codewords) + 24 * len(exceptions)) / digits.size
    assert dictionary.count_codewords(digits).tolist() == row_codewords
    assert dictionary.rate(np.asfortranarray(digits.astype(np.int64))) == dictionary.rate(digits)


def test_sizes():
    assert count_sizes(np.array([[0, -2], [2, 5]])).tolist() == [1, 0, 2, 0, 0, 1]
    assert count_sizes(np.int8([-128])).tolist() == [0] * 128 + [1]


def test_digits_are_counted_a_piece_at_a_time(monkeypatch):
    digits = np.int16([[0, -2, 1, 5, 0, 1], [7, 0, 0, -1, 0, 3]])
    whole = count_sizes(digits)
    monkeypatch.setattr("qmoe_lite.coding.dictionary._COUNTED", 4)
    assert count_sizes(digits).tolist() == whole.tolist() == [5, 3, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_config_brings_back_the_same_dictionary(counts):
    dictionary = Dictionary.fit_counts(counts, bits=9)
    for twin in (
        Dictionary.from_config(dictionary.to_config()),
        pickle.loads(pickle.dumps(dictionary)),
        copy.deepcopy(dictionary),
    ):
        assert twin == dictionary
        assert hash(twin) == hash(dictionary)
        assert (twin.digits_table == dictionary.digits_table).all()
    assert dictionary != Dictionary.fit_counts([3, 3, 3], bits=9, clip=2)


SMALL = Dictionary.fit_counts([9, 6, 2], bits=9, clip=2, longest=4)
KINDS = list(SMALL.kinds)
FORGERIES = {
    "cut": forge(SMALL.to_config(), KINDS[:-1]),
    "longer": forge(SMALL.to_config(), [*KINDS, 0]),
    "no such kind": forge(SMALL.to_config(), [*KINDS[:-1], 3, 0]),
    "too deep": forge(SMALL.to_config(), KINDS, longest=2),
    "quota": forge(SMALL.to_config(), [0] * len(KINDS)),
    "all complete": forge(SMALL.to_config(), [3] * len(KINDS)),
    "none": forge(SMALL.to_config(), []),
    "other hash": dict(SMALL.to_config(), sha256="0" * 64),
    "no base64": dict(SMALL.to_config(), trees="*"),
    "number for text": dict(SMALL.to_config(), trees=5),
    "nodes": dict(SMALL.to_config(), nodes=10**9),
    "negative nodes": dict(SMALL.to_config(), nodes=-1),
    "kind": dict(SMALL.to_config(), kind="tunstall"),
    "bits": dict(SMALL.to_config(), bits=13),
    "text for bits": dict(SMALL.to_config(), bits="9"),
    "clip": dict(SMALL.to_config(), clip=0),
    "clip too large": dict(SMALL.to_config(), clip=127),
    "longest": dict(SMALL.to_config(), longest=33),
    "starts": dict(SMALL.to_config(), starts=[0, 2, 1]),
    "starts beyond the clip": dict(SMALL.to_config(), starts=[0, 1, 3]),
    "no starts": dict(SMALL.to_config(), starts=[]),
    "nested starts": dict(SMALL.to_config(), starts=[0, [1], 2]),
    "quarters": dict(SMALL.to_config(), quarters=[2, 2, 1]),
    "five classes": dict(SMALL.to_config(), starts=[0, 1, 2, 3, 4], quarters=[1, 1, 1, 1, 0]),
    "missing": {key: value for key, value in SMALL.to_config().items() if key != "trees"},
}


@pytest.mark.parametrize("config", FORGERIES.values(), ids=FORGERIES)
def test_forged_configs_are_refused_in_one_line(config):
    with pytest.raises(FormatError) as caught:
        Dictionary.from_config(config)
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.integers(1, 2), st.integers(1, 4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_kinds_are_trees_or_refused(kinds, clip, longest):
    config = forge(SMALL.to_config(), kinds, clip=clip, longest=longest, starts=[0, 1], quarters=[2, 2])
    try:
        dictionary = Dictionary.from_config(config)
    except FormatError:
        return
    trees, _ = naive_trees(dictionary)
    assert sum(map(len, trees)) == len(kinds)
    assert max(len(string) for tree in trees for string in tree) <= longest


def test_padding_behind_the_trees_is_refused():
    config = SMALL.to_config()
    packed = bytearray(base64.b64decode(config["trees"]))
    spare = 8 * len(packed) - 2 * len(KINDS)
    if spare == 0:
        packed.append(0)
    else:
        packed[-1] |= 128
    config.update(trees=base64.b64encode(packed).decode(), sha256=hashlib.sha256(packed).hexdigest())
    with pytest.raises(FormatError):
        Dictionary.from_config(config)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: Dictionary.fit_counts([]), CodebookError),
        (lambda: Dictionary.fit_counts([0, 0]), CodebookError),
        (lambda: Dictionary.fit_counts([-1, 2]), CodebookError),
        (lambda: Dictionary.fit_counts([0.5]), CodebookError),
        (lambda: Dictionary.fit_counts([1, 2], 8), SettingError),
        (lambda: Dictionary.fit_counts([1, 2], 13), SettingError),
        (lambda: Dictionary.fit_counts([1, 2], clip=0), SettingError),
        (lambda: Dictionary.fit_counts([1, 2], longest=33), SettingError),
        (lambda: Dictionary.fit(np.float32([1])), DtypeError),
        (lambda: Dictionary.fit(np.zeros(0, np.int16)), ShapeError),
        (lambda: Dictionary.fit(np.array([40000])), DigitError),
        (lambda: SMALL.rate(np.zeros(4, np.int16)), ShapeError),
        (lambda: SMALL.rate(np.array([[-32768]])), DigitError),
        (lambda: SMALL.expected_bits([]), CodebookError),
        (lambda: Dictionary(9, 2, 4, (), (4,), SMALL.kinds), CodebookError),
        (lambda: Dictionary(9, 2, 4, (0,), (), SMALL.kinds), CodebookError),
        (lambda: Dictionary(9, 2, 4, (0,), (4,), b""), CodebookError),
    ],
)
def test_unusable_arguments(call, error):
    with pytest.raises(error):
        call()
