"""Dense models as transformers builds them, without weights; and what their checkpoints must hold."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qmoe_lite.checkpoint.reader import EXPERTS, Checkpoint
from qmoe_lite.errors import CheckpointError, first_line
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import Family, family_of

UNLIMITED = 1 << 30  # tokens; an expert capacity that nothing reaches


def open_checkpoint(directory: Path) -> tuple[Family, Checkpoint]:
    """Open a model directory; its tensors are known by the model's own names.

    Raises
    ------
    CheckpointError, UnsupportedFamilyError
        No model, damaged, or of a family that is not supported.
    """
    checkpoint = Checkpoint(directory)
    family = family_of(checkpoint.config.get("model_type"))
    checkpoint.know_as(family.canonical)
    return family, checkpoint


def check_promise(family: Family, config: Any, checkpoint: Checkpoint) -> list[MoELayer]:
    """Compare what config.json promises with what the checkpoint holds.

    Returns
    -------
    list of MoELayer

    Raises
    ------
    CheckpointError
        No sparse layer; an expert's matrix is missing or has another shape; or there are more than promised.
    """
    layers = family.layers(config)
    if not layers:
        raise CheckpointError(f"{checkpoint.directory} has no sparse layer: there are no experts to compress.")
    promised = {
        family.weight_name(layer, expert, projection): shape
        for layer in layers
        for expert in range(layer.count)
        for projection, shape in layer.shapes.items()
    }
    for name, shape in promised.items():
        if (found := checkpoint.shape(name)) != shape:
            raise CheckpointError(f"{name} has shape {found}; config.json says {shape}.")
    held = [name for name in checkpoint.names if EXPERTS in name]
    if extra := set(held) - set(promised):
        raise CheckpointError(f"the checkpoint has {sorted(extra)[0]}, which config.json does not account for.")
    return layers


def unused(family: Family, model: Any, checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that transformers leaves out on purpose, such as DeepSeek's layer for several tokens."""
    blocks = tuple(f"{block}." for stack in family.stacks(model.config) for block in stack.blocks)
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    # GLM's patterns name layer 46, which the smaller model leaves out and the larger one has
    extra = [name for name in checkpoint.names if not name.startswith(blocks)]
    return [name for name in extra if any(re.search(pattern, name) for pattern in patterns)]


def check_dense(family: Family, model: Any, checkpoint: Checkpoint) -> None:
    """Compare the tensors outside the experts with what a model needs; nothing is read.

    Raises
    ------
    CheckpointError
        A tensor is missing, or has another shape.
    """
    for _, fault in dense_faults(family, model, checkpoint):
        raise fault


def dense_faults(family: Family, model: Any, checkpoint: Checkpoint) -> Iterator[tuple[str, CheckpointError]]:
    """Return name and error of each tensor outside the experts that is missing or has another shape."""
    tied = family.tied(model.config)
    for name, target in model.state_dict().items():
        if EXPERTS in name or (name in tied and name not in checkpoint):
            continue
        try:
            if (found := checkpoint.shape(name)) != (expected := tuple(target.shape)):
                raise CheckpointError(
                    f"{name} has shape {found} in {checkpoint.directory}; config.json says {expected}."
                )
        except CheckpointError as error:
            yield name, error


class Placeholder(nn.Module):
    """Stands for an experts module while a model is built; holds nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__()


_building = threading.RLock()


@contextmanager
def experts_replaced(family: Family) -> Iterator[None]:
    """Let transformers build placeholders, in this thread, where experts modules would be slow to build.

    Not by transformers' register_patch_mapping, which stays in force when an exception passes through from_pretrained.
    One thread at a time is let in: while it builds a model, transformers replaces functions of torch and methods of its
    own for the whole process (tie_weights, torch.linspace, ..), and two threads that do so at once put back each
    other's replacements.
    """
    with _building:
        if family.experts_class is None:
            yield
            return
        module = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
        original, owner = getattr(module, family.experts_class), threading.get_ident()

        def build(config: Any) -> nn.Module:
            return Placeholder(config) if threading.get_ident() == owner else original(config)

        setattr(module, family.experts_class, build)
        try:
            yield
        finally:
            setattr(module, family.experts_class, original)


def auto_class(family: Family) -> Any:
    """Return the transformers class that loads and builds models of a family."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if family.seq2seq else AutoModelForCausalLM


def skeleton(family: Family, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build the model without any weights, on the meta device.

    Raises
    ------
    CheckpointError
        transformers cannot build it from this configuration.
    """
    from transformers.initialization import no_init_weights

    try:
        with experts_replaced(family), torch.device("meta"), no_init_weights():
            return auto_class(family).from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]
    except Exception as error:  # a configuration that is out of order fails anywhere in the model's own code
        text = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"config.json makes no {family.model_type} model ({text}). Fetch it again.") from error


@contextmanager
def capacity_lifted(model: nn.Module) -> Iterator[None]:
    """Let routers drop no token: calibration and evaluation must see each token's expert (notes of QMoE, section 3)."""
    limited: list[Any] = [m for m in model.modules() if hasattr(m, "expert_capacity")]
    before = [m.expert_capacity for m in limited]
    for module in limited:
        module.expert_capacity = UNLIMITED
    try:
        yield
    finally:
        for module, capacity in zip(limited, before, strict=True):
            module.expert_capacity = capacity


def read_config(directory: str) -> Any:
    """Read config.json through transformers.

    Raises
    ------
    CheckpointError
        transformers refuses it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers raises ValueError, OSError and its validators' own
        raise CheckpointError(f"{directory}/config.json is refused by transformers: {first_line(error)}.") from error
