"""Loss and perplexity of a model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmoe_lite.compression.calibration import check_ids, make_samples, read_tokens
from qmoe_lite.compression.documents import read_text
from qmoe_lite.compression.losses import IGNORED, Gap, paired_gap, summed_loss
from qmoe_lite.errors import NotFiniteError, SettingError
from qmoe_lite.models.skeletons import capacity_lifted


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


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    *,
    samples: int | None = None,
    sequence_length: int = 512,
    passes: int = 1,
    batch_size: int = 16,
    seed: int = 1,
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
    batch_size : int
        Samples at a time.
    seed : int
        Decides which spans are masked and which samples are drawn: the same for every model.

    Returns
    -------
    Evaluation

    Raises
    ------
    TextError
        The text is missing or empty.
    NotFiniteError
        The loss is NaN or infinite.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    tokens = read_tokens(read_text(text), tokenizer)
    drawn = make_samples(
        tokens,
        tokenizer,
        seq2seq=seq2seq,
        count=samples,
        sequence_length=sequence_length,
        seed=seed,
        passes=passes,
    )
    check_ids(drawn, model.config.vocab_size)
    model.eval()
    losses: list[float] = []
    counts: list[int] = []
    with torch.inference_mode(), capacity_lifted(model):
        for start in range(0, len(drawn), batch_size):
            part = slice(start, start + batch_size)
            ids = torch.from_numpy(drawn.input_ids[part])
            labels = ids if drawn.labels is None else torch.from_numpy(drawn.labels[part])
            arguments = {"input_ids": ids.to(model.device), "use_cache": False}
            if seq2seq:
                arguments["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels).to(model.device)
                del arguments["use_cache"]  # transformers hands it to the encoder, which refuses it
            logits = model(**arguments).logits
            if not seq2seq:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses += [summed_loss(*pair) for pair in zip(logits, labels, strict=True)]
            counts += (labels != IGNORED).sum(1).tolist()
    total = math.fsum(losses)
    if not math.isfinite(total):
        raise NotFiniteError("the loss is NaN or infinite, as are weights or activations of the model. Fetch it again.")
    return Evaluation(total / sum(counts), sum(counts), tuple(losses), tuple(counts))
