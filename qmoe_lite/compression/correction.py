"""What an expert's last projection is solved for in place of its dense weights, to make up for what is missing.

GPTQ keeps W h, on what the quantised first projections make of its tokens, h. The dense expert makes d of them, and is
to put out W d. So the last projection is solved for W + E[missing h^T] (H + dampening)^-1, where missing is W (d - h)
and the expert's share of what its block lacks, and H = E[h h^T], all of the tokens that have twins: least squares,
dampened as the solver is. In the literature such targets are called asymmetric calibration (GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_lite.compression.expert_runner import ExpertRunner
from qmoe_lite.compression.expert_training import squares
from qmoe_lite.compression.layer_parts import Inputs, Linear
from qmoe_lite.compression.run_samples import TUNED_TOKENS
from qmoe_lite.quantization.hessian import accumulate, added, blend, mean, new

MEASURED_TOKENS = 256  # of an expert, on which what is missing is measured for the report


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
    """Gathers what is missing of one expert's outputs, and what it is regressed on.

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
    tells : bool
        Measure what is missing before and after, for the report.
    """

    def __init__(
        self,
        runner: ExpertRunner,
        truth: list[Linear],
        lack: Lack,
        rows: Tensor,
        gates: Tensor,
        *,
        tells: bool = True,
    ) -> None:
        self._runner, self._truth, self._lack, self._tells = runner, truth, lack, tells
        self._rows, self._gates = rows, gates
        weights = truth[-1].weight
        # over the same tokens: where a few are larger by orders, other tokens' Hessian would let a change overshoot
        self._hessian, self._cross = (new(weights.shape[1], device=weights.device) for _ in range(2))
        self._lacking = torch.zeros_like(weights)
        self._tokens = 0
        self._measured: tuple[Tensor, Tensor, Tensor] | None = None

    def take(self, rows: Tensor, x: Tensor, inside: Tensor) -> None:
        """Take some of the tokens that enter the expert's Hessian; those with twins count, and the first ones of them.

        Parameters
        ----------
        rows : int64 tensor, shape (N,)
            Which ones.
        x : float32 tensor, shape (N, C of the first projections)
            Their activations.
        inside : float32 tensor, shape (N, C)
            What the quantised first projections make of them.
        """
        some = torch.nonzero(rows < self._lack.rows)[: TUNED_TOKENS - self._tokens, 0]
        if not len(some):
            return
        rows, x, inside = rows[some], x[some.to(x.device)], inside[some.to(x.device)]
        self._tokens += len(rows)
        dense = self._runner.inner(x, self._truth[:-1])
        change = dense - inside
        accumulate(self._hessian, inside)
        self._cross.addmm_(change.T, inside)
        gates, lacking = self._gates[torch.searchsorted(self._rows, rows)], torch.zeros(())
        if self._lack.buffer is not None:
            lacking = self._lack.share(rows, gates).to(inside.device)
            self._lacking.addmm_(lacking.T, inside)
        if self._tells and self._measured is None:
            few, last = slice(0, MEASURED_TOKENS), self._truth[-1]
            gates = gates[few, None].to(inside.device)
            missing = change[few] @ last.weight.T
            missing = missing + lacking[few] if lacking.ndim else missing
            self._measured = last.of(dense[few]) * gates, missing * gates, inside[few] * gates

    def add_to(self, weights: Tensor, hessian: Tensor, dampening: float, blend_tokens: int) -> Found | None:
        """Add to a last projection what makes up for what is missing; return how much does, if it `tells`.

        Parameters
        ----------
        weights : float32 tensor, shape (R, C)
            Changed in place.
        hessian : float32 tensor, shape (C, C)
            As the expert is solved with; for tokens of which nothing is known to be missing.
        dampening : float
            Of the solver.
        blend_tokens : int
            How many of those count where there are fewer tokens than columns.
        """
        tokens, columns = self._tokens, len(hessian)
        if not tokens:
            return None
        own, missing = mean(self._hessian, tokens), (self._truth[-1].weight @ self._cross + self._lacking) / tokens
        if tokens < columns:
            own, missing = blend(own, hessian, tokens, blend_tokens), missing * (tokens / (tokens + blend_tokens))
        dampened = own + added(own, dampening) * torch.eye(columns, device=own.device)
        factor, info = torch.linalg.cholesky_ex(dampened)
        change = torch.cholesky_solve(missing.T, factor).T
        if info.item() or not change.isfinite().all():
            return None
        weights += change
        if self._measured is None:
            return None
        goal, before, inside = self._measured
        return Found(*map(squares, (goal, before, before - inside @ change.T)))
