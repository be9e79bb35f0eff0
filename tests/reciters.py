"""Dense models that write: those that recite, where each token has one successor, and random ones."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{{ 'x' if add_generation_prompt }}"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def byte_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """One token a byte, as a byte-level BPE without merges; no pad token, no begin token."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab={**vocabulary, "</s>": 256, "<|end|>": 257}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", extra_special_tokens=["<|end|>"], **options)


def reciter(successors: dict[int, int], vocabulary: int, positions: int = 1000) -> MixtralForCausalLM:
    """A Mixtral whose next token depends on the last one alone: blocks add nothing, the head is a table."""
    width = -(-vocabulary // 8) * 8
    config = {**SMALL, "hidden_size": width, "num_hidden_layers": 1, "max_position_embeddings": positions}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=vocabulary, intermediate_size=8, num_local_experts=2, **config)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, width))
        for token, successor in successors.items():
            model.lm_head.weight[successor, token] = 1.0
    return model


def chain(*ids: int) -> dict[int, int]:
    return dict(itertools.pairwise(ids))


def save_endless(directory: Path, positions: int = 1 << 20, **options: object) -> Path:
    """Save a model that writes "y y y .." for ever after an x."""
    tokenizer = byte_tokenizer(**options)
    space, x, y = tokenizer(" xy")["input_ids"]
    reciter({x: space, space: y, y: space}, len(tokenizer), positions).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_random(model_type: str, tokenizer: PreTrainedTokenizerFast, **changes: object) -> PreTrainedModel:
    """A random Mixtral or Qwen3-MoE for a tokenizer, whose text depends on all that came before."""
    own = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    }
    sizes = {**SMALL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **own[model_type]}
    config = AutoConfig.for_model(model_type, intermediate_size=24, initializer_range=0.3, **{**sizes, **changes})
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).eval()
