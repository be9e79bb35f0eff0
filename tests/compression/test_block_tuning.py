"""Tuning by block: experts learn what is missing with their digits as they are, and a run that stops ends the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from checks import Killed
from transformers import AutoModelForCausalLM

import qmoe_lite as qm
from qmoe_lite.compression.choice import TRAINED_RATE, choose
from qmoe_lite.compression.correction import Correction, Lack
from qmoe_lite.compression.expert_training import measured, train_expert
from qmoe_lite.compression.layer_parts import Linear
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.settings import Settings
from qmoe_lite.errors import SettingError
from qmoe_lite.inspection.verification import verify
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.routing import Assignment

NOTHING, ROWS = Lack(4, None, torch.ones(4)), torch.arange(4)
SETTINGS = {"samples": 16, "sequence_length": 32, "validation_samples": 2, "rate": 1.6}


def layer_of(rows, inner):
    return MoELayer(
        "experts", "block", 1, {"gate_proj": (inner, rows), "up_proj": (inner, rows), "down_proj": (rows, inner)}
    )


def run(matrices, x):
    """Return what an expert puts out, its matrices by projection."""
    inside = torch.nn.functional.silu(matrices["gate_proj"].of(x)) * matrices["up_proj"].of(x)
    return matrices["down_proj"].of(inside)


@pytest.mark.parametrize(("scaled", "biased"), [(True, False), (False, False), (True, True)])
def test_an_expert_learns_what_its_rows_and_columns_were_divided_by(scaled, biased):
    layer, generator = layer_of(8, 12), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    act = torch.nn.functional.silu
    dense = {
        name: Linear(draw(*shape) / 3, draw(shape[0]) / 3 if biased else None, act)
        for name, shape in layer.shapes.items()
    }
    x, gates = draw(5000, 8), torch.rand(5000, 1, generator=generator)
    goal = run(dense, x) * gates
    wrong = {
        name: replace(each, weight=each.weight * (1 + 0.1 * draw(len(each.weight), 1))) for name, each in dense.items()
    }
    with torch.inference_mode():
        found = train_expert(layer, wrong, scaled, x, gates, goal, (0,))
        again = train_expert(layer, wrong, scaled, x, gates, goal, (0,))
    assert found.after < 0.2 * found.before
    assert found.rows.keys() == layer.shapes.keys()
    assert set(found.columns) == ({"gate_proj", "down_proj"} if scaled else set())
    assert all(torch.equal(each, again.rows[name]) for name, each in found.rows.items())
    learnt = {}
    for name, each in wrong.items():  # the projections of a stage share their columns' factors
        columns = found.columns.get(layer.first_of_stage(name), torch.ones(1))
        learnt[name] = replace(each, weight=each.weight * found.rows[name][:, None] * columns)
    some = measured(len(x))
    assert len(some) == 1024
    assert some[-1] == 5000 - 5
    lacks = run(learnt, x[some]) * gates[some] - goal[some]
    assert found.after == pytest.approx(float(lacks.square().sum()), rel=1e-3)


def test_a_goal_of_zeros_changes_nothing():
    layer = layer_of(4, 4)
    matrices = {name: Linear(torch.eye(4), None, torch.nn.functional.silu) for name in layer.shapes}
    found = train_expert(layer, matrices, True, torch.ones(3, 4), torch.ones(3, 1), torch.zeros(3, 4), (0,))
    assert found.before == found.after
    assert all(torch.equal(each, torch.ones(4)) for each in found.rows.values())


def test_what_an_expert_lacks_is_measured_with_factors_that_can_be_stored():
    layer = layer_of(4, 4)
    matrices = {name: Linear(torch.eye(4), None, torch.nn.functional.silu) for name in layer.shapes}
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    given = layer, matrices, True, x, torch.ones(64, 1), 3 * x, (0,)

    rows, columns = {"gate_proj": 0.5, "up_proj": 2.0, "down_proj": 0.75}, {"gate_proj": 1.25, "down_proj": 0.25}

    def stored(*factors):
        own = zip((rows, columns), factors, strict=True)
        return tuple({name: torch.full_like(each, values[name]) for name, each in of.items()} for values, of in own)

    found = train_expert(*given, stored)
    for values, of in ((rows, found.rows), (columns, found.columns)):
        assert {name: each.tolist() for name, each in of.items()} == {
            name: pytest.approx([value] * 4) for name, value in values.items()
        }
    gate, up = 0.5 * 1.25 * x, 2.0 * 1.25 * x
    lacks = 0.75 * 0.25 * torch.nn.functional.silu(gate) * up - 3 * x
    assert found.after == pytest.approx(float(lacks.square().sum()), rel=1e-5)


def test_tokens_are_left_out_of_every_expert():
    index = torch.tensor([[0, 1], [1, -1], [2, 0], [1, 2]])
    assigned = Assignment.group(index, torch.arange(8.0).view(4, 2), 3)
    left = assigned.without(torch.tensor([False, True, False, False]))
    for expert in range(3):
        rows, weights = assigned.of_expert(expert)
        found = left.of_expert(expert)
        assert torch.equal(found[0], rows[rows != 1])
        assert torch.equal(found[1], weights[rows != 1])


class OneMatrix:
    """Runs experts whose matrices in front of the last one are one, without an activation."""

    def inner(self, x, matrices):
        return matrices[0].of(x)


@pytest.mark.parametrize("adds", [True, False])
def test_a_last_projection_is_solved_for_what_is_missing(adds):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tokens, columns, rows = 400, 6, 4
    x, dense, weights, lacks = draw(tokens, columns), draw(columns, columns), draw(rows, columns), draw(rows, columns)
    gates = torch.rand(tokens, generator=generator) + 0.1
    squares = 2 * gates.square()  # another expert has the same gate: each is to make up for half of what is lacking
    numbers = torch.arange(tokens) * 2
    buffer = ListBuffer(2 * tokens, 1, rows)
    buffer.zero()
    buffer.add(numbers, 2 * gates[:, None] * (x @ lacks.T))
    of_all = torch.zeros(2 * tokens).index_add(0, numbers, squares)  # of rows that other experts have, too
    lack = Lack(len(of_all), buffer if adds else None, of_all)
    found = Correction(OneMatrix(), [Linear(dense, None, None), Linear(weights, None, None)], lack, numbers, gates)
    for part in torch.split(torch.arange(tokens), 150):
        found.take(numbers[part], x[part], x[part])  # the quantised first matrix is one of ones
    aimed = weights.clone()
    what = found.add_to(aimed, x.T @ x / tokens, 1e-6, 64)
    expected = weights @ dense + adds * lacks
    torch.testing.assert_close(aimed, expected, rtol=1e-3, atol=1e-3)
    assert what.after < 1e-6 * what.before
    torch.testing.assert_close(what.goal, float((gates[:150, None] * (x[:150] @ dense.T @ weights.T)).square().sum()))


def test_few_tokens_say_less_of_what_is_missing():
    one, changes = torch.eye(8), []
    for blend in (0, 4):
        truth = [Linear(2 * one, None, None), Linear(one, None, None)]
        found = Correction(OneMatrix(), truth, NOTHING, ROWS, ROWS + 1.0)
        found.take(ROWS, one[:4], one[:4])
        aimed = one.clone()
        found.add_to(aimed, one / 8, 0.1, blend)
        changes.append(aimed - one)
    # H is 1/4 and 0, or half of that and 1/16 besides, dampened by .1 of its mean; half of what is missing is known
    torch.testing.assert_close(changes[0].diagonal()[:4], torch.full((4,), 0.25 / (0.25 + 0.0125)))
    torch.testing.assert_close(changes[1].diagonal()[:4], torch.full((4,), 0.125 / (0.1875 + 0.0125)))


def test_few_large_tokens_among_those_with_twins_do_not_make_a_change_overshoot():
    generator = torch.Generator().manual_seed(0)
    x, one = torch.randn(1000, 8, generator=generator), torch.eye(8)
    x[3] *= 1000  # the Hessian of all tokens holds a tenth of it
    truth = [Linear(1.1 * one, None, None), Linear(one, None, None)]
    rows = torch.arange(1000)
    found = Correction(OneMatrix(), truth, Lack(100, None, torch.ones(100)), rows, torch.ones(1000))
    found.take(rows, x, x)
    aimed = one.clone()
    found.add_to(aimed, x.T @ x / 1000, 0.1, 64)
    assert (aimed - one).abs().max() < 0.11


def test_what_is_tuned_by_default():
    def tune(grid=None, model="qwen3_moe", **given):
        return choose(grid, Settings(**given), model, 2)[1].tune

    assert tune() == tune(rate=TRAINED_RATE) == tune(recipe="paper", tune="block") == "block"
    assert tune(rate=TRAINED_RATE + 0.01) == tune(model="switch_transformers") == tune(qm.MinMaxTwoBit()) == "targets"
    assert tune(recipe="paper") == tune(recipe="nearest") == tune(tune="none") == "none"


@pytest.fixture(scope="module")
def untuned(made_once, causal, text_file):
    given = {"calibration": text_file, "tune": "none", **SETTINGS}
    return made_once("qwen3_moe-rated", lambda place: qm.compress(causal("qwen3_moe"), place, **given))


@pytest.fixture(scope="module")
def tuned(made_once, causal, text_file):
    given = {"calibration": text_file, "tune": "block", **SETTINGS}
    return made_once("qwen3_moe-by-block", lambda place: qm.compress(causal("qwen3_moe"), place, **given))


def test_what_experts_lack_becomes_less_and_the_model_nearer_at_no_bits(untuned, tuned, causal, tokenizer, text_file):
    report = json.loads((tuned / "qmoe_report.json").read_text())
    assert report["tuning_by_block"]["after"] < report["tuning_by_block"]["before"]
    assert report["settings"]["tune"] == "block"
    assert not verify(tuned)
    sizes = [sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (untuned, tuned)]
    assert sizes[1] < 1.02 * sizes[0]
    words = text_file.read_text(encoding="utf-8").split()[-200:]
    ids = torch.tensor([tokenizer(" ".join(words), add_special_tokens=False)["input_ids"][:128]])
    models = [AutoModelForCausalLM.from_pretrained(causal("qwen3_moe"), dtype=torch.float32)]
    models += [qm.load(each, dtype=torch.float32) for each in (untuned, tuned)]
    with torch.no_grad():
        dense, before, after = (model(ids, use_cache=False).logits for model in models)
    assert (after - dense).square().sum() < 0.8 * (before - dense).square().sum()


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bytes(tuned, causal, text_file, tmp_path):
    def kill(event):
        if event.done == 1:
            raise Killed

    given = {"calibration": text_file, "tune": "block", **SETTINGS}
    with pytest.raises(Killed):
        qm.compress(causal("qwen3_moe"), tmp_path / "out", progress=kill, **given)
    qm.compress(causal("qwen3_moe"), tmp_path / "out", **given)
    for file in sorted(tuned.glob("*.safetensors*")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["switch", "granitemoe"])  # few digits; outputs that the block scales
def test_other_blocks_are_tuned_too(request, causal, text_file, tmp_path, model_type):
    model = request.getfixturevalue("switch") if model_type == "switch" else causal(model_type)
    given = {**SETTINGS, "rate": None, "calibration": text_file, "activations": "bfloat16", "spill": tmp_path}
    report = qm.compress(model, tmp_path / "out", tune="block", **given)
    assert report.tuning_by_block["after"] < report.tuning_by_block["before"]
    assert not verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tune": "full"}, "tune is full; expected none, targets or block"),
        ({"tune": "block", "recipe": "nearest"}, "tune none"),
    ],
    ids=["word", "recipe"],
)
def test_what_cannot_be_tuned_is_refused(causal, tmp_path, change, words):
    with pytest.raises(SettingError, match=words):
        qm.compress(causal("qwen3_moe"), tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "tune", "epochs"),
    [(("full",), None, 1), (("block", "--tune-epochs", 3), "block", 3)],
    ids=["full", "both"],
)
def test_the_whole_is_tuned_after_targets_or_blocks(run, tmp_path, monkeypatch, options, tune, epochs):
    asked = {}

    def refuse(*arguments, **given):
        asked.update(given)
        raise SettingError("enough")

    monkeypatch.setattr("qmoe_lite.tuning.compressing.compress_and_tune", refuse)
    code, _, noted = run("compress", "m", tmp_path / "out", "--tune", *options)
    assert code != 0
    assert "enough" in noted
    assert (asked["tune"], asked["epochs"]) == (tune, epochs)
