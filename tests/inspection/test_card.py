"""`qmoe card`: what it says, what it takes from whom, and that a push carries it; `qmoe inspect --compare`."""

from __future__ import annotations

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForSeq2SeqLM
from transformers.utils import hub

import qmoe_lite as qm
from qmoe_lite.errors import CheckpointError, OutputError, SettingError
from qmoe_lite.inspection.card import make_card, write_card
from qmoe_lite.inspection.comparison import compare
from qmoe_lite.inspection.contents import inspect_model


@pytest.fixture
def copied(tmp_path, compressed):
    return shutil.copytree(compressed[0], tmp_path / "switch-qmoe")


def change_report(directory, change):
    file = directory / "qmoe_report.json"
    report = json.loads(file.read_text())
    change(report)
    file.write_text(json.dumps(report))


def test_a_card_says_what_was_made_and_how_to_load_it(copied, compressed, run, monkeypatch):
    options = ("--base-model", "google/switch-base-8", "--license", "apache-2.0")
    code, printed, _ = run("card", copied, *options)
    assert code == 0
    assert "README.md is written. Upload it" in printed
    text, report = (copied / "README.md").read_text(), compressed[1]
    header = ModelCard(text).data.to_dict()
    assert header == {
        "base_model": "google/switch-base-8",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text2text-generation",
        "tags": ["qmoe", "moe", "mixture-of-experts", "quantized", "switch_transformers"],
    }
    verdict = report.verdict
    assert f"| {verdict['dense_loss']:.3f} | {verdict['loss']:.3f} |" in text
    assert f"**Verdict:** {verdict['word']}: held-out loss" in text
    assert f"| bits an expert weight | 32.000 | {report.bits_per_weight:.3f} |" in text
    assert "calibrated on calibration.txt" in text  # the file's name, not where it lay
    assert "24 samples, 32 tokens each, 2 samples for validation, codewords of 10 bits asked for, dampening 0.1" in text
    assert f"qmoe-lite {qm.__version__}, torch {report.versions['torch']}" in text
    assert "That of [google/switch-base-8](https://huggingface.co/google/switch-base-8): apache-2.0." in text
    assert text.count("\n| encoder.1 | ") == text.count("\n| decoder.1 | ") == 2
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(copied.parent)
    found = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "SwitchTransformersForConditionalGeneration"


def test_a_readme_is_replaced_by_force_alone(copied, run):
    (copied / "README.md").write_text("mine")
    code, _, noted = run("card", copied)
    assert (code, noted.count("\n")) == (1, 1)
    assert "README.md exists already. Replace it by --force" in noted
    assert (copied / "README.md").read_text() == "mine"
    write_card(copied, force=True)
    assert (copied / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    with pytest.raises(CheckpointError, match="none is no directory"):
        write_card(copied / "none")
    with pytest.raises(OutputError, match="exists already"):
        write_card(copied)
    assert [finding for finding in qm.verify(copied) if finding.severity == "error"] == []


def test_base_model_and_licence_are_found_where_they_are_known(copied, tmp_path):
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x/y\n---\n# Q\n"
    )
    change_report(copied, lambda report: report.update(model=str(snapshot)))
    header = ModelCard(make_card(inspect_model(copied))).data.to_dict()
    assert [header[n] for n in ("base_model", "license", "license_name")] == ["Qwen/Qwen3-30B-A3B", "other", "qwen"]
    change_report(copied, lambda report: report.update(model="some/where"))
    assert ModelCard(make_card(inspect_model(copied))).data.base_model == "some/where"
    change_report(copied, lambda report: report.update(model="/some/where/else"))
    text = make_card(inspect_model(copied))
    assert ModelCard(text).data.base_model is None
    assert "which was not known where this card was written" in text
    assert "/some/where" not in text
    for options, message in (
        ({"base_model": "../x"}, r"base model is '\.\./x'; expected a name on the hub"),
        ({"license": "Apache 2\n---"}, r"license is 'Apache 2\\n---'; expected as the hub calls it"),
    ):
        with pytest.raises(SettingError, match=message):
            make_card(inspect_model(copied), **options)


def test_what_is_not_known_is_said_and_what_a_report_says_is_not_obeyed(copied):
    evil = "a](javascript:x) <script> |\n---\n# title `x`"
    change_report(copied, lambda report: report.update(degraded=[evil], verdict=None))
    text = make_card(inspect_model(copied))
    assert "- Note: a\\](javascript:x) \\<script\\> \\| --- # title \\`x\\`." in text
    assert "**Not judged**" in text
    (copied / "qmoe_report.json").unlink()
    text = make_card(inspect_model(copied))
    assert "The report of the compression (qmoe_report.json) is not there." in text
    bits = inspect_model(copied).totals["bits_per_weight"]
    assert f"| | compressed |\n|---|---:|\n| bits an expert weight | {bits:.3f} |\n" in text


class Api:
    """Stands for the hub: takes what would be uploaded."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **options):
        for each in operations:
            with open(each.path_or_fileobj, "rb") as file:
                self.files[each.path_in_repo] = file.read()


@pytest.mark.parametrize("own", [None, "---\ntags:\n- theirs\n---\n# Theirs\n"])
def test_a_push_carries_the_card_unless_the_repository_has_one(copied, monkeypatch, own):
    write_card(copied)
    card, api = (copied / "README.md").read_text(), Api()

    def load(repo_id, **options):
        if own is None:
            raise EntryNotFoundError("no README.md")
        return ModelCard(own)

    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub.ModelCard, "load", load)
    model = copy.deepcopy(AutoModelForSeq2SeqLM.from_pretrained(copied, dtype=torch.bfloat16))
    model.push_to_hub("me/it", tags=["mine"])
    pushed = api.files["README.md"].decode()
    assert any(name.endswith(".safetensors") for name in api.files)
    if own is None:
        assert ModelCard(pushed).data.tags == [*ModelCard(card).data.tags, "mine"]
        assert pushed.partition("\n# ")[2] == card.partition("\n# ")[2]
    else:
        assert "# Theirs" in pushed
        assert "qmoe" not in pushed


@pytest.fixture(scope="session")
def nearest(made_once, switch):
    return made_once("switch-nearest", lambda place: qm.compress(switch, place, recipe="nearest"))


def test_two_results_are_compared(compressed, nearest, run):
    code, printed, noted = run("inspect", compressed[0], "--compare", nearest)
    assert (code, noted) == (0, "")
    assert max(map(len, printed.splitlines()[3:])) <= 80
    for words in (
        ["recipe", "default", "nearest"],
        ["samples", "24", "-"],
        ["verdict", compressed[1].verdict["word"], "-"],
    ):
        assert words in [line.split() for line in printed.splitlines()]
    code, printed, _ = run("inspect", compressed[0], "--compare", nearest, "--json", "--layers", "encoder.*")
    found = json.loads(printed)
    reports = [inspect_model(place) for place in (compressed[0], nearest)]
    assert found["totals"]["bits_per_weight"] == [each.totals["bits_per_weight"] for each in reports]
    assert found["settings"]["calibration"] == ["calibration.txt", None]
    assert [(row["short"], row["projection"]) for row in found["projections"]] == [
        ("encoder.1", "wi"),
        ("encoder.1", "wo"),
    ]
    assert found["projections"][0]["error"] == [each.projections[0].report.error for each in reports]
    assert found["projections"][0]["held_out_error"][1] is None
    assert found["projections"][0]["differs"]


def test_what_is_the_same_and_what_cannot_be_compared(compressed, run):
    code, printed, _ = run("inspect", compressed[0], "--compare", compressed[0])
    assert code == 0
    assert "No figure of a layer differs." in printed
    assert "Settings that differ" not in printed
    code, _, noted = run("inspect", compressed[0], "--compare", compressed[0], "--plot", "a.png")
    assert (code, noted.count("\n")) == (1, 1)
    assert "--plot draws one directory" in noted
    whole = inspect_model(compressed[0])
    assert compare(whole, whole).settings == {}
    with pytest.raises(SettingError, match=r"are of different models: decoder\S*experts\.wi is not alike"):
        compare(whole, whole.only("encoder.*"))
