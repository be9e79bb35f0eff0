"""What an expert's last projection is solved for in place of its dense weights, to make up for what is missing.

GPTQ keeps W h, on what the quantised first projections make of its tokens, h. The dense expert makes d of them, and is
to put out W d. So the last projection is solved for W + E[missing h^T] (H + dampening)^-1, where missing is W (d - h)
and the expert's share of what its block lacks: least squares by the solver's own Hessian and dampening. In the
literature such targets are called asymmetric calibration (GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_lite.compression.expert_runner import ExpertRunner
from qmoe_lite.compression.layer_parts import Inputs, Linear
from qmoe_lite.compression.run_samples import TUNED_TOKENS
from qmoe_lite.quantization.hessian import added

MEASURED_TOKENS = 1024  # of an expert, on which what is missing is measured for the report


@dataclass(frozen=True)
class Lack:
    """What a block lacks of the dense model's output, were its experts dense.

    Attributes
    ----------
    rows : int
        Of how many rows, the first ones, it is known: those of the samples that have twins.
    buffer : Inputs or None
        A row of it for each; None where the block does more with its experts' outputs than to add them.
    squares : float32 tensor, a value a row
        Sum of the squares of the gates of a token's experts.
    """

    rows: int
    buffer: Inputs | None
    squares: Tensor

    def share(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return some tokens' lack, each times a weight over its squares; float32 (len(rows), R)."""
        assert self.buffer is not None
        shares = weights / self.squares[rows].clamp_min(torch.finfo(torch.float32).tiny)
        return self.buffer.gather(rows) * shares[:, None]


@dataclass(frozen=True)
class Found:
    """Sums of squares over some tokens, times their gates: of a dense expert's outputs, of what was and is missing."""

    goal: float
    before: float
    after: float


class Correction:
    """Gathers what is missing of one expert's outputs.

    Parameters
    ----------
    runner : ExpertRunner
        Runs the dense expert.
    truth : list of Linear
        Its matrices.
    lack : Lack
        Of the block.
    rows, gates : int64, float32 tensor
        All tokens of the expert.
    """

    def __init__(self, runner: ExpertRunner, truth: list[Linear], lack: Lack, rows: Tensor, gates: Tensor) -> None:
        self._runner, self._truth, self._lack = runner, truth, lack
        self._rows, self._gates = rows, gates
        size, columns = truth[-1].weight.shape
        self._cross = truth[-1].weight.new_zeros(columns, columns)
        self._lacking = truth[-1].weight.new_zeros(size, columns)
        self._tokens = self._owns = 0
        self._measured: tuple[Tensor, Tensor, Tensor] | None = None

    def take(self, rows: Tensor, x: Tensor, inside: Tensor) -> None:
        """Take some of the tokens that enter the expert's Hessian; of more than enough, the first ones.

        Parameters
        ----------
        rows : int64 tensor, shape (N,)
            Which ones.
        x : float32 tensor, shape (N, C of the first projections)
            Their activations.
        inside : float32 tensor, shape (N, C)
            What the quantised first projections make of them.
        """
        some = slice(0, max(0, TUNED_TOKENS - self._tokens))
        rows, x, inside = rows[some], x[some], inside[some]
        if not len(rows):
            return
        dense = self._runner.inner(x, self._truth[:-1])
        change = dense - inside
        self._cross.addmm_(change.T, inside)
        self._tokens += len(rows)
        lacking = torch.zeros(0, 0)
        if self._lack.buffer is not None:
            own = rows < self._lack.rows
            rows, inside, dense, change = rows[own], inside[own], dense[own], change[own]
            lacking = self._lack.share(rows, self._gates_of(rows)).to(inside.device)
            self._lacking.addmm_(lacking.T, inside)
            self._owns += len(rows)
        if self._measured is None and len(rows):
            some, last = slice(0, MEASURED_TOKENS), self._truth[-1]
            gates = self._gates_of(rows[some])[:, None].to(inside.device)
            missing = change[some] @ last.weight.T
            missing = missing + lacking[some] if len(lacking) else missing
            self._measured = last.of(dense[some]) * gates, missing * gates, inside[some] * gates

    def _gates_of(self, rows: Tensor) -> Tensor:
        return self._gates[torch.searchsorted(self._rows, rows)]

    def add_to(self, weights: Tensor, hessian: Tensor, dampening: float, blend_tokens: int) -> Found | None:
        """Add to a last projection what makes up for what is missing; return how much does.

        Parameters
        ----------
        weights : float32 tensor, shape (R, C)
            Changed in place.
        hessian : float32 tensor, shape (C, C)
            Of the same tokens, as it is solved with.
        dampening : float
            Of the solver.
        blend_tokens : int
            That a Hessian of too few tokens borrows of the layer.
        """
        if not self._tokens:
            return None
        columns, missing = len(hessian), self._truth[-1].weight @ self._cross / self._tokens
        missing *= _trust(self._tokens, columns, blend_tokens)
        if self._owns:
            missing += self._lacking / self._owns * _trust(self._owns, columns, blend_tokens)
        dampened = hessian + added(hessian, dampening) * torch.eye(columns, device=hessian.device)
        factor, info = torch.linalg.cholesky_ex(dampened)
        change = torch.cholesky_solve(missing.T, factor).T
        if info.item() or not change.isfinite().all():
            return None
        weights += change
        if self._measured is None:
            return None
        goal, before, inside = self._measured
        return Found(*(float(each.double().square().sum()) for each in (goal, before, before - inside @ change.T)))


def _trust(tokens: int, columns: int, blend_tokens: int) -> float:
    """Return the share of a mean over tokens that holds, as for a Hessian: too few say that nothing is missing."""
    return 1.0 if tokens >= columns else tokens / (tokens + blend_tokens)
