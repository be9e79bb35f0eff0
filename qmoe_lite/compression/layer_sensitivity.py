"""How much a model loses when one of its layers is quantised alone: what layers' shares of the bits can follow.

A few windows of text go through the dense model block by block. In front of each sparse layer a copy of them is made
that gets the outputs of its quantised experts, and goes on through dense layers with the copies made before it. In the
end each copy's predictions are compared with the dense model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.compression.block_runner import BlockRunner
from qmoe_lite.compression.calibration import Samples, check_ids, hessian_masks, open_tokenizer
from qmoe_lite.compression.choice import USUAL_RATE
from qmoe_lite.compression.documents import DEFAULT_TEXT
from qmoe_lite.compression.freed import return_freed
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.layer_parts import LayerInputs
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.losses import IGNORED, divergence_of, head_on, head_products, slices
from qmoe_lite.compression.opening import Opened, check_family, opened
from qmoe_lite.compression.positions import check_window
from qmoe_lite.compression.ranks import Ranks
from qmoe_lite.compression.rate import bounded, check_rate, first_step
from qmoe_lite.compression.replay import check_first_blocks
from qmoe_lite.compression.run_samples import RunSamples
from qmoe_lite.compression.settings import Progress, Settings
from qmoe_lite.compression.shares import Sensitivity
from qmoe_lite.devices import find_device
from qmoe_lite.errors import NotFiniteError, TextError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.skeletons import capacity_lifted
from qmoe_lite.quantization.grid import UniformGrid

COMPARED_TOKENS = 1024  # whose predictions are compared, at least
RUN_TOKENS = 256  # the same at the start of a compression, which has other work
LEAST_TOKENS = 4096  # in all Hessians of a layer
_TOKENS_OF_EXPERT = 256  # in its Hessian, on average


def sensitivity(
    model: str | Path,
    *,
    calibration: str | Path | None = None,
    rate: float = USUAL_RATE,
    sequence_length: int = 512,
    device: str | torch.device = "auto",
    seed: int = 0,
    family: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Sensitivity:
    """Measure what each sparse layer's experts, quantised alone, make a model lose.

    Parameters
    ----------
    model : path or str
        Dense Hugging Face directory, or a name on the hub; one pass goes through it.
    calibration : path or str, optional
        Text, as `compress` takes it.
    rate : float
        Stored bits a weight, about, 0.6 to 4.
    sequence_length : int
        Tokens of a sample; of a causal model's, at most 1,024 are taken.
    device : str or torch device
        Where blocks run and experts are solved.
    seed : int
        For masked spans and drawn tokens.
    family : str, optional
        As `compress` takes it.
    progress : callable, optional
        Called with a `Progress` for each layer.

    Returns
    -------
    Sensitivity
        For `compress(.., sensitivity=)`, which measures it by itself, on fewer tokens, where it is given none.

    Raises
    ------
    TextError
        There is too little text.
    CheckpointError, UnsupportedFamilyError, SettingError, DeviceError, NotFiniteError
        What is wrong with the input.

    Notes
    -----
    Memory: a block, a group of experts, and for each layer the activations of 1,024 tokens, or of a longer sample.
    """
    check_rate(rate)
    check_family(family)
    where = str(find_device(device))
    settings = Settings(sequence_length=sequence_length, device=where, validation_samples=0, seed=seed, rate=rate)
    settings.check()
    tell = progress or (lambda _: None)
    with torch.inference_mode():
        found = opened(find_model(model), family == "auto")
        check_first_blocks(found, settings)
        check_window(found.config, sequence_length)
        tokenizer = open_tokenizer(found.checkpoint.directory)
        seq2seq = found.family.seq2seq
        _, windows, wanted = amounts(found.layers, sequence_length, None, seq2seq, COMPARED_TOKENS)
        text = DEFAULT_TEXT if calibration is None else calibration
        samples, notes = RunSamples.make(text, tokenizer, wanted, seq2seq, settings)
        if samples.calibration < 2 * windows:
            few = f"the text gave {samples.calibration} samples of {sequence_length} tokens"
            raise TextError(f"{few}; {2 * windows} are needed. Add text.")
        check_ids(samples.all, found.config.get_text_config().vocab_size)
        for note in notes:
            tell(Progress(0, len(found.layers), note))
        return measured(tell, found, samples, tokenizer, settings, None, COMPARED_TOKENS)


def measured_by_first(ranks: Ranks, progress: Callable[[Progress], None], *what: Any) -> dict[str, float]:
    """Let the first rank measure what layers lose; `what` is what `measured` takes.

    The others wait for it, with a sign of life at each layer, since all of it may take longer than their patience.
    """

    def told(event: Progress) -> None:
        progress(event)
        ranks.of(0, None)

    found = measured(told, *what).layers if ranks.first else None
    while (losses := ranks.of(0, found)) is None:
        pass
    return losses


def measured(
    progress: Callable[[Progress], None],
    found: Opened,
    samples: RunSamples,
    tokenizer: Any,
    settings: Settings,
    spill: Path | None,
    tokens: int = RUN_TOKENS,
) -> Sensitivity:
    """Measure the same of an opened model on the first of given samples.

    Parameters
    ----------
    progress : callable
        Called with a `Progress` for each layer.
    found : Opened
        The model, none of whose weights need be loaded.
    samples : RunSamples
        Their first calibration samples are taken, of a causal model's the first `tokens` tokens.
    tokenizer
        Of the model.
    settings : Settings
        Of a compression, whose rate is about the one that experts are quantised at.
    spill : Path or None
        Folder for the activations.
    tokens : int
        Whose predictions are compared, at least; fewer where half of the samples have fewer.
    """
    labels, seq2seq = samples.all.labels, found.family.seq2seq
    length, windows, count = amounts(found.layers, settings.sequence_length, samples.calibration, seq2seq, tokens)
    ids = samples.all.input_ids[:count] if seq2seq else samples.all.input_ids[:count, :length]
    cut = RunSamples(Samples(ids, None if labels is None else labels[:count], count), count, count)
    settings = replace(settings, batch_size=windows, sequence_length=length)
    return _Pass(found, settings, spill).run(cut, hessian_masks(cut.all, tokenizer), progress)


def amounts(
    layers: Sequence[MoELayer], length: int, samples: int | None, seq2seq: bool, tokens: int = RUN_TOKENS
) -> tuple[int, int, int]:
    """Return how many tokens of a sample are taken, of how many samples predictions are compared, and of how many all.

    Parameters
    ----------
    layers : sequence of MoELayer
        Of the model.
    length : int
        Tokens that a sample has.
    samples : int or None
        That there are, as many as are wanted by default.
    seq2seq : bool
        Samples have labels, which are of the whole of them.
    tokens : int
        That are to be compared, at least; fewer where half of the samples have fewer.
    """
    length = length if seq2seq else min(length, tokens)
    windows = -(-tokens // length)
    others = max(LEAST_TOKENS, *(_TOKENS_OF_EXPERT * layer.count // layer.top_k for layer in layers))
    wanted = windows * (1 + -(-others // (windows * length)))
    if samples is not None:
        windows = max(min(windows, samples // 2), 1)
        wanted = min(wanted, samples) // windows * windows
    return length, windows, wanted


class _Solver(LayerCompressor):
    """Quantises experts for tokens that go through the dense ones, and keeps nothing of them."""

    def run_quantised(self, layer: MoELayer, number: int, seen: LayerInputs) -> None:
        """Add all experts' outputs to `seen.hidden`: dense ones of reference tokens, and else quantised ones.

        Experts that get none but reference tokens are not solved.
        """
        met, size = list[int](), len(self.groups(layer)[0])
        for expert in range(layer.count):
            rows, _ = seen.assigned.of_expert(expert)
            if not seen.reference[rows].all():
                met.append(expert)
            elif len(rows):
                self.run_reference(expert, self.truth(layer, expert), seen)
        groups = [met[start : start + size] for start in range(0, len(met), size)]
        for place, group in enumerate(groups):
            self._read_ahead(layer, groups[place + 1 : place + 2])
            self._run_group(layer, group, self._solver(layer, number, group, seen, None)(self._grid), seen)
            return_freed()


class _Pass:
    """One pass through a model: samples of the dense one, and behind them a copy of the first few for each layer."""

    def __init__(self, found: Opened, settings: Settings, spill: Path | None) -> None:
        assert settings.rate is not None
        self._settings, self._rate = settings, settings.rate
        self._family, self._checkpoint, self._config = found.family, found.checkpoint, found.config
        self._model, self._layers, self._notes = found.model, found.layers, found.notes
        grid = UniformGrid(level_dtype=torch.bfloat16, step=bounded(first_step(0.95 * self._rate)))
        self._solver = _Solver(self._family, self._config, self._checkpoint, grid, settings)
        self._runner = BlockRunner(self._model, self._family, self._checkpoint, self._layers, settings, spill=spill)
        self._windows = settings.batch  # of a copy

    def run(
        self,
        samples: RunSamples,
        masks: tuple[NDArray[np.bool_], NDArray[np.bool_] | None],
        progress: Callable[[Progress], None],
    ) -> Sensitivity:
        windows = self._windows
        self._family.load_outside_blocks(self._model, self._checkpoint, torch.float32)
        ids = [samples.all.input_ids]
        if samples.all.labels is not None:
            ids.append(samples.decoder_input(self._config))
        count, places = len(ids[0]), {layer.block: number for number, layer in enumerate(self._layers)}
        memory: ListBuffer | None = None
        done = list[int]()
        with capacity_lifted(self._model):
            for stack, tokens, mask in zip(self._family.stacks(self._config), ids, masks, strict=False):
                assert mask is not None
                hidden = self._runner.buffer((count + windows * len(done), tokens.shape[1]))
                of_all = np.concatenate([tokens, np.tile(tokens[:windows], (len(self._layers), 1))])
                calls = self._runner.enter(stack, of_all, memory, hidden, 0)
                for index, block in enumerate(stack.blocks):
                    number = places.get(block)
                    if number is not None:
                        progress(Progress(len(done), len(self._layers), f"what layers lose alone, {block}"))
                        if 0 in self._runner.handed:
                            self._runner.handed[len(hidden)] = self._runner.handed[0]
                        hidden, memory = self._copied(hidden), None if memory is None else self._copied(memory)
                    caught = self._runner.run(stack, index, hidden, memory, calls)
                    if caught is not None and number is not None:
                        own = len(hidden) - windows
                        seen = LayerInputs.of(caught, _flags(mask, own, len(hidden)), self._settings.seed, number)
                        self._solver.run_quantised(self._layers[number], number, seen)
                        caught.finish()
                        done.append(number)
                        del seen
                    del caught  # its buffers are as large as `hidden`
                self._runner.leave(stack, hidden)
                memory = hidden
        assert memory is not None
        labels = samples.all.labels
        told = torch.ones(windows, memory.shape[1], dtype=torch.bool)
        if labels is not None:
            told = torch.from_numpy(labels[:windows] != IGNORED)
        dense, *others = (memory.read(slice(at, at + windows))[told] for at in (0, *range(count, len(memory), windows)))
        progress(Progress(len(done), len(self._layers), "what layers lose alone, comparing predictions"))
        weight, finish = self._family.head(self._model, self._checkpoint)
        weight = head_on(weight, self._settings.device, self._notes)
        losses = _divergences(dense, others, weight, finish)
        found = {self._layers[number].experts: loss for number, loss in zip(done, losses, strict=True)}
        if not all(map(isfinite, losses)):
            text = "what layers lose alone is not finite: a layer's predictions hold NaN."
            raise NotFiniteError(f"{text} Choose --sensitivity none (sensitivity='none').")
        return Sensitivity(self._rate, len(dense), {layer.experts: found[layer.experts] for layer in self._layers})

    def _copied(self, buffer: ListBuffer) -> ListBuffer:
        """Return a buffer with the first windows once more at its end."""
        more = self._runner.buffer((len(buffer) + self._windows, buffer.shape[1]), buffer.shape[2])
        for start in range(0, len(buffer), self._windows):
            more.write(slice(start, start + self._windows), buffer.read(slice(start, start + self._windows)))
        more.write(slice(len(buffer), len(more)), buffer.read(slice(0, self._windows)))
        return more


def _flags(mask: NDArray[np.bool_], own: int, count: int) -> tuple[Tensor, ...]:
    """Return which tokens may enter a Hessian, are for validation, and go through the dense experts.

    The last samples, from `own` on, go through the quantised ones; what is compared enters no Hessian, unless there is
    nothing else.
    """
    tokens, windows = mask.shape[1], count - own
    eligible, reference = np.zeros((count, tokens), bool), np.ones((count, tokens), bool)
    first = windows if len(mask) > windows else 0
    eligible[first : len(mask)] = mask[first:]
    reference[own:] = False
    return tuple(torch.from_numpy(flag.reshape(-1)) for flag in (eligible, np.zeros_like(eligible), reference))


def _divergences(
    dense: Tensor, others: Sequence[Tensor], weight: Tensor, finish: Callable[[Tensor], Tensor]
) -> list[float]:
    """Return KL(dense || other) of each, nats a token, of what the last norm puts out (N, C) and the head (V, C)."""
    sums = [0.0] * len(others)
    for part in slices(len(dense), len(weight)):
        in_turn = (finish(head_products(each[part], weight)).log_softmax(-1) for each in (dense, *others))
        expected = next(in_turn)
        for place, other in enumerate(in_turn):
            sums[place] += divergence_of(other, expected)
    return [max(each / len(dense), 0.0) for each in sums]  # of equal predictions rounding makes less than 0
