"""Sharded checkpoints of random weights, of any size: made tensor by tensor, so that none but the last is in memory."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS, SENTINELS = 500, 100  # of the vocabulary, one token each; a Switch's sentinels besides
_SHARD = 256 << 20  # bytes
_BLOCK = 128  # rows and columns of an FP8 tensor that share a scale
_NAMES = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
_QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts_per_tok": 8,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
_HALF = {  # half as wide as Qwen3-30B-A3B, and half as many experts
    "hidden_size": 1024,
    "moe_intermediate_size": 384,
    "intermediate_size": 1536,
    "num_experts": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
FAMILIES: dict[str, dict[str, Any]] = {
    "switch": {
        "model_type": "switch_transformers",
        "d_model": 256,
        "d_ff": 512,
        "d_kv": 32,
        "num_heads": 8,
        "num_experts": 256,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "qwen3": {**_QWEN3, **_HALF},
    "qwen3-fp8": {**_QWEN3, **_HALF, "quantization_config": _FP8},
    "qwen3-30b": {
        **_QWEN3,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}


def config_of(family: str, gigabytes: float, **changes: Any) -> dict[str, Any]:
    """Return a config.json whose experts take so many gigabytes in bfloat16, as near as whole layers get to it.

    Parameters
    ----------
    family : str
        One of `FAMILIES`.
    gigabytes : float
        10^9 bytes.
    **changes
        Of the configuration.
    """
    config = {**FAMILIES[family], **changes}
    if config["model_type"] == "switch_transformers":  # as many layers in the encoder as in the decoder, all sparse
        of_layer = 2 * config["num_experts"] * 2 * config["d_model"] * config["d_ff"]
        layers = max(1, round(gigabytes * 1e9 / 2 / of_layer))
        names = ("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers")
        config |= dict.fromkeys(names, layers) | {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
    else:
        of_layer = 2 * config["num_experts"] * 3 * config["hidden_size"] * config["moe_intermediate_size"]
        config["num_hidden_layers"] = max(1, round(gigabytes * 1e9 / of_layer))
    return {"vocab_size": WORDS + SENTINELS, "dtype": "bfloat16", **config}


def make_checkpoint(directory: Path, config: dict[str, Any], seed: int = 0) -> int:
    """Write a checkpoint of random weights, with a tokenizer; return the bytes of its weight files.

    Parameters
    ----------
    directory : Path
        To be made.
    config : dict
        As `config_of` makes it.
    seed : int
        For the weights.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    _save_tokenizer(directory)
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[_Planned]] = [[]]
    size = 0
    for planned in _tensors(directory, "quantization_config" in config):
        if size and size + planned.nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.nbytes
    total, places = 0, dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write(directory / name, shard, generator)
        places |= {planned.name: name for planned in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class _Planned:
    """A tensor that is to be drawn."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw it: norms are ones, scales 0.5 to 1.5 times what makes matrices of 1 / sqrt(columns), as all are."""
        if self.dtype == torch.float32:
            return (torch.rand(self.shape, generator=generator) + 0.5) / 6400
        if len(self.shape) == 1:
            return torch.ones(self.shape, dtype=self.dtype)
        drawn = torch.randn(self.shape, generator=generator)
        scale = 100.0 if self.dtype == torch.float8_e4m3fn else self.shape[-1] ** -0.5
        return drawn.mul_(scale).clamp_(-448, 448).to(self.dtype)


def _tensors(directory: Path, fp8: bool) -> Iterator[_Planned]:
    """Yield a model's tensors by the names that its files have: the dense ones, then each expert's."""
    from qmoe_lite.checkpoint.reader import of_experts
    from qmoe_lite.models.building import read_config, skeleton
    from qmoe_lite.models.family import family_of

    config = read_config(str(directory))
    family = family_of(config.model_type)
    tied = family.tied(config)
    shapes = {n: tuple(t.shape) for n, t in skeleton(family, config, torch.float32).state_dict().items()}
    found = {name: shape for name, shape in shapes.items() if name not in tied and not of_experts(name)}
    for layer in family.layers(config):
        for expert in range(layer.count):
            found |= {family.weight_name(layer, expert, name): shape for name, shape in layer.shapes.items()}
    for name, shape in found.items():
        if fp8 and name.endswith("_proj.weight"):
            yield _Planned(name, shape, torch.float8_e4m3fn)
            yield _Planned(f"{name}_scale_inv", tuple(-(-size // _BLOCK) for size in shape), torch.float32)
        else:
            yield _Planned(name, shape)


def _write(file: Path, shard: list[_Planned], generator: torch.Generator) -> int:
    """Write a safetensors file, a tensor at a time; return its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in shard:
        begin, end = end, end + each.nbytes
        header[each.name] = {"dtype": _NAMES[each.dtype], "shape": each.shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with file.open("wb") as out:
        out.write(len(content).to_bytes(8, "little") + content)
        for each in shard:
            out.write(each.draw(generator).view(torch.uint8).numpy().data)
        return out.tell()


def _save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, WORDS)), *reversed(sentinels)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=sentinels, **special).save_pretrained(directory)


def make_text(file: Path, tokens: int, seed: int = 0) -> Path:
    """Write a text of random words, one token each."""
    draws = random.Random(seed)
    file.write_text(" ".join(f"w{draws.randrange(3, WORDS)}" for _ in range(tokens)))
    return file
