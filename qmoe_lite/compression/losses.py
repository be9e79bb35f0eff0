"""Cross-entropy in slices, and the difference of two models' losses on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # label of a position that predicts nothing
_ROWS = 1 << 14  # of the head that are made float32 at a time
SLICE_VALUES = 1 << 24  # float32 logits whose softmax is taken at a time: 64 MiB


@dataclass(frozen=True)
class Gap:
    """Difference of two models' losses, in nats a token, and its standard error over the samples they share."""

    nats: float
    standard_error: float


def paired_gap(losses: Sequence[float], reference: Sequence[float], tokens: Sequence[int]) -> Gap:
    """Return the difference of two models' summed losses on the same samples, a token.

    Parameters
    ----------
    losses, reference : sequences of float, one a sample
        Summed cross-entropy.
    tokens : sequence of int
        Predicted tokens of each sample.

    Returns
    -------
    Gap
        The standard error is that of a ratio of sums; NaN for a single sample.
    """
    difference, count = np.subtract(losses, reference), np.asarray(tokens, dtype=np.float64)
    nats = difference.sum() / count.sum()
    samples = len(count)
    rest = difference - nats * count
    error = math.sqrt((rest @ rest) * samples / (samples - 1)) / count.sum() if samples > 1 else math.nan
    return Gap(float(nats), error)


def slices(rows: int, vocabulary: int) -> Iterator[slice]:
    """Cut rows of logits so that those of a slice, as float32, take 64 MiB; one row may take more."""
    step = max(1, SLICE_VALUES // vocabulary)
    return (slice(start, start + step) for start in range(0, rows, step))


def summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the summed cross-entropy of logits (N, V), any float dtype, for labels (N,), int64, a slice at a time."""
    total = 0.0
    for part in slices(len(labels), logits.shape[-1]):
        of_part = torch.nn.functional.cross_entropy(
            logits[part].float(), labels[part].to(logits.device), reduction="sum", ignore_index=IGNORED
        )
        total += float(of_part)
    return total


def loss_of_states(
    states: Tensor, weight: Tensor, labels: Tensor, finish: Callable[[Tensor], Tensor] = lambda products: products
) -> float:
    """Return the summed cross-entropy of a head on states (N, C), float32, for labels (N,), int64.

    Parameters
    ----------
    states : float32 tensor, shape (N, C)
        What the last block and norm put out.
    weight : float tensor, shape (V, C)
        Of the head, any float dtype; a slice of states is multiplied at a time, where the weight is.
    labels : int64 tensor, shape (N,)
        The tokens to predict.
    finish : callable, optional
        Makes logits of the products.
    """
    total = 0.0
    for part in slices(len(labels), len(weight)):
        total += summed_loss(finish(head_products(states[part], weight)), labels[part])
    return total


def head_on(weight: Tensor, device: str, notes: list[str]) -> Tensor:
    """Return a head's weight on a device, or where it is if that has no room; then a note says so."""
    try:
        return weight.to(device)
    except torch.OutOfMemoryError:
        note = f"{device} has no room for the output matrix: predictions were compared on the CPU, which takes longer"
        notes += [] if note in notes else [note]
        return weight


def head_products(states: Tensor, weight: Tensor) -> Tensor:
    """Return products (N, V) of states (N, C), float32, with a head (V, C), where that is; a piece is made float32."""
    states = states.to(weight.device)
    return torch.cat([states @ piece.float().T for piece in torch.split(weight, _ROWS)], dim=1)


def summed_divergence(logits: Tensor, reference: Tensor) -> tuple[float, int]:
    """Compare the predictions of two models, token by token.

    Parameters
    ----------
    logits, reference : float tensors, shape (N, V)
        A slice; several times their memory is taken.

    Returns
    -------
    divergence : float
        Sum over the tokens of KL(reference || model), in nats.
    agreeing : int
        Tokens for which both hold the same one for the likeliest.
    """
    expected, found = (each.float().log_softmax(-1) for each in (reference, logits))
    return divergence_of(found, expected), int((expected.argmax(-1) == found.argmax(-1)).sum())


def divergence_of(found: Tensor, expected: Tensor) -> float:
    """Return the sum over the tokens of KL(expected || found), in nats, of log-probabilities (N, V), float32."""
    return float(torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
