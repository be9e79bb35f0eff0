"""A layer of experts as one of torch's operations, which torch.compile calls and does not look into.

An operation takes tensors and numbers, so that a module is named by the number it has in this process.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qmoe_lite.coding.guards import EXPORTED
from qmoe_lite.devices import uncompiled
from qmoe_lite.errors import SettingError

_MODULES: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(module: Any) -> int:
    """Return a new number, under which the operation finds a module with the method `run_layer`."""
    number = next(_numbers)
    _MODULES[number] = module
    return number


def call_experts(hidden_states: Tensor, routing: tuple[Tensor, ...], number: int) -> Tensor:
    """Send tokens through the experts of that number, as the module's `run_layer` does, while torch records.

    What learns goes around the recording, in a graph of its own: autograd does not work inside an operation.

    Raises
    ------
    SettingError
        torch.export records: what it makes is run where there is no such module.
    """
    if torch.compiler.is_exporting():
        raise SettingError(EXPORTED)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (hidden_states, *routing)):
        return _run_apart(hidden_states, routing, number)
    return _run(hidden_states, list(routing), number)  # type: ignore[no-any-return]


@uncompiled
def _run_apart(hidden_states: Tensor, routing: tuple[Tensor, ...], number: int) -> Tensor:
    return _MODULES[number].run_layer(hidden_states, *routing)  # type: ignore[no-any-return]


@torch.library.custom_op("qmoe_lite::run_experts", mutates_args=())
def _run(hidden_states: Tensor, routing: list[Tensor], number: int) -> Tensor:
    return _MODULES[number].run_layer(hidden_states, *routing)  # type: ignore[no-any-return]


@_run.register_fake
def _(hidden_states: Tensor, routing: list[Tensor], number: int) -> Tensor:
    return torch.empty_like(hidden_states)
