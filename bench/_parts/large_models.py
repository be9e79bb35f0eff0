"""Configurations of large models, as far as sizes and times follow from them."""

from __future__ import annotations

from typing import Any


def _switch(width: int, inner: int, heads: int, layers: int, sparse: int, experts: int) -> dict[str, Any]:
    return {
        "model_type": "switch_transformers",
        "d_model": width,
        "d_ff": inner,
        "d_kv": 64,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_sparse_encoder_layers": sparse,
        "num_sparse_decoder_layers": sparse,
        "encoder_sparse_step": layers // sparse,
        "decoder_sparse_step": layers // sparse,
        "num_experts": experts,
        "vocab_size": 32128,
        "dtype": "bfloat16",
    }


def _qwen3(width: int, inner: int, dense: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "hidden_size": width,
        "moe_intermediate_size": inner,
        "intermediate_size": dense,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": layers,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


SWITCH_RATE, RATE = 0.8, 2.0  # bits a weight that are asked for
LARGE: dict[str, dict[str, Any]] = {
    "switch-base-128": _switch(768, 3072, 12, 12, 6, 128),
    "switch-large-128": _switch(1024, 4096, 16, 24, 12, 128),
    "switch-c-2048": {**_switch(2080, 6144, 30, 15, 15, 2048), "tie_word_embeddings": False},
    "Qwen3-30B-A3B": _qwen3(2048, 768, 6144, 32, 48),
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "dtype": "bfloat16",
    },
    "Qwen3-235B-A22B": _qwen3(4096, 1536, 12288, 64, 94),
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "intermediate_size": 18432,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 129280,
        "dtype": "bfloat16",
    },
}


def rate_of(config: dict[str, Any]) -> float:
    """Return the rate that a model is projected at: a Switch bears less than one bit."""
    return SWITCH_RATE if config["model_type"] == "switch_transformers" else RATE
