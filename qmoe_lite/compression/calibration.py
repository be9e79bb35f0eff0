"""Text to token samples: T5 span corruption for encoder-decoder models, plain windows for causal ones.

A sample is one row of equal-length windows, so nothing is ever padded. The span corruption is that of T5
(arXiv:1910.10683, section 3.1.4), with which SwitchTransformers were trained and QMoE calibrates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_lite.compression.documents import Continued, Conversation
from qmoe_lite.compression.marks import conversation_ids, marks_of, special_ids
from qmoe_lite.errors import CheckpointError, SettingError, TextError, first_line, unreadable

NOISE_DENSITY = 0.15  # T5: share of the tokens that are masked
MEAN_SPAN = 3.0  # T5: mean tokens of a masked span
SHORTEST_WINDOW = 8  # tokens; below this there is no span to corrupt and nothing to predict


@dataclass(frozen=True)
class Samples:
    """Token windows, and what the model is to predict.

    Attributes
    ----------
    input_ids : int64 array, shape (N, S)
        Encoder input (corrupted text), or the causal window.
    labels : int64 array, shape (N, T), or None
        Decoder targets; None for a causal model, which predicts `input_ids` themselves.
    windows : int
        Distinct stretches of text; N is a multiple or a part of it (each pass masks other spans).
    """

    input_ids: np.ndarray
    labels: np.ndarray | None
    windows: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def predicted_tokens(self) -> int:
        """Tokens whose loss is counted."""
        if self.labels is not None:
            return int(self.labels.size)
        return int(self.input_ids.size - len(self.input_ids))


def open_tokenizer(directory: Path) -> Any:
    """Open a model's tokenizer.

    Raises
    ------
    CheckpointError
        There is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    # without any of these transformers makes up an empty tokenizer and says nothing
    names = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((directory / name).is_file() for name in names):
        raise CheckpointError(f"{directory} has no tokenizer ({', '.join(names[:3])}, ..). Copy the model's own there.")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers, sentencepiece and json each raise their own
        if isinstance(error, OSError) and error.errno:  # the system's, and not one of transformers' own making
            raise unreadable(Path(error.filename or directory), error) from error
        raise CheckpointError(f"{directory} has no usable tokenizer: {first_line(error)}. Fetch it again.") from error


def check_ids(samples: Samples, vocabulary: int) -> None:
    """Raise SettingError where the tokenizer gives ids that the model does not know."""
    largest = max(int(ids.max()) for ids in (samples.input_ids, samples.labels) if ids is not None)
    if largest >= vocabulary:
        text = f"the tokenizer produces id {largest}, the model knows {vocabulary}. Use this model's own tokenizer."
        raise SettingError(text)


def read_tokens(
    documents: Iterable[str | Conversation], tokenizer: Any, wanted: int | None = None, *, seq2seq: bool = False
) -> np.ndarray:
    """Tokenise documents, one after another.

    Parameters
    ----------
    documents : iterable of str and Conversation
        What `read_text` yields.
    tokenizer : transformers tokenizer
        The model's own.
    wanted : int, optional
        Stop reading when there are this many tokens; by default everything is read.
    seq2seq : bool
        Put no marks between documents, as T5 does not; else those that the tokenizer has (see `marks.Marks`).

    Returns
    -------
    int64 array, shape (tokens,)

    Raises
    ------
    TextError
        All that was read is white space, or messages that the tokenizer's chat template does not take.
    """
    begin, end = ([], []) if seq2seq else marks_of(tokenizer)
    pieces: list[np.ndarray] = []
    count, blank = 0, True
    before: list[int] = []  # what ends the document that was read last
    for text in documents:
        if isinstance(text, Conversation):
            ids, before, blank = [*before, *conversation_ids(text, tokenizer)], [], False
        else:
            blank = blank and not text.strip()
            ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if not isinstance(text, Continued):
                ids, before = [*before, *begin, *ids], end
        pieces.append(np.asarray(ids, dtype=np.int64))
        count += len(ids)
        if wanted is not None and count >= wanted:
            break
    if pieces and blank:
        raise TextError("the text is empty but for white space. Give text of the kind that the model is to read.")
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def sentinel_ids(tokenizer: Any) -> np.ndarray:
    """Ids of <extra_id_0>, <extra_id_1>, .. as far as the tokenizer has them.

    Returns
    -------
    int64 array, shape (sentinels,)
    """
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    return np.asarray(ids, dtype=np.int64)


def noise_counts(length: int, density: float = NOISE_DENSITY, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    """Masked tokens and masked spans of a window, as T5's random_spans_noise_mask counts them."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, noise, length - noise)


def window_length(sequence_length: int) -> int:
    """Most text tokens whose corrupted form, with sentinels and </s>, fits `sequence_length`.

    Notes
    -----
    T5's random_spans_helper. 512 gives 568 as there.
    """
    length = SHORTEST_WINDOW
    while True:
        noise, spans = noise_counts(length + 1)
        if length + 1 - noise + spans + 1 > sequence_length:
            return length
        length += 1


def noise_mask(
    length: int, rng: np.random.Generator, density: float = NOISE_DENSITY, mean_span: float = MEAN_SPAN
) -> np.ndarray:
    """Draw which tokens of a window are masked, as T5's random_spans_noise_mask does.

    Parameters
    ----------
    length : int
        Tokens of the window, at least 2.
    rng : numpy Generator
        Modified by this function.
    density, mean_span : float
        Share of masked tokens, and mean tokens of a masked span.

    Returns
    -------
    bool array, shape (length,)
        Kept and masked stretches take turns; the first is kept, the last is masked.
    """
    noise, spans = noise_counts(length, density, mean_span)

    def segments(items: int) -> np.ndarray:
        cuts = np.sort(rng.choice(items - 1, spans - 1, replace=False)) + 1 if spans > 1 else np.empty(0, np.int64)
        return np.diff(np.concatenate([[0], cuts, [items]]))

    lengths = np.stack([segments(length - noise), segments(noise)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def corrupt_spans(
    tokens: np.ndarray,
    sentinels: np.ndarray,
    eos: int,
    rng: np.random.Generator,
    density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace random spans by sentinels; the spans become the target.

    Parameters
    ----------
    tokens : int64 array, shape (length,)
        One window of text.
    sentinels : int64 array
        Ids of <extra_id_0>, <extra_id_1>, ..
    eos : int
        Id of </s>, which ends input and target.
    rng : numpy Generator
        Modified by this function.
    density, mean_span : float
        Share of masked tokens, and mean tokens of a masked span.

    Returns
    -------
    inputs, targets : int64 arrays
        Their lengths depend on the length of `tokens` alone.

    Raises
    ------
    SettingError
        The window has more spans than there are sentinels.
    """
    mask = noise_mask(len(tokens), rng, density, mean_span)
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    kept_starts = ~mask & np.concatenate([[True], mask[:-1]])
    spans = int(starts.sum())
    if spans > len(sentinels):
        raise SettingError(
            f"a window of {len(tokens)} tokens has {spans} masked spans but the tokenizer has {len(sentinels)} "
            f"sentinels (<extra_id_0>, ..). Use a smaller --sequence-length, or this model's own tokenizer."
        )

    def merge(dropped: np.ndarray, dropped_starts: np.ndarray) -> np.ndarray:
        out = tokens.copy()
        out[dropped_starts] = sentinels[:spans]
        return np.append(out[~dropped | dropped_starts], eos)

    return merge(mask, starts), merge(~mask, kept_starts)


def make_samples(
    tokens: np.ndarray,
    tokenizer: Any,
    *,
    seq2seq: bool,
    count: int | None,
    sequence_length: int,
    seed: int,
    passes: int = 1,
) -> Samples:
    """Cut a token stream into samples.

    Parameters
    ----------
    tokens : int64 array, shape (tokens,)
        What `read_tokens` gives.
    tokenizer : transformers tokenizer
        For its sentinels and its </s>; of a causal model for what begins a text, which takes the place of a window's
        first tokens. None: nothing does.
    seq2seq : bool
        Span corruption (True) or plain causal windows (False).
    count : int or None
        Samples wanted, drawn at random from the windows; None takes every window `passes` times in order. Where a
        seq2seq text has fewer windows than `count`, further passes mask other spans of the same windows; a causal
        text then gives all its windows once.
    sequence_length : int
        Tokens of a sample (encoder side), at least 16.
    seed : int
        Decides order and masked spans.
    passes : int
        With `count=None`: how often each window is corrupted anew.

    Raises
    ------
    TextError
        Fewer than 8 tokens of text.
    SettingError
        `sequence_length` or `count` out of range, or the tokenizer has too few sentinels.
    """
    if sequence_length < 2 * SHORTEST_WINDOW:
        raise SettingError(f"sequence length {sequence_length} is too short; use at least {2 * SHORTEST_WINDOW}.")
    if count is not None and count < 1:
        raise SettingError(f"{count} samples were asked for; ask for at least 1.")
    if len(tokens) < SHORTEST_WINDOW:
        raise TextError(f"the text is empty or too short: {len(tokens)} tokens, at least {SHORTEST_WINDOW} needed.")
    length = min(window_length(sequence_length) if seq2seq else sequence_length, len(tokens))
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    rng = np.random.default_rng(seed)
    if count is None:
        order = np.tile(np.arange(len(windows)), passes if seq2seq else 1)
    else:
        rounds = -(-count // len(windows)) if seq2seq else 1
        order = np.concatenate([rng.permutation(len(windows)) for _ in range(rounds)])[:count]
    if not seq2seq:
        drawn = windows[order]
        if tokenizer is not None:
            begin = marks_of(tokenizer).begin
            drawn[:, : len(begin)] = begin
        return Samples(drawn, None, len(windows))
    if tokenizer.eos_token_id is None:
        raise SettingError("the tokenizer has no end-of-text token (</s>). Use this model's own tokenizer.")
    sentinels = sentinel_ids(tokenizer)
    pairs = [corrupt_spans(windows[i], sentinels, tokenizer.eos_token_id, rng) for i in order]
    return Samples(np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs]), len(windows))


def hessian_masks(samples: Samples, tokenizer: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return which positions may enter a Hessian.

    Returns
    -------
    encoder : bool array, shape (N, S)
        False at sentinels; for a causal model at all special tokens, such as those that begin and end documents.
    decoder : bool array, shape (N, T), or None for a causal model
        False just before a sentinel, where the model predicts nothing but the sentinel.

    Notes
    -----
    QMoE, section 3.2 and table 2: without the mask the ternary base128 loses 2.16 instead of 1.99.
    """
    if samples.labels is None:
        return ~np.isin(samples.input_ids, special_ids(tokenizer)), None
    sentinels = sentinel_ids(tokenizer)
    return ~np.isin(samples.input_ids, sentinels), ~np.isin(samples.labels, sentinels)
