"""Losses in slices, paired gaps, and the words for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qmoe_lite.compression import losses
from qmoe_lite.compression.losses import IGNORED, Gap, paired_gap, summed_loss
from qmoe_lite.compression.verdict import judge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_slices_is_the_loss(monkeypatch, dtype):
    monkeypatch.setattr(losses, "SLICE_VALUES", 7 * 50)
    logits, labels = torch.randn(31, 50).to(dtype), torch.randint(0, 50, (31,))
    labels[::5] = IGNORED
    expected = sum(
        -torch.log_softmax(row.float(), -1)[label] for row, label in zip(logits, labels, strict=True) if label >= 0
    )
    assert summed_loss(logits, labels) == pytest.approx(float(expected), rel=1e-5)


def test_a_head_stays_where_it_is_if_the_device_has_no_room_and_the_report_says_so():
    weight, notes = torch.randn(3, 2), []
    assert losses.head_on(weight, "cpu", notes) is weight
    assert not notes

    class Large:
        def to(self, device):
            raise torch.OutOfMemoryError

    large = Large()
    for _ in range(2):
        assert losses.head_on(large, "cuda:0", notes) is large
    assert [note.split(":0 ")[1] for note in notes] == [
        "has no room for the output matrix: predictions were compared on the CPU, which takes longer"
    ]


def test_a_gap_is_of_sums_and_its_error_is_that_of_equal_samples():
    rng = np.random.default_rng(0)
    reference, more = rng.normal(300, 50, 400), rng.normal(10, 3, 400)
    gap = paired_gap(reference + more, reference, [100] * 400)
    assert gap.nats == pytest.approx(more.mean() / 100)
    assert gap.standard_error == pytest.approx(more.std(ddof=1) / 20 / 100)
    assert math.isnan(paired_gap([5.0], [4.0], [1]).standard_error)


def test_samples_count_by_their_tokens():
    assert paired_gap([10.0, 2.0], [0.0, 0.0], [10, 2]) == Gap(1.0, 0.0)


@pytest.mark.parametrize(
    ("gap", "word"), [(-0.1, "fine"), (0.1, "fine"), (0.3, "usable"), (0.9, "degraded"), (1.1, "unusable")]
)
def test_words(gap, word):
    verdict = judge(3.0, Gap(gap, 0.01), 100, 50_000, 2.0, 4.0)
    assert (verdict.word, bool(verdict.advice)) == (word, word != "fine")
    assert verdict.loss == 3.0 + gap
    assert str(verdict).startswith(f"{word}: held-out loss 3.000 -> {3 + gap:.3f}")


def test_worse_than_guessing_evenly_is_unusable():
    assert judge(2.9, Gap(0.2, 0.01), 100, 20, 2.0, 4.0).word == "unusable"
    assert judge(2.9, Gap(math.nan, 0.01), 100, 20, 2.0, 4.0).word == "unusable"


@pytest.mark.parametrize(
    ("rate", "advice"), [(None, "--rate: 2 to 3"), (0.8, "--rate 1.8"), (3.5, "--rate 4"), (4.0, "more calibration")]
)
def test_advice_names_what_to_change(rate, advice):
    assert advice in judge(3.0, Gap(2.0, 0.1), 100, 50_000, rate, 4.0).advice


def test_a_verdict_without_an_error_is_json():
    assert judge(3.0, Gap(0.0, math.nan), 9, 50, None, 4.0).to_json()["standard_error"] is None
