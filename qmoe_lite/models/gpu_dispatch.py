"""A layer of experts by the CUDA twins: two launches for few tokens; else experts of many tokens are decoded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.coding.tokens import count_tokens
from qmoe_lite.models.architecture import Joint
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import inner

GPU_BYTES = 1 << 28  # of what one projection puts out on a GPU, so that memory does not grow with a prompt
_KERNEL_ACTIVATIONS = {  # classes of transformers and torch: what the GPU's kernel calls them
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}

Activation = Callable[[Tensor], Tensor] | Joint


def run_packets(
    layer: MoELayer,
    activation: Activation,
    packets: dict[str, Any],
    hidden_states: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Send each token through its experts, all of which a GPU holds as packets.

    Parameters
    ----------
    layer : MoELayer
        Whose experts these are.
    activation : callable
        The experts' own.
    packets : dict, projection to Packets or WindowPackets
        All experts' matrices.
    hidden_states : float tensor, shape (T, C)
        Tokens.
    index, weights : tensors, shape (T, K)
        Experts of each token, -1 for none, and what their outputs are multiplied by.

    Returns
    -------
    float32 tensor, shape (T, C)
    """
    parts = []
    for some in stretches(layer, index):
        call = begin_call(layer, activation, packets, hidden_states[some], index[some], weights[some])
        if call.few:
            call.gather()
        else:
            sizes = count_tokens(index[some], layer.count)[:-1].tolist()
            own = functools.partial(inner, activation)
            call.turn({expert: expert for expert, size in enumerate(sizes) if size}, sizes, own)
        parts.append(call.total())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def stretches(layer: MoELayer, index: Tensor) -> list[slice]:
    """Return the tokens that go through a layer on a GPU at a time: as many as `GPU_BYTES` suffice for."""
    widest = max(rows for rows, _ in layer.shapes.values())
    step = max(1, GPU_BYTES // (4 * widest * index.shape[1]))
    return [slice(start, start + step) for start in range(0, max(len(index), 1), step)]


def begin_call(
    layer: MoELayer, activation: Activation, packets: dict[str, Any], x: Tensor, index: Tensor, weights: Tensor
) -> Any:
    """Begin to send tokens through experts that a GPU holds as packets, a projection an entry."""
    from qmoe_lite.cuda.experts import ExpertsCall, share_x

    first, (last,) = layer.stages
    own = [packets[name] for name in first]
    kernel = _KERNEL_ACTIVATIONS.get(type(activation).__name__) if share_x(own) else None
    x = (x.float() if x.dtype == torch.float64 else x).contiguous()
    given = kernel or functools.partial(inner, activation)
    return ExpertsCall(own, packets[last], given, x, index, weights, layer.count)
