"""`python bench/scale.py`: what it makes, measures and prints."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import qmoe_lite as qm
from qmoe_lite.bench._parts import made_checkpoint
from qmoe_lite.bench._parts.large_models import LARGE
from qmoe_lite.bench._parts.made_checkpoint import config_of, make_checkpoint, make_text
from qmoe_lite.bench._parts.phases import Compressed, MemoryPeak, Stopwatch, compress_watched
from qmoe_lite.bench.scale import Projected, Size, show_groups, show_projected, show_sizes
from qmoe_lite.checkpoint.reader import Checkpoint

SMALL = {
    "hidden_size": 24,
    "moe_intermediate_size": 20,
    "intermediate_size": 48,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_a_made_checkpoint_in_fp8_is_compressed_and_its_phases_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(made_checkpoint, "_SHARD", 10_000)
    config = config_of("qwen3-fp8", 2 * 6 * 3 * 24 * 20 * 2e-9, **SMALL)
    assert config["num_hidden_layers"] == 2
    size = make_checkpoint(tmp_path / "dense", config)
    shards = list((tmp_path / "dense").glob("*.safetensors"))
    assert len(shards) > 3
    assert size == sum(file.stat().st_size for file in shards)
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    assert Checkpoint(tmp_path / "dense").tensor(name).float().std() == pytest.approx(100 / 6400, rel=0.6)

    settings = {"calibration": make_text(tmp_path / "text.txt", 1500), "grid": qm.MinMaxTernary(torch.bfloat16)}
    settings |= {"samples": 16, "sequence_length": 32, "validation_samples": 2, "spill": tmp_path}
    took = compress_watched(tmp_path / "dense", tmp_path / "out", settings)
    assert took.weights == 2 * 6 * 3 * 24 * 20
    assert sum(took.phases.values()) == pytest.approx(took.seconds, rel=0.1)
    phases = ["read", "checksums", "gather", "Hessian", "factor", "solve", "encode", "judge", "write"]
    assert all(took.phases[phase] > 0 for phase in [*phases, "dense forward", "experts' outputs"])
    assert took.peak_bytes >= took.import_bytes > 1e7
    assert took.moved["written"] > took.bytes


def test_sizes_come_by_whole_layers():
    layer = 256 * 2 * 256 * 512 * 2 / 1e9
    assert [config_of("switch", share * layer)["num_layers"] for share in (0.1, 2, 6.2)] == [1, 1, 3]
    assert config_of("qwen3-30b", 12)["num_hidden_layers"] == 10


def test_seconds_go_to_the_innermost_phase_of_one_thread(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    inner = watch.around("inner", lambda: None)
    watch.around("outer", inner)()
    other = threading.Thread(target=inner)
    other.start()
    other.join()
    watch.lap()
    assert watch.seconds == {"other": 1 + 16, "outer": 2 + 8, "inner": 4}
    assert watch.within == {"outer": 2 + 4 + 8, "inner": 4}


def test_the_peak_is_what_was_there_for_a_moment():
    watch = Stopwatch()
    with MemoryPeak(watch) as memory:
        held = watch.around("solve", lambda: (torch.ones(30_000_000), time.sleep(0.1)))()
        del held
        time.sleep(0.1)
    assert memory.most - memory.before == pytest.approx(120e6, rel=0.2)
    assert memory.phase == "solve"


def test_tables_fit_into_80_columns(capsys):
    phases = {phase: 1234.5 for phase in ("read", "factor", "solve", "experts' outputs", "dense forward")}
    moved = dict.fromkeys(("read", "written", "from the disk", "to the disk"), 10**12)
    took = Compressed(10**10, 2.0, 10**9, 6e4, 6e4, 5e3, phases, 3 * 10**8, 10**10, "dense forward", moved)
    sizes = [Size(2 * 10**10, took, 10**10, 10**9, 6e4, clock, {}) for clock in ("wall", "processor")]
    show_sizes(sizes)
    assert [size.longer for size in sizes] == [took.seconds / 6e4, took.processor_seconds / 6e4]
    show_groups(dict.fromkeys((1, 4, 16), took))
    show_projected([Projected(name, 10**12, 10**10, 0.8, 10**11, 10**10, 10**10, 10**12, 9, 5e6) for name in LARGE], 1)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "1.00x" in printed
    assert "switch-c-2048" in printed
