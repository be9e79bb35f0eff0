"""Which strings of digits the codewords stand for: a decode table for every kernel, an automaton for the encoder.

A Tunstall code grows from the empty string by replacing the most probable leaf by its one-digit extensions until the
codes run out; the leaves are the codewords, so every row has exactly one reading. It is rebuilt exactly from the digit
counts and the codeword bits, which is all that a checkpoint stores of it. The paper's dictionary is fixed.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.coding.alphabet import ALPHABETS, Alphabet
from qmoe_lite.coding.automaton import Automaton, Steps, build_automaton, walk_steps
from qmoe_lite.coding.counting import count_codewords, count_rates
from qmoe_lite.coding.gather import STEP_IN_BYTES
from qmoe_lite.coding.strings import (
    PAPER_BITS,
    PAPER_COUNTS,
    mean_length,
    paper_strings,
    table_entries,
    tunstall_strings,
)
from qmoe_lite.errors import CodebookError, FormatError, QMoEError, SettingError

_FIELD_COUNTS = (2, 3, 4, 7)  # nonzeros an entry that kernels are compiled for: each costs seconds once
_RATE_MARGIN = 1.02  # the size that `Codebook.choose` pays for a faster product


@dataclass(frozen=True, repr=False)
class Codebook:
    """The digit strings behind the codes; made by `Codebook.fit`, `choose` or `paper`, never changed.

    Parameters
    ----------
    kind : str
        "tunstall" or "paper".
    counts : tuple of int
        Digit counts in ascending digit order: (n(-1), n(0), n(+1)) for ternary, (n(0), .., n(3)) for two-bit digits.
    bits : int
        Bits of a codeword: 8 to 13, the paper's 16.

    Notes
    -----
    Two codebooks are equal when kind, counts and bits are. `table` is the whole of what a decoder needs.
    """

    kind: str
    counts: tuple[int, ...]
    bits: int

    def __post_init__(self) -> None:
        if self.kind not in ("tunstall", "paper"):
            raise CodebookError(
                f'codebook kind is {self.kind!r}; expected "tunstall" or "paper". Use Codebook.fit(counts).'
            )
        object.__setattr__(self, "counts", _checked_counts(self.counts))
        try:
            object.__setattr__(self, "bits", operator.index(self.bits))
        except TypeError as error:
            raise SettingError(f"bits is {self.bits!r}; expected an integer from 8 to 13.") from error
        if self.kind == "tunstall" and not 8 <= self.bits <= 13:
            raise SettingError(f"bits is {self.bits}; expected 8 to 13 (10 serves most models).")
        if self.kind == "paper" and (self.counts, self.bits) != (PAPER_COUNTS, PAPER_BITS):
            raise CodebookError(
                f"the paper's dictionary has counts {list(self.counts)} and {self.bits} bits; expected "
                f"{list(PAPER_COUNTS)} and {PAPER_BITS}. Use Codebook.paper(), or fit a code to your counts."
            )

    @classmethod
    def fit(cls, counts: Iterable[int], bits: int = 10) -> Codebook:
        """Build the Tunstall code for digits that occur as often as `counts` says.

        Parameters
        ----------
        counts : three or four int, none negative, not all zero
            [n(-1), n(0), n(+1)] for ternary digits, [n(0), n(1), n(2), n(3)] for two-bit digits.
        bits : int, default 10
            Bits of a codeword, 8 to 13: 2**bits codewords at most.

        Raises
        ------
        CodebookError
            Counts of the wrong number, negative, all zero or not integers.
        SettingError
            `bits` out of range.

        Notes
        -----
        Departs from QMoE (arXiv:2310.16795, section 4), whose dictionary is fixed: a fitted code is 10% smaller. Exact
        integer arithmetic, so the same table everywhere. A count of 0 is taken as 1, so every digit can be written.
        Among equally probable leaves the shortest is split first, then the lexicographically first (ascending digits).
        A leaf of 84 weights (63 for four digits) or 7 nonzeros is not split. Codewords are numbered in lexicographic
        order; a code left over stands for nothing and has length 0.

        Examples
        --------
        >>> Codebook.fit([115, 1770, 115], bits=8)
        Codebook.fit([115, 1770, 115], bits=8)
        """
        return cls("tunstall", tuple(counts), bits)

    @classmethod
    def choose(cls, counts: Iterable[int], digits: NDArray[np.int8] | None = None) -> Codebook:
        """Build the Tunstall code of 8 to 13 bits that serves such digits best.

        Parameters
        ----------
        counts : three or four int
            As for `fit`.
        digits : int8 array, shape (R, C), optional
            Rows of such digits, or a sample of them; what they take decides. Without them it is what long rows of
            independent digits would take.

        Raises
        ------
        CodebookError, ShapeError, DtypeError, DigitError
            As `fit` and `rate` do.

        Notes
        -----
        Of the codes of 8 to 12 bits within 2% of the smallest rate it is the one nearest to 10 bits, whose products are
        the fastest (a table of 4 KB, two nonzeros an entry), and the shorter of two as near. Where that has 12 bits,
        one of 13 is taken if it is smaller: with 95% zeros it takes 2% less, and its products are as fast. A model's
        digits are not independent: their rates differ from the expected ones by up to 6%, and in another way at each
        number of bits.

        Examples
        --------
        >>> Codebook.choose([115, 1770, 115]).bits, Codebook.choose([25, 950, 25]).bits
        (10, 13)
        """
        counts = cls.fit(counts).counts
        books = {bits: cls.fit(counts, bits) for bits in range(8, 14)}
        if digits is None:
            rates = {bits: books[bits].expected_bits_per_weight() for bits in range(8, 13)}
        else:
            rates = count_rates(counts, digits, range(8, 13))
        good = [bits for bits, rate in rates.items() if rate <= _RATE_MARGIN * min(rates.values())]
        chosen = min(good, key=lambda bits: (abs(bits - 10), bits))
        if chosen == 12:
            longer = books[13].expected_bits_per_weight() if digits is None else books[13].rate(digits)
            chosen = 13 if longer < rates[12] else 12
        return books[chosen]

    @staticmethod
    def paper() -> Codebook:
        """Return the dictionary that the paper's checkpoints are coded with: 65,536 codewords of 16 bits.

        Notes
        -----
        QMoE (arXiv:2310.16795), section 4: the most probable strings of 1 to 14 pairs of ternary digits where
        P(0) = 0.885, numbered as published. Rows are matched greedily, pair by pair; the last pair of a row of odd
        width ends in a zero beyond it. `counts` holds the nominal ones. Built once, in about a second.

        Examples
        --------
        >>> round(Codebook.paper().expected_bits_per_weight(), 3)
        0.735
        """
        return _paper()

    @property
    def digits(self) -> int:
        """Size of the alphabet: 3 (ternary) or 4 (two-bit)."""
        return len(self.counts)

    @property
    def alphabet(self) -> Alphabet:
        """The digits that the codes stand for."""
        return ALPHABETS[self.digits]

    @property
    def lowest_digit(self) -> int:
        """The alphabet's lowest digit: -1 or 0; the others follow without a gap."""
        return self.alphabet.lowest

    @cached_property
    def table(self) -> NDArray[np.uint64]:
        """Decode table: uint64, shape (2**bits,), read-only.

        Byte 0 is the number of weights; bytes 1 to 7 are one per nonzero, `digits * position + slot`, in ascending
        position. Ternary slots: 0 = digit +1, 1 = digit -1, 2 = zero; two-bit slots 0 to 2 = digits 1 to 3, 3 = zero.
        An absent nonzero is the zero slot of position 0.
        """
        left_over = (b"",) * ((1 << self.bits) - len(self._strings))
        table = table_entries(self._strings + left_over, self.digits)
        table.flags.writeable = False
        return table

    @cached_property
    def fields(self) -> tuple[int, ...]:
        """A tuple as long as the fields of an entry that a kernel reads; only its length counts, and is compiled."""
        return (0,) * next(count for count in _FIELD_COUNTS if count >= self.max_nonzeros)

    def gather_table(self, tokens: int) -> NDArray[Any]:
        """The table as the gather kernel of so many tokens reads it.

        Returns
        -------
        uint32 array, shape (2**bits,), where the fields leave room in it, else uint64
            The fields, first one lowest; above them the weights as a step in x: in bytes (4 * digits * tokens each)
            where `gather.STEP_IN_BYTES` holds their number, else in slots (digits each).
        """
        if tokens not in self._gather_tables:
            scale = self.digits * (4 * tokens if len(self.fields) in STEP_IN_BYTES else 1)
            self._gather_tables[tokens] = self._fields_first(self.table >> np.uint64(8), scale)
        return self._gather_tables[tokens]

    @cached_property
    def _gather_tables(self) -> dict[int, NDArray[Any]]:
        return {}

    @cached_property
    def split_table(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Two tables of the same dtype: positions for fields and above them the weights; the slots for fields."""
        positions, slots = np.zeros_like(self.table), np.zeros_like(self.table)
        for shift in range(0, 56, 8):
            fields = self.table >> np.uint64(shift + 8) & np.uint64(255)
            positions |= fields // np.uint64(self.digits) << np.uint64(shift)
            slots |= fields % np.uint64(self.digits) << np.uint64(shift)
        return self._fields_first(positions, 1), self._fields_first(slots, 0)

    def _fields_first(self, fields: NDArray[np.uint64], scale: int) -> NDArray[Any]:
        """Put `scale` times an entry's weights behind as many of seven fields as kernels look at."""
        above = np.uint64(8 * len(self.fields))
        lengths = (self.table & np.uint64(255)) * np.uint64(scale)
        table = fields & ((np.uint64(1) << above) - np.uint64(1)) | lengths << above
        return table.astype(np.uint32) if len(self.fields) <= 3 else table

    @cached_property
    def longest(self) -> int:
        """Most weights of a codeword."""
        return max(map(len, self._strings))

    @cached_property
    def max_nonzeros(self) -> int:
        """Most nonzeros of a codeword: how many fields of an entry a kernel must look at."""
        zero = self.alphabet.zero_symbol
        return max(len(string) - string.count(zero) for string in self._strings)

    @cached_property
    def automaton(self) -> Automaton:
        """The encoder's state machine."""
        return build_automaton(self._strings, self.digits)

    @cached_property
    def steps(self) -> Steps:
        """The automaton as the CPU's encoder walks it."""
        return walk_steps(self.automaton, self.digits)

    @cached_property
    def min_weights(self) -> int:
        """Fewest weights of a codeword."""
        return min(map(len, self._strings))

    @cached_property
    def _strings(self) -> tuple[bytes, ...]:
        """The codewords' digit strings as symbols (rank of the digit), by code."""
        return paper_strings() if self.kind == "paper" else tunstall_strings(self.counts, self.bits)

    def expected_bits_per_weight(self, counts: Iterable[int] | None = None) -> float:
        """Return the code bits per weight of a long row of independent digits that occur as often as `counts` says.

        Parameters
        ----------
        counts : three or four int, optional
            As for `fit`; by default the codebook's own.

        Raises
        ------
        CodebookError
            Counts that `fit` would refuse, or of another alphabet.

        Notes
        -----
        Codes only: no row lengths, no levels, no tail. bits / (mean weights of a codeword).
        """
        own = self.counts if counts is None else _checked_counts(counts)
        if len(own) != self.digits:
            raise CodebookError(f"counts has {len(own)} numbers; expected {self.digits}, one a digit of the codebook.")
        total = sum(own)
        shares = np.array([count / total for count in own])
        return self.bits / mean_length(self._strings, shares, whole=self.kind == "tunstall")

    def rate(self, digits: NDArray[np.int8]) -> float:
        """Return the code bits per weight that encoding `digits` would take, without encoding them.

        Parameters
        ----------
        digits : int8 array, shape (R, C)
            Rows are coded independently, tails included.

        Raises
        ------
        ShapeError, DtypeError, DigitError
            As :func:`qmoe_lite.coding.codec.encode` does.

        Notes
        -----
        Codes only: no row lengths, no levels.
        """
        return self.bits * int(self.count_codewords(digits).sum()) / digits.size

    def count_codewords(self, digits: NDArray[np.int8]) -> NDArray[np.int64]:
        """Count the codewords of each row; arguments and errors as for `rate`.

        Returns
        -------
        int64 array, shape (R,)
        """
        return count_codewords(digits, self.alphabet, self.steps)

    def to_config(self) -> dict[str, Any]:
        """Return what a checkpoint stores: kind, counts, bits, and the table's sha256 (little-endian bytes, hex)."""
        return {"kind": self.kind, "counts": list(self.counts), "bits": self.bits, "sha256": self._sha256}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Codebook:
        """Rebuild a codebook from what `to_config` returned.

        Raises
        ------
        FormatError
            A field is missing or unusable, or the rebuilt table has another sha256.
        """
        try:
            codebook = cls(config["kind"], tuple(config["counts"]), config["bits"])
            expected = config["sha256"]
        except (KeyError, TypeError) as error:
            raise FormatError(f"codebook config is unusable: {error}; expected kind, counts, bits, sha256.") from error
        except QMoEError as error:
            raise FormatError(f"codebook config is unusable: {error}") from error
        if codebook.kind == "paper":
            codebook = cls.paper()
        if codebook._sha256 != expected:
            raise FormatError(
                f"{codebook!r} has a table with sha256 {codebook._sha256}; the file says {expected}. "
                "The file is damaged or was written by another version."
            )
        return codebook

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(self.table.astype("<u8").tobytes()).hexdigest()

    def __repr__(self) -> str:
        return "Codebook.paper()" if self.kind == "paper" else f"Codebook.fit({list(self.counts)}, bits={self.bits})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_paper, ()) if self.kind == "paper" else (Codebook, (self.kind, self.counts, self.bits))


@cache
def _paper() -> Codebook:
    return Codebook("paper", PAPER_COUNTS, PAPER_BITS)


def _checked_counts(counts: Iterable[Any]) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(count) for count in counts)
    except TypeError as error:
        raise CodebookError(f"counts is {counts!r}; expected three or four integers. Pass digit counts.") from error
    if len(checked) not in ALPHABETS:
        raise CodebookError(f"counts has {len(checked)} numbers; expected 3 (ternary) or 4 (two-bit), one a digit.")
    if min(checked) < 0 or not 0 < sum(checked) < 1 << 63:
        raise CodebookError(f"counts is {list(checked)}; expected none negative, a sum from 1 to 2**63 - 1.")
    return checked
