"""Part "choice" of `bench/gpu.py`: what the product chose by a model of the time, beside what it might have chosen."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.bench._parts import gpu as parts
from qmoe_lite.bench._show.text import print_rows, print_text
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.cuda import gather, matmul, variants

LANES = (2, 4, 8, 16, 32)
TOKENS = (8, 16, 32, 64, 128)


def measure_choice(quick: bool, end: float) -> Iterator[parts.Row]:
    """Microseconds of the product in a graph: one token by lanes a row; some tokens gathered, and by decoded tiles."""
    for rows, columns in parts.QUICK_SHAPES:
        if time.monotonic() > end - 10:
            yield {"skipped": f"{rows} x {columns}"}
            continue
        packed, dense = parts._matrix(rows, columns)
        copies, shape = parts._copies(packed.nbytes, packed, parts._clone), {"rows": rows, "columns": columns}
        yield shape | {"chosen": _chosen_lanes(packed), "by_lanes": _time_lanes(copies, dense)}
        for tokens in TOKENS[::2] if quick else TOKENS:
            times = _time_tokens(copies, dense, tokens)
            yield shape | {"tokens": tokens, "gathers": tokens <= matmul.GATHERED_TOKENS} | times


def _chosen_lanes(packed: PackedMatrix) -> int:
    found: list[int] = []

    def noted(*given: Any) -> int:
        found.append(choose(*given))
        return found[0]

    choose: Callable[..., int] = variants.choose_lanes
    with _forced(gather, "choose_lanes", noted):
        matmul.decode_matmul(packed, _draw(1, packed.columns))
    return found[0]


def _time_lanes(copies: list[PackedMatrix], dense: Tensor) -> dict[str, float]:
    x = _draw(1, dense.shape[1])
    found = {}
    for lanes in LANES:
        with _forced(gather, "choose_lanes", functools.partial(_always, lanes)):
            found[str(lanes)] = _time(copies, dense, x)
    return found


def _time_tokens(copies: list[PackedMatrix], dense: Tensor, tokens: int) -> parts.Row:
    x = _draw(tokens, dense.shape[1])
    found = {}
    for name, most in (("gathered_us", tokens), ("tiles_us", 0)):
        with _forced(matmul, "GATHERED_TOKENS", most):
            found[name] = _time(copies, dense, x)
    return found


def _time(copies: list[PackedMatrix], dense: Tensor, x: Tensor) -> float:
    parts._compare(matmul.decode_matmul(copies[0], x), dense, x)
    calls = [functools.partial(matmul.decode_matmul, packed, x) for packed in copies]
    for call in calls:
        call()  # what is made at a matrix's first product, a graph cannot hold
    return parts._graph_us(calls)


@contextmanager
def _forced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Set another value in a module inside the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _always(value: int, *_: Any) -> int:
    return value


def _draw(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, device=parts._DEVICE).bfloat16()


def show_choice(rows: list[parts.Row]) -> None:
    """Print both tables, and from how many tokens on tiles are faster."""
    lanes = [row for row in rows if "by_lanes" in row]
    cells = []
    for r, name in parts._named(lanes):
        times = r["by_lanes"].values()
        chosen = r["by_lanes"][str(r["chosen"])]
        cells.append([name, *(f"{each:.1f}" for each in times), str(r["chosen"]), f"{chosen / min(times):.2f}x"])
    titles = ("rows x\ncolumns", *(f"{each}\nlanes" for each in LANES), "chosen", "its time\nto best")
    print_rows("us of one token's product in a graph, by lanes a row", titles, cells, text=1)
    some = [row for row in rows if "tokens" in row]
    cells = [
        [
            name,
            str(r["tokens"]),
            f"{r['gathered_us']:.1f}",
            f"{r['tiles_us']:.1f}",
            "gather" if r["gathers"] else "tiles",
        ]
        for r, name in parts._named(some)
    ]
    print_rows(
        "us of a product in a graph", ("rows x\ncolumns", "tokens", "gathered", "tiles", "chosen"), cells, text=1
    )
    for rows_, columns in dict.fromkeys((r["rows"], r["columns"]) for r in some):
        own = [r for r in some if (r["rows"], r["columns"]) == (rows_, columns)]
        faster = [r["tokens"] for r in own if r["tiles_us"] < r["gathered_us"]]
        found = f"from {min(faster)} tokens on" if faster else f"for none of up to {own[-1]['tokens']} tokens"
        print_text(f"{rows_} x {columns}: tiles are faster {found}; chosen above {matmul.GATHERED_TOKENS}.")
    print_text("")


PART = parts.Part(measure_choice, show_choice, 15)
