"""How many calibration tokens experts got, and what twice the text would bring."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from qmoe_lite.checkpoint.expert_tokens import ExpertTokens
from qmoe_lite.checkpoint.report import FILE_NAME, read_report
from qmoe_lite.errors import FormatError


def test_the_figures_are_those_of_the_tokens():
    found = ExpertTokens.of([(0, 64), (10, 64), (63, 64), (64, 64), (500, 64)])
    assert (found.experts, found.fewest, found.median, found.most, found.starved) == (5, 0, 63, 500, 3)
    assert found.starved_at_twice == pytest.approx(2, abs=1e-6), "the first two stay so, as far as one can know"


def test_what_twice_the_text_brings_is_what_drawing_it_brings():
    rng = np.random.default_rng(0)
    tokens, columns = rng.poisson(35, 300), 64
    drawn = [(tokens + rng.poisson(tokens) < columns).sum() for _ in range(200)]
    found = ExpertTokens.of((int(count), columns) for count in tokens)
    assert found.starved == 300
    assert found.starved_at_twice == pytest.approx(np.mean(drawn), rel=0.02)


def test_a_report_sums_up_each_layer_by_its_widest_matrix(compressed):
    report = compressed[1]
    [encoder, decoder] = report.tokens_of_layers.values()
    rows = {(row.layer, row.projection): row for row in report.projections}
    for name, found in report.tokens_of_layers.items():
        tokens = rows[name, "wo"].tokens
        assert found.starved == sum(count < max(rows[name, each].columns for each in ("wi", "wo")) for count in tokens)
        assert (found.fewest, found.most) == (min(tokens), max(tokens))
    both = report.tokens_of_all
    assert (both.experts, both.starved) == (8, encoder.starved + decoder.starved)
    assert both.fewest == min(encoder.fewest, decoder.fewest)
    assert report.to_json()["tokens_per_expert"].keys() == report.held_out_error.keys()


def test_without_text_there_is_nothing_to_sum_up(compressed):
    rows = [replace(row, tokens=[0] * row.experts) for row in compressed[1].projections]
    report = replace(compressed[1], projections=rows)
    assert report.tokens_of_layers == {}
    assert report.tokens_of_all is None


@pytest.mark.parametrize(("field", "value"), [("tokens", [1, 10**400]), ("tokens", [-1]), ("columns", 10**400)])
def test_a_report_with_numbers_that_nothing_was_counted_to_is_none(compressed, tmp_path, field, value):
    content = compressed[1].to_json()
    content["projections"][0][field] = value
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(FormatError, match="is no report of qmoe compress"):
        read_report(tmp_path)
