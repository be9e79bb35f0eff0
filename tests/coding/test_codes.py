from __future__ import annotations

import numpy as np
import pytest

from qmoe_lite.coding.alphabet import ALPHABETS, TERNARY, TWO_BIT
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codes import CODES, code_from_config
from qmoe_lite.errors import FormatError


@pytest.mark.parametrize("codebook", [Codebook.fit([1, 8, 1], bits=8), Codebook.paper()], ids=["tunstall", "paper"])
def test_a_code_is_read_by_its_name(codebook):
    assert codebook.kind in CODES
    assert code_from_config(codebook.to_config()) == codebook


@pytest.mark.parametrize("config", [{"kind": "huffman"}, {"kind": ["tunstall"]}, {}, ["tunstall"], None], ids=str)
def test_an_unknown_code_is_a_format_error(config):
    with pytest.raises(FormatError, match="tunstall"):
        code_from_config(config)


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=lambda alphabet: alphabet.name)
def test_the_parts_of_an_alphabet_fit_one_another(alphabet):
    digits = list(range(alphabet.lowest, alphabet.highest + 1))
    assert len(digits) == alphabet.digits
    assert digits[alphabet.zero_symbol] == 0
    assert alphabet.slot_digits[alphabet.zero_slot] == 0
    assert [alphabet.slot_digits[slot] for slot in alphabet.slot_of_symbol] == digits
    assert alphabet.digits * (alphabet.longest - 1) + alphabet.zero_slot <= 255 < alphabet.digits * alphabet.longest + 4
    levels = np.array([digit for digit in digits if digit])
    assert [levels[place] for place in alphabet.level_of_slot] == list(alphabet.slot_digits[:-1])


def test_slots_are_those_that_files_and_kernels_know():
    assert TERNARY.slot_of_symbol == (1, 2, 0)
    assert TERNARY.level_of_slot == (1, 0)
    assert TWO_BIT.slot_of_symbol == (3, 0, 1, 2)
    assert TWO_BIT.level_of_slot == (0, 1, 2)
