"""What befalls a run from outside: other runs on the same OUT, and unfinished work that was damaged or moved."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from checks import Killed, bytes_of, changed_copy
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import qmoe_lite as qm
from qmoe_lite import MinMaxTernary
from qmoe_lite.checkpoint.report import read_report
from qmoe_lite.compression.lock import locked
from qmoe_lite.compression.notes import ranges
from qmoe_lite.compression.positions import positions_of
from qmoe_lite.errors import CheckpointError, NotFiniteError, OutputError, ResumeError, SettingError, TextError

SMALL = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "tune": "none", "codeword_bits": 10}


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_on_one_out_is_refused_and_harms_nothing(tmp_path, switch, resume):
    refused = []

    def meddle(event):
        with pytest.raises(OutputError) as error:
            qm.compress(switch, tmp_path / "new" / "out", recipe="nearest", seed=1, resume=resume)
        refused.append(str(error.value))

    qm.compress(switch, tmp_path / "plain", recipe="nearest")
    qm.compress(switch, tmp_path / "new" / "out", recipe="nearest", progress=meddle)
    holder = f"process {os.getpid()} on {platform.node()}"
    assert set(refused) == {
        f"{tmp_path}/new/out.partial is being written by another run, {holder}. Wait for its end, or name another OUT."
    }
    assert bytes_of(tmp_path / "new" / "out") == bytes_of(tmp_path / "plain")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from qmoe_lite.compression.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    partial = tmp_path / "out.partial"
    with subprocess.Popen([sys.executable, "-c", code, partial], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"another run, process {other.pid} on "), locked(partial):
            pass
        other.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.partial.lock"]
    with locked(partial) as note:
        assert note is None
    assert not list(tmp_path.iterdir())


def test_a_run_without_locks_says_so_and_one_that_fails_leaves_nothing(tmp_path, switch, monkeypatch):
    def refuse(handle, operation):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        report = qm.compress(switch, tmp_path / "out", recipe="nearest")
    assert report.degraded == [f"{tmp_path} has no file locks: nothing kept other runs away from out.partial"]

    def kill(event):
        raise Killed

    with pytest.raises(OutputError, match="names no new directory"):
        qm.compress(switch, tmp_path / "x" / "..", recipe="nearest", progress=kill)
    with pytest.raises(OutputError, match="cannot be made: File name too long"):
        qm.compress(switch, tmp_path / ("x" * 250), recipe="nearest", progress=kill)
    with pytest.raises(qm.QMoEError, match="no model directory"):
        qm.compress(tmp_path / "none", tmp_path / "a" / "b" / "c", recipe="nearest")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stopped_at(event_number, *arguments, **settings):
    """Compress until so many groups are done, as if killed there."""

    def kill(event):
        if event.done == event_number:
            raise Killed

    with pytest.raises(Killed):
        qm.compress(*arguments, progress=kill, **settings)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.fixture(scope="module")
def four_layers(made_once, tokenizer):
    """A Switch with four sparse layers."""
    sparse = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    return made_once("switch-four", lambda place: tiny.make_switch(place, tokenizer, **sparse))


@pytest.fixture(scope="module")
def at_a_rate(made_once, four_layers, text_file):
    """The same compressed at a rate, whose layers depend on those before; and the work after three of them."""
    settings = {"calibration": text_file, "rate": 2.0, **SMALL}

    def make(place):
        place.mkdir()
        qm.compress(four_layers, place / "whole", **settings)
        stopped_at(4, four_layers, place / "out", **settings)

    return made_once("at-a-rate", make), settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "damage", "note"),
    [
        (["model-00001-of-*"], "removed", "model-00001-of-00005.safetensors; 1 of 3 finished layers computed again"),
        (["model-00002-of-*"], "flipped", "model-00002-of-00005.safetensors; 1 of 3 finished layers computed again"),
        pytest.param(["model-00003-of-*"], "truncated", "; 1 of 3 finished layers", marks=pytest.mark.slow),
        (["model-00001-of-*", "model-00003-of-*"], "longer", " and 1 more; 2 of 3 finished layers computed again"),
        (["hidden-*"], "flipped", "hidden-1-0.zst; activations computed again"),
        pytest.param(["memory-*"], "removed", "memory-1.zst; activations", marks=pytest.mark.slow),
    ],
)
def test_damaged_unfinished_work_is_found_and_computed_again(tmp_path, four_layers, at_a_rate, files, damage, note):
    made, settings = at_a_rate
    shutil.copytree(made / "out.partial", tmp_path / "out.partial")
    for pattern in files:
        (path,) = (tmp_path / "out.partial").glob(pattern)
        DAMAGES[damage](path)
    events = []
    report = qm.compress(four_layers, tmp_path / "out", progress=events.append, **settings)
    assert bytes_of(tmp_path / "out") == bytes_of(made / "whole")
    assert note in report.degraded[0]
    assert report.degraded[0] in (events[0].warning or "")
    whole = read_report(made / "whole")
    assert [p.layer for p in report.projections] == [p.layer for p in whole.projections]
    assert report.held_out_error == whole.held_out_error
    assert report.verdict == whole.verdict
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (made / "whole").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])  # gates with scales that are shared; biases
def test_gated_experts_run_from_their_files_as_they_were_compressed(tmp_path, tokenizer, text_file, model_type):
    model = tiny.make_causal(tmp_path / "model", tokenizer, model_type)
    settings = {"calibration": text_file, "rate": 2.0, **SMALL}
    qm.compress(model, tmp_path / "whole", **settings)
    stopped_at(2, model, tmp_path / "out", **settings)
    flip(next((tmp_path / "out.partial").glob("hidden-*")))
    report = qm.compress(model, tmp_path / "out", **settings)
    assert "activations computed again" in report.degraded[0]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_run_killed_while_it_repairs_goes_on_from_there(tmp_path, four_layers, at_a_rate):
    made, settings = at_a_rate
    shutil.copytree(made / "out.partial", tmp_path / "out.partial")
    for path in (tmp_path / "out.partial").glob("model-0000[13]*"):
        path.unlink()
    stopped_at(3, four_layers, tmp_path / "out", **settings)  # the first is repaired, the third is not
    report = qm.compress(four_layers, tmp_path / "out", **settings)
    assert "1 of 3 finished layers computed again" in report.degraded[0]
    assert bytes_of(tmp_path / "out") == bytes_of(made / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("grid", [MinMaxTernary(torch.bfloat16), None])
def test_layers_rounded_to_nearest_are_repaired_by_themselves(tmp_path, four_layers, grid):
    settings = {"recipe": "nearest", "rate": 2.0 if grid is None else None, "grid": grid}
    qm.compress(four_layers, tmp_path / "whole", **settings)
    stopped_at(4, four_layers, tmp_path / "out", **settings)
    flip(next((tmp_path / "out.partial").glob("model-00002-of-*")))
    events = []
    report = qm.compress(four_layers, tmp_path / "out", progress=events.append, **settings)
    assert [line for line in report.degraded if "safetensors; 1 of 3 finished layers" in line] == report.degraded[:1]
    assert [event.place for event in events] == [
        "unfinished work",
        "encoder.block.1, expert group 1 of 1",
        "decoder.block.1, expert group 1 of 1",
    ]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_model_that_was_touched_is_known_and_one_that_was_changed_is_not(tmp_path, switch, text_file):
    model = changed_copy(switch, tmp_path / "model")
    stopped_at(2, model, tmp_path / "out", calibration=text_file, **SMALL)
    os.utime(model / "model.safetensors", (1, 1))
    shutil.copytree(tmp_path / "out.partial", tmp_path / "changed.partial")
    places = []
    qm.compress(model, tmp_path / "out", calibration=text_file, progress=places.append, **SMALL)
    assert len(places) == 1
    flip(model / "model.safetensors")
    os.utime(model / "model.safetensors", (2, 2))
    with pytest.raises(ResumeError, match=r"the model's model.safetensors has changed since. Put the old one back"):
        qm.compress(model, tmp_path / "changed", calibration=text_file, **SMALL)


def test_a_run_resumes_with_smaller_batches_and_groups(tmp_path, switch, text_file, compressed):
    settings = {"calibration": text_file, "grid": MinMaxTernary(torch.bfloat16), **SMALL}
    stopped_at(2, switch, tmp_path / "out", **settings)
    places = []
    qm.compress(switch, tmp_path / "out", progress=places.append, batch_size=3, group_size=2, **settings)
    assert len(places) == 2  # groups of the second layer
    assert bytes_of(tmp_path / "out") == bytes_of(compressed[0])


# what is wrong with the input, found before the work


def test_windows_longer_than_the_positions_are_refused(tmp_path, run, causal, switch, text_file):
    model = changed_copy(causal("mixtral"), tmp_path / "mixtral", max_position_embeddings=40)
    with pytest.raises(SettingError, match="sequence_length is 41; the model has 40 positions"):
        qm.compress(model, tmp_path / "out", calibration=text_file, **{**SMALL, "sequence_length": 41})
    code, _, err = run("eval", model, "--text", text_file, "--sequence-length", 41)
    assert (code, "the model has 40 positions" in err) == (1, True)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("switch_transformers", {"max_position_embeddings": 128}, None),  # relative positions
        ("mixtral", {"max_position_embeddings": 64}, 64),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, None),
        (
            "qwen3_moe",
            {
                "max_position_embeddings": 100,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 80,
                    "rope_theta": 1e4,
                },
            },
            320,
        ),
        ("gpt_oss", {}, 131072),
        ("gemma4", {}, 131072),  # of its text; each kind of layer has its own rotation
        ("jamba", {}, None),
        ("nemotron_h", {}, None),
        ("granitemoehybrid", {}, None),
        ("granitemoehybrid", {"position_embedding_type": "rope", "max_position_embeddings": 77}, 77),
    ],
)
def test_how_far_positions_reach(model_type, settings, expected):
    assert positions_of(AutoConfig.for_model(model_type, **settings)) == expected


def test_a_check_before_the_first_layer_finds_every_nan(tmp_path, run, switch):
    model = changed_copy(switch, tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    for name in ("decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight", "shared.weight"):
        tensors[name].view(-1)[-1] = float("inf")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    events = []
    with pytest.raises(NotFiniteError, match=r"expert_2.wo.weight in .* NaN or infinity, and 1 other tensors do"):
        qm.compress(model, tmp_path / "out", recipe="nearest", check_first=True, progress=events.append)
    assert {event.done for event in events} == {0}
    code, _, err = run("compress", model, tmp_path / "out", "--recipe", "nearest", "--check-first")
    assert (code, "expert_2.wo.weight" in err) == (1, True)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("lacking", [["model_type"], ["model_type", "architectures"]], ids=len)
def test_a_config_of_no_known_model_says_what_it_lacks(tmp_path, run, switch, compressed, lacking):
    for source, command in ((switch, "compress"), (compressed[0], "inspect"), (compressed[0], "verify")):
        model = changed_copy(source, tmp_path / command)
        config = json.loads((model / "config.json").read_text())
        rest = {key: value for key, value in config.items() if key not in lacking}
        (model / "config.json").write_text(json.dumps(rest))
        more = [tmp_path / "out", "--recipe", "nearest"] if command == "compress" else []
        code, out, err = run(command, model, *more)
        assert code == 1
        assert f"config.json lacks {' and '.join(lacking)}: it does not say what" in out + err


def test_an_index_that_names_a_lacking_tensor_is_found_at_the_start(tmp_path, switch):
    model = changed_copy(switch, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    names = [*tensors, "encoder.block.1.layer.1.mlp.experts.expert_2.wo.scale", "x"]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks encoder.*wo.scale and 1 more, which the index names. Fetch"):
        qm.compress(model, tmp_path / "out", recipe="nearest")
    assert not list(tmp_path.glob("out*"))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_that_would_run_a_program_is_answered_by_our_own_remedy(tmp_path, switch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = changed_copy(switch, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"shared.weight": Malicious()}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        qm.compress(model, tmp_path / "out", recipe="nearest")
    assert "pytorch_model.bin asks for posix.system: a pickle may run any program" in str(error.value)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [" " * 8192, "\n\t \u00a0\u2003" * 1000])
def test_white_space_is_no_text(tmp_path, causal, run, content):
    text = tmp_path / "white.txt"
    text.write_text(content)
    byte_model = tiny.make_causal(tmp_path / "model", tiny.train_tokenizer(tiny.make_text(0, 500)), "mixtral")
    with pytest.raises(TextError, match="the text is empty but for white space"):
        qm.compress(byte_model, tmp_path / "out", calibration=text, **SMALL)
    code, _, err = run("eval", byte_model, "--text", text, "--sequence-length", 32)
    assert (code, "white space" in err) == (1, True)


def test_experts_without_a_token_are_named(tmp_path, switch, text_file):
    few = {"samples": 1, "sequence_length": 32, "validation_samples": 0}
    report = qm.compress(switch, tmp_path / "a", calibration=text_file, **few)
    rows = {row.layer: row.tokens for row in report.projections}
    starved = {name: [i for i, count in enumerate(tokens) if not count] for name, tokens in rows.items()}
    (note,) = (line for line in report.degraded if line.startswith("experts that no calibration token reached, in "))
    for name, experts in starved.items():
        block = name.split(".layer.")[0]
        assert (f"in {block}: " in note) == bool(experts)
        assert not experts or f"{block}: {ranges(experts)}" in note
    assert any(starved.values())
