"""Whether what came out of a compression is worth using: held-out loss of both models, and a word for the gap.

Validation samples ride along twice, once through the quantised experts and once through the dense ones, so that both
losses are there when the last block is done. The bounds are in nats a token; `qmoe bench accuracy` shows what models
lose at which rate. On the real model of bench/real_model.py llama.cpp's Q4_0 loses .05, Q3_K .27, IQ2_S .78 and
IQ1_M, which writes no sentence, 2.75.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from qmoe_lite.compression.losses import Gap

BOUNDS = (("fine", 0.1), ("usable", 0.35), ("degraded", 1.0))  # the most that each may lose
WORST = "unusable"
BAD_LAYER = 0.4  # relative squared error of a layer's outputs above which a model comes out degraded or worse


@dataclass(frozen=True)
class Verdict:
    """How a compressed model did on text that calibration had not seen.

    Attributes
    ----------
    word : str
        "fine", "usable", "degraded" or "unusable".
    dense_loss, loss : float
        Of the dense and of the compressed model, in nats a token.
    gap, standard_error : float
        Their difference; the error is over samples, NaN for one sample.
    tokens : int
        Predicted tokens.
    advice : str
        What to try next; empty for "fine".
    """

    word: str
    dense_loss: float
    loss: float
    gap: float
    standard_error: float
    tokens: int
    advice: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; a standard error that is not a number is None."""
        values = asdict(self)
        return values | {"standard_error": None if math.isnan(self.standard_error) else self.standard_error}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Verdict:
        """Return what `to_json` was made of."""
        known = {f.name: values[f.name] for f in fields(cls)}
        error = known["standard_error"]
        return cls(**{**known, "standard_error": math.nan if error is None else error})

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" +- {self.standard_error:.3f}"
        losses = f"held-out loss {self.dense_loss:.3f} -> {self.loss:.3f}"
        text = f"{self.word}: {losses}, {self.gap:+.3f}{error} nats a token on {self.tokens:,} tokens"
        return f"{text}. {self.advice}" if self.advice else f"{text}."


def judge(dense_loss: float, gap: Gap, tokens: int, vocabulary: int, rate: float | None, most: float) -> Verdict:
    """Return the verdict on a compressed model.

    Parameters
    ----------
    dense_loss : float
        Of the dense model, nats a token.
    gap : Gap
        What the compressed model loses besides.
    tokens : int
        Predicted tokens.
    vocabulary : int
        Its size: a model that guesses evenly has a loss of its logarithm.
    rate : float or None
        Bits a weight that were asked for; None where the grid decided.
    most : float
        The highest rate there is.
    """
    loss = dense_loss + gap.nats
    word = next((word for word, bound in BOUNDS if gap.nats <= bound), WORST)
    if not math.isfinite(loss) or loss >= math.log(vocabulary) > dense_loss:
        word = WORST
    return Verdict(word, dense_loss, loss, gap.nats, gap.standard_error, tokens, _advice(word, rate, most))


def bad_layer(block: str, error: float | None) -> str | None:
    """Return a warning where a layer's held-out error says that the model will be bad."""
    if error is None or error <= BAD_LAYER:
        return None
    text = f"{block} loses {error:.0%} of its experts' output on held-out text: the model will be degraded or worse"
    return f"{text}. Choose a higher rate, or other calibration text."


def _advice(word: str, rate: float | None, most: float) -> str:
    if word == BOUNDS[0][0]:
        return ""
    if rate is None:
        return "Choose the bits with --rate: 2 to 3 loses far less than this grid."
    if rate < most:
        higher = min(most, rate + (0.5 if word == "usable" else 1.0))
        return f"A higher rate loses less: try --rate {higher:g}."
    return "Use more calibration text, like that which the model was trained on."
