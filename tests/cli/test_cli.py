"""The command line: what it prints, and with which exit code it ends."""

from __future__ import annotations

import errno
import json
import shutil
import sys

import pytest
import tiny
from safetensors.torch import load_file, save_file

from qmoe_lite.cli import demo
from qmoe_lite.cli import main as main_

SMALL = ["--samples", "12", "--sequence-length", "32", "--validation-samples", "2"]


@pytest.mark.slow
def test_compress_then_eval(run, tmp_path, switch, text_file):
    out = tmp_path / "out"
    code, printed, noted = run("compress", switch, out, "--calibration", text_file, *SMALL)
    assert code == 0, noted
    assert "bits a weight" in printed
    assert "encoder.block.1" in printed
    assert "Tokens behind each expert's Hessian" in printed
    assert "all 8 experts" in printed
    assert len(json.loads((out / "qmoe_report.json").read_text())["tokens_per_expert"]) == 2
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "compressing: 2 of 2 groups" in noted
    code, printed, _ = run("eval", out, "--text", text_file, "--sequence-length", 32, "--samples", 8, "--json")
    assert code == 0
    packed = json.loads(printed)
    code, printed, _ = run("eval", switch, "--text", text_file, "--sequence-length", 32, "--samples", 8)
    assert code == 0
    assert f"{packed['tokens']:,} tokens" in printed
    assert packed["loss"] > 0
    more = ["--expert-cache", "1MB", "--stats"]
    code, printed, noted = run(
        "eval", out, "--text", text_file, "--sequence-length", 32, "--samples", 8, "--json", *more
    )
    assert code == 0
    assert json.loads(printed) == packed
    assert "misses" in noted


def test_without_text_the_package_s_own_is_taken_and_named(run, tmp_path, switch):
    code, printed, noted = run("compress", switch, tmp_path / "out", *SMALL)
    assert code == 0, noted
    assert "note: calibrated on the package's default text, Python's documentation and sources (PSF" in printed
    report = json.loads((tmp_path / "out" / "qmoe_report.json").read_text())
    assert report["settings"]["calibration"] == "the package's default text"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_causal_model_from_its_directory_to_its_text(run, tmp_path, model_type):
    """compress, eval, generate and inspect, on a model with a trained tokenizer."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.make_text(3, 2000), encoding="utf-8")
    model = tiny.make_causal(tmp_path / "model", tiny.train_tokenizer(text.read_text()), model_type)
    out = tmp_path / "out"
    code, printed, noted = run("compress", model, out, "--calibration", text, *SMALL)
    assert code == 0, noted
    assert "gate_proj" in printed
    assert max(map(len, printed.splitlines())) <= 80
    losses = []
    for directory in (model, out):
        code, printed, noted = run("eval", directory, "--text", text, "--sequence-length", 32, "--json")
        assert code == 0, noted
        losses.append(json.loads(printed)["loss"])
    assert 0 < abs(losses[1] - losses[0]) < 0.5
    code, printed, noted = run("generate", out, "--prompt", "expert router token", "--max-new-tokens", 5, "--json")
    assert code == 0, noted
    assert json.loads(printed)["tokens"] == 5
    code, printed, noted = run("inspect", out)
    assert code == 0, noted
    assert "down_proj" in printed


def test_compress_prints_one_json_document(run, tmp_path, switch):
    code, printed, noted = run("compress", switch, tmp_path / "out", "--recipe", "nearest", "--json")
    assert code == 0
    assert noted == ""
    assert json.loads(printed)["totals"]["matrices"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "{tmp}/missing", "{tmp}/out", "--recipe", "nearest"], "is no model directory"),
        (["verify", "./missing"], "/missing is no model directory: there is no such directory"),
        (["compress", "{tmp}", "{tmp}/out", "--recipe", "nearest"], "it has no config.json"),
        (["compress", "{switch}", "{tmp}", "--recipe", "nearest"], "exists already"),
        (["compress", "{switch}", "{tmp}/out", "--calibration", "{tmp}/none.txt"], "none.txt does not exist"),
        (["compress", "{switch}", "{tmp}/out", "--calibration", "{tmp}/empty.txt"], "empty or too short"),
        (["eval", "{tmp}", "--text", "{tmp}/empty.txt"], "no config.json"),
        (["eval", "{switch}", "--text", "{tmp}/empty.txt"], "empty or too short"),
        (["demo", "--out", "{tmp}"], "exists already"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(run, tmp_path, switch, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    code, printed, noted = run(*(a.format(tmp=tmp_path, switch=switch) for a in arguments))
    assert code == 1
    assert printed == ""
    lines = noted.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("qmoe: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dense_model_that_lacks_a_tensor_is_not_filled_with_random_numbers(run, tmp_path, switch, text_file):
    shutil.copytree(switch, tmp_path / "lacking")
    tensors = load_file(tmp_path / "lacking" / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    code, _, noted = run("eval", tmp_path / "lacking", "--text", text_file)
    assert code == 1
    assert "lacks the tensor encoder.final_layer_norm.weight. Is it the whole model?" in noted


@pytest.mark.parametrize("arguments", [["compres"], ["compress"], ["compress", "a", "b", "--codeword-bits", "20"]])
def test_wrong_usage_is_exit_code_2(run, arguments):
    code, _, noted = run(*arguments)
    assert code == 2
    assert noted


def test_debug_shows_where_an_error_came_from(run, tmp_path):
    from qmoe_lite.errors import CheckpointError

    with pytest.raises(CheckpointError):
        run("compress", tmp_path, tmp_path / "out", "--recipe", "nearest", "--debug")


def test_an_interrupted_run_says_how_to_resume(run, tmp_path, switch, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("qmoe_lite.compression.run._Run.run", interrupt)
    code, _, noted = run("compress", switch, tmp_path / "out", "--recipe", "nearest")
    assert code == 130
    assert "rerun the command to resume" in noted


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["estimate"], ["compress"], ["eval"], ["generate"], ["inspect"], ["verify"], ["doctor"]]
)
def test_every_command_has_help_and_an_example(run, command):
    code, printed, _ = run(*command, "--help")
    assert code == 0
    assert "Usage" in printed
    if command:
        assert f"Example: qmoe {command[0]}" in " ".join(printed.split())


def test_version(run):
    from qmoe_lite import __version__

    assert run("--version")[1].strip() == f"qmoe-lite {__version__}"


@pytest.mark.slow
def test_the_demo_does_the_whole_job(run, tmp_path, monkeypatch, switch, text_file):
    """On a random model of a few thousand weights; the real one is run by the README's first command."""
    text = tmp_path / "text"
    text.mkdir()
    for name in ("calibration.txt", "evaluation.txt"):
        (text / name).write_bytes(text_file.read_bytes())
    monkeypatch.setattr(demo, "data_file", {"text": text, "tiny_switch": switch}.__getitem__)
    monkeypatch.setattr(demo, "SAMPLES", 12)
    monkeypatch.setattr(demo, "SEQUENCE", 32)
    monkeypatch.setattr(demo, "SHOWN", (3, 1))
    code, printed, noted = run("demo", "--out", tmp_path / "kept", "--json")
    assert code == 0, noted
    result = json.loads(printed)
    assert set(result) >= {"dense", "rtn", "qmoe", "recovered", "sample", "seconds"}
    assert result["dense"]["bits_per_weight"] == 32  # this one is float32
    assert result["qmoe"]["tokens"] == result["dense"]["tokens"]
    assert set(result["sample"]) == {"text", "truth", "dense", "qmoe"}
    assert result["sample"]["truth"]
    code, printed, _ = run("eval", tmp_path / "kept", "--text", text_file, "--sequence-length", 32)
    assert code == 0
    code, printed, _ = run("demo")
    assert code == 0
    assert "QMoE recovers" in printed
    table = printed.split("\nThe gap in")[0]
    assert max(map(len, table.splitlines())) <= 80


def test_a_model_of_another_quantization_is_refused_by_name(run, tmp_path, switch, text_file):
    path = tmp_path / "fp8"
    shutil.copytree(switch, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(config))
    for arguments in (["eval", path, "--text", text_file], ["generate", path, "--prompt", "router"]):
        code, _, noted = run(*arguments)
        assert code == 1
        assert "is quantised by fp8" in noted


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "qmoe: the output cannot be written: No space left on device.",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            "qmoe: out of memory. Shorten the text, or process fewer tokens or samples at a time.",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys, error, line):
    def fail():
        raise error

    monkeypatch.setattr(main_, "app", fail)
    monkeypatch.setattr(sys, "argv", ["qmoe"])
    with pytest.raises(SystemExit, match="1"):
        main_.main()
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "three"}, "config.json is refused by transformers: Validation error for field 'num_h"),
        ({"quantization_config": "qmoe"}, "config.json has a damaged quantization_config. Fetch it again."),
    ],
)
def test_a_damaged_configuration_is_not_blamed_on_the_tokenizer(run, directory, change, message):
    path = directory()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    code, printed, noted = run("generate", path, "--prompt", "router")
    assert (code, printed) == (1, "")
    assert len(noted.splitlines()) == 1
    assert message in noted
