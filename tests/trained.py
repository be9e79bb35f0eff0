"""A small Qwen3-MoE that is trained on the spot, so that losing its experts' weights costs held-out loss.

2 layers, 8 experts of 64 x 128, 2 of them for each token, 0.55 M parameters.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import softshrink
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

DATA = Path(__file__).parents[1] / "qmoe_lite" / "data"
SEQUENCE, BATCH, STEPS, WARMUP = 64, 16, 300, 20
RATE = 8e-3
BALANCE = 0.01  # weight of each layer's load-balancing loss
SHRINK = 0.1  # learning rates a step by which each expert weight is pulled to zero
CALIBRATION, HELD_OUT = 60_000, 24_000  # characters; about 23,000 and 9,000 tokens


def train_qwen3_moe(directory: Path, seed: int = 0) -> Path:
    """Train a Qwen3-MoE on the committed documentation; save it in bfloat16, its tokenizer, and text to test it with.

    Parameters
    ----------
    directory : Path
        Gets the model, and beside it calibration.txt and held_out.txt, texts which training has not seen.
    seed : int
        Decides the random start and the order of the text.

    Returns
    -------
    Path
        `directory`.
    """
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_switch")
    text = (DATA / "text" / "train.txt").read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(_config(tokenizer))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads would give other bits, and wait for each other on a busy machine
    try:
        _train(model, tokens, np.random.default_rng(seed))
    finally:
        torch.set_num_threads(threads)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name, source, characters in (
        ("calibration.txt", "calibration.txt", CALIBRATION),
        ("held_out.txt", "evaluation.txt", HELD_OUT),
    ):
        part = (DATA / "text" / source).read_text(encoding="utf-8")[:characters]
        (directory / name).write_text(part, encoding="utf-8")
    return directory


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=128,
        max_position_embeddings=512,
        # six times the usual start, from which so few steps make experts that ternary weights hardly hurt
        initializer_range=0.12,
        router_aux_loss_coef=0.0,  # transformers sums the layers' loads, so one layer may starve what another feeds
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _train(model: Qwen3MoeForCausalLM, tokens: np.ndarray, rng: np.random.Generator) -> None:
    """Train with AdamW, a warm-up and a cosine; an L1 penalty wears off what is left of the experts' random start."""
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    config = model.config
    model.train()
    for step in range(STEPS):
        rate = RATE * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = rate
        starts = rng.integers(0, len(tokens) - SEQUENCE, BATCH)
        ids = torch.from_numpy(np.stack([tokens[start : start + SEQUENCE] for start in starts]))
        out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        balance = sum(
            load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
            for logits in out.router_logits
        )
        (out.loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for weight in experts:
            weight.data = softshrink(weight.data, SHRINK * rate)
    model.eval()
