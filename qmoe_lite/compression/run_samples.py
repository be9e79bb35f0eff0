"""The samples of one compression: for Hessians, for validation, and those for validation once more as a reference.

The validation samples go through the quantised experts, the reference samples, which are the same, through the dense
ones; so both models' losses are known when the last block is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.compression.calibration import Samples, make_samples, read_tokens, window_length
from qmoe_lite.compression.documents import DEFAULT_TEXT, read_text
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.losses import IGNORED, loss_of_states, paired_gap
from qmoe_lite.compression.ranks import ALONE, Ranks
from qmoe_lite.compression.rate import MOST
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.verdict import Verdict, judge
from qmoe_lite.errors import SettingError
from qmoe_lite.models.blocks import MoELayer

SAMPLES_PER_EXPERT = 80  # the paper's ratio, one expert a token: 10K samples for 128 experts, 160K for 2048
TUNED_TOKENS = 4096  # that an expert is tuned on, about


def text_for(recipe: str, calibration: str | Path | None) -> str | Path | None:
    """Return the text that a recipe takes: the one that was named, the package's own, or none for rounding."""
    if recipe == "nearest" and calibration is not None:
        raise SettingError("recipe nearest needs no calibration text.")
    return calibration if recipe == "nearest" or calibration is not None else DEFAULT_TEXT


def samples_for(layers: Sequence[MoELayer], settings: Settings) -> int:
    """Return how many calibration samples are wanted."""
    return settings.samples or max(SAMPLES_PER_EXPERT * layer.count // layer.top_k for layer in layers)


def twins_for(layers: Sequence[MoELayer], settings: Settings) -> int:
    """Return how many samples are to go through the dense model too, that an expert may be tuned on enough tokens."""
    if settings.tune == "none":
        return 0
    return max(-(-TUNED_TOKENS * layer.count // (layer.top_k * settings.sequence_length)) for layer in layers)


@dataclass(frozen=True)
class RunSamples:
    """All samples in one row.

    Attributes
    ----------
    all : Samples
    calibration : int
        How many of them, the first ones, are for Hessians.
    reference : int
        Number of the first reference sample; the validation samples lie between.
    twins : int
        How many calibration samples, the first ones, stand among the reference samples too, after the others.
    """

    all: Samples
    calibration: int
    reference: int
    twins: int = 0

    @property
    def first_twin(self) -> int:
        """Number of the first calibration sample that is there for reference."""
        return 2 * self.reference - self.calibration

    @classmethod
    def make(
        cls, text: str | Path, tokenizer: Any, wanted: int, seq2seq: bool, settings: Settings, twins: int = 0
    ) -> tuple[RunSamples, list[str]]:
        """Draw the samples from a text; return them, and what is less than was asked for, in words.

        `twins` calibration samples, if there are as many, are there for reference too.
        """
        window = window_length(settings.sequence_length) if seq2seq else settings.sequence_length
        tokens = read_tokens(
            read_text(text), tokenizer, (wanted + settings.validation_samples) * window, seq2seq=seq2seq
        )
        # validation text is the end of the text, at most an eighth of it, so that no Hessian sees a word of it
        kept = min(settings.validation_samples, len(tokens) // window // 8)
        cut = len(tokens) - kept * window

        def make(part: np.ndarray, count: int | None) -> Samples:
            length, seed = settings.sequence_length, settings.seed
            return make_samples(part, tokenizer, seq2seq=seq2seq, count=count, sequence_length=length, seed=seed)

        main, notes = make(tokens[:cut], wanted), list[str]()
        if len(main) < wanted:
            notes.append(f"the text gave {len(main)} calibration samples instead of {wanted}")
        elif main.windows < wanted:
            masked = f"the text holds {main.windows} windows of calibration text: the {wanted} samples mask each "
            notes.append(f"{masked}{wanted / main.windows:.1f} times on average")
        twins = min(twins, len(main))
        if kept == 0 and twins == 0:
            return cls(main, len(main), len(main)), notes
        extra = [make(tokens[cut:], None)] if kept else []
        ids, labels = ([getattr(part, name) for part in (main, *extra, *extra)] for name in ("input_ids", "labels"))
        ids.append(main.input_ids[:twins])
        if main.labels is not None:
            labels.append(main.labels[:twins])
        both = Samples(np.concatenate(ids), None if main.labels is None else np.concatenate(labels), main.windows)
        return cls(both, len(main), len(main) + sum(map(len, extra)), twins), notes

    def decoder_input(self, config: Any) -> np.ndarray:
        """Shift labels to the right, as transformers does."""
        labels, start = self.all.labels, config.decoder_start_token_id
        assert labels is not None
        start = config.pad_token_id if start is None else start
        return np.concatenate([np.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)

    def flags(self, mask: np.ndarray) -> tuple[Tensor, ...]:
        """Return whether each token may enter a Hessian, is for validation, is for reference; bool, flat.

        Parameters
        ----------
        mask : bool array, shape (samples, tokens)
            From `hessian_masks`.
        """
        found = mask.copy(), np.zeros_like(mask), np.zeros_like(mask)
        found[0][self.calibration :] = False
        rides = slice(self.calibration, self.reference)
        # what experts make of a causal model's BOS is larger by orders and would decide every comparison alone
        found[1][rides] = mask[rides] if self.all.labels is None else True
        found[2][self.reference :] = True
        return tuple(torch.from_numpy(flag.reshape(-1)) for flag in found)

    def judge(
        self,
        states: ListBuffer,
        weight: Tensor,
        finish: Callable[[Tensor], Tensor],
        rate: float | None,
        ranks: Ranks = ALONE,
    ) -> Verdict | None:
        """Compare the losses of the validation and of the reference samples; None where there are none.

        Parameters
        ----------
        states : ListBuffer
            What the last norm put out, of all samples.
        weight, finish
            What makes logits of them; see `Family.head`.
        rate : float or None
            Bits a weight that were asked for.
        ranks : Ranks, optional
            Of the run; each has the states of its own samples.
        """
        count = self.reference - self.calibration
        if not count:
            return None
        losses: list[float] = []
        tokens: list[int] = []
        for sample in range(self.calibration, self.reference + count):
            known = self.all.input_ids if self.all.labels is None else self.all.labels
            shift = int(self.all.labels is None)
            labels = torch.from_numpy(known[sample])[shift:]
            tokens.append(int((labels != IGNORED).sum()))
            if sample in states.own:
                of_sample = states.read(slice(sample, sample + 1))[0]
                losses.append(loss_of_states(of_sample[: len(labels)], weight, labels, finish))
        losses = [loss for each in ranks.gather(losses) for loss in each]
        gap, predicted = paired_gap(losses[:count], losses[count:], tokens[:count]), sum(tokens[:count])
        return judge(sum(losses[count:]) / predicted, gap, predicted, len(weight), rate, MOST)
