"""Types that nobody knows, registered here: taken by --family auto and right, or refused in a line."""

from __future__ import annotations

import pytest
import tiny
import torch
from checks import layers_of, logits_of
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import qmoe_lite as qm
from qmoe_lite.errors import UnsupportedFamilyError

COUNT, WIDTH, INSIDE, TOP_K = 6, 24, 20, 2
TERNARY = {
    "grid": qm.MinMaxTernary(torch.bfloat16),
    "samples": 6,
    "sequence_length": 16,
    "validation_samples": 2,
    "tune": "none",
    "codeword_bits": 10,
}


class MadeUpConfig(PreTrainedConfig):
    model_type = "made_up"
    vocab_size: int = 40
    hidden_size: int = WIDTH
    num_hidden_layers: int = 2
    num_experts_per_tok: int = TOP_K
    max_position_embeddings: int = 256
    kinds: list | None = None  # of each block: attention or a running mean, experts or a plain product
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    named: bool = False  # the experts are called by argument names
    trick: str | None = None  # what makes it another model than its experts' class declares


class _Experts(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        shapes = {"gate_up_proj": (2 * INSIDE, WIDTH), "down_proj": (WIDTH, INSIDE)}
        for name, shape in shapes.items():
            turned = shape[::-1] if config.transposed else shape
            self.register_parameter(name, nn.Parameter(torch.empty(COUNT, *turned)))
            if config.biased:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(COUNT, shape[0])))
        self.act_fn = nn.SiLU()
        self.num_experts = COUNT
        self.sharpness = 1.0 + number  # another one in each layer
        self.trick = config.trick

    def _apply_gate(self, both):
        gate, up = (both[..., ::2], both[..., 1::2]) if not self.is_concatenated else both.chunk(2, -1)
        return torch.tanh(self.sharpness * gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for i in range(self.num_experts):
            token, place = torch.where(top_k_index == i)
            inside = hidden_states[token]
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(self, name)[i]
                inside = inside @ (weight if self.is_transposed else weight.T)
                if self.has_bias:
                    inside = inside + getattr(self, f"{name}_bias")[i]
                inside = self._apply_gate(inside) if name == "gate_up_proj" else inside
            if self.trick == "twice":  # which no declaration says
                inside = 2 * inside
            out.index_add_(0, token, inside * top_k_weights[token, place, None])
        return out


CLASSES = {
    (transposed, interleaved, biased): use_experts_implementation(
        is_transposed=transposed, is_concatenated=not interleaved, has_bias=biased
    )(type("MadeUpExperts", (_Experts,), {}))
    for transposed in (False, True)
    for interleaved in (False, True)
    for biased in (False, True)
}


class MadeUpSparse(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.config = config
        self.router = nn.Linear(WIDTH, COUNT, bias=False)
        kind = CLASSES[config.transposed, config.interleaved, config.biased]
        made = kind(config, number)
        if config.trick == "name":
            self.bank = made
        else:
            self.experts = made

    def forward(self, x):
        tokens = x.reshape(-1, WIDTH)
        weights, index = self.router(tokens).softmax(-1).topk(TOP_K)
        experts = self.bank if self.config.trick == "name" else self.experts
        if self.config.named:
            return experts(tokens, top_k_index=index, top_k_weights=weights).view_as(x)
        return experts(tokens, index, weights).view_as(x)


class MadeUpBlock(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.mixes, self.kind = (config.kinds or ["attention experts"] * 2)[number].split()
        self.entry_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH if self.mixes == "attention" else WIDTH)
        self.ffn = MadeUpSparse(config, number) if self.kind == "experts" else nn.Linear(WIDTH, WIDTH)

    def forward(self, x, steps=None, mask=None):
        given = self.entry_norm(x)
        if self.mixes == "attention":
            q, k, v = self.qkv(given).chunk(3, -1)
            x = x + (q @ k.mT / WIDTH**0.5 + mask).softmax(-1) @ v
        else:
            x = x + self.qkv(given).cumsum(1) / steps
        return x + 0.7 * self.ffn(self.norm(x))


class MadeUpPreTrainedModel(PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "trunk"

    @torch.no_grad()
    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.normal_(std=0.2)


class MadeUpModel(MadeUpPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, WIDTH)
        self.chain = nn.ModuleList([MadeUpBlock(config, i) for i in range(config.num_hidden_layers)])
        self.closing_norm = nn.LayerNorm(WIDTH)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, **kwargs):
        x = 3 * self.wte(input_ids)
        size = input_ids.shape[1]
        mask = torch.full((size, size), -1e9).triu(1)
        steps = torch.arange(1, size + 1)[:, None]
        for block in self.chain:
            x = block(x, mask=mask) if block.mixes == "attention" else block(x, steps)
        return BaseModelOutput(last_hidden_state=self.closing_norm(x))


class MadeUpForCausalLM(MadeUpPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.trunk = MadeUpModel(config)
        self.to_words = nn.Linear(WIDTH, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.to_words

    def forward(self, input_ids, **kwargs):
        logits = self.to_words(self.trunk(input_ids=input_ids, **kwargs).last_hidden_state)
        return CausalLMOutput(logits=4 * torch.tanh(logits / 4))


AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
ALTERNATING = {
    "num_hidden_layers": 4,
    "kinds": ["mean plain", "attention experts", "mean experts", "attention plain"],
}
VARIANTS = {
    "fused": {},
    "hybrid": ALTERNATING,
    "transposed": {"transposed": True},
    "interleaved": {"interleaved": True},
    "transposed, interleaved, biased": {"transposed": True, "interleaved": True, "biased": True},
    "transposed, biased": {"transposed": True, "biased": True, **ALTERNATING},
    "by argument names": {"named": True},
}


@pytest.fixture(autouse=True)
def _own_tokenizer(monkeypatch):
    monkeypatch.setattr("qmoe_lite.compression.run.open_tokenizer", lambda directory: tiny.make_tokenizer())


def save(place, **settings):
    torch.manual_seed(0)
    model = MadeUpForCausalLM(MadeUpConfig(**settings)).eval()
    model.save_pretrained(place)
    return place


def assert_right(source, out, text_file):
    """Compress by calibration, and compare with the dense model of the same digits."""
    with pytest.raises(UnsupportedFamilyError, match=r"made_up is not supported; supported: .* With --family auto"):
        qm.compress(source, out, recipe="nearest")
    report = qm.compress(source, out, calibration=text_file, family="auto", **TERNARY)
    packed, dense = qm.load(out), AutoModelForCausalLM.from_pretrained(source)
    before = logits_of(dense)
    tiny.fill_dense(dense, packed, layers_of(packed))
    expected = logits_of(dense)
    assert (logits_of(packed) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max(), "experts matter"
    assert [finding for finding in qm.verify(out) if finding.severity == "error"] == []
    assert report.verdict is not None


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, marks=[] if name in ("hybrid", "transposed") else [pytest.mark.slow])
        for name, settings in VARIANTS.items()
    ],
    ids=VARIANTS,
)
def test_a_made_up_model_is_right(tmp_path, text_file, settings):
    assert_right(save(tmp_path / "m", **settings), tmp_path / "out", text_file)


def test_a_made_up_list_of_renames_is_followed(tmp_path, text_file):
    """Experts one by one under names of their own, and other names of all else, some in the blocks of one kind only."""
    mapping = [
        WeightRenaming(r"^transformer\.", "trunk."),
        WeightRenaming(r"\.final\.", ".closing_norm."),
        WeightRenaming(r"\.h\.", ".chain."),
        WeightRenaming("ffn.expert.", "ffn.experts."),  # which matches `ffn.experts` too, as transformers' own do
        WeightRenaming(r"\.moe\.gating\.", ".ffn.router."),
        WeightConverter(
            source_patterns=["ffn.experts.*.w1", "ffn.experts.*.w3"],
            target_patterns="ffn.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="ffn.experts.*.w2",
            target_patterns="ffn.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping("made_up", mapping, overwrite=True)
    try:
        source = save(tmp_path / "m", **ALTERNATING)
        MadeUpForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "own", save_original_format=False)
        names = set(load_file(source / "model.safetensors"))
        assert {"transformer.h.1.ffn.expert.5.w1", "transformer.h.0.ffn.weight", "transformer.final.bias"} <= names
        assert_right(source, tmp_path / "out", text_file)
        assert "trunk.chain.1.ffn.experts.down_proj" in load_file(tmp_path / "own" / "model.safetensors")
        assert_right(tmp_path / "own", tmp_path / "out2", text_file)
    finally:
        register_checkpoint_conversion_mapping("made_up", [], overwrite=True)


@pytest.mark.parametrize(
    ("trick", "reason"),
    [
        ("twice", "run block by block, its first 2 blocks differ"),
        ("name", "is no module `experts` in a list of blocks"),
    ],
)
def test_a_made_up_model_that_cannot_be_read_off_is_refused(tmp_path, trick, reason):
    source = save(tmp_path / "m", trick=trick)
    with pytest.raises(UnsupportedFamilyError, match=reason):
        qm.compress(source, tmp_path / "out", recipe="nearest", family="auto")
