"""Train the small Switch Transformer behind `qmoe demo`, on the committed text, from nothing.

d_model 320, 2+2 blocks, each sparse with 4 experts of 320 x 768 (the layout of switch-c-2048), T5 span corruption,
9.4 M parameters. Seeded; 26 minutes on one core.

    python bench/train_tiny.py qmoe_lite/data/tiny_switch
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from qmoe_lite.compression.calibration import (
    corrupt_spans,
    make_samples,
    read_tokens,
    sentinel_ids,
    window_length,
)
from qmoe_lite.compression.documents import read_text

TEXT = Path(__file__).parents[1] / "qmoe_lite" / "data" / "text"
VOCABULARY, SENTINELS = 1024, 64
SEQUENCE, BATCH = 128, 16
WARMUP = 100  # steps
BALANCE = 0.05  # weight of the load-balancing loss (arXiv:2101.03961, equation 4)
SEED = 0


@dataclass(frozen=True)
class Stage:
    """One run of the learning rate from its peak to zero.

    `phases` holds (until this share of the steps, masked share, mean span); the rates and `decay` are AdamW's;
    `shrink` pulls each weight matrix's entries towards 0 by that many learning rates a step (an L1 penalty).
    """

    steps: int
    phases: tuple[tuple[float, float, float], ...]
    rate: float
    embedding_rate: float
    decay: float
    dropout: float
    shrink: float


STAGES = (
    # T5 span corruption throughout; a small text yields too few predicted tokens at 15%, so training begins with more:
    # one long span teaches the decoder the language first
    Stage(2400, ((0.2, 0.9, 1000.0), (0.55, 0.5, 5.0), (1.0, 0.15, 3.0)), 2e-3, 1e-2, 0.05, 0.0, 0.0),
    # wears off what is left of the random start, which a large model trained for long does not have either
    Stage(500, ((1.0, 0.15, 3.0),), 1e-3, 3e-3, 2.0, 0.1, 0.25),
)


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
    tokens = read_tokens(read_text(TEXT / "evaluation.txt"), tokenizer, seq2seq=True)
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


def new_model() -> Any:
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
    )
    model = SwitchTransformersForConditionalGeneration(config)
    start_well(model)
    return model


def train(model: Any, tokenizer: Any, tokens: np.ndarray, stage: Stage, seed: int) -> Iterator[dict[str, float]]:
    """Train through one stage; yield a row of the log now and then."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = stage.dropout
    collected = balance_losses(model)
    others = [p for p in model.parameters() if p is not model.shared.weight]
    matrices = [
        p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("shared") and "bias" not in n
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "lr": stage.rate, "weight_decay": stage.decay},
            {"params": [model.shared.weight], "lr": stage.embedding_rate, "weight_decay": 0.01},
        ],
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * min(step / stage.steps, 1.0))) + 1e-3,
    )
    sentinels, length = sentinel_ids(tokenizer), window_length(SEQUENCE)
    running, start = [], time.perf_counter()
    for step in range(1, stage.steps + 1):
        windows = [tokens[i : i + length] for i in rng.integers(0, len(tokens) - length, BATCH)]
        density, span = next(phase[1:] for phase in stage.phases if step <= phase[0] * stage.steps)
        pairs = [corrupt_spans(w, sentinels, tokenizer.eos_token_id, rng, density, span) for w in windows]
        collected.clear()
        loss = model(
            input_ids=torch.from_numpy(np.stack([p[0] for p in pairs])),
            labels=torch.from_numpy(np.stack([p[1] for p in pairs])),
        ).loss
        (loss + BALANCE * torch.stack(collected).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if stage.shrink:
            by = stage.shrink * optimizer.param_groups[0]["lr"]
            for matrix in matrices:
                matrix.data = torch.nn.functional.softshrink(matrix.data, by)
        optimizer.zero_grad()
        schedule.step()
        running.append(loss.item())
        if step % 200 == 0 or step == stage.steps:
            yield {
                "step": step,
                "train_loss": round(float(np.mean(running)), 4),
                "held_out_loss": round(held_out_loss(model, tokenizer), 4),
                "seconds": round(time.perf_counter() - start),
            }
            running.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("stages"), help="where each stage's model is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = (TEXT / "train.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    tokens = read_tokens([text], tokenizer, seq2seq=True)
    torch.manual_seed(SEED)
    model, log = new_model(), []
    for number, stage in enumerate(STAGES, 1):
        kept = options.work / f"stage{number}"
        if (kept / "training_log.json").exists():
            log = json.loads((kept / "training_log.json").read_text())["log"]
        else:
            for row in train(model, tokenizer, tokens, stage, SEED + number - 1):
                log.append({"stage": number, **row})
                print(json.dumps(log[-1]), flush=True)
            save(model, tokenizer, log, options, kept)
        # from the saved weights, so that a stage run by itself and one run after the other are the same
        model = SwitchTransformersForConditionalGeneration.from_pretrained(kept, dtype=torch.float32)
    save(model, tokenizer, log, options, options.out)


def save(model: Any, tokenizer: Any, log: list[dict[str, float]], options: argparse.Namespace, out: Path) -> None:
    """Write the model in bfloat16, its tokenizer, and the log beside it."""
    copied = copy.deepcopy(model).to(torch.bfloat16)
    copied.config.dtype = torch.bfloat16
    copied.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "command": f"python bench/train_tiny.py OUT --threads {options.threads}",
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "log": log,
    }
    (out / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
