"""Where experts are kept, as the command line asks for it: the same text, within the budget, with its figures."""

from __future__ import annotations

import io
import json
import sys

import pytest
import tiny

import qmoe_lite as qm
from qmoe_lite.cli._models import open_model
from qmoe_lite.cli._options import Placement

PROMPT = ["--prompt", "router expert token", "--max-new-tokens", 5]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A compressed Qwen3-MoE of 6 experts a layer, 24 KiB each in a cache."""
    folder = tmp_path_factory.mktemp("placement")
    tiny.make_causal(folder / "dense", tiny.make_tokenizer(), "qwen3_moe", eos_token_id=None, bos_token_id=None)
    qm.compress(folder / "dense", folder / "qmoe", recipe="nearest")
    return folder / "qmoe"


def test_a_budget_changes_the_figures_and_not_the_text(run, packed, tmp_path):
    trace = tmp_path / "trace.jsonl"
    code, wanted, noted = run("generate", packed, *PROMPT, "--stats")
    assert code == 0
    assert "hits" not in noted
    code, printed, noted = run("generate", packed, *PROMPT, "--expert-cache", "90KB", "--stats", "--trace", trace)
    assert (code, printed) == (0, wanted)
    lines = noted.splitlines()
    assert all(line.startswith("qmoe: ") for line in lines)
    assert any("misses" in line for line in lines)
    head, *passes = map(json.loads, trace.read_text().splitlines())
    assert (head["experts"], head["top_k"]) == (6, 2)
    assert len(passes) == 5 * len(head["layers"])
    assert len(passes[0]["experts"]) == 3  # the prompt's tokens


def test_a_chat_prints_its_cache_figures_once_at_the_end(run, packed, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"router\ntoken\n")))
    code, _, noted = run("chat", packed, "--max-new-tokens", 3, "--offload", "disk", "--ram-cache", "90KB", "--stats")
    assert code == 0
    lines = noted.splitlines()
    assert sum("tokens before" in line for line in lines) == 2
    assert sum("misses" in line for line in lines) == 1
    assert "misses" in noted.rpartition("tokens before")[2]


def test_without_stats_nothing_is_printed_and_the_runner_is_closed(run, packed, monkeypatch):
    opened = []

    def keep(*arguments):
        opened.append(open_model(*arguments)[0])
        from qmoe_lite.offload.runner import runner_of

        assert runner_of(opened[0]) is not None
        return opened[0], tiny.make_tokenizer()

    monkeypatch.setattr("qmoe_lite.cli._models.open_model", keep)
    code, _, noted = run("generate", packed, *PROMPT, "--offload", "ram")
    assert (code, noted) == (0, "qmoe: cut by --max-new-tokens.\n")
    from qmoe_lite.offload.runner import runner_of

    assert runner_of(opened[0]) is None


def test_devices_are_separated_by_commas():
    assert Placement().given() == {}
    assert Placement(expert_cache="1GiB", devices="cuda:0, cuda:1").given() == {
        "expert_cache": "1GiB",
        "devices": ["cuda:0", "cuda:1"],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert-cache", "much"], "expert_cache is 'much'; expected bytes or a size"),
        (["--expert-cache", "1"], "one expert"),
        (["--offload", "ram", "--ram-cache", "1GiB"], "Give one of them"),
        (["--offload", "disk"], "offload='disk' needs a budget of memory"),
        (["--trace", "{tmp}/trace"], "Give --expert-cache or --offload too"),
        (["--offload", "ram", "--trace", "{tmp}"], "cannot be written"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_bad_options_are_one_line_and_exit_code_1(run, packed, tmp_path, monkeypatch, command, options, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"router\n")))
    code, printed, noted = run(command, packed, *(o.format(tmp=tmp_path) for o in options))
    assert (code, printed) == (1, "")
    assert len(noted.splitlines()) == (2 if command == "chat" and "--trace" in options else 1)
    assert message in noted


def test_a_dense_model_has_no_expert_cache(run, switch):
    code, _, noted = run("generate", switch, *PROMPT, "--expert-cache", "1GiB")
    assert code == 1
    assert "is a dense model, and --expert-cache is for compressed ones" in noted
