"""Tuning with the digits frozen: row steps, column scales and norms learn to match the dense model's logits.

Nothing that is trained takes a bit: steps, scales and norms are stored anyway. The dense model runs first and is put
away; what its head was given is kept, so that both models are never in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from qmoe_lite.compression.calibration import Samples
from qmoe_lite.compression.losses import IGNORED, slices, summed_divergence, summed_loss
from qmoe_lite.compression.schedule import BETAS, share_of_rate
from qmoe_lite.errors import NotFiniteError
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.models.heads import Head
from qmoe_lite.models.skeletons import capacity_lifted
from qmoe_lite.text.evaluation import states_of
from qmoe_lite.tuning.experts import TunedExperts


@dataclass(frozen=True)
class Step:
    """One step of training: its number from 1, how many there are, and the divergence of its samples before it."""

    number: int
    steps: int
    divergence: float


@dataclass(frozen=True)
class Measured:
    """A model's predictions of some samples.

    Attributes
    ----------
    divergence : float
        Mean KL(dense || model), in nats.
    losses, dense_losses : list of float
        Summed cross-entropy of each sample: the model's, and the dense one's.
    tokens : list of int
        Predicted tokens of each sample.
    """

    divergence: float
    losses: list[float]
    dense_losses: list[float]
    tokens: list[int]


@torch.no_grad()
def run_dense(model: Any, drawn: Samples, progress: Callable[[int], None] | None = None) -> list[Tensor]:
    """Return what the dense model's head is given for each sample, (T, C) in the model's dtype, on the CPU."""
    head, found = Head(model), []
    with capacity_lifted(model):
        for row in range(len(drawn)):
            found.append(states_of(model, head, drawn, [row])[1][0].cpu().clone())
            if progress is not None:
                progress(row + 1)
    return found


class Tuner:
    """A compressed model whose experts and norms can be trained.

    Parameters
    ----------
    model : transformers model
        Loaded by `qmoe_lite.load` in float32. Its experts are replaced.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.head = Head(model)
        self.experts: list[TunedExperts] = []
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedExperts):
                parent, _, child = name.rpartition(".")
                self.experts.append(TunedExperts(module))
                setattr(model.get_submodule(parent), child, self.experts[-1])
        self.norms = _copy_norms(model)
        self._norms_before = {name: norm.detach().clone() for name, norm in self.norms.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Undo all training."""
        for experts in self.experts:
            for factors in experts.parameters():
                factors.zero_()
        for name, norm in self.norms.items():
            norm.copy_(self._norms_before[name])

    def parameters(self, rate: float) -> list[dict[str, Any]]:
        """Return all that is trained as Adam takes it: a norm's learning rate goes by the size of its weights."""
        factors = [each for experts in self.experts for each in experts.parameters()]
        groups: list[dict[str, Any]] = [{"params": factors, "lr": rate}]
        for norm in self.norms.values():
            groups.append({"params": [norm], "lr": rate * max(float(norm.detach().abs().mean()), 1e-3)})
        return groups

    def learn(self, drawn: Samples, dense: list[Tensor], rows: list[int]) -> tuple[float, int]:
        """Add the gradients of the summed KL(dense || model) of some samples' predictions to what is trained.

        Returns
        -------
        divergence : float
            That sum, in nats.
        predictions : int
            How many they are. A slice of tokens' logits is in memory at a time.
        """
        total, count = 0.0, 0
        outputs, gradients = [], []
        of_rows = zip(*states_of(self.model, self.head, drawn, rows), strict=True)
        for row, (labels, states) in zip(rows, of_rows, strict=True):
            inner = states.detach().requires_grad_()
            predicted = labels != IGNORED
            for part in slices(len(labels), self.head.vocabulary):
                with torch.no_grad():
                    expected = self.head.logits(self._beside(dense[row][part])).log_softmax(-1)[predicted[part]]
                found = self.head.logits(inner[part]).log_softmax(-1)[predicted[part]]
                loss = kl_div(found, expected, reduction="sum", log_target=True)
                total += float(loss.detach())
                loss.backward()  # type: ignore[no-untyped-call]
            count += int(predicted.sum())
            outputs.append(states)
            gradients.append(inner.grad)
        torch.autograd.backward(outputs, gradients)
        return total, count

    def train(
        self,
        drawn: Samples,
        dense: list[Tensor],
        *,
        epochs: int,
        batch: int,
        rate: float,
        seed: int,
        progress: Callable[[Step], None] | None = None,
        goes_on: Callable[[], bool] | None = None,
    ) -> bool:
        """Train on some samples.

        Parameters
        ----------
        drawn : Samples
            To train on.
        dense : list of tensor
            Of these samples, as `run_dense` returned them.
        epochs, batch : int
            How often each sample is seen, and samples a step.
        rate : float
            Highest learning rate of the relative changes.
        seed : int
            Of the samples' order.
        progress : callable, optional
            Called after each step.
        goes_on : callable, optional
            Called after half of the steps; training ends there where it returns False.

        Returns
        -------
        bool
            Whether it ended there.

        Raises
        ------
        NotFiniteError
            A divergence is NaN or infinite.
        """
        optimizer = torch.optim.Adam(self.parameters(rate), betas=BETAS)
        generator = np.random.default_rng(seed)
        order = [part for _ in range(epochs) for part in _batches(generator.permutation(len(drawn)).tolist(), batch)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: share_of_rate(number, len(order)))
        with capacity_lifted(self.model):
            for number, part in enumerate(order, 1):
                optimizer.zero_grad()
                total, count = self.learn(drawn, dense, part)
                if not math.isfinite(total):
                    raise NotFiniteError("the models' predictions are NaN or infinite. Compress at a higher rate.")
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad /= count
                optimizer.step()
                schedule.step()
                if progress is not None:
                    progress(Step(number, len(order), total / count))
                if goes_on is not None and number == len(order) // 2 and not goes_on():
                    return True
        return False

    @torch.no_grad()
    def measure(self, drawn: Samples, dense: list[Tensor]) -> Measured:
        """Compare some samples' predictions with the dense model's, and with the text; `dense` as for `train`."""
        divergences, losses, dense_losses, tokens = [], [], [], []
        with capacity_lifted(self.model):
            for row, expected in enumerate(dense):
                labels, states = (each[0] for each in states_of(self.model, self.head, drawn, [row]))
                predicted, own, wanted = labels != IGNORED, 0.0, 0.0
                for part in slices(len(labels), self.head.vocabulary):
                    logits = self.head.logits(states[part])
                    reference = self.head.logits(self._beside(expected[part]))
                    divergences.append(summed_divergence(logits[predicted[part]], reference[predicted[part]])[0])
                    own += summed_loss(logits, labels[part])
                    wanted += summed_loss(reference, labels[part])
                losses.append(own)
                dense_losses.append(wanted)
                tokens.append(int(predicted.sum()))
        return Measured(math.fsum(divergences) / sum(tokens), losses, dense_losses, tokens)

    def stored(self) -> dict[str, Tensor]:
        """Return all tensors that training changed, on the CPU, as they are stored, by the model's names."""
        changed = {name: tensor for experts in self.experts for name, tensor in experts.stored().items()}
        return changed | {name: norm.detach().cpu() for name, norm in self.norms.items()}

    def _beside(self, states: Tensor) -> Tensor:
        """Return what the dense model's head was given where the model is, as float32."""
        return states.to(self.model.device, torch.float32)


def _copy_norms(model: Any) -> dict[str, nn.Parameter]:
    """Let a model's vectors be trained: norms' weights, and biases, each a copy of what is a map of a file."""
    found: dict[str, nn.Parameter] = {}
    copies: dict[int, nn.Parameter] = {}
    for owner_name, owner in model.named_modules():
        if isinstance(owner, TunedExperts):
            continue
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dim() == 1 and parameter.is_floating_point():
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
                    found[f"{owner_name}.{name}".removeprefix(".")] = copies[id(parameter)]
                setattr(owner, name, copies[id(parameter)])
    return found


def _batches(rows: list[int], batch: int) -> list[list[int]]:
    return [rows[start : start + batch] for start in range(0, len(rows), batch)]
