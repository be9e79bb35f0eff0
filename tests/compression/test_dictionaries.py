"""Which dictionary a projection takes: another one only where that pays for storing it."""

from __future__ import annotations

import numpy as np

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.compression.dictionaries import Dictionaries


def test_none_is_fitted_where_too_few_digits_could_pay_for_it(monkeypatch):
    dictionaries = Dictionaries(9)
    narrow, wide = np.array([900, 90, 10]), np.array([500, 400, 100])
    first = dictionaries.choose(narrow)
    assert first == Dictionary.fit_counts(narrow, 9)
    dictionaries.use(first)
    fits = []
    fit = Dictionary.fit_counts
    monkeypatch.setattr(Dictionary, "fit_counts", lambda *given: fits.append(1) or fit(*given))
    assert dictionaries.choose(wide) == first
    assert not fits, "a thousand digits save less than the 512 bytes of any dictionary"
    other = dictionaries.choose(wide * 1000)
    assert fits
    assert other == fit(wide * 1000, 9)
    assert other != first
