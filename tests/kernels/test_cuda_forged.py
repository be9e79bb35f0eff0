"""What validation lets pass of forged matrices stays inside its rows on a GPU too; what it refuses reaches no kernel.

The emulator raises at the first index outside an array, and at a store that does not fit.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("greenlet", reason="the emulator runs one greenlet a thread; pip install 'qmoe-lite[dev]'")

import emulator
from checks import draw_digits, draw_windows, window_book

from qmoe_lite.coding import codec as cpu_codec
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.validation import validate
from qmoe_lite.cuda import codec, gather, launch, matmul, windows, windows_product
from qmoe_lite.errors import FormatError, SettingError

COLUMNS = 61


@pytest.fixture
def emulated(monkeypatch):
    emulator.install(monkeypatch, seed=7)
    for module in (gather, windows_product):
        monkeypatch.setattr(module, "WARPS", (1, 2))
    monkeypatch.setattr(windows, "WARPS", 2)
    monkeypatch.setattr(codec, "WARPS", 2)


def draw(name):
    rng = np.random.default_rng(0)
    if name.startswith("windows"):
        return draw_windows(rng, window_book(int(name.split()[-1])), (3, COLUMNS), outliers=0.1)
    book = {"ternary": Codebook.fit([1, 8, 1], bits=8), "two-bit": Codebook.fit([8, 2, 1, 1], bits=8)}[name]
    levels = torch.from_numpy(rng.standard_normal((3, book.digits - 1)).astype(np.float32))
    return cpu_codec.encode(draw_digits(rng, book.counts, (3, COLUMNS)), levels, book)


def forgeries(packed, parts, count):
    """Copies with one bit of a part that is another."""
    rng = np.random.default_rng(1)
    for i in range(count):
        name = parts[i % len(parts)]
        tensor = getattr(packed, name).clone()
        content = tensor.view(torch.uint8).numpy()
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        yield dataclasses.replace(packed, **{name: tensor}, _validated=False)


@pytest.mark.parametrize("name", ["ternary", "two-bit", "windows 8", "windows 32"])
def test_forged_matrices_stay_in_their_rows(emulated, name):
    packed = draw(name)
    parts = ["codes", "row_codewords"]
    if name.startswith("windows"):
        parts += ["exception_positions", "exception_values", "exception_starts"]
    x, accepted, refused = torch.randn(2, COLUMNS), 0, 0
    for forged in forgeries(packed, parts, 60):
        try:
            expected, _ = cpu_codec.decode(forged)
        except FormatError:
            refused += 1
            continue
        accepted += 1
        if accepted > 4:  # the emulator takes its time
            continue
        assert torch.equal(codec.decode(forged)[0], expected)
        dense, y = forged.dense().double(), matmul.decode_matmul(forged, x)
        assert ((y - x.double() @ dense.T).abs() <= 1e-5 * (x.double().abs() @ dense.abs().T)).all()
    assert accepted > 3
    assert refused > 3


@pytest.mark.parametrize("name", ["ternary", "two-bit", "windows 8"])
def test_what_is_refused_reaches_no_kernel(emulated, monkeypatch, name):
    monkeypatch.setattr(launch.Kernel, "launch", lambda *_, **__: pytest.fail("a kernel ran"))
    packed, x = draw(name), torch.ones(COLUMNS)
    longer = packed.row_codewords.clone()
    longer[0] += 1
    for changes in ({"codes": packed.codes[:-1]}, {"row_codewords": longer}, {"columns": 1}):
        forged = dataclasses.replace(packed, **changes, _validated=False)
        with pytest.raises(FormatError):
            validate(forged)
        for use in (
            codec.decode,
            lambda m: codec.decode_dense(m, torch.float32),
            lambda m: matmul.decode_matmul(m, x[: m.columns]),
        ):
            with pytest.raises(SettingError, match="has not been validated"):
                use(forged)
