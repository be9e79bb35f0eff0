"""The digits that a code writes: which one is zero, and what kernels and levels go by instead of the digits.

A symbol is a digit's rank, 0 for the lowest. A slot is what a table entry says of a nonzero: its place among the values
of a row, the last of which is the zero's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmoe_lite.errors import DigitError


@dataclass(frozen=True)
class Alphabet:
    """Digits that follow one another without a gap.

    Attributes
    ----------
    name : str
    digits : int
        How many there are.
    zero_symbol : int
        Rank of the digit 0.
    slot_digits : tuple of int
        Digit of each slot, the zero's last.
    level_counts : tuple of int
        Levels that a row may have: one for each nonzero digit, or 1 where rows may be symmetric.
    longest : int
        Most weights of a codeword, so that `digits * position + slot` fits a byte.
    count_word : str
        The number of digits as a message writes it.
    """

    name: str
    digits: int
    zero_symbol: int
    slot_digits: tuple[int, ...]
    level_counts: tuple[int, ...]
    longest: int
    count_word: str

    @property
    def lowest(self) -> int:
        """The lowest digit."""
        return -self.zero_symbol

    @property
    def highest(self) -> int:
        """The highest digit."""
        return self.digits - 1 - self.zero_symbol

    @property
    def zero_slot(self) -> int:
        """The slot of digit 0."""
        return self.digits - 1

    @property
    def slot_of_symbol(self) -> tuple[int, ...]:
        """Slot of each symbol."""
        return tuple(self.slot_digits.index(symbol + self.lowest) for symbol in range(self.digits))

    @property
    def level_of_slot(self) -> tuple[int, ...]:
        """Place of each slot's level, but the zero's, in a row that has one for each nonzero digit, ascending."""
        nonzeros = sorted(self.slot_digits[:-1])
        return tuple(nonzeros.index(digit) for digit in self.slot_digits[:-1])

    def refusal(self, digit: Any, row: int, column: int) -> DigitError:
        """Return the error for a digit that the alphabet lacks."""
        others = " or ".join(f"{other.count_word} counts" for other in ALPHABETS.values() if other != self)
        return DigitError(
            f"digits holds {digit} at row {row}, column {column}; expected {self.lowest} to {self.highest}. "
            f"Fit the codebook with {others}, or fix the digits."
        )


TERNARY = Alphabet("ternary", 3, 1, (1, -1, 0), (1, 2), 84, "three")
TWO_BIT = Alphabet("two-bit", 4, 0, (1, 2, 3, 0), (3,), 63, "four")
ALPHABETS = {alphabet.digits: alphabet for alphabet in (TERNARY, TWO_BIT)}
