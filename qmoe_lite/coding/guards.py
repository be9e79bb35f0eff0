"""What the CPU's kernels cannot do, refused before they begin: run in a forked process, or be recorded by torch."""

from __future__ import annotations

import os
import sys
from typing import Any

import numba
import torch
from torch.autograd import forward_ad

from qmoe_lite.errors import QMoEError, SettingError

EXPORTED = "torch.export cannot hold the experts' kernels. Save the model, or use torch.compile."
_forked = False  # from a process that has OpenMP's threads
_started = False


def _note_fork() -> None:
    global _forked
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    if parallel is not None and parallel._is_initialized:
        _forked = sys.modules["numba"].threading_layer() == "omp"  # the others survive a fork


os.register_at_fork(after_in_child=_note_fork)


def enter_kernels() -> None:
    """Start Numba's threads before a process's first kernel, and leave torch its own number of them.

    Starting them sets OpenMP's number of threads, which torch goes by from then on: its sums would come out otherwise
    before a process's first kernel than after it.

    Raises
    ------
    QMoEError
        This process was forked from one that ran kernels: OpenMP would end it.
    """
    global _started
    if not _started:
        threads = torch.get_num_threads()
        numba.get_num_threads()
        torch.set_num_threads(threads)
        _started = True
    if _forked:
        raise QMoEError(
            "this process was forked from one that had run kernels, which OpenMP forbids. Start processes by spawn: "
            "multiprocessing.get_context('spawn'), or DataLoader(.., multiprocessing_context='spawn')."
        )


def check_recording(x: Any) -> None:
    """Raise SettingError where torch records what is done with x, and would silently record something else."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise SettingError("torch.jit.trace cannot record the experts' kernels. Run the model eagerly or compile it.")
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            raise SettingError(EXPORTED)
        torch._dynamo.graph_break("Numba's kernels are not traced: leave fullgraph out, or compile a model's modules.")
    if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise SettingError("forward-mode derivatives do not pass through the experts' kernels. Use backward().")
