"""Sizes of memory, read and written as people do, and budgets of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qmoe_lite.errors import SettingError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(size: int | str, name: str = "size") -> int:
    """Turn 4294967296, "4GiB" or "4.3 GB" into bytes.

    Raises
    ------
    SettingError
        It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size).upper())
    if not found or found[2] not in _UNITS or isinstance(size, bool):
        raise SettingError(f"{name} is {size!r}; expected bytes or a size such as 4GiB or 500MB.")
    return int(float(found[1]) * _UNITS[found[2]])


def show_size(size: float) -> str:
    """Write bytes for people, in units of 10^6 or 10^9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def plan_memory(
    expert_cache: int | str | Sequence[int | str] | None, ram_cache: int | str | None, offload: str | None, gpus: int
) -> tuple[int | None, list[int | None]]:
    """Turn the budgets that `attach` takes into bytes.

    Returns
    -------
    memory : int or None
        For experts in memory; None for as many as all experts take.
    budgets : list of int or None
        The same for each GPU.

    Raises
    ------
    SettingError
        They are no sizes, not as many as there are GPUs, or exclude each other; or `offload` is neither.
    """
    if offload not in (None, "ram", "disk"):
        raise SettingError(f"offload is {offload!r}; expected 'ram' or 'disk'.")
    sizes = [] if expert_cache is None else [expert_cache] if isinstance(expert_cache, int | str) else [*expert_cache]
    budgets: list[int | None] = [parse_size(size, "expert_cache") for size in sizes]
    memory = None if ram_cache is None else parse_size(ram_cache, "ram_cache")
    if len(sizes) not in (0, 1, max(gpus, 1)):
        raise SettingError(f"expert_cache has {len(sizes)} sizes for {max(gpus, 1)} devices. Give one for each.")
    if not gpus:
        if memory is not None and budgets and budgets[0] != memory:
            raise SettingError("expert_cache and ram_cache are the same memory on the CPU. Give one of them.")
        memory = memory if memory is not None or not budgets else budgets[0]
    elif len(budgets) < gpus:
        budgets = (budgets or [None]) * gpus
    if offload == "ram" and memory is not None:
        raise SettingError("offload='ram' holds all experts in memory, a budget only some. Give one of them.")
    if offload == "disk" and memory is None:
        budget = "ram_cache" if gpus else "ram_cache or expert_cache"
        raise SettingError(f"offload='disk' needs a budget of memory, or nothing is limited. Set {budget} too.")
    return memory, budgets
