"""Whether a model's first blocks, run block by block here, compute what transformers' own model does.

For a type that is in no list of tested families all is read off transformers' model; here it is tried, on the
checkpoint's own weights, before anything is compressed. The other side shares neither the reading of experts nor
their arithmetic: their module is transformers' own, and filled by transformers' own operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint, materialise
from qmoe_lite.compression.block_runner import BlockRunner
from qmoe_lite.compression.expert_runner import ExpertRunner
from qmoe_lite.compression.opening import Opened
from qmoe_lite.compression.settings import Settings
from qmoe_lite.errors import UnsupportedFamilyError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import skeleton
from qmoe_lite.models.causal import Causal
from qmoe_lite.models.family import FAMILIES
from qmoe_lite.models.routing import in_order

_TOKENS = (3, 12)  # samples, tokens of each: a few, since the experts that they take are in memory together
_SPARSE = 2  # sparse blocks that are tried
_TOLERANCE = 1e-4


class _Reached(Exception):
    """Carries what the last block that is tried returns."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out: Tensor = out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def check_first_blocks(found: Opened, settings: Settings) -> None:
    """Compare the hidden states after the first blocks, of a type that is not among the tested ones.

    Parameters
    ----------
    found : Opened
        The model.
    settings : Settings
        Of the run.

    Raises
    ------
    UnsupportedFamilyError
        They differ, or the model's own code fails.
    """
    family, checkpoint, config, layers = found.family, found.checkpoint, found.config, found.layers
    if not isinstance(family, Causal) or family.model_type in FAMILIES:
        return
    (stack,) = family.stacks(config)
    tried = layers[:_SPARSE]
    last = stack.blocks.index(tried[-1].block)
    experts = ExpertRunner(family, config, checkpoint, settings)
    tokens = np.random.default_rng(0).integers(0, config.get_text_config().vocab_size, _TOKENS)
    try:
        expected = _by_transformers(family, config, checkpoint, tried, stack.blocks[: last + 1], tokens)
        model = skeleton(family, config, torch.float32)
        family.load_outside_blocks(model, checkpoint, torch.float32)
        runner = BlockRunner(model, family, checkpoint, tried, replace(settings, batch_size=2, activations="float32"))
        hidden = runner.buffer(tokens.shape)
        calls = runner.enter(stack, tokens, None, hidden, 0)
        for number in range(last + 1):
            caught = runner.run(stack, number, hidden, None, calls)
            if caught is None:
                continue
            layer = next(layer for layer in tried if layer.block == stack.blocks[number])
            for expert in range(layer.count):
                rows, weights = caught.assigned.of_expert(expert)
                if len(rows):
                    x = caught.inputs.gather(rows).to(experts.device)
                    y = experts.expert(x, [replace(each, products=None) for each in experts.truth(layer, expert)])
                    caught.outputs.add(rows, y.cpu() * weights[:, None])
            caught.finish()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} in its first {last + 1} blocks: {' '.join(str(error).split())[:200]}"
        raise UnsupportedFamilyError(f"model type {family.model_type} is not supported: {reason}.") from error
    own = hidden.read(slice(None))
    difference = float((own - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        text = (
            f"model type {family.model_type} is not supported: run block by block, its first {last + 1} blocks differ"
        )
        raise UnsupportedFamilyError(f"{text} by {difference:.1e} from what transformers computes.")


def _by_transformers(
    family: Causal,
    config: Any,
    checkpoint: Checkpoint,
    layers: list[MoELayer],
    blocks: tuple[str, ...],
    tokens: np.ndarray,
) -> Tensor:
    """Return what the last of some blocks puts out in transformers' own model."""
    model: Any = skeleton(family, config, torch.float32)
    family.load_outside_blocks(model, checkpoint, torch.float32)
    for block in blocks:
        materialise(model.get_submodule(block), block, checkpoint, torch.float32)
    for layer in layers:
        _fill_when_asked(family, config, layer, model.get_submodule(layer.experts), checkpoint)

    def stop(module: nn.Module, arguments: Any, out: Any) -> None:
        raise _Reached(out)

    model.get_submodule(blocks[-1]).register_forward_hook(stop)
    try:
        family.body(model)(input_ids=torch.from_numpy(tokens), use_cache=False)
    except _Reached as reached:
        return reached.out
    raise ValueError(f"{blocks[-1]} was not run")


def _fill_when_asked(family: Causal, config: Any, layer: MoELayer, module: nn.Module, checkpoint: Checkpoint) -> None:
    """Let transformers' experts module take the experts that it is asked for, of which alone memory is touched."""
    assert layer.layout is not None
    for name in layer.layout.tensors[:2]:
        shape = module.get_parameter(name).shape
        module.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def fill(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        assert layer.layout is not None
        routing = in_order(arguments[1:], named)
        wanted = set(routing[0].flatten().tolist()) if routing else range(layer.count)
        for expert in wanted:
            for name in layer.layout.tensors[:2] if 0 <= expert < layer.count else ():
                module.get_parameter(name).data[expert] = family.own_slice(config, layer, name, expert, checkpoint)

    module.register_forward_pre_hook(fill, with_kwargs=True)
