"""T5 span corruption, and windows of text."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from qmoe_lite.compression import calibration as cal
from qmoe_lite.errors import SettingError, TextError

SENTINELS = np.arange(900, 800, -1)
EOS = 1


def undo(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Put the spans of the target back where their sentinels stand."""
    sentinels = set(SENTINELS.tolist())
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    text: list[int] = []
    for token in inputs[:-1].tolist():
        text += spans.pop(token) if token in sentinels else [token]
    assert not spans
    return text


@given(st.integers(2, 600), st.integers(0, 2**32 - 1))
def test_corruption_loses_no_token_and_masks_what_t5_masks(length, seed):
    tokens = np.arange(length) + 1000
    inputs, targets = cal.corrupt_spans(tokens, SENTINELS, EOS, np.random.default_rng(seed))
    assert undo(inputs, targets) == tokens.tolist()
    assert inputs[-1] == targets[-1] == EOS
    masked = int((targets >= 1000).sum())
    assert masked == min(max(round(length * 0.15), 1), length - 1)
    spans = int(np.isin(inputs, SENTINELS).sum())
    assert spans == min(max(round(masked / 3), 1), masked, length - masked)
    assert inputs[inputs <= 900][:-1].tolist() == SENTINELS[:spans].tolist()  # in order, from <extra_id_0> on
    assert inputs[0] == 1000  # the first stretch is kept


@pytest.mark.parametrize(("sequence_length", "window", "target"), [(512, 568, 114), (256, 284, 58), (128, 141, 29)])
def test_windows_are_as_long_as_t5_makes_them(sequence_length, window, target):
    assert cal.window_length(sequence_length) == window
    inputs, targets = cal.corrupt_spans(np.arange(window) + 1000, SENTINELS, EOS, np.random.default_rng(0))
    assert (len(inputs), len(targets)) == (sequence_length, target)


def test_every_length_fits_the_sequence(tokenizer):
    for length in range(16, 200):
        window = cal.window_length(length)
        inputs, _ = cal.corrupt_spans(np.arange(window) + 1000, SENTINELS, EOS, np.random.default_rng(0))
        assert len(inputs) <= length


def test_spans_are_spread_evenly_over_the_window():
    rng = np.random.default_rng(0)
    share = np.mean([cal.noise_mask(141, rng) for _ in range(4000)], axis=0)
    assert share[0] == 0
    assert share[-1] == 1  # T5's masks end with a masked span
    assert np.abs(share[20:-20] - 0.15).max() < 0.05


def test_too_few_sentinels_are_named():
    with pytest.raises(SettingError, match="7 masked spans but the tokenizer has 3 sentinels"):
        cal.corrupt_spans(np.arange(141), SENTINELS[:3], EOS, np.random.default_rng(0))


def test_sentinels_are_found_by_name(tokenizer):
    ids = cal.sentinel_ids(tokenizer)
    assert len(ids) == tiny.SENTINELS
    assert ids[0] == len(tokenizer) - 1  # T5 numbers them from the end


def make(tokenizer, tokens=1000, **changes):
    settings = {"seq2seq": True, "count": 10, "sequence_length": 32, "seed": 0, **changes}
    return cal.make_samples(np.arange(tokens) % 10 + 3, tokenizer, **settings)


def test_samples_are_seeded_and_all_of_one_length(tokenizer):
    first, again, other = make(tokenizer), make(tokenizer), make(tokenizer, seed=1)
    assert first.input_ids.shape == (10, 32)
    assert np.array_equal(first.input_ids, again.input_ids)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.input_ids, other.input_ids)
    assert first.predicted_tokens == first.labels.size


def test_a_short_text_is_masked_again_until_there_are_enough_samples(tokenizer):
    samples = make(tokenizer, tokens=100, count=20)
    assert len(samples) == 20
    assert samples.windows == 2
    assert len({row.tobytes() for row in samples.input_ids}) > 10


def test_a_text_shorter_than_a_window_is_one_window(tokenizer):
    samples = make(tokenizer, tokens=12, count=None)
    assert samples.windows == 1
    assert undo_lengths(samples) == 12


def undo_lengths(samples) -> int:
    special = (samples.input_ids > 14) | (samples.input_ids == EOS)
    targets = (samples.labels > 14) | (samples.labels == EOS)
    return int((~special).sum() + (~targets).sum())


def test_causal_windows_are_plain_text_and_each_is_given_once(tokenizer):
    samples = make(tokenizer, seq2seq=False, count=1000)
    assert samples.labels is None
    assert samples.input_ids.shape == (31, 32)
    assert samples.predicted_tokens == 31 * 31


@pytest.mark.parametrize("tokens", [0, 7])
def test_empty_text_is_refused(tokenizer, tokens):
    with pytest.raises(TextError, match=f"{tokens} tokens, at least 8 needed"):
        make(tokenizer, tokens=tokens)


@pytest.mark.parametrize(("changes", "message"), [({"sequence_length": 8}, "too short"), ({"count": 0}, "at least 1")])
def test_settings_out_of_range_are_refused(tokenizer, changes, message):
    with pytest.raises(SettingError, match=message):
        make(tokenizer, **changes)


def test_masks_leave_out_sentinels_and_the_positions_before_them(tokenizer):
    samples = make(tokenizer)
    encoder, decoder = cal.hessian_masks(samples, tokenizer)
    sentinels = set(cal.sentinel_ids(tokenizer).tolist())
    for row, mask in zip(samples.input_ids, encoder, strict=True):
        assert [token not in sentinels for token in row.tolist()] == mask.tolist()
    # the decoder is given the labels shifted by one: position t is just before label t
    for row, mask in zip(samples.labels, decoder, strict=True):
        assert [token not in sentinels for token in row.tolist()] == mask.tolist()
    assert not decoder[:, 0].any()


def test_reading_stops_when_there_are_enough_tokens(tokenizer):
    def endless():
        while True:
            yield "expert router token " * 10

    assert len(cal.read_tokens(endless(), tokenizer, wanted=100, seq2seq=True)) == 120
