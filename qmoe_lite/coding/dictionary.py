"""The code of digits with any number of values: trees of digit strings, the next one chosen by the last string's class.

A string that ended says what the next digit is not: none of those that it could have gone on with. So the strings that
may follow are those of a tree without them; codewords are numbered so that their top two bits tell the class, and the
table's index is a window of the stream that overlaps the codeword before by those two bits.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmoe_lite.coding.chain import follow_chain
from qmoe_lite.coding.exceptions import count_exceptions
from qmoe_lite.coding.fitting import EXCEPTION_BITS, LARGEST_CLIP, digit_chances, exception_bits, fit_trees
from qmoe_lite.coding.trees import FAULTS, MOST_DIGITS, Trees, encoder_entries, read_trees, window_tables
from qmoe_lite.coding.windows import count_codewords
from qmoe_lite.errors import CodebookError, DigitError, DtypeError, FormatError, QMoEError, SettingError, ShapeError

KIND = "windows"
_MOST_NODES = 65535  # of all trees: each codeword of 12 bits in four trees has one, and their parents
_WIDTHS = (8, 16, 32)  # digits of a table's row
_COUNTED = 1 << 20  # digits counted at a time: each takes 8 bytes meanwhile


@dataclass(frozen=True, repr=False)
class Dictionary:
    """The digit strings behind the windows of a stream; made by `Dictionary.fit`, never changed.

    Parameters
    ----------
    bits : int
        Bits of a codeword, 9 to 12.
    clip : int
        Largest digit of the strings, 1 to 30; what digits have beyond it is stored as exceptions.
    longest : int
        Digits of the longest string, 1 to 32.
    starts : tuple of int
        Smallest kind of each class, 1 to 4 classes, ascending from 0.
    quarters : tuple of int
        Quarters of the codewords that each class has.
    kinds : bytes
        Of the trees' nodes in preorder, one a node; see :mod:`qmoe_lite.coding.trees`.

    Raises
    ------
    SettingError
        A number out of range.
    CodebookError
        Kinds that are no trees.

    Notes
    -----
    Two dictionaries are equal when all of these are.
    """

    bits: int
    clip: int
    longest: int
    starts: tuple[int, ...]
    quarters: tuple[int, ...]
    kinds: bytes

    def __post_init__(self) -> None:
        _check_number("bits", self.bits, 9, 12)
        _check_number("clip", self.clip, 1, LARGEST_CLIP)
        _check_number("longest", self.longest, 1, MOST_DIGITS)
        starts, quarters = self.starts, self.quarters
        numbers = all(type(number) is int for number in (*starts, *quarters))
        ascending = numbers and all(a < b for a, b in pairwise((*starts, self.clip + 1)))
        if not (ascending and starts and starts[0] == 0):
            raise CodebookError(
                f"starts is {starts}; expected integers ascending from 0, at most the clip {self.clip}."
            )
        if len(quarters) != len(starts) or min(quarters) < 1 or sum(quarters) != 4:
            raise CodebookError(f"quarters is {quarters}; expected 4 of them shared by {len(starts)} classes.")
        fault = self._read[0]
        if fault:
            raise CodebookError(f"the dictionary's kinds are no trees: {FAULTS[fault]}. Use Dictionary.fit(digits).")

    def __reduce__(self) -> Any:
        return Dictionary, (self.bits, self.clip, self.longest, self.starts, self.quarters, self.kinds)

    def __repr__(self) -> str:
        return f"<Dictionary of {self.entries} strings: bits {self.bits}, clip {self.clip}, longest {self.longest}>"

    @classmethod
    def fit(
        cls, digits: ArrayLike, bits: int = 10, *, clip: int | None = None, longest: int | None = None
    ) -> Dictionary:
        """Build the dictionary that takes the fewest bits for such digits.

        Parameters
        ----------
        digits : integer array, any shape, at least one digit
            Digits, or a sample of them; of size 32767 at most.
        bits, clip, longest
            As for `fit_counts`.

        Raises
        ------
        DtypeError, ShapeError, DigitError
            `digits` is no array of integers, empty, or holds one beyond 16 bits.
        SettingError
            A number out of range.

        Examples
        --------
        >>> dictionary = Dictionary.fit(np.array([0, 0, 1, 0, -1, 0, 2, 0]))
        >>> dictionary.bits, dictionary.clip
        (10, 2)
        """
        return cls.fit_counts(count_sizes(digits), bits, clip=clip, longest=longest)

    @classmethod
    def fit_counts(
        cls, counts: Iterable[int], bits: int = 10, *, clip: int | None = None, longest: int | None = None
    ) -> Dictionary:
        """Build the dictionary that takes the fewest bits for independent digits of such sizes.

        Parameters
        ----------
        counts : sequence of int, none negative, not all zero
            How many digits have the size 0, 1, 2, ..; from `count_sizes`.
        bits : int, default 10
            Bits of a codeword, 9 to 12.
        clip : int, optional
            Largest digit of the strings, 1 to 30; by default the one that takes the fewest bits, exceptions counted.
        longest : int, optional
            Digits of the longest string, 1 to 32; by default 8, or 16 where that saves 0.5%, or 32 where it saves 5%.
            Behind 8 digits strings have zeros only, by default where that costs at most 1.25%.

        Raises
        ------
        CodebookError
            Counts that are negative, all zero or not integers.
        SettingError
            A number out of range.

        Notes
        -----
        A digit and its negative are taken as equally probable, as a network's weights are, and a count of 0 as a half.
        The trees are grown by :func:`qmoe_lite.coding.growth.grow_trees`. Floats decide only which trees are best, and
        a file holds the trees.
        """
        sizes = _checked_counts(counts)
        _check_number("bits", bits, 9, 12)
        if clip is not None:
            _check_number("clip", clip, 1, LARGEST_CLIP)
        if longest is not None:
            _check_number("longest", longest, 1, MOST_DIGITS)
        return cls(bits, *fit_trees(sizes, bits, clip, longest))

    @property
    def kind(self) -> str:
        """What config.json calls the code."""
        return KIND

    @property
    def entries(self) -> int:
        """How many digit strings the trees hold."""
        return int((self.trees.numbers >= 0).sum())

    @property
    def width(self) -> int:
        """Digits of a row of `digits_table`: 8, 16 or 32."""
        return next(width for width in _WIDTHS if width >= self.longest)

    @property
    def trees(self) -> Trees:
        """Nodes of the trees."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[int, Trees]:
        kinds = np.frombuffer(self.kinds, dtype=np.uint8)
        quotas = np.array(self.quarters) << self.bits >> 2
        return read_trees(kinds, self.clip, self.longest, np.array(self.starts), quotas)

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
        return _read_only(*window_tables(self.trees, self.bits, self.width, self.quarters))

    @property
    def digits_table(self) -> NDArray[np.int8]:
        """Digits of each window's string, zeros behind: int8, shape (4 * 2**bits, width), read-only."""
        return self._tables[0]

    @cached_property
    def heads_table(self) -> NDArray[np.int8]:
        """The first 8, 16 or 32 columns of `digits_table`: as few as hold all digits but zeros. Read-only."""
        used = int(np.flatnonzero(self.digits_table.any(0)).max(initial=0)) + 1
        width = next(width for width in _WIDTHS if width >= used)
        table = self.digits_table if width == self.width else np.ascontiguousarray(self.digits_table[:, :width])
        return _read_only(table)[0]

    @property
    def lengths(self) -> NDArray[np.uint8]:
        """Digits of each window's string, 0 where it occurs in no stream: uint8, shape (4 * 2**bits,), read-only."""
        return self._tables[1]

    @cached_property
    def encoder(self) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
        """Nodes as the encoder walks them; see :func:`qmoe_lite.coding.trees.encoder_entries`."""
        return _read_only(*encoder_entries(self.trees, self.clip, np.array(self.starts)))

    def rate(self, digits: NDArray[Any]) -> float:
        """Return the stored bits a digit that encoding `digits` would take: codewords and exceptions.

        Parameters
        ----------
        digits : integer array, shape (R, C)
            Rows are coded independently, tails included.

        Raises
        ------
        DtypeError, ShapeError, DigitError
            `digits` is no matrix of integers, empty, or holds one beyond 16 bits.

        Notes
        -----
        Neither the rows' lengths and steps nor where blocks of exceptions begin.
        """
        array = checked_digits(digits)
        codewords = int(count_codewords(array, self.clip, *self.encoder).sum())
        return (self.bits * codewords + EXCEPTION_BITS * count_exceptions(array, self.clip)) / array.size

    def count_codewords(self, digits: NDArray[Any]) -> NDArray[np.int64]:
        """Count the codewords of each row: int64, shape (R,); arguments and errors as for `rate`."""
        return count_codewords(checked_digits(digits), self.clip, *self.encoder)

    def expected_bits(self, counts: Iterable[int]) -> float:
        """Return the stored bits a digit of a long row of independent digits: codewords and exceptions.

        Parameters
        ----------
        counts : sequence of int
            How many digits have the size 0, 1, 2, ..; as for `fit_counts`.

        Raises
        ------
        CodebookError
            Counts that `fit_counts` would refuse.
        """
        sizes = _checked_counts(counts)
        trees = self.trees
        single = digit_chances(sizes, self.clip)
        chances = np.array([*single, 1.0])
        inside = np.arange(MOST_DIGITS) < trees.lengths[:, None]
        size = np.abs(trees.strings).astype(np.int64)
        chance = np.where(inside[:, 1:], chances[size[:, 1:]], 1.0).prod(1) * np.where(size[:, 0] > 0, 0.5, 1.0)
        gained = np.zeros((len(self.starts), self.clip + 1))
        np.add.at(gained, (trees.trees, size[:, 0]), chance)
        ends = np.zeros((len(self.starts), self.clip + 1, self.clip + 1))
        words = np.flatnonzero(trees.numbers >= 0)
        share = single * np.where(np.arange(self.clip + 1) > 0, 2.0, 1.0)
        left = share[::-1].cumsum()[::-1]  # probability of the digits of at least each size
        kinds = trees.kinds[words]
        np.add.at(ends, (trees.trees[words], size[words, 0], kinds), chance[words] * left[kinds])
        classes = np.searchsorted(np.array(self.starts), np.arange(self.clip + 1), side="right") - 1
        arriving = np.full(self.clip + 1, 1.0 / (self.clip + 1))
        digits, _ = follow_chain(single, classes, gained, ends, arriving)
        return self.bits / float(digits) + exception_bits(sizes, self.clip)

    def to_config(self) -> dict[str, Any]:
        """Return what a checkpoint stores: the numbers, the trees (their kinds packed, base64) and their sha256."""
        return {
            "kind": KIND,
            "bits": self.bits,
            "clip": self.clip,
            "longest": self.longest,
            "starts": list(self.starts),
            "quarters": list(self.quarters),
            "nodes": len(self.kinds),
            "trees": base64.b64encode(self._packed).decode("ascii"),
            "sha256": hashlib.sha256(self._packed).hexdigest(),
        }

    @cached_property
    def _packed(self) -> bytes:
        """The kinds, each in as many bits as the largest needs, least significant bit first."""
        each = _kind_bits(self.clip)
        kinds = np.frombuffer(self.kinds, dtype=np.uint8)
        return np.packbits(kinds[:, None] >> np.arange(each, dtype=np.uint8) & 1, bitorder="little").tobytes()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Dictionary:
        """Rebuild a dictionary from what `to_config` gave.

        Raises
        ------
        FormatError
            A field is missing or unusable, the trees have another sha256, or are no trees.
        """
        try:
            if config["kind"] != KIND:
                raise FormatError(f'dictionary config has kind {config["kind"]!r}; expected "{KIND}".')
            packed = base64.b64decode(config["trees"], validate=True)
            found, expected = hashlib.sha256(packed).hexdigest(), config["sha256"]
            if found != expected:
                raise FormatError(
                    f"the dictionary's trees have sha256 {found}; the file says {expected}. "
                    "The file is damaged; get it again."
                )
            _check_number("clip", config["clip"], 1, LARGEST_CLIP)
            kinds = _unpack(packed, config["nodes"], _kind_bits(config["clip"]))
            numbers = config["bits"], config["clip"], config["longest"]
            dictionary = cls(*numbers, tuple(config["starts"]), tuple(config["quarters"]), kinds)
            if dictionary._packed != packed:
                raise FormatError("the dictionary's trees have data behind them. The file is damaged; get it again.")
            return dictionary
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            if isinstance(error, QMoEError):
                raise FormatError(f"dictionary config is unusable: {error}") from error
            raise FormatError(
                f"dictionary config is unusable: {error}; expected bits, clip, longest, starts, quarters, nodes, "
                "trees, sha256."
            ) from error


def count_sizes(digits: ArrayLike) -> NDArray[np.int64]:
    """Count the digits of each absolute value: int64, shape (largest + 1,); errors as for `Dictionary.fit`."""
    array = checked_digits(np.asarray(digits).reshape(1, -1)).ravel()
    found = np.zeros(1, dtype=np.int64)
    for start in range(0, len(array), _COUNTED):
        some = np.bincount(np.abs(array[start : start + _COUNTED]), minlength=len(found))
        some[: len(found)] += found
        found = some
    return found


def checked_digits(digits: NDArray[Any]) -> NDArray[np.int16]:
    """Return digits (R, C) as a contiguous int16 array; errors as for `Dictionary.rate`."""
    if not isinstance(digits, np.ndarray) or digits.dtype.kind not in "iu":
        found = getattr(digits, "dtype", type(digits).__name__)
        raise DtypeError(f"digits is {found}; expected a NumPy array of integers, such as int16.")
    if digits.ndim != 2 or digits.size == 0:
        raise ShapeError(f"digits has shape {digits.shape}; expected (rows, columns), at least one of each.")
    if digits.dtype != np.int8 and (int(digits.max()) > 32767 or int(digits.min()) < -32767):
        raise DigitError(
            f"digits holds {int(digits.min())} to {int(digits.max())}; expected -32767 to 32767. Take a larger step."
        )
    return np.ascontiguousarray(digits, dtype=np.int16)


def _checked_counts(counts: Iterable[int]) -> NDArray[np.int64]:
    try:
        sizes = np.array([operator.index(count) for count in counts], dtype=np.int64)
    except (TypeError, OverflowError) as error:
        raise CodebookError(f"counts is unusable: {error}; expected integers, one for each size of digit.") from error
    if len(sizes) == 0 or sizes.min() < 0 or sizes.sum() == 0:
        raise CodebookError("counts are negative, all zero or none; expected how many digits have the size 0, 1, 2, ..")
    return sizes


def _check_number(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise SettingError(f"{name} is {value!r}; expected an integer from {least} to {most}.")


def _kind_bits(clip: int) -> int:
    """Return the bits that a kind, 0 to clip + 1, takes in a file."""
    return (clip + 1).bit_length()


def _unpack(packed: bytes, nodes: int, each: int) -> bytes:
    """Read so many kinds of `each` bits."""
    if type(nodes) is not int or not 1 <= nodes <= _MOST_NODES or -(-nodes * each // 8) != len(packed):
        raise FormatError(f"the dictionary's trees have {len(packed)} bytes for {nodes!r} nodes of {each} bits.")
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    kinds = bits[: nodes * each].reshape(nodes, each) << np.arange(each, dtype=np.uint8)
    return kinds.sum(1, dtype=np.uint8).tobytes()


def _read_only(*arrays: NDArray[Any]) -> Any:
    for array in arrays:
        array.flags.writeable = False
    return arrays
