"""What checkpoints must hold for the models that transformers builds."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.config_file import check_named
from qmoe_lite.checkpoint.reader import Checkpoint, of_experts
from qmoe_lite.checkpoint.sources import method_of
from qmoe_lite.errors import CheckpointError, FormatError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import auto_class, class_of_saved, experts_replaced, read_config, skeleton
from qmoe_lite.models.family import Family, family_of

UNLIMITED = 1 << 30  # tokens; an expert capacity that nothing reaches


def open_checkpoint(directory: Path, auto: bool = False, variant: str | None = None) -> tuple[Family, Checkpoint]:
    """Open a model directory; its tensors are known by the model's own names.

    `auto` is that of `family_of`; what is compressed was tried before. `variant` is that of `Checkpoint`.

    Raises
    ------
    CheckpointError, UnsupportedFamilyError
        No model, damaged, or of a family that is not supported.
    FormatError
        Its quantization_config is no object.
    """
    check_named(directory)
    checkpoint = Checkpoint(directory, variant=variant)
    if not isinstance(checkpoint.config.get("quantization_config") or {}, dict):
        raise FormatError(f"{directory}/config.json has a damaged quantization_config. Fetch it again.")
    auto = auto or method_of(checkpoint.config) == "qmoe"
    family = family_of(checkpoint.config.get("model_type"), auto)
    checkpoint.know_as(family.views(read_config(str(directory)), checkpoint))
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
    held = [name for name in checkpoint.names if of_experts(name)]
    extra = sorted(set(held) - set(promised))
    if extra and (lost := next((name for name in promised if name not in checkpoint), None)):
        text = (
            f"{checkpoint.directory} holds {checkpoint.stored_name(extra[0])} and not {lost}: its layout is unknown. "
        )
        more = "Load it in transformers and save it by save_pretrained(.., save_original_format=False)."
        raise CheckpointError(text + more)
    for name, shape in promised.items():
        if (found := checkpoint.shape(name)) != shape:
            raise CheckpointError(f"{name} has shape {found}; config.json says {shape}.")
    if extra:
        raise CheckpointError(f"the checkpoint has {extra[0]}, which config.json does not account for.")
    return layers


def check_whole(family: Family, config: Any, checkpoint: Checkpoint) -> None:
    """Compare all that a model needs with what the checkpoint holds, as `compress` does; only headers are read.

    Parameters
    ----------
    family, checkpoint
        What `open_checkpoint` returned. Tensors that transformers leaves out are forgotten.
    config : transformers configuration
        Of the model.

    Raises
    ------
    CheckpointError
        A damaged shard; a tensor is missing, has another shape, or is not accounted for.
    """
    for file_name in checkpoint.files:
        checkpoint.stored_in(file_name)
    model = skeleton(family, config, torch.float32)
    checkpoint.forget(unused(family, model, checkpoint))
    if family.layers(config):
        check_promise(family, config, checkpoint)
    check_dense(family, model, checkpoint)


def unused(family: Family, model: Any, checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that transformers leaves out on purpose, such as DeepSeek's layer for several tokens."""
    blocks = tuple(f"{block}." for stack in family.stacks(model.config) for block in stack.blocks)
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    # GLM's patterns name layer 46, which the smaller model leaves out and the larger one has
    extra = [name for name in checkpoint.names if not name.startswith(blocks)]
    return [name for name in extra if any(re.search(pattern, name) for pattern in patterns)]


def check_dense(family: Family, model: Any, checkpoint: Checkpoint, new: Container[str] = ()) -> None:
    """Compare the tensors outside the experts with what a model needs, but for new ones; nothing is read.

    Raises
    ------
    CheckpointError
        A tensor is missing, or has another shape.
    """
    for name, fault in dense_faults(family, model.config, model.state_dict(), checkpoint):
        if name not in new:
            raise fault


def dense_faults(
    family: Family, config: Any, needed: Mapping[str, Tensor], checkpoint: Checkpoint
) -> Iterator[tuple[str, CheckpointError]]:
    """Return name and error of each needed tensor outside the experts that is missing or has another shape."""
    tied = family.tied(config)
    for name, target in needed.items():
        if of_experts(name) or (name in tied and name not in checkpoint):
            continue
        try:
            if (found := checkpoint.shape(name)) != (expected := tuple(target.shape)):
                raise CheckpointError(
                    f"{name} has shape {found} in {checkpoint.directory}; config.json says {expected}."
                )
        except CheckpointError as error:
            yield name, error


def state_of_saved(family: Family, config: Any) -> dict[str, Tensor]:
    """Return what a compressed directory must hold, by the names of the model that writes text, on the meta device."""
    model: Any = skeleton(family, config, torch.float32)
    wanted, saved = auto_class(family, config), class_of_saved(family, config)
    if saved is wanted:
        return model.state_dict()  # type: ignore[no-any-return]
    with experts_replaced(family), torch.device("meta"):
        other = saved.from_config(config, dtype=torch.float32)
    prefix = (
        f"{model.base_model_prefix}." if other.base_model is other and hasattr(model, model.base_model_prefix) else ""
    )
    return {f"{prefix}{name}": tensor for name, tensor in other.state_dict().items()}


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
