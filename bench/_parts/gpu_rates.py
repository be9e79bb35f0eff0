"""Part "rates" of `bench/gpu.py`: products from codes at a rate, by a dictionary of strings, against cuBLAS's."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import numpy as np
import torch

from qmoe_lite.bench._parts import gpu as parts
from qmoe_lite.bench._show.text import print_rows
from qmoe_lite.bench.rate_matmul import packed_at
from qmoe_lite.cuda import matmul, windows, windows_product
from qmoe_lite.cuda.window_packets import matrix_packets
from qmoe_lite.errors import QMoEError

RATES = (2.0, 1.3, 3.0)
TOKENS = (1, 4, 16, 64)


def measure_rates(quick: bool, end: float) -> Iterator[parts.Row]:
    """Microseconds of our product and of cuBLAS's, at some rates; decoding, and both ways of multiplying 16 tokens."""
    for rows, columns in parts.QUICK_SHAPES:
        for rate in RATES[:1] if quick else RATES:
            if time.monotonic() > end - 15:
                yield {"skipped": f"{rows} x {columns} at {rate} bits"}
            else:
                yield from _measure_one(rows, columns, rate, quick, end)


def _measure_one(rows: int, columns: int, rate: float, quick: bool, end: float) -> Iterator[parts.Row]:
    on_cpu = packed_at(rate, rows, columns, np.random.default_rng(rows))
    packed, dense = on_cpu.to(parts._DEVICE), on_cpu.dense().to(parts._DEVICE)
    shape = {"rows": rows, "columns": columns, "bits": on_cpu.bits_per_weight}
    if not torch.equal(windows.decode_weights(matrix_packets(packed)), dense):
        raise QMoEError(f"decoding {rows} x {columns} at {rate} bits is not the CPU's; please report this as a bug.")
    copies = parts._copies(packed.nbytes, packed, parts._clone)
    peers = parts._copies(2 * dense.numel(), dense.bfloat16(), torch.clone)
    refused: list[str] = []
    for tokens in TOKENS[::2] if quick else TOKENS:
        if time.monotonic() > end - 4:
            yield {"skipped": f"{rows} x {columns} at {rate} bits, {tokens} tokens"}
        else:
            yield shape | {"tokens": tokens} | parts._time_product(copies, peers, dense, tokens, refused)
    decode = [functools.partial(windows.decode_weights, matrix_packets(each), 0, torch.bfloat16) for each in copies]
    x = torch.randn(windows_product.PRODUCT_TOKENS, columns, device=parts._DEVICE).bfloat16()
    tiles = [functools.partial(windows_product.tile_product, matrix_packets(each), 0, x) for each in copies]
    direct = [functools.partial(matmul.decode_matmul, each, x) for each in copies]
    for call in (*tiles, *direct):
        call()  # a graph cannot hold what a matrix's first product makes
    times = {"tiles_us": parts._graph_us(tiles), "direct_us": parts._graph_us(direct)}
    yield shape | {"decoded": rows * columns / 1e3 / parts._event_us(decode), "choice_tokens": len(x)} | times


def show_rates(rows: list[parts.Row]) -> None:
    """Print microseconds by rate, then decoding and the two ways of multiplying."""
    cells = []
    for r in (row for row in rows if "tokens" in row):
        figures = []
        for way in ("us", "graph_us"):
            pair = r[f"ours_{way}"], r[f"cublas_{way}"]
            figures += [*("-" if value is None else f"{value:.1f}" for value in pair), parts._times(*pair)]
        cells.append([f"{r['rows']} x {r['columns']}", f"{r['bits']:.2f}", str(r["tokens"]), *figures])
    titles = ("as called\nours", "\ncuBLAS", "\nratio", "in a graph\nours", "\ncuBLAS", "\nratio")
    title = "us of a product at a rate, x bfloat16; cuBLAS's weights bfloat16"
    print_rows(title, ("rows x\ncolumns", "bits", "tokens", *titles), cells, text=1)
    both = [
        [
            f"{r['rows']} x {r['columns']}",
            f"{r['bits']:.2f}",
            f"{r['decoded']:.0f}",
            str(r["choice_tokens"]),
            f"{r['direct_us']:.1f}",
            f"{r['tiles_us']:.1f}",
        ]
        for r in rows
        if "decoded" in r
    ]
    columns = ("rows x\ncolumns", "bits", "10^9 weights\na second", "tokens", "product\nus", "by tiles\nus")
    print_rows("Decoding to bfloat16, and a product both ways", columns, both, text=1)


PART = parts.Part(measure_rates, show_rates, 55)
