"""Loss and perplexity of a model on a text, and how far its predictions are from another model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.compression.calibration import Samples, check_ids, make_samples, read_tokens
from qmoe_lite.compression.documents import read_text
from qmoe_lite.compression.losses import IGNORED, Gap, paired_gap, slices, summed_divergence, summed_loss
from qmoe_lite.compression.settings import Progress
from qmoe_lite.errors import NotFiniteError, SettingError
from qmoe_lite.models.heads import Head
from qmoe_lite.models.skeletons import capacity_lifted

_MOST_SAMPLES = 16  # in a batch; more are no faster
_BATCH_BYTES = 1 << 28  # about what the activations of a batch may take, by `_token_bytes`


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes
    ----------
    loss : float
        Mean cross-entropy of a predicted token, in nats.
    tokens : int
        Predicted tokens.
    sample_losses : tuple of float
        Summed cross-entropy of each sample.
    sample_tokens : tuple of int
        Predicted tokens of each sample.
    """

    loss: float
    tokens: int
    sample_losses: tuple[float, ...] = field(default=(), repr=False)
    sample_tokens: tuple[int, ...] = field(default=(), repr=False)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def gap(self, other: Evaluation) -> Gap:
        """Return how much more this model loses than another one on the same samples.

        Raises
        ------
        SettingError
            The two were measured on other samples.
        """
        if self.sample_tokens != other.sample_tokens or not self.sample_tokens:
            raise SettingError("the two losses are of different samples. Measure both on the same text.")
        return paired_gap(self.sample_losses, other.sample_losses, self.sample_tokens)


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured: a model, and the reference on the same samples.

    Attributes
    ----------
    model, reference : Evaluation
    divergence : Gap
        Mean KL divergence of a token's prediction, KL(reference || model), in nats, and its standard error.
    agreement : float
        Share of the tokens for which both models hold the same one for the likeliest.
    """

    model: Evaluation
    reference: Evaluation
    divergence: Gap
    agreement: float

    @property
    def gap(self) -> Gap:
        """How much more the model loses than the reference."""
        return self.model.gap(self.reference)


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    *,
    samples: int | None = None,
    sequence_length: int = 512,
    passes: int = 1,
    batch_size: int | None = None,
    seed: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Measure a model's loss on a text.

    Parameters
    ----------
    model : transformers model
        Dense, or loaded by `qmoe_lite.load`. It is put in evaluation mode; its experts drop no token.
    tokenizer : transformers tokenizer
        The model's own.
    text : path or str
        As `compress` takes its calibration text: a file, a directory, or a data set name.
    samples : int, optional
        Samples drawn at random; by default the whole text, `passes` times.
    sequence_length : int
        Tokens of a sample.
    passes : int
        An encoder-decoder model predicts 15% of the tokens in a pass; each pass masks other spans.
    batch_size : int, optional
        Samples at a time; by default at most 16, and as many as take a few hundred megabytes beside the model.
    seed : int
        Decides which spans are masked and which samples are drawn: the same for every model.
    progress : callable, optional
        Called after each batch.

    Returns
    -------
    Evaluation

    Raises
    ------
    SettingError
        `batch_size` is below 1, or as `make_samples`.
    TextError
        The text is missing or empty.
    NotFiniteError
        The loss is NaN or infinite.

    Notes
    -----
    The logits are made and used a slice of tokens at a time: what they take does not grow with batch, sequence or
    vocabulary.
    """
    drawn = _draw(model, tokenizer, text, samples, sequence_length, passes, seed)
    return _measure([model], drawn, batch_size, progress)[0][0]


def compare(
    model: Any,
    reference: Any,
    tokenizer: Any,
    text: str | Path,
    *,
    samples: int | None = None,
    sequence_length: int = 512,
    passes: int = 1,
    batch_size: int | None = None,
    seed: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Measure a model's loss on a text, and how far its predictions are from those of another one.

    Parameters
    ----------
    model, reference : transformers models
        As `evaluate` takes them: a compressed one, and the dense one that it was made of.
    tokenizer, text, samples, sequence_length, passes, batch_size, seed, progress
        As in `evaluate`.

    Returns
    -------
    Comparison

    Raises
    ------
    SettingError
        The two have other vocabularies or are of other kinds; or as `evaluate`.
    TextError, NotFiniteError
        As `evaluate`.
    """
    widths = [Head(each).vocabulary for each in (model, reference)]
    kinds = [bool(each.config.is_encoder_decoder) for each in (model, reference)]
    if widths[0] != widths[1] or kinds[0] != kinds[1]:
        differ = f"the two models predict among {widths[0]} and {widths[1]} tokens"
        if kinds[0] != kinds[1]:
            differ = "one of the two models is an encoder-decoder"
        raise SettingError(f"{differ}. Compare with the original model.")
    drawn = _draw(model, tokenizer, text, samples, sequence_length, passes, seed)
    (ours, theirs), divergences, agreeing = _measure([model, reference], drawn, batch_size, progress)
    divergence = paired_gap(divergences, [0.0] * len(divergences), ours.sample_tokens)
    return Comparison(ours, theirs, divergence, agreeing / ours.tokens)


def _draw(
    model: Any, tokenizer: Any, text: str | Path, samples: int | None, sequence_length: int, passes: int, seed: int
) -> Samples:
    seq2seq = bool(model.config.is_encoder_decoder)
    drawn = make_samples(
        read_tokens(read_text(text), tokenizer, seq2seq=seq2seq),
        tokenizer,
        seq2seq=seq2seq,
        count=samples,
        sequence_length=sequence_length,
        seed=seed,
        passes=passes,
    )
    check_ids(drawn, model.config.get_text_config().vocab_size)
    return drawn


def _measure(
    models: list[Any], drawn: Samples, batch_size: int | None, progress: Callable[[Progress], None] | None
) -> tuple[list[Evaluation], list[float], int]:
    """Measure one model or two; return also the summed divergence of each sample, and how often the two agree."""
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"{batch_size} samples a batch were asked for; ask for at least 1.")
    heads = [Head(model) for model in models]
    length = drawn.input_ids.shape[1]
    batch = batch_size or max(1, min(_MOST_SAMPLES, _BATCH_BYTES // (length * _token_bytes(models[0].config, length))))
    losses: list[list[float]] = [[] for _ in models]
    counts: list[int] = []
    divergences: list[float] = []
    agreeing = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model in models:
            model.eval()
            stack.enter_context(capacity_lifted(model))
        for start in range(0, len(drawn), batch):
            for labels, states in _samples(models, heads, drawn, slice(start, start + batch)):
                predicted = labels != IGNORED
                totals, divergence = [0.0] * len(models), 0.0
                for part in slices(len(labels), heads[0].vocabulary):
                    logits = [head.logits(each[part]) for head, each in zip(heads, states, strict=True)]
                    for i, each in enumerate(logits):
                        totals[i] += summed_loss(each, labels[part])
                    if len(models) == 2:
                        ours, theirs = (x[predicted[part].to(x.device)].to(logits[0].device) for x in logits)
                        of_part, same = summed_divergence(ours, theirs)
                        divergence, agreeing = divergence + of_part, agreeing + same
                for found, total in zip(losses, totals, strict=True):
                    found.append(total)
                divergences.append(divergence)
                counts.append(int(predicted.sum()))
            if progress is not None:
                done = min(start + batch, len(drawn))
                progress(Progress(done, len(drawn), f"sample {done}"))
    return [_evaluation(found, counts) for found in losses], divergences, agreeing


def _samples(
    models: list[Any], heads: list[Head], drawn: Samples, batch: slice
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Run a batch; yield the labels (T,) of each sample, and of each model the states (T, C) that predict them."""
    found = [states_of(model, head, drawn, batch) for model, head in zip(models, heads, strict=True)]
    for row, of_sample in enumerate(found[0][0]):
        yield of_sample, [states[row] for _, states in found]


def states_of(model: Any, head: Head, drawn: Samples, rows: slice | list[int]) -> tuple[Tensor, Tensor]:
    """Run some samples; return their labels (B, T) and the states (B, T, C) that a model's head predicts them from."""
    ids = torch.from_numpy(drawn.input_ids[rows])
    if drawn.labels is None:
        return ids[:, 1:], head.states(input_ids=ids.to(model.device), use_cache=False)[:, :-1]
    labels = torch.from_numpy(drawn.labels[rows])
    given = model.prepare_decoder_input_ids_from_labels(labels)
    # transformers would hand use_cache to the encoder, which refuses it
    return labels, head.states(input_ids=ids.to(model.device), decoder_input_ids=given.to(model.device))


def _token_bytes(config: Any, length: int) -> int:
    """Return about how many bytes a token's activations take in a block, of a sample with this many tokens."""
    text = config.get_text_config()

    def number(name: str) -> int:
        value = getattr(text, name, None)
        return value if isinstance(value, int) else 1

    chosen = number("num_experts_per_tok")
    inner = max(number("intermediate_size"), number("d_ff"), chosen * number("moe_intermediate_size"))
    return 4 * ((8 + 2 * chosen) * number("hidden_size") + 4 * inner + number("num_attention_heads") * length)


def _evaluation(losses: list[float], counts: list[int]) -> Evaluation:
    total = math.fsum(losses)
    if not math.isfinite(total):
        raise NotFiniteError("the loss is NaN or infinite, as are weights or activations of the model. Fetch it again.")
    return Evaluation(total / sum(counts), sum(counts), tuple(losses), tuple(counts))
