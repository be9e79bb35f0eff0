"""How much a model loses when one of its layers is quantised alone: what layers' shares of the bits can follow.

A few windows of text go through the dense model block by block. In front of each sparse layer a copy of them is made
that gets the outputs of its quantised experts, and goes on through dense layers with the copies made before it. In the
end each copy's predictions are compared with the dense model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.layer_parts import LayerInputs
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.losses import IGNORED, head_on, head_products, slices, summed_divergence
from qmoe_lite.compression.opening import check_family, opened
from qmoe_lite.compression.positions import check_window
from qmoe_lite.compression.rate import bounded, check_rate, first_step
from qmoe_lite.compression.replay import check_first_blocks
from qmoe_lite.compression.run_samples import RunSamples
from qmoe_lite.compression.settings import Progress, Settings
from qmoe_lite.compression.shares import Sensitivity
from qmoe_lite.devices import find_device
from qmoe_lite.errors import TextError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.skeletons import capacity_lifted
from qmoe_lite.quantization.grid import UniformGrid

COMPARED_TOKENS = 1024  # of which predictions are compared, at least
_TOKENS_OF_EXPERT = 256  # in its Hessian, on average
LEAST_TOKENS = 4096  # in all Hessians of a layer


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
        Tokens of a sample.
    device : str or torch device
        Where blocks run and experts are solved.
    seed : int
        For masked spans.
    family : str, optional
        As `compress` takes it.
    progress : callable, optional
        Called with a `Progress` for each layer.

    Returns
    -------
    Sensitivity
        For `compress(.., sensitivity=)`.

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
    windows = -(-COMPARED_TOKENS // max(sequence_length, 1))
    settings = Settings(
        sequence_length=sequence_length,
        batch_size=windows,
        device=str(find_device(device)),
        validation_samples=0,
        seed=seed,
        tune="none",
    )
    settings.check()
    with torch.inference_mode():
        return _Pass(find_model(model), settings, rate, family == "auto").run(calibration, progress or (lambda _: None))


class _Compressor(LayerCompressor):
    """Solves for tokens that go through the dense experts."""

    def _solved_once(self, layer: MoELayer) -> bool:
        return False


class _Pass:
    """One pass through a model: samples of the dense one, and behind them a copy of the first few for each layer."""

    def __init__(self, model: Path, settings: Settings, rate: float, auto: bool) -> None:
        self._settings, self._rate = settings, rate
        found = opened(model, auto)
        self._family, self._checkpoint, self._config = found.family, found.checkpoint, found.config
        self._model, self._layers = found.model, found.layers
        grid = UniformGrid(level_dtype=torch.bfloat16, step=bounded(first_step(0.95 * rate)))
        self._compressor = _Compressor(self._family, self._config, self._checkpoint, grid, settings)
        check_first_blocks(self._family, self._checkpoint, self._config, self._layers, self._compressor, settings)
        self._runner = BlockRunner(self._model, self._family, self._checkpoint, self._layers, settings)
        self._windows = settings.batch_size  # of a copy

    def run(self, calibration: str | Path | None, progress: Callable[[Progress], None]) -> Sensitivity:
        check_window(self._config, self._settings.sequence_length)
        tokenizer = open_tokenizer(self._checkpoint.directory)
        samples, notes = self._samples(calibration, tokenizer)
        for note in notes:
            progress(Progress(0, len(self._layers), note))
        windows = self._windows
        self._family.load_outside_blocks(self._model, self._checkpoint, torch.float32)
        ids = [samples.all.input_ids]
        if samples.all.labels is not None:
            ids.append(samples.decoder_input(self._config))
        count, places = len(ids[0]), {layer.block: number for number, layer in enumerate(self._layers)}
        memory: ListBuffer | None = None
        done = list[int]()
        with capacity_lifted(self._model):
            masks = hessian_masks(samples.all, tokenizer)
            for stack, tokens, mask in zip(self._family.stacks(self._config), ids, masks, strict=False):
                assert mask is not None
                hidden = self._runner.buffer((count + windows * len(done), tokens.shape[1]))
                of_all = np.concatenate([tokens, np.tile(tokens[:windows], (len(self._layers), 1))])
                calls = self._runner.enter(stack, of_all, memory, hidden, 0)
                for index, block in enumerate(stack.blocks):
                    number = places.get(block)
                    if number is not None:
                        progress(Progress(len(done), len(self._layers), block))
                        if 0 in self._runner.handed:
                            self._runner.handed[len(hidden)] = self._runner.handed[0]
                        hidden, memory = self._copied(hidden), None if memory is None else self._copied(memory)
                    caught = self._runner.run(stack, index, hidden, memory, calls)
                    if caught is not None and number is not None:
                        own = len(hidden) - windows
                        seen = LayerInputs.of(caught, _flags(mask, own, len(hidden)), self._settings.seed, number)
                        self._compressor.compress(self._layers[number], number, seen, lambda *_: None)
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
        progress(Progress(len(done), len(self._layers), "comparing predictions"))
        weight, finish = self._family.head(self._model, self._checkpoint)
        losses = _divergences(dense, others, head_on(weight, self._settings.device), finish)
        found = {self._layers[number].experts: loss for number, loss in zip(done, losses, strict=True)}
        return Sensitivity(self._rate, len(dense), {layer.experts: found[layer.experts] for layer in self._layers})

    def _samples(self, calibration: str | Path | None, tokenizer: Any) -> tuple[RunSamples, list[str]]:
        """Return the dense model's samples, as many as fill whole batches, and what is less than it should be."""
        length = self._settings.sequence_length
        tokens = max(LEAST_TOKENS, *(_TOKENS_OF_EXPERT * layer.count // layer.top_k for layer in self._layers))
        wanted = self._windows * (1 + -(-tokens // (self._windows * length)))
        text = DEFAULT_TEXT if calibration is None else calibration
        found, notes = RunSamples.make(text, tokenizer, wanted, self._family.seq2seq, self._settings)
        count = found.calibration // self._windows * self._windows
        if count < 2 * self._windows:
            few = f"the text gave {found.calibration} samples of {length} tokens"
            raise TextError(f"{few}; {2 * self._windows} are needed. Add text.")
        check_ids(found.all, self._config.get_text_config().vocab_size)
        labels = found.all.labels
        kept = Samples(found.all.input_ids[:count], None if labels is None else labels[:count], found.all.windows)
        return RunSamples(kept, count, count), notes

    def _copied(self, buffer: ListBuffer) -> ListBuffer:
        """Return a buffer with the first windows once more at its end."""
        more = self._runner.buffer((len(buffer) + self._windows, buffer.shape[1]), buffer.shape[2])
        for start in range(0, len(buffer), self._windows):
            more.write(slice(start, start + self._windows), buffer.read(slice(start, start + self._windows)))
        more.write(slice(len(buffer), len(more)), buffer.read(slice(0, self._windows)))
        return more


def _flags(mask: NDArray[np.bool_], own: int, count: int) -> tuple[Tensor, ...]:
    """Return which tokens may enter a Hessian, are for validation, and go through the dense experts.

    The last samples, from `own` on, go through the quantised ones; what is compared enters no Hessian.
    """
    tokens, windows = mask.shape[1], count - own
    eligible, reference = np.zeros((count, tokens), bool), np.ones((count, tokens), bool)
    eligible[windows : len(mask)] = mask[windows:]
    reference[own:] = False
    return tuple(torch.from_numpy(flag.reshape(-1)) for flag in (eligible, np.zeros_like(eligible), reference))


def _divergences(
    dense: Tensor, others: Sequence[Tensor], weight: Tensor, finish: Callable[[Tensor], Tensor]
) -> list[float]:
    """Return KL(dense || other) of each, nats a token, of what the last norm puts out (N, C) and the head (V, C)."""
    sums = [0.0] * len(others)
    for part in slices(len(dense), len(weight)):
        expected = finish(head_products(dense[part], weight))
        for place, other in enumerate(others):
            sums[place] += summed_divergence(finish(head_products(other[part], weight)), expected)[0]
    return [max(each / len(dense), 0.0) for each in sums]  # of equal predictions rounding makes less than 0
