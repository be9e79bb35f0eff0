"""What holds while a model writes: one text at a time, our settings only, no NaN, and ways to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from qmoe_lite.errors import NotFiniteError

_turns: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


def alone(model: Any) -> threading.RLock:
    """A model writes one text at a time: settings and hooks that lie on it meanwhile are that text's."""
    with _turns_lock:
        return _turns.setdefault(model, threading.RLock())


class Stopped(Exception):
    """Leaves a model: between two forward passes, where a cache is whole (`stopping`), or inside one (`leaving`)."""


@contextmanager
def stopping(model: Any, stop: Callable[[], bool] | None) -> Iterator[None]:
    """Ask before each forward pass whether to stop there, by raising `Stopped`."""
    if stop is None:
        yield
        return

    def ask(*_: Any) -> None:
        if stop():
            raise Stopped

    handle = model.register_forward_pre_hook(ask)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def leaving(model: Any, leave: Callable[[], bool]) -> Iterator[None]:
    """Ask before each block of the model whether to leave the pass there, by raising `Stopped`; its cache is lost."""

    def ask(*_: Any) -> None:
        if leave():
            raise Stopped

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    handles = [block.register_forward_pre_hook(ask) for blocks in lists for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def only(model: Any, settings: Any) -> Iterator[None]:
    """Hide the model's own generation_config, from which transformers fills what is left open."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def refuse_nan(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Pass scores on; raise NotFiniteError for NaN."""
    if torch.isnan(scores).any():  # argmax would call it the likeliest token
        raise NotFiniteError("the model outputs NaN: its weights or activations contain it. Fetch the model again.")
    return scores
