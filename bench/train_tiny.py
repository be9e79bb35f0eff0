"""Train the small Switch Transformer behind `qmoe demo`, on the committed text, from nothing.

d_model 320, 2+2 blocks, each sparse with 4 experts of 320 x 768 (the layout of switch-c-2048), T5 span corruption,
9.4 M parameters. Seeded; about 25 minutes on one core.

    python bench/train_tiny.py qmoe_lite/data/tiny_switch
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from qmoe_lite.calibration import corrupt_spans, make_samples, read_text, read_tokens, sentinel_ids, window_length

TEXT = Path(__file__).parents[1] / "qmoe_lite" / "data" / "text"
VOCABULARY, SENTINELS = 1024, 64
SEQUENCE, BATCH = 128, 16
PEAK_RATE, EMBEDDING_RATE, WARMUP = 2e-3, 1e-2, 100
BALANCE = 0.05  # weight of the load-balancing loss (arXiv:2101.03961, equation 4)
SEED = 0
# T5 span corruption throughout; a small text yields too few predicted tokens at 15%, so training begins with more.
# (until this share of the steps, masked share, mean span): one long span teaches the decoder the language first
PHASES = ((0.2, 0.9, 1000.0), (0.55, 0.5, 5.0), (1.0, 0.15, 3.0))


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose sentinels have T5's numbering: <extra_id_0> is the last id."""
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - SENTINELS,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(sentinels[::-1])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=sentinels,
    )


def balance_losses(model: torch.nn.Module) -> list[torch.Tensor]:
    """Collect each router's load-balancing loss of the latest forward pass, through hooks."""
    losses: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        dispatched, _, logits = output
        share = dispatched.flatten(0, 1).float().mean(0)
        probability = logits.flatten(0, 1).softmax(-1).mean(0)
        losses.append(share.numel() * (share * probability).sum())

    for name, module in model.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(hook)
    return losses


def start_well(model: Any) -> None:
    """Start attention where small models take thousands of steps to get, and routers undecided.

    Some heads begin with a position bias for the token one or two places away. The decoder's cross attention begins
    with equal query and key projections, so that a score is about a dot product of the two vectors, and the decoder's
    <extra_id_3> sees the encoder's <extra_id_3> from the first step on.
    """
    # buckets of T5's relative positions: bidirectional -1, +1, -2, +2 are 1, 17, 2, 18; causal -1, -2, -3 are 1, 2, 3
    for stack, buckets in ((model.encoder, (1, 17, 2, 18)), (model.decoder, (1, 2, 3))):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data
        for head, bucket in enumerate(buckets):
            bias[bucket, head] += 5.0
    for name, parameter in model.named_parameters():
        if name.endswith("router.classifier.weight"):
            parameter.data.mul_(0.02)  # transformers starts it at 1, where the softmax is saturated and never balances
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        torch.nn.init.normal_(attention.k.weight, std=0.6 * model.config.d_model**-0.5)
        attention.q.weight.data.copy_(attention.k.weight.data)


def held_out_loss(model: torch.nn.Module, tokenizer: Any) -> float:
    tokens = read_tokens(read_text(TEXT / "evaluation.txt"), tokenizer)
    samples = make_samples(tokens, tokenizer, seq2seq=True, count=160, sequence_length=SEQUENCE, seed=1)
    model.eval()
    with torch.no_grad():
        losses = [
            model(
                input_ids=torch.from_numpy(samples.input_ids[i : i + 32]),
                labels=torch.from_numpy(np.asarray(samples.labels)[i : i + 32]),
            ).loss.item()
            for i in range(0, len(samples), 32)
        ]
    model.train()
    return float(np.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    text = "".join(read_text(TEXT / "train.txt"))
    tokenizer = train_tokenizer(text)
    tokens = read_tokens([text], tokenizer)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=320,
        d_kv=32,
        d_ff=768,
        num_heads=5,
        num_layers=2,
        num_sparse_encoder_layers=2,
        num_decoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=4,
        expert_capacity=1 << 20,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        max_position_embeddings=SEQUENCE,
    )
    model = SwitchTransformersForConditionalGeneration(config)
    start_well(model)
    model.train()
    collected = balance_losses(model)
    embedding = [model.shared.weight]
    others = [p for p in model.parameters() if p is not model.shared.weight]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": PEAK_RATE, "weight_decay": 0.05}, {"params": embedding, "lr": EMBEDDING_RATE}],
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * min(step / options.steps, 1.0))) + 1e-3,
    )
    sentinels, length = sentinel_ids(tokenizer), window_length(SEQUENCE)
    rng = np.random.default_rng(SEED)
    log, running, start = [], [], time.perf_counter()
    for step in range(1, options.steps + 1):
        windows = [tokens[i : i + length] for i in rng.integers(0, len(tokens) - length, BATCH)]
        density, span = next(phase[1:] for phase in PHASES if step <= phase[0] * options.steps)
        pairs = [corrupt_spans(w, sentinels, tokenizer.eos_token_id, rng, density, span) for w in windows]
        collected.clear()
        loss = model(
            input_ids=torch.from_numpy(np.stack([p[0] for p in pairs])),
            labels=torch.from_numpy(np.stack([p[1] for p in pairs])),
        ).loss
        (loss + BALANCE * torch.stack(collected).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running.append(loss.item())
        if step % 200 == 0 or step == options.steps:
            row = {
                "step": step,
                "train_loss": round(float(np.mean(running)), 4),
                "held_out_loss": round(held_out_loss(model, tokenizer), 4),
                "seconds": round(time.perf_counter() - start),
            }
            running.clear()
            log.append(row)
            print(json.dumps(row), flush=True)
            save(model, tokenizer, log, options, options.out if step == options.steps else options.out / "latest")


def save(model: Any, tokenizer: Any, log: list[dict[str, float]], options: argparse.Namespace, out: Path) -> None:
    """Write the model in bfloat16, its tokenizer, and the log beside it."""
    import copy

    copied = copy.deepcopy(model).to(torch.bfloat16)
    copied.config.dtype = torch.bfloat16
    copied.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "command": f"python bench/train_tiny.py OUT --steps {options.steps} --threads {options.threads}",
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "log": log,
    }
    (out / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
