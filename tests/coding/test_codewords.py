"""The published dictionary, to the byte, and what greedy matching with it costs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle

import naive
import numpy as np
import pytest
from checks import draw_digits
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_lite.coding.automaton import build_automaton
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import decode, encode
from qmoe_lite.coding.strings import paper_strings, table_entries
from qmoe_lite.coding.validation import validate
from qmoe_lite.errors import CodebookError, DigitError, FormatError, ShapeError

PAPER = Codebook.paper()
PUBLISHED = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"


@pytest.mark.slow
def test_the_table_has_the_published_bytes():
    strings = naive.strings_of(PAPER.table.tolist(), 3)
    assert hashlib.sha256(naive.published_table(strings)).hexdigest() == PUBLISHED
    assert strings == naive.paper_dictionary()


def test_the_table_has_one_layout_with_tunstall_codes():
    assert PAPER.table.tolist() == [naive.entry(string, 3) for string in naive.paper_dictionary()]
    assert PAPER.table.shape == (65536,)
    assert PAPER.table.dtype == np.uint64
    assert not PAPER.table.flags.writeable
    assert (PAPER.kind, PAPER.bits, PAPER.digits, PAPER.max_nonzeros) == ("paper", 16, 3, 3)
    assert PAPER.counts == (115, 1770, 115)


@pytest.mark.parametrize("shares", [(115, 1770, 115), (1, 1, 1), (30, 60, 10), (0, 1, 0), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("columns", [1, 27, 28, 29, 63, 1000])
def test_codes_are_the_naive_longest_matches(shares, columns):
    digits = draw_digits(np.random.default_rng(columns), shares, (9, columns))
    codes, row_codewords = naive.encode_pairs(digits)
    packed = encode(digits, np.ones((9, 2), dtype=np.float32), PAPER)
    assert packed.codes.numpy().tobytes() == codes
    assert packed.count_codewords().tolist() == row_codewords
    assert PAPER.count_codewords(digits).tolist() == row_codewords


@given(
    shares=st.one_of(
        st.sampled_from([(1, 18, 1), (1, 40, 1), (1, 4, 1)]),
        st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(any),
    ),
    rows=st.integers(1, 20),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_any_width_comes_back_from_the_naive_codes(shares, rows, columns, seed):
    digits = draw_digits(np.random.default_rng(seed), shares, (rows, columns))
    packed = encode(digits, np.ones((rows, 1), dtype=np.float32), PAPER)
    assert packed.codes.numpy().tobytes() == naive.encode_pairs(digits)[0]
    read = dataclasses.replace(packed, _validated=False)
    assert (decode(read)[0].numpy() == digits).all()
    assert PAPER.rate(digits) == 16 * int(packed.count_codewords().sum()) / digits.size


def test_each_string_alone_in_a_row_is_its_own_code():
    for code in (0, 1, 13, 14, 999, 8190, 65535):
        string = naive.paper_dictionary()[code]
        packed = encode(np.int8([string]), np.ones((1, 1), dtype=np.float32), PAPER)
        assert packed.codes[:2].numpy().view("<u2").tolist() == [code]
        assert packed.count_codewords().tolist() == [1]


def test_another_reading_than_the_greedy_one_decodes_too():
    two_zeros = naive.paper_codes()[(0, 0)]
    packed = encode(np.zeros((1, 56), dtype=np.int8), np.ones((1, 1), dtype=np.float32), PAPER)
    codes = np.array([two_zeros] * 28 + [0] * 4, dtype="<u2").view(np.uint8)
    other = dataclasses.replace(
        packed,
        codes=packed.codes.new_tensor(codes),
        fewest_codewords=28,
        _validated=False,
    )
    validate(other)
    assert decode(other)[0].tolist() == [[0] * 56]


# notes: (P(0) in thousandths, rate at 14336 columns)
@pytest.mark.parametrize(("zeros", "noted"), [(800, 1.120), (850, 0.875), (885, 0.735), (920, 0.638), (950, 0.591)])
def test_rates_of_the_notes_come_out(zeros, noted):
    counts = [1000 - zeros, 2 * zeros, 1000 - zeros]
    expected = PAPER.expected_bits_per_weight(counts)
    digits = draw_digits(np.random.default_rng(zeros), counts, (300, 14336))
    assert abs(expected - noted) < 0.0015
    assert abs(PAPER.rate(digits) - expected) < 0.0025
    for columns in (768, 2048):
        rate = PAPER.rate(digits.reshape(-1, columns))
        assert expected < rate < expected + 16 / columns, "a row's tail costs about half a codeword"


@pytest.mark.parametrize("counts", [[20, 800, 180], [1, 1, 1], [0, 9, 1], [300, 0, 10]], ids=str)
def test_expected_bits_per_weight_equals_measured_ones_of_lopsided_digits(counts):
    digits = draw_digits(np.random.default_rng(3), counts, (20, 60000))
    assert PAPER.rate(digits) == pytest.approx(PAPER.expected_bits_per_weight(counts), rel=0.01)


def test_expected_bits_per_weight_of_zeros_only_is_one_code_for_28():
    assert PAPER.expected_bits_per_weight([0, 5, 0]) == pytest.approx(16 / 28)
    assert PAPER.expected_bits_per_weight() == PAPER.expected_bits_per_weight([115, 1770, 115])


def test_a_fitted_codebook_expects_more_bits_of_digits_it_was_not_fitted_to():
    codebook = Codebook.fit([115, 1770, 115])
    digits = draw_digits(np.random.default_rng(4), [1, 8, 1], (20, 60000))
    assert codebook.rate(digits) == pytest.approx(codebook.expected_bits_per_weight([1, 8, 1]), rel=0.01)
    with pytest.raises(CodebookError, match="expected 3"):
        codebook.expected_bits_per_weight([7, 1, 1, 1])


@pytest.mark.slow
def test_the_dictionary_is_built_once():
    strings = paper_strings()
    assert build_automaton(strings, 3)
    assert len(table_entries(strings, 3)) == 65536
    assert Codebook.paper() is PAPER is Codebook.from_config(PAPER.to_config())
    assert copy.deepcopy(PAPER) is PAPER is pickle.loads(pickle.dumps(PAPER))


def test_config_and_repr_rebuild_it_and_it_equals_no_fitted_one():
    config = PAPER.to_config()
    assert config["kind"] == "paper"
    assert config["bits"] == 16
    assert config["sha256"] == hashlib.sha256(PAPER.table.astype("<u8").tobytes()).hexdigest()
    assert eval(repr(PAPER)) is PAPER
    assert Codebook.fit([115, 1770, 115]) != PAPER


@pytest.mark.parametrize(
    "change",
    [{"sha256": "0" * 64}, {"counts": [1, 9, 1]}, {"bits": 12}, {"bits": None}, {"kind": "tunstall"}],
    ids=str,
)
def test_a_forged_config_is_a_format_error(change):
    with pytest.raises(FormatError):
        Codebook.from_config(PAPER.to_config() | change)


def test_it_refuses_what_it_cannot_write():
    with pytest.raises(DigitError, match="2 at row 0, column 1"):
        encode(np.int8([[0, 2]]), np.ones((1, 2), dtype=np.float32), PAPER)
    with pytest.raises(ShapeError):
        encode(np.int8([[0, 1]]), np.ones((1, 3), dtype=np.float32), PAPER)
