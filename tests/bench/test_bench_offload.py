"""`qmoe bench offload` on a small model, all contenders in this process."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qmoe_lite as qm
from qmoe_lite.bench import offload
from qmoe_lite.bench._parts import offload as parts
from qmoe_lite.checkpoint.weight_file import room
from qmoe_lite.cli import bench_
from qmoe_lite.errors import OutputError, QMoEError, SettingError
from qmoe_lite.offload.runner import runner_of

SMALL = {
    **parts.SHAPE,
    "hidden_size": 256,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture
def small(monkeypatch):
    """Measure a small model, without processes of its own for each contender."""
    monkeypatch.setattr(offload, "SHAPE", SMALL)
    monkeypatch.setattr(offload, "_REPLAYED", 50)
    monkeypatch.setattr(offload, "demo_trace", functools.partial(offload.demo_trace, 128))
    monkeypatch.setattr(offload, "_alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(parts.gc, "collect", lambda: 0)  # of all that the tests have made: a second each time


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "both"
    parts.make_models(place, SMALL, 2, 100, 0)
    return place


def test_all_models_hold_the_same_weights(models):
    packed, made = (parts.load_contender(kind, models, None) for kind in ("ours", "dense"))
    dense = AutoModelForCausalLM.from_pretrained(models / "dense", dtype=torch.bfloat16).eval()
    for number in range(2):
        ours, theirs = (m.model.layers[number].mlp.experts for m in (packed, dense))
        gate_up = torch.cat([ours.dense(9, name, torch.bfloat16) for name in ("gate_proj", "up_proj")])
        assert torch.equal(gate_up, theirs.gate_up_proj[9])
        assert torch.equal(ours.dense(9, "down_proj", torch.bfloat16), theirs.down_proj[9])
    states = packed.state_dict(), dense.state_dict()
    assert all(torch.equal(t, states[0][n]) for n, t in states[1].items() if ".experts." not in n)
    assert all(torch.equal(t, states[1][n]) for n, t in made.state_dict().items()), "as its files would be loaded"
    assert made.config._experts_implementation == dense.config._experts_implementation
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, dense(input_ids=ids).logits)


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_the_bfloat16_cache_computes_what_the_dense_model_does(models, slots):
    ids = torch.arange(20)[None]
    model = parts.load_contender("dense cache", models, slots * 3 * room(2 * 256 * 512))
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (model, parts.load_contender("dense", models, None)))
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    assert model.model.layers[0].mlp.experts.tier.read_bytes > 0


@pytest.mark.slow
def test_tables_and_figures(small, tmp_path, monkeypatch):
    measured, measure = [], offload.measure
    monkeypatch.setattr(offload, "measure", lambda *a, **o: measured.append(measure(*a, **o)) or measured[-1])
    model = tmp_path / "trace"
    parts.make_models(model, SMALL, 2, 100, 0)
    running = qm.load(model / "packed", ram_cache="1MB")
    runner_of(running).trace(tmp_path / "own.jsonl")
    with torch.no_grad():
        running(input_ids=torch.arange(9)[None])
        running(input_ids=torch.arange(1)[None])
    runner_of(running).close()
    arguments = ["offload", "--layers", "2", "--tokens", "2", "--budget", "0.5", "--budget", "1"]
    arguments += [
        "--plot",
        str(tmp_path / "budgets.png"),
        "--trace",
        str(tmp_path / "own.jsonl"),
        "--directory",
        str(tmp_path),
    ]
    plain = CliRunner().invoke(bench_.app, arguments, catch_exceptions=False)
    assert plain.exit_code == 0
    assert max(map(len, plain.stdout.splitlines()[:-1])) <= 80
    for text in ("dense cache", "Amdahl", "own.jsonl", "LRU"):
        assert text in plain.stdout
    monkeypatch.setattr(offload, "measure", lambda *arguments, **options: measured[-1])
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(CliRunner().invoke(bench_.app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert not list(tmp_path.glob("qmoe-offload-*")), "the models are gone"
    assert report["packed_bytes"] < report["dense_bytes"] / 5
    ours = [r for r in report["runs"] if r["contender"] == "ours"]
    assert [(r["routing"], r["budget"]) for r in ours] == [(r, b) for r in ("even", "switch") for b in (None, 1.0, 0.5)]
    assert all(r["tokens_per_second"] > 0 for r in report["runs"])
    assert all(0 <= r["hit_rate"] <= 1 for r in ours if r["budget"])
    assert any(r["disk_bytes_per_token"] for r in ours if r["budget"])
    assert {r["contender"] for r in report["runs"]} >= {"ours", "dense", "dense cache"}
    for times in report["parts"].values():
        assert times["experts"] < times["blocks"] < times["whole"]
        assert times["blocks"] + times["attention"] + times["head"] < times["whole"]
    assert {p["trace"] for p in report["policies"]} == {"even", "switch", "own.jsonl"}


@pytest.mark.slow
def test_both_models_in_memory_alone(small, tmp_path, monkeypatch):
    written = []
    make = offload.make_models
    monkeypatch.setattr(offload, "make_models", lambda *a: (make(*a), written.extend(a[0].iterdir()))[0])
    arguments = ["offload", "--no-disk", "--tokens", "2", "--directory", str(tmp_path)]
    plain = CliRunner().invoke(bench_.app, [*arguments, "--plot", str(tmp_path / "a.png")], catch_exceptions=False)
    assert plain.exit_code == 0
    assert [path.name for path in written] == ["packed"], "no dense model is written"
    assert "MoE blocks" in plain.stdout
    assert "LRU" not in plain.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(offload, "_available", lambda: 0)
    plain = CliRunner().invoke(bench_.app, arguments, catch_exceptions=False)
    assert "does not fit in memory: it was not measured" in " ".join(plain.stdout.split())


@pytest.mark.slow
def test_other_tokens_are_not_reported(small, monkeypatch):
    run = offload.run_contender

    def other(kind, place, budget, *more):
        found = run(kind, place, budget, *more)
        return {**found, "tokens": [0] if budget else found["tokens"]}

    monkeypatch.setattr(offload, "run_contender", other)
    with pytest.raises(QMoEError, match="a budget of 50% gave other tokens"):
        offload.measure(2, 1, (0.5,), peers=False, vocabulary=100, shape=SMALL)


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(OutputError, match="cannot be read"):
        offload.read_trace(tmp_path / "none")
    (tmp_path / "text").write_text("not json\n")
    with pytest.raises(SettingError, match="is no trace"):
        offload.read_trace(tmp_path / "text")
    for wrong in (
        {"layers": 0},
        {"peers": False, "disk": False},
        {"tokens": 0},
        {"budgets": (0.0,)},
        {"budgets": (1.5,)},
    ):
        with pytest.raises(SettingError):
            offload.measure(**wrong)


def test_amdahls_law():
    made = offload.Parts({"experts": 10.0, "whole": 40.0}, {"experts": 30.0, "whole": 60.0})
    assert made.share == 0.5
    assert math.isclose(made.predicted, 60 / 40)
