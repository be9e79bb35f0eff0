"""Models whose experts come from disk: the same bits at any budget, and a clear line for each thing that goes wrong."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import tiny
import torch
from checks import outputs
from forking import PACKAGE
from safetensors.torch import load_file

import qmoe_lite as qm
from qmoe_lite.errors import CheckpointError, FormatError, OutputError, QMoEError, SettingError
from qmoe_lite.models.causal import Causal
from qmoe_lite.offload import use_counts
from qmoe_lite.offload.cache import ExpertCache
from qmoe_lite.offload.ram_tier import slot_layout
from qmoe_lite.offload.readers import Read
from qmoe_lite.offload.runner import attach, runner_of
from qmoe_lite.offload.sizes import parse_size

FAMILIES = ["switch_transformers", *sorted(tiny.CAUSAL)]


@pytest.fixture
def limited(request):
    """Give a function that loads a model with slots for so many experts; its runner is closed at the end."""

    def get(path, slots, **options):
        model = qm.load(path, dtype=torch.float32)
        probe = attach(model, remember=False)
        size = sum(layer.index_bytes for layer in probe._layers) + slots * slot_layout(probe._layers)[1]
        probe.close()
        runner = attach(model, ram_cache=size, **{"remember": False, **options})
        request.addfinalizer(runner.close)
        return model, runner

    return get


@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch_transformers"])
def test_a_budget_counts_all_that_is_held_beside_the_codes(in_windows, limited, model_type):
    model, runner = limited(in_windows(model_type), 9)
    outputs(model)
    for layer in runner._layers:
        held = {}
        for stack in layer.parts.values():
            assert stack.parts["levels"].dtype == torch.uint8
            parts = [*stack.parts.items(), *stack.held.items()]
            arrays = [torch.from_numpy(stack._steps), torch.from_numpy(stack._float_scales)]
            arrays += [part for name, part in parts if name != "codes"]
            held |= {array.data_ptr(): array.nbytes for array in arrays}
        assert layer.index_bytes == sum(held.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(directory, limited, dtype):
    """It is switched, for the whole process, while another thread loads a model."""
    path = directory("qwen3_moe")
    models = [qm.load(path, dtype=torch.float32), limited(path, 4)[0]]
    expected = outputs(models[0])
    packed = models[0].model.layers[0].mlp.experts.packed(0, "up_proj")
    x = torch.randn(200, packed.columns)
    products = [qm.decode_matmul(packed, x[:rows]) for rows in (1, 200)]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert all(torch.equal(outputs(model), expected) for model in models)
        found = [qm.decode_matmul(packed, x[:rows]) for rows in (1, 200)]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(*pair) for pair in zip(found, products, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_the_same_bits_at_every_budget(directory, limited, model_type):
    path = directory(model_type)
    expected = outputs(qm.load(path, dtype=torch.float32))
    for slots in (1, 2, 5, 9, 1000):
        model, runner = limited(path, slots)
        assert torch.equal(outputs(model), expected), slots
        assert torch.equal(outputs(model), expected), slots
        found = runner.statistics
        assert found.misses > 0
        assert found.disk_bytes > 0
        if slots == 1000:
            assert found.hits > found.misses, "the second time all are there"
        else:
            assert found.cache_bytes == min(slots, len(runner._ram.cache.uses)) * runner._ram.slot_bytes


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"prefetch": False}, {"half_life": 0.0}, {"remember": True}])
def test_no_option_changes_a_bit(directory, limited, options):
    path = directory()
    expected = outputs(qm.load(path, dtype=torch.float32))
    for slots in (1, 4, 7):
        model, runner = limited(path, slots, **options)
        for _ in range(2):
            assert torch.equal(outputs(model), expected)
        runner.close()


def test_without_direct_reads_the_bits_are_the_same(directory, limited):
    path = directory()
    expected = outputs(qm.load(path, dtype=torch.float32))
    model, runner = limited(path, 4)
    for file in runner._files.values():
        file.direct = False
    assert torch.equal(outputs(model), expected)
    assert not runner.statistics.direct
    assert any("dropped from it" in line for line in runner.statistics.lines())


def test_generation_gives_the_same_tokens(directory):
    path = directory("mixtral")
    ids = torch.randint(3, 15, (1, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = qm.load(path).generate(ids, **options)
    model = qm.load(path, ram_cache="120KB")
    assert torch.equal(model.generate(ids, **options), expected)
    runner = runner_of(model)
    assert runner.statistics.passes == 12
    assert runner.statistics.tokens == 9 + 11
    assert runner.statistics.seconds > 0
    runner.close()


def test_what_is_not_finite_spreads_as_without_a_budget(directory, limited):
    path = directory()
    plain = qm.load(path, dtype=torch.float32)
    model, _ = limited(path, 3)
    for one in (plain, model):
        with torch.no_grad():
            one.model.embed_tokens.weight[5, 3] = float("inf")
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert expected.isnan().any()
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_gradients_are_the_same(directory, limited):
    path, gradients = directory(), []
    for model in (qm.load(path, dtype=torch.float32), limited(path, 2)[0]):
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        model(input_ids=torch.arange(3, 14)[None]).logits.square().sum().backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_training_steps_end_with_fewer_slots_than_experts(directory, limited):
    """In the second step the slots hold the last experts, and the first one is needed first."""
    path = directory()
    plain, (model, runner) = qm.load(path, dtype=torch.float32), limited(path, 2)
    name = runner._layers[0].experts.layer.experts
    index, weights = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.full((3, 2), 0.5)
    for step in range(3):
        gradients = []
        for one in (plain, model):
            x = torch.randn(3, 24, generator=torch.Generator().manual_seed(step)).requires_grad_(True)
            one.get_submodule(name)(x, index, weights).square().sum().backward()
            gradients.append(x.grad)
        assert gradients[0].abs().max() > 0
        assert torch.equal(*gradients)


def test_a_prompt_in_stretches_runs_with_fewer_slots_than_experts(directory, limited, monkeypatch):
    """The slots hold the last stretch's experts, and the first one is of others."""
    monkeypatch.setattr("qmoe_lite.models.cpu_dispatch.STRETCH", 2)
    path = directory()
    plain, (model, runner) = qm.load(path, dtype=torch.float32), limited(path, 2)
    name = runner._layers[0].experts.layer.experts
    index, weights = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.full((3, 2), 0.5)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            found, expected = (one.get_submodule(name)(x, index, weights) for one in (model, plain))
            assert torch.equal(found, expected)


def test_waiting_for_nothing_is_an_error(directory, limited):
    _, runner = limited(directory(), 2)
    with pytest.raises(QMoEError, match="report this as a bug"):
        runner._ram.wait([0])


def test_a_dequantised_expert_is_the_same(directory, limited):
    path = directory()
    plain, (model, runner) = qm.load(path), limited(path, 1)
    name = runner._layers[1].experts.layer.experts
    for expert in (5, 0, 5):
        for projection in ("gate_proj", "down_proj"):
            found = model.get_submodule(name).dense(expert, projection)
            assert torch.equal(found, plain.get_submodule(name).dense(expert, projection))
    first = model.get_submodule(name).packed(0, "up_proj").codes
    kept = first.clone()
    model.get_submodule(name).packed(1, "up_proj")
    assert torch.equal(first, kept), "what was given stays when the slot is another's"


def test_layers_may_be_run_one_by_one_and_in_any_order(directory, limited):
    path = directory()
    plain, (model, runner) = qm.load(path, dtype=torch.float32), limited(path, 3)
    generator = torch.Generator().manual_seed(1)
    for number in (1, 0, 0, 1):
        name = runner._layers[number].experts.layer.experts
        x = torch.randn(9, 24, generator=generator)
        index, weights = torch.randint(0, 6, (9, 2), generator=generator), torch.rand(9, 2, generator=generator)
        with torch.no_grad():
            found, expected = (m.get_submodule(name)(x, index, weights) for m in (model, plain))
        assert torch.equal(found, expected)


def test_copies_and_files_of_a_model_have_no_runner(directory, limited, tmp_path):
    path = directory()
    model, runner = limited(path, 4)
    expected, passes = outputs(model), runner.statistics.passes
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert runner_of(other) is None
        assert torch.allclose(outputs(other), expected, atol=1e-5), "its dense weights lie elsewhere, BLAS rounds so"
    assert runner.statistics.passes == passes
    model.save_pretrained(tmp_path / "again")
    assert torch.allclose(outputs(qm.load(tmp_path / "again", dtype=torch.float32)), expected, atol=1e-5)


def test_a_closed_runner_leaves_the_model_as_it_was(directory):
    path = directory()
    model = qm.load(path, dtype=torch.float32)
    outputs(model)  # ends the hooks that check dense tensors
    before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    runner = attach(model, ram_cache="200KB", remember=False)
    expected = outputs(model)
    runner.close()
    runner.close()
    assert runner_of(model) is None
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == before
    assert torch.equal(outputs(model), expected)
    again = attach(model, ram_cache="1MB", remember=False)
    assert torch.equal(outputs(model), expected)
    again.close()


def test_hits_and_misses_add_up(directory, limited):
    path = directory()
    model, runner = limited(path, 1000, prefetch=False)
    ids = torch.tensor([[4, 5]])
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=ids)
    found = runner.statistics
    experts = runner._ram.reads
    assert found.misses == experts, "each once"
    assert found.hits == 2 * experts
    assert found.hit_rate == pytest.approx(2 / 3)
    codes = sum(runner._layers[0].largest(name) for name in ("gate_proj", "up_proj", "down_proj"))
    assert 0 < found.disk_bytes <= experts * codes
    assert (found.tokens, found.passes, found.prefetched) == (6, 3, 0)
    assert "66.7% hits" in "\n".join(found.lines())
    assert json.loads(json.dumps(found.to_json()))["misses"] == experts


def test_experts_that_are_guessed_right_are_hits(directory, limited):
    """Both layers' routers choose the same experts for any token: each guess is right."""
    path = directory()
    model, runner = limited(path, 1000)
    with torch.no_grad():
        for layer in runner._layers:
            router = model.get_submodule(layer.experts.layer.experts.rpartition(".")[0]).gate.weight
            router.copy_(torch.arange(6.0)[:, None] * model.model.embed_tokens.weight.new_ones(24))
        between = model.model.layers[1].input_layernorm

        def arrive(*_):
            for read in list(runner._ram._under_way.values()):
                runner._ram.readers.wait([read])

        between.register_forward_hook(arrive)
        model.model.embed_tokens.weight.fill_(1.0)
        model(input_ids=torch.tensor([[4]]))
    found = runner.statistics
    assert (found.predicted, found.predicted_right) == (2, 2)
    assert (found.prefetched, found.prefetch_hits) == (2, 2)
    assert (found.misses, found.hits, found.late) == (2, 2, 0)
    assert "100.0% of 2 right; 2 read ahead, 2 of them used" in "\n".join(found.lines())


@contextmanager
def busy(readers):
    """All reading threads are at something else."""
    gate = threading.Event()
    for _ in readers._threads:
        readers.submit(Read(lambda: gate.wait() and 0, True))
    while readers._urgent:
        time.sleep(0.001)
    try:
        yield
    finally:
        gate.set()


def test_a_guess_that_gave_way_unpins_no_others_slot(directory, limited):
    _, runner = limited(directory(), 4)
    ram = runner._ram
    for layer in runner._layers:
        ram.open(layer)
    with busy(ram.readers):
        assert ram.guess([6]) == [6]
        ram.want([0, 1, 2, 3])  # the guess's slot is needed
        assert ram.cache.slot(6) < 0
        ram.end_guess([])
        assert (ram.cache._pins == 2).all(), "a read and a want each"
    while ram._under_way:
        ram.wait([])
    assert (ram.cache._pins == 1).all()


def test_routing_is_recorded(directory, limited, tmp_path):
    path = directory("switch_transformers")
    model, runner = limited(path, 4)
    runner.trace(tmp_path / "trace.jsonl")
    outputs(model)
    runner.close()
    head, *lines = map(json.loads, (tmp_path / "trace.jsonl").read_text().splitlines())
    assert head == {
        "model_type": "switch_transformers",
        "layers": ["encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"],
        "experts": 4,
        "top_k": 1,
    }
    assert [(line["pass"], line["layer"]) for line in lines] == [(n, layer) for n in range(1, 5) for layer in (0, 1)]
    assert len(lines[0]["experts"]) == 22
    assert all(-1 <= expert < 4 for (expert,) in lines[0]["experts"])
    with pytest.raises(OutputError, match="cannot be written"):
        limited(path, 4)[1].trace(tmp_path / "no" / "trace")


def test_routing_is_decoded_once_a_layer(directory, limited, monkeypatch):
    model, runner = limited(directory(), 4)
    decoded, routing = [], Causal.routing
    monkeypatch.setattr(Causal, "routing", lambda *given: decoded.append(given) or routing(*given))
    outputs(model)
    assert len(decoded) == runner.statistics.passes * len(runner._layers) > 0


def test_passes_of_several_threads_are_told_apart(directory, limited, tmp_path):
    model, runner = limited(directory("qwen3_moe"), 4)
    ids = torch.arange(3, 9)[None]
    model(ids)
    seconds, runner_passes = runner.statistics.seconds, runner.statistics.passes
    runner.trace(tmp_path / "trace.jsonl")
    all_in = threading.Barrier(3)
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: [all_in.wait(60), None][1])
    threads = [threading.Thread(target=model, args=(ids + i,)) for i in range(3)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begun
    hook.remove()
    with pytest.raises(IndexError):
        model(ids + 1000)
    runner.close()
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()[1:]]
    layers = range(len(runner._layers))
    wanted = {(runner_passes + number, layer) for number in (1, 2, 3) for layer in layers}
    assert {(line["pass"], line["layer"]) for line in lines} == wanted
    assert len(lines) == len(wanted)
    assert 0 < runner.statistics.seconds - seconds <= wall + 1
    assert runner._passes.under_way == 0, "a pass that failed is over too"


@pytest.mark.slow
def test_a_compiled_model_runs_around_the_cache(directory, limited, monkeypatch):
    model, _ = limited(directory("qwen3_moe"), 4)
    ids = torch.arange(3, 9)[None]
    seen, use = [], ExpertCache.use

    def noted(cache, expert):
        seen.append(torch.compiler.is_compiling())
        use(cache, expert)

    monkeypatch.setattr(ExpertCache, "use", noted)
    with torch.no_grad():
        expected = model(ids).logits
        found = torch.compile(model, backend="eager")(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert len(seen) > 10
    assert not any(seen), "the cache's bookkeeping was compiled"


@pytest.mark.parametrize("step", ["header", "end"])
def test_a_trace_on_a_full_disk_is_one_line(directory, limited, tmp_path, step):
    model, runner = limited(directory(), 4)
    if step == "header":
        with pytest.raises(OutputError, match="/dev/full cannot be written: No space left"):
            runner.trace("/dev/full")
        assert runner._trace is None
        outputs(model)
        runner.close()
        return
    runner.trace(tmp_path / "trace")
    runner._trace.file.close()
    runner._trace.file = open("/dev/full", "w")  # noqa: SIM115
    runner._trace.file.write("a line")
    with pytest.raises(OutputError, match=r"/dev/full cannot be written: No .* The end of the trace"):
        runner.close()
    assert runner_of(model) is None
    assert runner._ram.readers.closed
    runner.close()


@pytest.mark.parametrize("place", ["no/trace", "/dev/full"])
def test_a_trace_to_an_unwritable_place_leaves_the_old_one_running(directory, limited, tmp_path, place):
    model, runner = limited(directory(), 4)
    runner.trace(tmp_path / "old")
    outputs(model)
    with pytest.raises(OutputError, match="cannot be written"):
        runner.trace(tmp_path / place)
    outputs(model)
    runner.close()
    _, *lines = map(json.loads, (tmp_path / "old").read_text().splitlines())
    assert [line["pass"] for line in lines] == [n for n in range(1, 9) for _ in runner._layers]


def test_a_new_trace_follows_an_old_one(directory, limited, tmp_path):
    """In the same file, and where the end of the old one is lost."""
    model, runner = limited(directory(), 4)
    for _ in range(2):
        runner.trace(tmp_path / "trace")
        outputs(model)
    runner._trace.file.close()
    runner._trace.file = open("/dev/full", "w")  # noqa: SIM115
    runner._trace.file.write("a line")
    with pytest.raises(OutputError, match=r"/dev/full cannot be written: No .* The end of the trace"):
        runner.trace(tmp_path / "third")
    outputs(model)
    runner.close()
    for file, first in (("trace", 5), ("third", 9)):
        head, *lines = map(json.loads, (tmp_path / file).read_text().splitlines())
        assert head["model_type"] == "qwen3_moe"
        assert [line["pass"] for line in lines] == [n for n in range(first, first + 4) for _ in runner._layers]


@pytest.mark.slow
def test_a_forgotten_model_ends_its_threads_and_closes_its_files(directory):
    def open_now():
        gc.collect()
        return sorted(t.name for t in threading.enumerate()), len(os.listdir("/proc/self/fd"))

    path = directory()
    outputs(qm.load(path, dtype=torch.float32))  # what torch and numba start once
    before = open_now()
    model = qm.load(path, ram_cache="1MB", dtype=torch.float32)
    outputs(model)
    assert open_now() != before
    del model
    assert open_now() == before
    assert (path / "expert_counts.json").is_file(), "and keeps its counts"


def test_a_runner_whose_directory_is_gone_closes(directory):
    path = directory()
    model = qm.load(path, ram_cache="1MB")
    runner = runner_of(model)
    outputs(model)
    shutil.rmtree(path)
    runner.close()
    assert runner._ram.readers.closed
    assert runner_of(model) is None
    assert not path.exists()


def test_a_read_that_cannot_begin_takes_no_slot(directory, limited, monkeypatch):
    model, runner = limited(directory(), 2)
    expected = outputs(model)

    def fail(_):
        raise QMoEError("fake")

    with monkeypatch.context() as patch:
        patch.setattr(runner._ram.readers, "submit", fail)
        with pytest.raises(QMoEError, match="fake"):
            outputs(model)
    assert not runner._ram._under_way
    assert torch.equal(outputs(model), expected)


def test_a_warm_up_that_fails_leaves_the_model_as_it_was(directory, monkeypatch):
    path = directory()
    model = qm.load(path, ram_cache="1MB")
    outputs(model)
    runner_of(model).close()

    def fail(_):
        raise CheckpointError("fake")

    before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    monkeypatch.setattr("qmoe_lite.offload.ram_tier.RamTier.warm_up", fail)
    with pytest.raises(CheckpointError, match="fake"):
        attach(model, ram_cache="1MB")
    assert runner_of(model) is None
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == before


def test_closing_beside_a_pass_is_one_line(directory, limited):
    model, runner = limited(directory(), 2)
    experts = runner._layers[0].experts
    runner.close()
    with pytest.raises(QMoEError, match="was closed while its model ran"):  # a pass that has the runner still
        runner.run(experts, [0, 1], torch.ones(2, 24), [0, 1, 2])
    with pytest.raises(QMoEError, match="was closed while its model ran"):
        runner.packed(experts, 0, "gate_proj")
    outputs(model)


def test_the_next_start_is_warm(directory):
    path = directory()
    model = qm.load(path, ram_cache="1MB")
    runner = runner_of(model)
    expected = outputs(model)
    used = {i for i, n in enumerate(runner._ram.cache.uses) if n}
    runner.close()
    assert (path / "expert_counts.json").is_file()
    again = qm.load(path, ram_cache="1MB")
    runner = runner_of(again)
    assert {n for n in range(12) if runner._ram.cache.slot(n) >= 0} == used
    while runner._ram._under_way:
        runner._ram.wait([])
    assert torch.equal(outputs(again), expected)
    assert runner.statistics.misses == 0
    runner.close()
    # other weights: the counts say nothing of them
    os.utime(path / "config.json")
    shard = next(path.glob("*.safetensors"))
    os.utime(shard, (1, 1))
    third = qm.load(path, ram_cache="1MB")
    assert not runner_of(third)._ram.cache.uses.any()
    runner_of(third).close()


def test_a_user_without_a_home_keeps_counts_beside_the_model(directory, monkeypatch):
    path = directory()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(use_counts.Path, "home", no_home)
    model = qm.load(path, ram_cache="1MB")
    outputs(model)
    runner_of(model).close()
    assert (path / "expert_counts.json").is_file()


def test_counts_go_to_the_users_cache_where_the_model_is_read_only(directory, tmp_path, monkeypatch):
    path = directory()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = use_counts.write_json

    def refuse(file, value):
        if file.parent == path:
            raise OutputError("read-only")
        write(file, value)

    monkeypatch.setattr(use_counts, "write_json", refuse)
    for warm in (False, True):
        model = qm.load(path, ram_cache="1MB")
        assert runner_of(model)._ram.cache.uses.any() == warm
        outputs(model)
        runner_of(model).close()
    assert not (path / "expert_counts.json").exists()
    assert len(list((tmp_path / "cache" / "qmoe-lite").iterdir())) == 1


def test_damaged_counts_are_no_counts(directory):
    path = directory()
    for text in ("", "{}", "[1]", '{"model": 1, "counts": "x"}'):
        (path / "expert_counts.json").write_text(text)
        model = qm.load(path, ram_cache="1MB")
        assert not runner_of(model)._ram.cache.uses.any()
        runner_of(model).close()


def shards(path):
    return sorted(path.glob("*.safetensors"))


def test_files_deleted_while_the_model_runs_are_read_on(directory, limited):
    path = directory()
    expected = outputs(qm.load(path, dtype=torch.float32))
    model, _ = limited(path, 2)
    shutil.rmtree(path)
    assert torch.equal(outputs(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["budget", "maps"])
def test_a_file_cut_while_the_model_runs_is_one_line(forks, directory, way):
    """In a process of its own: a map that is touched behind the file's end would end it."""
    path = directory("mixtral")
    code = """
import copy, os, sys, torch, qmoe_lite as qm
from pathlib import Path
from qmoe_lite.offload.runner import runner_of
model = qm.load(sys.argv[1], ram_cache="40KB" if sys.argv[2] == "budget" else None)
ids = torch.tensor([[4, 5, 6]])
model(input_ids=ids)
for file in Path(sys.argv[1]).glob("*.safetensors"):
    os.truncate(file, 4096)
experts = model.model.layers[0].mlp.experts
inner = model.model
for use in (lambda: model(input_ids=ids), lambda: inner(input_ids=ids), model.state_dict, inner.state_dict,
            lambda: copy.deepcopy(model), lambda: experts.dense(0, "up_proj")):
    try:
        use()
    except qm.QMoEError as error:
        print(type(error).__name__, error)
"""
    done = forks.run(code, path, way, imports=PACKAGE)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("CheckpointError") for line in lines)
    assert all("it was truncated while the model ran. Restore the file" in line for line in lines)


def test_a_cut_that_only_a_read_meets_is_the_same_line(directory, limited):
    """Between the look at the files' sizes and the read."""
    path = directory()
    model, runner = limited(path, 2)
    sizes = {file: file.stat().st_size for file in shards(path)}
    contents = {file: file.read_bytes() for file in sizes}
    expected = outputs(qm.load(path, dtype=torch.float32))
    for layer in runner._layers:
        runner._ram.open(layer)
    for layer in runner._layers:
        place = layer._places["gate_proj"]["codes"]
        os.truncate(place.path, place.offset)
    with pytest.raises(CheckpointError, match="was truncated while the model ran"):
        runner._layers[0].experts(torch.ones(1, 24), torch.tensor([[0, 1]]), torch.ones(1, 2))
    while runner._ram._under_way:  # the other expert's read met the cut file too
        runner._ram.collect()
    for file, content in contents.items():
        with file.open("rb+") as opened:
            opened.write(content)
    assert torch.equal(outputs(model), expected), "the next call finds the files whole again"


def test_a_read_that_began_on_a_cut_file_fails_no_later_call(directory, limited, monkeypatch):
    """It is under way when its call fails, and ends when the next call wants the same expert."""
    path = directory()
    expected = outputs(qm.load(path, dtype=torch.float32))
    model, runner = limited(path, 12, prefetch=False)
    layer, gate, began = runner._layers[0], threading.Event(), threading.Event()
    fetch, wait, failed = layer.fetch, runner._ram.readers.wait, []

    def cut(expert, projection, *arguments):
        if expert in failed:
            return fetch(expert, projection, *arguments)
        failed.append(expert)
        if expert == 1:
            began.set()
            gate.wait()
        else:
            began.wait()
        raise CheckpointError(f"expert {expert} was cut")

    monkeypatch.setattr(layer, "fetch", cut)
    two = torch.ones(1, 24), torch.tensor([[0, 1]]), torch.ones(1, 2)
    with pytest.raises(CheckpointError, match="expert 0 was cut"):
        layer.experts(*two)
    assert 1 in runner._ram._under_way

    def wait_and_end(reads):
        gate.set()
        wait(reads)

    monkeypatch.setattr(runner._ram.readers, "wait", wait_and_end)
    layer.experts(*two)
    assert failed[:2] == [0, 1]
    failed += range(6)
    assert torch.equal(outputs(model), expected)


def test_a_layer_whose_row_lengths_could_not_be_read_is_read_again(directory, limited, monkeypatch):
    path = directory()
    expected = outputs(qm.load(path, dtype=torch.float32))
    model, runner = limited(path, 4)
    layer = runner._layers[0]
    read, bad = layer._read, layer._places["up_proj"]["levels"]

    def cut(place):
        if place == bad:
            raise CheckpointError("cut")
        return read(place)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "_read", cut)
        with pytest.raises(CheckpointError, match="cut"):
            outputs(model)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("part", ["codes", "levels"])
def test_bytes_that_change_are_noticed_at_every_read(directory, limited, part):
    path = directory()
    model, runner = limited(path, 1)
    expected = outputs(model)
    place = runner._layers[0]._places["gate_proj"][part]
    with place.path.open("rb+") as file:
        file.seek(place.offset)
        data = bytearray(file.read(place.length))
        file.seek(place.offset)
        file.write(bytes(byte ^ 1 for byte in data))
    if part == "levels":  # they were read when the layer first ran
        assert torch.equal(outputs(model), expected)
        model, runner = limited(path, 1)
    with pytest.raises(FormatError, match=r"expert \d of model\.layers\.0\.mlp\.experts\.gate_proj is damaged"):
        outputs(model)


def test_codes_that_do_not_decode_never_reach_a_kernel(directory, limited):
    """Their checksum is right: whoever wrote them meant it."""
    from qmoe_lite.checkpoint.format import checksum

    path = directory()
    _, runner = limited(path, 3)
    layer = runner._layers[0]
    runner._ram.open(layer)
    stack = layer.parts["gate_proj"]
    stack.parts["checksums"].fill_(0)
    codes = next(t for f in shards(path) for n, t in load_file(f).items() if "layers.0" in n and "gate_proj_codes" in n)
    place = layer._places["gate_proj"]["codes"]
    changed = codes.clone()
    changed[:20] ^= 0xFF
    with place.path.open("rb+") as file:
        file.seek(place.offset)
        file.write(changed.numpy().tobytes())
    for expert in range(6):
        start, used = stack.span(expert)
        stack.parts["checksums"][expert] = checksum(stack.matrix(expert, changed[start : start + used]))
    with pytest.raises(FormatError, match=r"expert 0 of .*gate_proj: row \d+ "):
        layer.experts(torch.ones(1, 24), torch.tensor([[0, 1]]), torch.ones(1, 2))


@pytest.mark.slow
def test_two_processes_run_one_directory(forks, directory):
    path = directory()
    code = """
import os, sys, torch, qmoe_lite as qm
from qmoe_lite.offload.runner import runner_of
child = os.fork()
model = qm.load(sys.argv[1], ram_cache="60KB", dtype=torch.float32)
ids = torch.randint(3, 15, (1, 9), generator=torch.Generator().manual_seed(0))
print(model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist())
runner_of(model).close()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    done = forks.run(code, path, imports=PACKAGE)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == 2
    assert found[0] == found[1]
    assert json.loads((path / "expert_counts.json").read_text())["counts"]


def test_a_budget_below_one_expert_is_refused(directory):
    path = directory()
    with pytest.raises(SettingError, match=r"the cache is 1000 bytes; .* Give at least (\d+)\.") as caught:
        qm.load(path, ram_cache=1000)
    least = int(str(caught.value).rpartition(" ")[2].rstrip("."))
    with pytest.raises(SettingError, match="Give at least"):
        qm.load(path, ram_cache=least - 1)
    model = qm.load(path, ram_cache=least)
    assert runner_of(model)._ram.cache.slots == 1
    outputs(model)
    runner_of(model).close()


def test_options_that_exclude_each_other_are_refused(directory, switch):
    path = directory()
    for options, match in (
        ({"ram_cache": "1MB", "expert_cache": "2MB"}, "the same memory on the CPU"),
        ({"ram_cache": "1MB", "offload": "ram"}, "Give one of them"),
        ({"offload": "disk"}, "Set ram_cache or expert_cache too"),
        ({"offload": "tape"}, "expected 'ram' or 'disk'"),
        ({"ram_cache": "lots"}, "ram_cache is 'lots'"),
    ):
        with pytest.raises(SettingError, match=match):
            qm.load(path, **options)
    model = qm.load(path, ram_cache="1MB")
    with pytest.raises(SettingError, match="has a runner already"):
        attach(model)
    runner_of(model).close()
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="is not there"):
        attach(model)


def test_sizes_are_read_as_people_write_them():
    for text, size in ((4096, 4096), ("4096", 4096), ("4GiB", 4 << 30), ("1.5 kb", 1500), ("3MB", 3 * 10**6)):
        assert parse_size(text) == size
    for wrong in ("", "GiB", "-1", "4 G iB", "1e3", "4XB", True):
        with pytest.raises(SettingError):
            parse_size(wrong)
