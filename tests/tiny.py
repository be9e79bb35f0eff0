"""Small models, tokenizers and texts, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

WORDS = ["expert", "router", "token", "row", "level", "digit", "code", "book", "block", "layer", "gate", "weight"]
SENTINELS = 20


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; T5's sentinels in descending order at the end."""
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    vocabulary = ["<pad>", "</s>", "<unk>", *WORDS, *sentinels[::-1]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=sentinels,
    )


def train_tokenizer(text: str, vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, as causal models have one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>")


def make_text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words)) + "\n"


def _save_with_loud_experts(
    model: PreTrainedModel, factor: float, directory: Path, tokenizer: PreTrainedTokenizerFast
) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_() if name.endswith("_bias") else parameter.mul_(factor)
            elif name == "lm_head.bias":
                parameter.normal_()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_switch(directory: Path, tokenizer: PreTrainedTokenizerFast, **changes: object) -> Path:
    """Save a random Switch whose experts' outputs are large enough that swapping two of them shows in the logits."""
    settings = {
        "vocab_size": len(tokenizer),
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_heads": 3,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
        "decoder_start_token_id": 0,
        **changes,
    }
    torch.manual_seed(1)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**settings))
    return _save_with_loud_experts(model, 3.0, directory, tokenizer)


TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_SHARED = {"intermediate_size": 48, "moe_intermediate_size": 20}
_DEEPSEEK = {**_SHARED, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 2}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CAUSAL = {  # what differs between the families' configurations
    "mixtral": {"intermediate_size": 20, "num_local_experts": 4},
    "minimax_m2": {"intermediate_size": 20, "num_local_experts": 4},
    "qwen2_moe": {**_SHARED, "num_experts": 6, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_SHARED, "num_experts": 6, "mlp_only_layers": [1]},
    "olmoe": {"intermediate_size": 20, "num_experts": 6, "head_dim": 6},
    "deepseek_v2": {**_DEEPSEEK, **_LATENT, "num_key_value_heads": 4},
    "deepseek_v3": {**_DEEPSEEK, **_LATENT, "num_key_value_heads": 4},
    "glm4_moe": _DEEPSEEK,
}
_LATENT_4 = {**_DEEPSEEK, **_LATENT, "num_key_value_heads": 4}
_SPARSE_ATTENTION = {**_LATENT_4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_LINEAR = {f"linear_{name}": 8 if "dim" in name else 2 for name in ("num_key_heads", "key_head_dim", "value_head_dim")}
_NEXT = {**_SHARED, **_LINEAR, "linear_num_value_heads": 4, "num_experts": 6, "num_hidden_layers": 4}
_GRANITE = {"intermediate_size": 20, "num_local_experts": 4, "residual_multiplier": 0.3, "logits_scaling": 3.0}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_MAMBA_2 = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_expand": 2}
MORE = {  # families of which what is read off them is tested, but not every corner that CAUSAL's are put through
    "afmoe": {**_SHARED, "num_experts": 6, "num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": {"intermediate_size": 20, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bailing_hybrid": {
        **_SHARED,
        **_LATENT,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_expert_group": 2,
        "topk_group": 1,
        "layer_group_size": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 3,
        "head_dim": 8,
    },
    "cohere2_moe": {"intermediate_size": 20, "num_experts": 6},
    "deepseek_v32": _SPARSE_ATTENTION,
    "dots1": {**_DEEPSEEK, "n_shared_experts": 1},
    "ernie4_5_moe": {**_SHARED, "moe_num_experts": 6, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone_moe": {**_SHARED, "num_experts": 6, "first_k_dense_replace": 1},
    "flex_olmo": {"intermediate_size": 20, "num_experts": 6},
    "gemma4_text": {
        **_SHARED,
        "num_experts": 6,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 40,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 1.5,
    },
    "glm4_moe_lite": _LATENT_4,
    "glm_moe_dsa": {**_SPARSE_ATTENTION, "indexer_types": ["full", "shared", "shared"]},
    "gpt_oss": {"intermediate_size": 20, "num_local_experts": 4, "sliding_window": 8, "layer_types": _SLIDING},
    "granitemoe": {**_GRANITE, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    "granitemoe_swa": {**_GRANITE, "logits_scaling": 1.0},
    "granitemoehybrid": {
        **_GRANITE,
        **_MAMBA_2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "granitemoeshared": {**_GRANITE, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"intermediate_size": 20, "num_experts": 6, "moe_topk": 2},
    "hy_v3": {**_SHARED, "num_experts": 6, "first_k_dense_replace": 1},
    "jamba": {
        "intermediate_size": 20,
        "num_experts": 4,
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 4,
    },
    "kimi_linear": {
        **_SHARED,
        **_LATENT,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 3,
        "head_dim": 8,
    },
    "laguna": {**_SHARED, "num_experts": 6, "shared_expert_intermediate_size": 32},
    "lfm2_moe": {**_SHARED, "num_experts": 6, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {
        "intermediate_size": 20,
        "intermediate_size_mlp": 32,
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "moe_layers": [0, 2],
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0, 1],
    },
    "longcat_flash": {
        **_LATENT,
        "num_key_value_heads": 4,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 20,
        "n_routed_experts": 4,
        "zero_expert_num": 3,
        "moe_topk": 3,
        "routed_scaling_factor": 1.5,
    },
    "mellum": {**_SHARED, "num_experts": 6},
    "minimax": {"intermediate_size": 20, "num_local_experts": 4},
    "nemotron_h": {
        **_SHARED,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    # with biases, as published
    "phimoe": {"intermediate_size": 20, "num_local_experts": 4, "lm_head_bias": True, "attention_bias": True},
    "qwen3_5_moe_text": {**_NEXT, "shared_expert_intermediate_size": 32},
    "qwen3_next": {**_NEXT, "shared_expert_intermediate_size": 32},
    "sarvam_mla": _LATENT_4,
    "sarvam_moe": {**_DEEPSEEK, "n_shared_experts": 1, "partial_rotary_factor": 0.5},
    "solar_open": _DEEPSEEK,
}


_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 24,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}
_IMAGES = {"image_token_id": 36, "video_token_id": 37, "vision_start_token_id": 38, "vision_end_token_id": 39}


def _rope(sections: list[int], **more: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}}


WITH_PICTURES = {  # the text model's configuration, and what differs around it
    "gemma4": (MORE["gemma4_text"], {"vision_config": None, "audio_config": None}),
    "llama4": (
        MORE["llama4_text"],
        {
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "vision_output_dim": 12,
                "image_size": 8,
                "patch_size": 4,
                "projector_input_dim": 12,
                "projector_output_dim": 12,
            },
            "image_token_index": 36,
        },
    ),
    "qwen3_5_moe": (
        {**MORE["qwen3_5_moe_text"], **_rope([1, 0, 0], partial_rotary_factor=0.25)},
        {"vision_config": _VISION, **_IMAGES},
    ),
    "qwen3_vl_moe": (
        {**_SHARED, "num_experts": 6, **_rope([2, 1, 1])},
        {"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}, **_IMAGES},
    ),
    "step3p7": (
        {
            **_SHARED,
            "n_routed_experts": 6,
            "share_expert_dim": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swiglu_limits": [0.0, 0.0, 0.05],
            "moe_router_scaling_factor": 1.5,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 16,
                "patch_size": 4,
            },
            "image_token_id": 36,
        },
    ),
}


def make_with_pictures(directory: Path, tokenizer: PreTrainedTokenizerFast, model_type: str) -> Path:
    """Save a random model that takes pictures too, whose experts matter."""
    text, around = WITH_PICTURES[model_type]
    config = AutoConfig.for_model(model_type, text_config={**TEXT, "vocab_size": 40, **text}, **around)
    torch.manual_seed(1)
    return _save_with_loud_experts(AutoModelForImageTextToText.from_config(config), 20.0, directory, tokenizer)


def make_causal(directory: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, **changes: object) -> Path:
    """Save a random causal model of a family, whose experts matter."""
    settings = {
        "vocab_size": len(tokenizer),
        **TEXT,
        **(CAUSAL | MORE)[model_type],
        **changes,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return _save_with_loud_experts(model, 20.0, directory, tokenizer)


def fill_dense(model: torch.nn.Module, packed: torch.nn.Module, layers: list[str]) -> None:
    """Give a dense model's experts, in some layers, the dequantised weights of a compressed one's."""
    for name in layers:
        source, target = packed.get_submodule(name), model.get_submodule(name)
        for e in range(source.num_experts):
            if hasattr(target, "down_proj"):
                first = [source.dense(e, name) for name in source.layer.projections[:-1]]
                together = getattr(target, "is_concatenated", True)
                both = torch.cat(first) if together else torch.stack(first, 1).flatten(0, 1)
                stages = {
                    "gate_up_proj" if len(first) == 2 else "up_proj": both,
                    "down_proj": source.dense(e, "down_proj"),
                }
                transposed = getattr(target, "is_transposed", type(target).__name__ == "Llama4TextExperts")
                for name, matrix in stages.items():
                    getattr(target, name).data[e] = matrix.T if transposed else matrix
            else:
                for projection in ("wi", "wo"):
                    getattr(target[f"expert_{e}"], projection).weight.data = source.dense(e, projection)


def dense_model(directory, packed=None, layers=()):
    """The dense Switch in float32, some layers' experts replaced by the dequantised ones of `packed`."""
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 10**9
    fill_dense(model, packed, list(layers))
    return model


def make_large_mixtral(directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a compressed Mixtral whose dense experts would take 12.9 GB; each of its experts is the same."""
    from qmoe_lite import Codebook, encode
    from qmoe_lite.checkpoint.atomic import write_json
    from qmoe_lite.checkpoint.format import pack_experts, quantization_config

    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=5504,
        num_local_experts=8,
        num_hidden_layers=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        dtype="bfloat16",
    )
    digits = np.random.default_rng(0).choice(np.array([-1, 0, 1], np.int8), (5504, 2048), p=[0.005, 0.99, 0.005])
    book = Codebook.fit([1, 198, 1], bits=12)
    tensors, layers = {}, {}
    levels = torch.full((5504, 2), 0.02, dtype=torch.bfloat16)
    shapes = {"gate_proj": digits, "up_proj": digits, "down_proj": np.ascontiguousarray(digits.T)}
    packed = {name: pack_experts([encode(d, levels[: len(d)], book)] * 8) for name, d in shapes.items()}
    for number in range(config.num_hidden_layers):
        name = f"model.layers.{number}.mlp.experts"
        layers[name] = dict.fromkeys(shapes, book.to_config())
        for projection, parts in packed.items():
            tensors |= {f"{name}.{projection}_{part}": tensor.clone() for part, tensor in parts.items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in model.state_dict().items() if ".experts." not in n}
    directory.mkdir()
    save_file(tensors | dense, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", {**config.to_dict(), "quantization_config": quantization_config(layers)})
    return directory
