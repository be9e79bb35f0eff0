"""A loaded model made dense again: transformers' own experts in the place of the compressed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qmoe_lite.errors import SettingError
from qmoe_lite.models.building import empty_copy
from qmoe_lite.models.dense import can_be_grouped
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.models.placing import put_dense


@torch.no_grad()
def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Put dense experts into a model that from_pretrained loaded.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    dtype : torch dtype, optional
        Of the whole model; by default it keeps its own.

    Returns
    -------
    transformers.PreTrainedModel
        The same.

    Raises
    ------
    SettingError
        Its experts have a runner.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    if any(module.source is not None for module in packed.values()):
        raise SettingError(
            "the model's experts have a runner. Close it first: qmoe_lite.offload.runner_of(model).close()"
        )
    empty = empty_copy(model)
    if dtype is not None and dtype != model.dtype:
        model.to(dtype)
    for name, module in packed.items():
        dense = empty.get_submodule(name).to(model.dtype)
        dense.to_empty(device=module.get_buffer(f"{module.layer.projections[0]}_codes").device)
        _fill(dense, module)
        put_dense(model, name, dense.train(module.training), empty.get_submodule(name.rpartition(".")[0]))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.__dict__.pop("_is_quantized", None)
    if not can_be_grouped(model):
        model.set_experts_implementation("eager")
    return model.requires_grad_(True)


def _fill(dense: nn.Module, packed: PackedExperts) -> None:
    layer = packed.layer
    for expert in range(layer.count):
        for projection, (rows, _) in layer.shapes.items():
            if layer.layout is None:
                name = packed.family.weight_name(layer, expert, projection).removeprefix(f"{layer.experts}.")
                dense.get_parameter(name).copy_(packed.dense(expert, projection))
                continue
            tensor, part = layer.layout.place(projection, rows)
            own = dense.get_parameter(tensor)[expert]
            own = own.mT if layer.layout.transposed else own
            own[slice(None) if part is None else part] = packed.dense(expert, projection).to(own.dtype)
    if layer.layout is not None and layer.layout.biased:
        for name in (f"{layer.layout.first}_bias", "down_proj_bias"):
            dense.get_parameter(name).copy_(packed.get_buffer(name))
