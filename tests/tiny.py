"""Small models, tokenizers and texts, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

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


def make_text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words)) + "\n"


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
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
