"""from_pretrained, save_pretrained and load: one model, whichever way it came, and no silent garbage."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import shutil
import threading
import time

import pytest
import tiny
import torch
from checks import layers_of, logits_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    SwitchTransformersEncoderModel,
)

import qmoe_lite as qm
from qmoe_lite.checkpoint.format import PARTS
from qmoe_lite.errors import CheckpointError, DeviceError, FormatError, SettingError
from qmoe_lite.models.building import Placeholder, experts_replaced, read_config
from qmoe_lite.models.family import family_of
from qmoe_lite.models.hf import QMoEConfig

FAMILIES = ["switch_transformers", *sorted(tiny.CAUSAL)]


@pytest.fixture
def pair(request, switch, compressed):
    """Give a function: model type -> (dense directory, compressed directory, transformers class)."""

    def get(model_type: str):
        if model_type == "switch_transformers":
            return switch, compressed[0], AutoModelForSeq2SeqLM
        make, pack = request.getfixturevalue("causal"), request.getfixturevalue("compressed_causal")
        return make(model_type), pack(model_type), AutoModelForCausalLM

    return get


def swap_two_experts(module) -> None:
    if hasattr(module, "gate_up_proj"):
        for parameter in (module.gate_up_proj.data, module.down_proj.data):
            parameter[[0, 1]] = parameter[[1, 0]]
    else:
        module["expert_0"], module["expert_1"] = module["expert_1"], module["expert_0"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_agree_whichever_way_the_model_came(pair, tmp_path, model_type):
    dense_directory, directory, auto = pair(model_type)
    ours = qm.load(directory, dtype=torch.float32)
    assert layers_of(ours)
    dense = auto.from_pretrained(dense_directory, dtype=torch.float32)
    tiny.fill_dense(dense, ours, layers_of(ours))
    reference = logits_of(dense)
    largest = reference.abs().max()
    ours.save_pretrained(tmp_path / "again")
    models = {
        "load": ours,
        "from_pretrained": auto.from_pretrained(directory, dtype=torch.float32),
        "saved, from_pretrained": auto.from_pretrained(tmp_path / "again", dtype=torch.float32),
        "saved, load": qm.load(tmp_path / "again", dtype=torch.float32),
    }
    for name, model in models.items():
        assert not model.training
        assert (logits_of(model) - reference).abs().max() <= 1e-4 * largest, name
    # on a model where it would show: two experts swapped change the logits a hundred times as much
    swap_two_experts(dense.get_submodule(layers_of(ours)[0]))
    assert (logits_of(dense) - reference).abs().max() > 1e-2 * largest


@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral", "qwen3_moe"])
def test_generation_gives_the_same_tokens(pair, tmp_path, model_type):
    dense_directory, directory, auto = pair(model_type)
    ours = qm.load(directory, dtype=torch.float32)
    ours.save_pretrained(tmp_path / "again")
    dense = auto.from_pretrained(dense_directory, dtype=torch.float32)
    tiny.fill_dense(dense, ours, layers_of(ours))
    ids = torch.randint(3, 15, (8, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "eos_token_id": None}
    expected = dense.generate(ids, **options)
    assert expected.unique().numel() > 2
    for model in (ours, auto.from_pretrained(directory), auto.from_pretrained(tmp_path / "again")):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral", "qwen3_moe"])
def test_a_missing_or_renamed_code_tensor_raises(pair, tmp_path, model_type, part):
    """transformers would fill its buffer with whatever lies in memory, and say nothing."""
    _, directory, auto = pair(model_type)
    for change in ("missing", "renamed"):
        path = tmp_path / change
        shutil.copytree(directory, path)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        name = next(n for n in index["weight_map"] if n.endswith(f"_{part}"))
        file = path / index["weight_map"].pop(name)
        tensors = load_file(file)
        tensor = tensors.pop(name)
        if change == "renamed":
            tensors[name + "s"] = tensor
            index["weight_map"][name + "s"] = file.name
        save_file(tensors, file, {"format": "pt"})
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        for load in (qm.load, auto.from_pretrained):
            with pytest.raises(CheckpointError, match=rf"lacks the tensor .*_{part}\."):
                load(path)


def test_a_code_tensor_that_transformers_renames_on_the_way_raises(compressed_causal):
    with pytest.raises(FormatError, match="gate_proj_codes was not loaded"):
        AutoModelForCausalLM.from_pretrained(compressed_causal("mixtral"), key_mapping={"gate_proj_codes": "other"})


@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral"])
def test_a_missing_dense_tensor_raises(pair, tmp_path, model_type):
    """transformers would fill it with random numbers."""
    _, directory, auto = pair(model_type)
    path = tmp_path / "less"
    shutil.copytree(directory, path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if n.endswith(("q.weight", "q_proj.weight")))
    del index["weight_map"][name]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (qm.load, auto.from_pretrained):
        with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
            load(path)


def test_a_failed_load_leaves_transformers_as_it_was(compressed, switch, tmp_path):
    path = tmp_path / "failing"
    shutil.copytree(compressed[0], path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["layers"].popitem()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="names other compressed layers"):
        qm.load(path)
    dense = AutoModelForSeq2SeqLM.from_pretrained(switch)
    assert hasattr(dense.encoder.block[1].layer[1].mlp.experts["expert_0"], "wi")
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_whole_models_can_be_saved_by_torch(pair, model_type):
    model, file = qm.load(pair(model_type)[1]), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits_of(torch.load(file, weights_only=False)), logits_of(model))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_save_pretrained_keeps_names_bits_and_configuration(pair, tmp_path, model_type):
    """A name such as gate_up_proj.codes would be split over the experts by transformers' own renaming."""
    _, directory, auto = pair(model_type)
    auto.from_pretrained(directory).save_pretrained(tmp_path / "again", max_shard_size="20KB")

    def contents(path):
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        return {name: safe_open(path / file, "pt").get_tensor(name) for name, file in index.items()}

    before, after = contents(directory), contents(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    repeated = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert before.keys() - repeated == after.keys() - repeated
    for name in after.keys() & before.keys():
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    configs = [json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_levels_are_never_cast(tmp_path, causal):
    """They are data: a model moved to bfloat16 would lose bits of float16 levels."""
    out = tmp_path / "out"
    qm.compress(causal("mixtral"), out, recipe="nearest", grid=qm.MinMaxTernary(level_dtype=torch.float16))
    layer = "model.layers.0.mlp.experts"
    levels = qm.load(out).get_submodule(layer).gate_proj_levels
    assert levels.dtype == torch.float16
    moved = qm.load(out).to(torch.bfloat16)
    for model in (
        moved,
        qm.load(out, dtype=torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16),
    ):
        assert model.lm_head.weight.dtype == torch.bfloat16
        found = model.get_submodule(layer).gate_proj_levels
        assert found.dtype == torch.float16
        assert torch.equal(found, levels)
        assert logits_of(model).dtype == torch.bfloat16
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    experts = [model.get_submodule(layer).run_expert(0, x) for model in (moved, qm.load(out, dtype=torch.bfloat16))]
    assert torch.equal(*experts)


def test_a_switch_router_that_became_float32_is_saved_and_loaded(tmp_path, compressed):
    """Switch turns its router's weights to float32 at the first call, also in a bfloat16 model."""
    model = AutoModelForSeq2SeqLM.from_pretrained(compressed[0], dtype=torch.bfloat16)
    before = logits_of(model)
    routers = [name for name in model.state_dict() if "router" in name]
    assert {model.state_dict()[name].dtype for name in routers} == {torch.float32}
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits_of(again), before)
    assert torch.equal(logits_of(qm.load(tmp_path / "again")), before)


def test_tied_embeddings_stay_tied(tmp_path, tokenizer):
    source = tiny.make_causal(tmp_path / "m", tokenizer, "qwen3_moe", tie_word_embeddings=True)
    qm.compress(source, tmp_path / "out", recipe="nearest")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(qm.load(tmp_path / "again")), logits_of(model))


def test_a_switch_whose_files_hold_only_the_shared_embedding_is_not_filled_with_random_numbers(tmp_path, tokenizer):
    """With an untied head transformers does not tie the other embeddings either, and initialises them."""
    source = tiny.make_switch(tmp_path / "m", tokenizer, tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.endswith("embed_tokens.weight")}
    kept["lm_head.weight"] = torch.randn(tensors["shared.weight"].shape)
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    qm.compress(source, tmp_path / "out", recipe="nearest")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert torch.equal(model.lm_head.weight, kept["lm_head.weight"])
    assert torch.equal(logits_of(model), logits_of(qm.load(tmp_path / "out")))


def test_a_copy_of_a_model_runs(compressed):
    model = AutoModelForSeq2SeqLM.from_pretrained(compressed[0])
    before = logits_of(model)
    assert torch.equal(logits_of(copy.deepcopy(model)), before)


@pytest.mark.parametrize("place", ["cuda", {"": "disk"}, {"": 0}])
def test_a_device_map_of_others_than_the_cpu_is_refused(compressed, place):
    from qmoe_lite.models.hf import QMoEQuantizer

    quantizer = QMoEQuantizer(
        QMoEConfig(**json.loads((compressed[0] / "config.json").read_text())["quantization_config"])
    )
    with pytest.raises(DeviceError, match="Use device_map='cpu'"):
        quantizer.validate_environment(device_map=place, weights_only=True)
    for good in (None, "auto", "cpu", {"": "cpu"}, torch.device("cpu")):
        quantizer.validate_environment(device_map=good, weights_only=True)


def test_a_model_saved_into_its_own_directory_is_whole(compressed, tmp_path):
    """save_pretrained removes the old shards and leaves their index, which transformers then does not look at."""
    path = tmp_path / "own"
    shutil.copytree(compressed[0], path)
    before = logits_of(qm.load(path))
    AutoModelForSeq2SeqLM.from_pretrained(path).save_pretrained(path)
    assert (path / "model.safetensors").is_file()
    assert (path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits_of(qm.load(path)), before)
    assert torch.equal(logits_of(AutoModelForSeq2SeqLM.from_pretrained(path)), before)


def test_what_is_checked_is_what_transformers_loads(compressed_causal, tmp_path):
    """Beside whole shards, transformers prefers a single file, whatever it lacks."""
    path = tmp_path / "both"
    shutil.copytree(compressed_causal("mixtral"), path)
    tensors = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for load in (qm.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
            load(path)
    save_file(tensors, path / "model.fp16.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(path, variant="fp16")


@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral"])
def test_gradients_pass_through_the_experts(pair, model_type):
    """What trains around frozen experts, such as LoRA, must not train on garbage."""
    dense_directory, directory, auto = pair(model_type)
    ours = qm.load(directory, dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    dense = auto.from_pretrained(dense_directory, dtype=torch.float32)
    tiny.fill_dense(dense, ours, layers_of(ours))
    ids = torch.randint(3, 15, (2, 11))
    more = {"decoder_input_ids": ids} if ours.config.is_encoder_decoder else {}
    found = []
    for model in (ours, dense):
        embedding = model.get_input_embeddings().weight.requires_grad_(True)
        torch.nn.functional.cross_entropy(model(input_ids=ids, **more).logits.flatten(0, 1), ids.flatten()).backward()
        found.append(embedding.grad)
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max()
    with torch.no_grad():
        model = qm.load(directory, dtype=torch.float32)
        assert not model(input_ids=ids, **more).logits.requires_grad


def test_a_class_that_lacks_a_part_of_the_experts_is_refused(compressed):
    named = "AutoModelForSeq2SeqLM or qmoe_lite.load, not as SwitchTransformersEncoderModel"
    with pytest.raises(CheckpointError, match=named):
        SwitchTransformersEncoderModel.from_pretrained(compressed[0])


def test_models_load_in_several_threads_one_after_another(compressed, compressed_causal, switch, monkeypatch):
    """While it builds a model transformers replaces functions of torch and its own: for all threads."""
    before = PreTrainedModel.tie_weights, torch.linspace, torch.get_default_dtype()
    active, seen, failed, start = [], [], [], threading.Barrier(4)

    def watched(load):
        def call(*arguments, **options):
            active.append(load)
            seen.append(len(active))
            time.sleep(0.02)
            try:
                return load(*arguments, **options)
            finally:
                active.pop()

        return call

    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        monkeypatch.setattr(auto, "from_pretrained", watched(auto.from_pretrained))

    def repeat(path):
        start.wait()
        try:
            for _ in range(3):
                qm.load(path)
        except Exception as error:
            failed.append(error)

    paths = [compressed[0], compressed_causal("mixtral")] * 2
    threads = [threading.Thread(target=repeat, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert seen == [1] * 12
    assert before == (PreTrainedModel.tie_weights, torch.linspace, torch.get_default_dtype())
    monkeypatch.undo()
    dense = AutoModelForSeq2SeqLM.from_pretrained(switch)
    assert dense.encoder.embed_tokens.weight is dense.shared.weight


def test_only_the_thread_that_loads_gets_placeholders(switch):
    """A class of transformers is replaced while Switch is built; another thread may build a dense one meanwhile."""
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling

    config, built = read_config(str(switch)), []
    with experts_replaced(family_of("switch_transformers")):
        other = threading.Thread(target=lambda: built.append(modeling.SwitchTransformersExperts(config)))
        other.start()
        other.join()
        built.append(modeling.SwitchTransformersExperts(config))
    assert hasattr(built[0]["expert_0"], "wi")
    assert isinstance(built[1], Placeholder)


def test_other_codes_are_checked_anew(compressed, tmp_path):
    """A module that has run, and is given another model's state, must not go on with what it knew."""
    model = qm.load(compressed[0])
    logits_of(model)
    name = layers_of(model)[0]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state[f"{name}.wi_codes"][4] ^= 1
    model.load_state_dict(state, assign=True)
    with pytest.raises(FormatError, match="is damaged"):
        model.get_submodule(name).dense(0, "wi")


def test_an_unknown_device_is_refused(compressed):
    with pytest.raises(SettingError, match="device is banana; expected auto, cpu, cuda or cuda:N"):
        qm.load(compressed[0], device="banana")


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import qmoe_lite; import transformers",
        "import transformers; import qmoe_lite",
        "from transformers import AutoModelForCausalLM; import qmoe_lite",
        "import transformers; transformers.AutoModelForCausalLM; import transformers.modeling_utils; import qmoe_lite",
    ],
)
def test_importing_the_package_is_enough_in_any_order(forks, compressed_causal, imports):
    code = f"""
import sys
{imports}
from transformers import AutoModelForCausalLM
assert "numba" not in sys.modules, "registering loaded numba"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.experts).__name__, [f for f in sys.meta_path if "qmoe" in type(f).__module__])
"""
    done = forks.run(code, compressed_causal("mixtral"))
    assert done.stdout.split() == ["PackedExperts", "[]"], done.stderr


@pytest.mark.slow
def test_transformers_stays_importable_when_the_quantizer_does_not_fit_it(forks):
    code = """
import sys, warnings
import qmoe_lite
sys.modules["qmoe_lite.models.hf"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import PreTrainedModel
print([str(w.message) for w in caught if "qmoe" in str(w.message)])
"""
    done = forks.run(code)
    assert "qmoe-lite cannot register with transformers" in done.stdout, done.stderr


@pytest.mark.slow
def test_no_dense_expert_is_ever_allocated(forks, tmp_path, tokenizer):
    """12.9 GB of dense experts: loading, by either way, adds less than 0.3 GB of anonymous memory."""
    path = tiny.make_large_mixtral(tmp_path / "large", tokenizer)
    code = """
import sys, torch, qmoe_lite as qm
from pathlib import Path
from transformers import AutoModelForCausalLM
import qmoe_lite.models.hf, qmoe_lite.models.experts, transformers.models.mixtral.modeling_mixtral

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

start = anonymous()
model = (qm.load if sys.argv[2] == "load" else AutoModelForCausalLM.from_pretrained)(sys.argv[1])
experts = [m for m in model.modules() if isinstance(m, qm.PackedExperts)]
weights = sum(m.layer.weights for m in experts)
added = anonymous() - start
dense = experts[0].dense(7, "down_proj", torch.bfloat16)
print(2 * weights, added * 1024, dense.shape == (2048, 5504))
"""
    for way in ("load", "from_pretrained"):
        done = forks.run(code, path, way)
        size, added, right = done.stdout.split()
        assert int(size) > 12.9e9, done.stderr
        assert int(added) < 0.3e9
        assert right == "True"


@pytest.mark.slow
def test_a_first_import_of_transformers_that_fails_is_not_the_last(forks, compressed_causal):
    code = """
import sys
import qmoe_lite
sys.modules["transformers.quantizers.quantizer_awq"] = None  # one of those that the registry imports
try:
    import transformers.modeling_utils
except ImportError:
    print("first")
for name in [n for n in sys.modules if n.startswith("transformers")]:
    del sys.modules[name]
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.experts).__name__)
"""
    done = forks.run(code, compressed_causal("mixtral"))
    assert done.stdout.split() == ["first", "PackedExperts"], done.stderr


@pytest.mark.slow
def test_the_package_can_be_imported_anew(forks, compressed_causal):
    code = """
import sys
import qmoe_lite, transformers.modeling_utils
for name in [n for n in sys.modules if n.startswith("qmoe_lite")]:
    del sys.modules[name]
import qmoe_lite
print(type(qmoe_lite.load(sys.argv[1]).model.layers[0].mlp.experts) is qmoe_lite.PackedExperts)
"""
    done = forks.run(code, compressed_causal("mixtral"))
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_accelerates_device_maps_of_the_cpu_give_the_same_model(compressed_causal, place):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    path = compressed_causal("mixtral")
    if place == "auto" and torch.cuda.is_available():
        pytest.skip("auto means the GPU here")
    model = AutoModelForCausalLM.from_pretrained(path, device_map=place, dtype=torch.float32)
    assert torch.allclose(logits_of(model), logits_of(qm.load(path, dtype=torch.float32)), atol=1e-5)


@pytest.mark.parametrize("place", ["cuda", {"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_accelerates_other_device_maps_are_refused(compressed_causal, place):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    with pytest.raises((DeviceError, ValueError), match=r"Use device_map='cpu'|offload"):
        AutoModelForCausalLM.from_pretrained(compressed_causal("mixtral"), device_map=place)


def test_push_to_hub_uploads_what_save_pretrained_writes(compressed_causal, monkeypatch, tmp_path):
    """Up to the upload itself, which is caught."""
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    path, uploaded = compressed_causal("mixtral"), []
    model = qm.load(path)

    def create_commit(self, *arguments, operations, **options):
        for operation in operations:
            target = tmp_path / "hub" / operation.path_in_repo
            target.parent.mkdir(exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())
            uploaded.append(operation.path_in_repo)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model.push_to_hub("someone/model")
    assert {"config.json", "model.safetensors"} <= set(uploaded)
    assert torch.equal(logits_of(qm.load(tmp_path / "hub")), logits_of(model))
