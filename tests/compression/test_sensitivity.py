"""What layers lose alone, and how a rate's bits are shared out by it."""

from __future__ import annotations

import json

import pytest
import torch
from checks import Killed, bytes_of

import qmoe_lite as qm
from qmoe_lite.compression import layer_sensitivity
from qmoe_lite.compression.block_runner import _Catcher
from qmoe_lite.compression.calibration import open_tokenizer
from qmoe_lite.compression.choice import choose
from qmoe_lite.compression.expert_runner import ExpertRunner
from qmoe_lite.compression.identity import fingerprint_of
from qmoe_lite.compression.layer_sensitivity import amounts, measured
from qmoe_lite.compression.opening import opened
from qmoe_lite.compression.run_samples import RunSamples
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.shares import MEASURED, NONE, Sensitivity, layers_of, octaves, shares_of
from qmoe_lite.errors import FormatError, NotFiniteError, SettingError, TextError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.dense import load_dense
from qmoe_lite.models.family import inner
from qmoe_lite.models.routing import in_order
from qmoe_lite.models.skeletons import open_checkpoint

LENGTH = 32
SMALL = {"samples": 24, "sequence_length": LENGTH, "validation_samples": 2}


class Quantised(torch.nn.Module):
    """Experts one by one, of matrices that were noted."""

    def __init__(self, family, matrices):
        super().__init__()
        self.family, self.matrices = family, matrices

    def forward(self, hidden, *routing, **named):
        index, gates = self.family.routing(in_order(routing, named))
        x = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(x)
        for expert, (*first, last) in self.matrices.items():
            inside = inner(first[0].activation, [x @ each.weight.T for each in first])
            out += inside @ last.weight.T * (gates * (index == expert)).sum(dim=1, keepdim=True)
        return out.view_as(hidden)


@pytest.fixture
def noted(monkeypatch):
    """Matrices of the experts that a pass quantises, by layer and expert."""
    found, run = {}, ExpertRunner.run

    def note(self, layer, expert, weights_of, *rest):
        found.setdefault(layer.experts, {})[expert] = self.linears(layer, expert, weights_of)
        return run(self, layer, expert, weights_of, *rest)

    monkeypatch.setattr(ExpertRunner, "run", note)
    monkeypatch.setattr(layer_sensitivity, "COMPARED_TOKENS", 2 * LENGTH)
    monkeypatch.setattr(layer_sensitivity, "LEAST_TOKENS", 4 * LENGTH)
    return found


@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch"])
@torch.inference_mode()
def test_it_is_what_the_whole_model_says(monkeypatch, noted, causal, switch, text_file, model_type):
    directory = switch if model_type == "switch" else causal(model_type)
    places, samples, make = [], [], layer_sensitivity.RunSamples.make
    monkeypatch.setattr(layer_sensitivity.RunSamples, "make", lambda *what: samples.append(make(*what)) or samples[0])
    found = qm.sensitivity(
        directory, calibration=text_file, rate=1.5, sequence_length=LENGTH, device="cpu", progress=places.append
    )
    assert list(found.layers) == list(noted)
    assert len(places) == len(noted) + 1 > 2
    ids, labels = samples[0][0].all.input_ids[:2], samples[0][0].all.labels
    given = {"input_ids": torch.from_numpy(ids)}
    told = torch.ones(ids.shape, dtype=torch.bool)
    family, checkpoint = open_checkpoint(directory)
    model = load_dense(directory, family, checkpoint, torch.float32).eval()
    if labels is not None:
        told = torch.from_numpy(labels[:2] != -100)
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(torch.from_numpy(labels[:2]))
    dense = model(**given).logits.log_softmax(-1)
    for name, matrices in noted.items():
        parent, _, leaf = name.rpartition(".")
        whole = getattr(model.get_submodule(parent), leaf)
        setattr(model.get_submodule(parent), leaf, Quantised(family, matrices))
        other = model(**given).logits.log_softmax(-1)
        setattr(model.get_submodule(parent), leaf, whole)
        expected = (dense.exp() * (dense - other)).sum(dim=-1)[told].mean()
        assert found.layers[name] == pytest.approx(float(expected), rel=1e-3)
        assert found.layers[name] > 0
    assert found.tokens == int(told.sum())


def test_a_run_measures_it_where_there_is_a_rate_and_a_choice():
    def shares(grid=None, model="qwen3_moe", layers=2, **given):
        return choose(grid, Settings(**given), model, layers)[1].sensitivity

    assert shares() == shares(rate=3.5) == shares(rate=1.0, model="switch_transformers") == MEASURED
    assert shares(layers=1) == shares(model="switch_transformers") == shares(qm.UniformGrid(1.0)) == NONE
    assert shares(recipe="paper") == shares(recipe="nearest", rate=2.0) == shares(sensitivity=NONE) == NONE
    assert shares(sensitivity={"a": 1.0}) == {"a": 1.0}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch"])
def test_what_a_run_measures_is_what_it_takes_from_a_file(causal, switch, text_file, tmp_path, model_type):
    model = switch if model_type == "switch" else causal(model_type)
    given = {"calibration": text_file, "rate": 2.0, "device": "cpu", **SMALL}
    events = []
    report = qm.compress(model, tmp_path / "out", progress=events.append, **given)
    losses = report.settings["sensitivity"]
    assert list(losses) == list(dict.fromkeys(row.layer for row in report.projections))
    assert min(losses.values()) > 0
    first = [event for event in events if event.place.startswith("what layers lose alone")]
    assert len(first) == len(losses) + 1
    assert {(event.done, event.total) for event in first} == {(0, events[-1].total)}
    Sensitivity(2.0, 1, losses).write(tmp_path / "layers.json")
    qm.compress(model, tmp_path / "again", sensitivity=tmp_path / "layers.json", **given)
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
    report = qm.compress(model, tmp_path / "even", sensitivity="none", **given)
    assert report.settings["sensitivity"] == "none"
    assert bytes_of(tmp_path / "even") != bytes_of(tmp_path / "out")


def test_what_was_measured_is_kept_and_what_was_not_is_measured_again(causal, text_file, tmp_path, monkeypatch):
    model, given = causal("qwen3_moe"), {"calibration": text_file, "rate": 2.0, "device": "cpu", **SMALL}
    qm.compress(model, tmp_path / "whole", **given)
    calls = []
    monkeypatch.setattr(layer_sensitivity, "measured", lambda *what: calls.append(1) or measured(*what))

    def killed_at(place):
        def kill(event):
            if event.place.startswith(place):
                raise Killed

        with pytest.raises(Killed):
            qm.compress(model, tmp_path / "out", progress=kill, **given)

    killed_at("what layers lose alone, comparing")
    killed_at("model.layers.0")
    killed_at("model.layers.2")
    qm.compress(model, tmp_path / "out", **given)
    assert len(calls) == 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@torch.inference_mode()
def measured_of(directory, text_file, *tokens):
    found = opened(directory, auto=False)
    settings = Settings(rate=2.0, sequence_length=LENGTH, validation_samples=0)
    tokenizer = open_tokenizer(found.checkpoint.directory)
    samples, _ = RunSamples.make(text_file, tokenizer, 8, False, settings)
    return found, measured(lambda _: None, found, samples, tokenizer, settings, None, *tokens)


def test_experts_that_nothing_compared_meets_are_not_solved(noted, causal, text_file):
    found, losses = measured_of(causal("qwen3_moe"), text_file, 1)
    for layer in found.layers:
        assert len(noted[layer.experts]) == layer.top_k < layer.count
        assert losses.layers[layer.experts] > 0


def test_no_activations_are_kept_when_it_was_measured(causal, text_file):
    found, _ = measured_of(causal("granitemoehybrid"), text_file)
    catchers = [module for module in found.model.modules() if isinstance(module, _Catcher)]
    assert [catcher.answer for catcher in catchers] == [None] * len(found.layers)


def test_predictions_that_are_not_finite_are_told_of(causal, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_sensitivity, "divergence_of", lambda *_: float("nan"))
    with pytest.raises(NotFiniteError, match="Choose --sensitivity none"):
        qm.compress(causal("qwen3_moe"), tmp_path / "out", calibration=text_file, rate=2.0, **SMALL)


def test_work_without_it_is_what_earlier_versions_began(causal):
    checkpoint = opened(causal("qwen3_moe"), auto=False).checkpoint
    _, settings = choose(None, Settings(sensitivity=NONE), "qwen3_moe", 2)
    assert fingerprint_of(checkpoint, settings, qm.UniformGrid(1.0), None)["sensitivity"] is None


def test_a_single_sample_is_compared_and_calibrated_on(causal, text_file, tmp_path):
    given = {**SMALL, "samples": 1, "validation_samples": 0}
    report = qm.compress(causal("qwen3_moe"), tmp_path / "out", calibration=text_file, rate=2.0, **given)
    assert min(report.settings["sensitivity"].values()) > 0


def test_how_many_samples_are_taken():
    layers = [MoELayer("experts", "block", 128, {}, top_k=8)]
    assert amounts(layers, 512, 1000, seq2seq=False) == (256, 1, 17)
    assert amounts(layers, 512, None, seq2seq=True) == (512, 1, 9)
    assert amounts(layers, 64, 1000, seq2seq=False, tokens=100) == (64, 2, 66)
    assert amounts(layers, 64, 5, seq2seq=False) == (64, 2, 4)
    assert amounts(layers, 64, 1, seq2seq=False) == (64, 1, 1)


def test_steps_of_layers_that_lose_more_are_shorter():
    assert octaves([0.1, 0.1, 0.1]) == pytest.approx([0, 0, 0])
    most, middle, least = octaves([0.4, 0.1, 0.025])
    assert most < middle < least
    assert most + middle + least == pytest.approx(0)
    assert middle - most == pytest.approx(least - middle) == pytest.approx(0.35)  # half of log2 4, followed in part
    assert octaves([0.0, 0.0]) == [0, 0]
    assert max(map(abs, octaves([1e-9, 1.0, 0.0]))) < 2


def test_more_bits_for_layers_that_lose_more(causal, text_file, tmp_path):
    model = causal("qwen3_moe")
    names = [row.layer for row in qm.compress(model, tmp_path / "nearest", recipe="nearest", rate=2.0).projections]
    losses = Sensitivity(2.0, 1, dict.fromkeys(names, 0.01) | {names[-1]: 0.1})
    losses.write(tmp_path / "layers.json")
    report = qm.compress(
        model, tmp_path / "out", recipe="nearest", rate=2.0, sensitivity=tmp_path / "layers.json", device="cpu"
    )
    assert report.bits_per_weight == pytest.approx(2.0, rel=0.02)
    bits = {row.layer: row.bits_per_weight for row in report.projections}
    assert bits[names[-1]] > bits[names[0]] + 0.3
    assert report.settings["sensitivity"] == losses.layers
    with pytest.raises(SettingError, match="another model: block is not in both"):
        shares_of({"other": 1.0}, [MoELayer("block", each, 2, {}) for each in dict.fromkeys(names)])
    with pytest.raises(SettingError, match="shares out a rate's bits"):
        qm.compress(model, tmp_path / "x", calibration=text_file, recipe="paper", sensitivity=losses)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rate": 2, "tokens": 1, "layers": {}}', '{"rate": 2, "tokens": 1, "layers": {"a": -1}}']
)
def test_what_is_no_sensitivity_is_refused(tmp_path, text):
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(FormatError, match=r"layers\.json holds .*qmoe sensitivity MODEL FILE"):
        Sensitivity.read(tmp_path / "layers.json")
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        Sensitivity.read(tmp_path / "missing.json")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0])
def test_a_sensitivity_that_cannot_be_is_refused(tmp_path, causal, loss):
    given = Sensitivity(2.0, 1, {"model.layers.0.mlp.experts": loss})
    with pytest.raises(FormatError, match="below 0 or not finite"):
        qm.compress(causal("qwen3_moe"), tmp_path / "out", recipe="nearest", rate=2.0, sensitivity=given)


def test_what_a_family_or_a_length_cannot_be_is_refused(causal):
    with pytest.raises(SettingError, match="family foo is unknown"):
        qm.sensitivity(causal("qwen3_moe"), family="foo")
    with pytest.raises(SettingError, match="sequence_length is 0"):
        qm.sensitivity(causal("qwen3_moe"), sequence_length=0)


def test_the_command_writes_what_compress_takes(run, monkeypatch, tmp_path):
    found = Sensitivity(2.0, 1024, {"model.layers.0.mlp.experts": 0.08, "model.layers.1.mlp.experts": 0.01})
    monkeypatch.setattr(layer_sensitivity, "sensitivity", lambda *what, **given: found)
    code, printed, _ = run("sensitivity", "m", tmp_path / "layers.json")
    assert code == 0
    assert "model.layers.0" in printed
    assert "0.080000" in printed
    assert "-0.26" in printed
    assert Sensitivity.read(tmp_path / "layers.json") == found
    code, printed, _ = run("sensitivity", "m", tmp_path / "layers.json", "--json")
    assert json.loads(printed) == found.to_json()
    code, _, noted = run("sensitivity", "m", tmp_path / "no" / "layers.json")
    assert (code, noted.count("\n")) == (1, 1)
    assert "folder" in noted
    assert "is a folder" in run("sensitivity", "m", tmp_path)[2]


def test_other_commands_take_the_file(run, monkeypatch, tmp_path, causal):
    given, file = {}, tmp_path / "layers.json"
    Sensitivity(2.0, 1024, {"model.layers.0.mlp.experts": 0.08}).write(file)

    def stopped(*what, **options):
        given.update(options)
        raise SettingError("stopped.")

    monkeypatch.setattr("qmoe_lite.bench.accuracy.measure", stopped)
    what = ["bench", "accuracy", "m", "--calibration", "c.txt", "--text", "t.txt", "--sensitivity"]
    assert "stopped" in run(*what, file)[2]
    assert layers_of(given["settings"]["sensitivity"]) == {"model.layers.0.mlp.experts": 0.08}
    assert "cannot be read" in run(*what, tmp_path / "missing.json")[2]
    seconds = []
    for word in ("none", None):
        command = ["estimate", causal("qwen3_moe"), "--json", *(["--sensitivity", word] if word else [])]
        seconds.append(json.loads(run(*command)[1])["compressing"]["phases"].get("what layers lose alone", 0))
    assert 0 == seconds[0] < seconds[1]


def test_too_little_text_is_told_of(causal, tmp_path):
    (tmp_path / "short.txt").write_text("few words " * 20)
    with pytest.raises(TextError, match="are needed"):
        qm.sensitivity(causal("qwen3_moe"), calibration=tmp_path / "short.txt", sequence_length=LENGTH)
