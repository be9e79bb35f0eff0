"""Reads and multiplies matrices whose tensors touch memory that nobody may touch: a byte too far ends the process.

Run as a program: prints what it did, and is killed by the first read or write outside a tensor. Half of the matrices
are forged, some in a way that validation accepts; the other half of the way is its own: it must be safe on any bytes.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import torch
from checks import draw_digits, draw_windows, window_book
from guard_pages import guarded

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import decode, encode
from qmoe_lite.coding.decode_kernels import decode_rows
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.matmul import decode_matmul
from qmoe_lite.coding.stream import row_starts
from qmoe_lite.coding.validation import validate
from qmoe_lite.coding.window_parts import exceptions_of
from qmoe_lite.coding.windows import decode_rows as decode_window_rows
from qmoe_lite.errors import QMoEError

FORGED = 40  # of each matrix


def put(tensor, at_end):
    """A copy of a tensor there."""
    if not tensor.numel():
        return tensor
    data = guarded(tensor.nbytes, at_end)
    data[:] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)


def use(packed, at_end):
    """Validate, decode and multiply; each row into memory of its own. None where it is refused."""
    rows, columns = packed.shape
    try:
        validate(packed)
    except QMoEError as error:
        if "\n" in str(error):
            raise
        return None
    digits, _ = decode(packed)
    packed.dense()
    for tokens in (1, 5):
        decode_matmul(packed, put(torch.ones(tokens, columns), at_end))
    codes, starts = packed.codes.numpy(), row_starts(packed.count_codewords().numpy())
    for row in range(rows):
        out = put(torch.full((1, columns), -77, dtype=digits.dtype), at_end)
        if isinstance(packed.codebook, Dictionary):
            tables = packed.codebook.bits, packed.codebook.digits_table, packed.codebook.lengths
            decode_window_rows(codes, starts, *tables, exceptions_of(packed), row, out.numpy())
        else:
            values = torch.tensor([packed.codebook.alphabet.slot_digits] * rows, dtype=torch.int8)
            decode_rows(codes, packed.codebook, values, starts, row, out)
        assert torch.equal(out[0], digits[row])
    return digits


def matrices():
    """A matrix of each code, narrow and wide ones."""
    rng = np.random.default_rng(0)
    books = {"ternary": (Codebook.fit([115, 1770, 115], bits=8), 2), "two-bit": (Codebook.fit([885, 50, 40, 25]), 3)}
    for shape in ((1, 1), (5, 29), (3, 1000)):
        for name, (book, width) in books.items():
            levels = torch.from_numpy(rng.standard_normal((shape[0], width)).astype(np.float32))
            yield f"{name} {shape}", encode(draw_digits(rng, book.counts, shape), levels, book)
        for longest in (8, 32):
            yield f"windows of {longest} {shape}", draw_windows(rng, window_book(longest), shape, outliers=0.05)


def forge(packed, rng):
    """The tensors of a matrix, some bytes of which are others; or its width, or its least number of codewords."""
    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    name = str(rng.choice([name for name, tensor in tensors.items() if tensor.numel()]))
    changes = {}
    match rng.integers(6):
        case 0:
            changes["columns"] = int(rng.choice([1, packed.columns + 1, 2 * packed.columns, 65535, 0, 1 << 40]))
        case 1:
            changes["fewest_codewords"] = int(rng.choice([0, packed.fewest_codewords + 1, 65535, -1]))
        case 2:
            tensors[name] = tensors[name][: int(rng.integers(len(tensors[name])))].contiguous()
        case _:
            content = tensors[name].view(-1).view(torch.uint8).numpy()
            for place in rng.integers(len(content), size=rng.integers(1, 4)):
                content[place] ^= 1 << rng.integers(8)
    return tensors, changes


def main():
    rng = np.random.default_rng(int(sys.argv[1]))
    for name, packed in matrices():
        for at_end in (True, False):
            placed = {part: put(tensor, at_end) for part, tensor in packed.tensors.items()}
            found = use(dataclasses.replace(packed, **placed, _validated=False), at_end)
            assert torch.equal(found, decode(packed)[0])
        outcomes = [0, 0]
        for i in range(FORGED):
            tensors, changes = forge(packed, rng)
            placed = {part: put(tensor, i % 2 == 0) for part, tensor in tensors.items()}
            found = use(dataclasses.replace(packed, **placed, **changes, _validated=False), i % 2 == 0)
            outcomes[found is None] += 1
        sys.stdout.write(f"{name}: {outcomes[0]} accepted, {outcomes[1]} refused\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
