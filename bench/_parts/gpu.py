"""What `bench/gpu.py` measures on a GPU, part by part, and the tables that it prints.

Times are medians between CUDA events, weights rotated through more copies than the L2 cache holds; "in a graph" is the
time in a replayed CUDA graph, without the host's. Everything is compared with a plain computation before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qmoe_lite.bench import gptq as plain
from qmoe_lite.bench._show.text import print_rows, print_text
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode as cpu_encode
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.cuda import codec, launch, matmul, solver
from qmoe_lite.errors import QMoEError
from qmoe_lite.quantization.grid import MinMaxTernary
from qmoe_lite.quantization.hessian import factorise
from qmoe_lite.quantization.solver import gptq

SHAPES = (  # rows x columns
    *((768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2080, 6144), (6144, 2080)),  # the paper's kernel's
    *((14336, 4096), (4096, 14336)),  # Mixtral 8x7B
    *((768, 2048), (2048, 768)),  # Qwen3-30B-A3B
)
QUICK_SHAPES = ((14336, 4096), (768, 2048))
TOKENS = (1, 4, 16, 64, 256)
ZEROS = 0.885
LEVELS = (-0.5, 0.375)
COPY_BYTES = 1 << 30
_DEVICE = "cuda"
_event: Any = torch.cuda.Event  # it has no types
_FEWEST, _MOST, _SECONDS = 5, 50, 0.15  # rounds of a measurement, and what they may take
_MOST_COPIES = 1024
_TOLERANCE = 0.02  # bfloat16 results: largest error over the largest result

Row = dict[str, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """One question: how it is measured, a row at a time, until a monotonic time; how shown; the seconds it may take."""

    measure: Callable[[bool, float], Iterator[Row]]
    show: Callable[[list[Row]], None]
    seconds: float


def measure_launch(quick: bool, end: float) -> Iterator[Row]:
    """Host time of a call, in microseconds, beside that of torch's smallest operation; and a copy's speed."""
    arrays = [torch.zeros(4, device=_DEVICE) for _ in range(6)]
    packed, _ = _matrix(64, 128)
    x = torch.randn(1, 128, device=_DEVICE).bfloat16()
    weight = torch.randn(64, 128, device=_DEVICE).bfloat16()
    calls: dict[str, Call] = {
        "empty kernel, 1 array, 1 number": lambda: _one_array_kernel.launch(1, 32, arrays[0], 1),
        "empty kernel, 6 arrays, 6 numbers": lambda: _six_arrays_kernel.launch(1, 32, *arrays, 1, 2, 3, 4, 5, 6),
        "torch: x.add_(1)": lambda: arrays[0].add_(1),
        "decode_matmul, 64 x 128, 1 token": lambda: matmul.decode_matmul(packed, x),
        "torch: linear, bf16, 64 x 128, 1 token": lambda: linear(x, weight),
    }
    for name, call in calls.items():
        yield {"call": name, "host_us": _host_us(call)}
    again = launch.Kernel(_one_array_kernel.py_func, _one_array_kernel.signatures)
    start = time.perf_counter()
    again.launch(1, 32, arrays[0], 1)
    yield {"call": "a kernel's first launch, compiled before", "host_us": (time.perf_counter() - start) * 1e6}
    source = torch.full((COPY_BYTES,), 165, dtype=torch.uint8, device=_DEVICE)
    target = torch.empty_like(source)
    seconds = _event_us([lambda: target.copy_(source)]) / 1e6
    yield {"call": "copy of memory", "gigabytes": 2 * COPY_BYTES / 1e9 / seconds}


def measure_matmul(quick: bool, end: float) -> Iterator[Row]:
    """Our product against torch's (cuBLAS) bfloat16 one, as called and in a graph, in microseconds."""
    captured: list[str] = []
    for rows, columns in QUICK_SHAPES if quick else SHAPES:
        if time.monotonic() > end - 8:
            yield {"skipped": f"{rows} x {columns}"}
            continue
        packed, dense = _matrix(rows, columns)
        copies, peers = (
            _copies(packed.nbytes, packed, _clone),
            _copies(2 * dense.numel(), dense.bfloat16(), torch.clone),
        )
        for tokens in TOKENS[::2] if quick else TOKENS:
            if time.monotonic() > end - 4:
                yield {"skipped": f"{rows} x {columns}, {tokens} tokens"}
            else:
                row = {"rows": rows, "columns": columns, "tokens": tokens, "bits": packed.bits_per_weight}
                yield row | _time_product(copies, peers, dense, tokens, captured)


def _time_product(
    copies: list[PackedMatrix], peers: list[Tensor], dense: Tensor, tokens: int, refused: list[str]
) -> Row:
    """Time the product of some tokens; `refused` remembers that ours is not to be captured in a graph."""
    x = torch.randn(tokens, dense.shape[1], device=_DEVICE).bfloat16()
    row: Row = {"error": _compare(matmul.decode_matmul(copies[0], x), dense, x)}
    ours: list[Call] = [lambda p=p: matmul.decode_matmul(p, x) for p in copies]  # type: ignore[misc]
    ways: list[list[Call]] = [[lambda w=w: linear(x, w) for w in peers]]  # type: ignore[misc]
    if tokens == 1:  # cuBLAS has another routine for a vector
        ways.append([lambda w=w: torch.mv(w, x[0]) for w in peers])  # type: ignore[misc]
    row |= {"ours_us": _event_us(ours), "cublas_us": min(map(_event_us, ways))}
    row |= {"ours_graph_us": None, "cublas_graph_us": min(map(_graph_us, ways))}
    if not refused:
        try:
            row["ours_graph_us"] = _graph_us(ours)
        except Exception as error:
            refused.append(one_line(error))
            row["note"] = f"decode_matmul cannot be captured in a graph: {refused[0]}"
    return row


def measure_solver(quick: bool, end: float) -> Iterator[Row]:
    """Milliseconds of a group of experts: our solver, the plain loop, and that loop over all experts at once."""
    experts = 4 if quick else plain.EXPERTS
    gptq(torch.ones(2, 3, device=_DEVICE), torch.eye(3, device=_DEVICE), MinMaxTernary())  # compiles
    for rows, columns in plain.SHAPES:
        if time.monotonic() > end - 20:
            yield {"skipped": f"{rows} x {columns}"}
        else:
            yield _time_solvers(experts, rows, columns)


def _time_solvers(experts: int, rows: int, columns: int) -> Row:
    grid, generator = MinMaxTernary(), torch.Generator().manual_seed(0)
    weight, hessian = (part.to(_DEVICE) for part in plain._draw(experts, rows, columns, generator))
    levels = grid.fit(weight)
    factor = torch.stack([plain.inverse_factor(matrix) for matrix in hessian])
    batched = batched_loop(weight, factor, levels)
    same = (gptq(weight, hessian, grid, dampening=plain.DAMPENING).weight == batched).float().mean().item()
    single = plain.column_loop(weight[0], factor[0], levels[0])[0]
    table, width = grid.rounding(levels), min(columns, plain.BLOCK)
    first = weight[..., :width].mT.contiguous().mT, factor[:, :width, :width], table  # as the solver lays it out
    for name, share in (("ours", same), ("one by one", (single == batched[0]).float().mean().item())):
        if not share >= plain.SAME:
            message = f"{name}: {share:.2%} of the digits of {rows} x {columns} are the torch loop's; "
            raise QMoEError(message + f"expected {plain.SAME:.1%}. Please report this as a bug.")
    return {
        "rows": rows,
        "columns": columns,
        "experts": experts,
        "same": same,
        "block_us": _event_us([lambda: solver.solve_block(*first)]),
        "ours_ms": _call_ms(lambda: gptq(weight, hessian, grid, dampening=plain.DAMPENING)),
        "ours_factorisation_ms": _call_ms(lambda: factorise(hessian, plain.DAMPENING)),
        "torch_factorisation_ms": _call_ms(lambda: [plain.inverse_factor(matrix) for matrix in hessian]),
        "batched_loop_ms": _call_ms(lambda: batched_loop(weight, factor, levels)),
        "loop_ms": experts * _call_ms(lambda: plain.column_loop(weight[0], factor[0], levels[0])),
    }


def batched_loop(weight: Tensor, factor: Tensor, levels: Tensor) -> Tensor:
    """Round experts (E, R, C) as `bench.gptq.column_loop` does one, a column of all of them at a time."""
    low, high = levels[..., 0], levels[..., 1]
    rest, columns = weight.clone(), weight.shape[-1]
    rounded = torch.zeros_like(weight)
    for start in range(0, columns, plain.BLOCK):
        end = min(start + plain.BLOCK, columns)
        block, upper = rest[..., start:end].clone(), factor[:, start:end, start:end]
        errors = torch.zeros_like(block)
        for column in range(end - start):
            w = block[..., column]
            q = (w > high / 2) * high + (w < low / 2) * low
            error = (w - q) / upper[:, column, column, None]
            block[..., column:] -= error[..., None] * upper[:, column, None, column:]
            errors[..., column] = error
            rounded[..., start + column] = q
        rest[..., end:].baddbmm_(errors, factor[:, start:end, end:], alpha=-1)
    return rounded


def measure_coder(quick: bool, end: float) -> Iterator[Row]:
    """Encoder and decoder in 10^9 weights a second, after a look that the bytes are the CPU's."""
    for rows, columns in QUICK_SHAPES:
        if time.monotonic() > end - 8:
            yield {"skipped": f"{rows} x {columns}"}
        else:
            yield _time_coder(rows, columns)


def _time_coder(rows: int, columns: int) -> Row:
    packed, dense = _matrix(rows, columns)
    digits, levels, book = torch.sign(dense).to(torch.int8), packed.levels, packed.codebook
    again = codec.encode(digits, levels, book)
    right = {
        "encode": torch.equal(again.codes, packed.codes) and torch.equal(again.row_codewords, packed.row_codewords),
        "decode": torch.equal(codec.decode(packed)[0], digits),
        "decode_dense": torch.equal(codec.decode_dense(packed), dense),
    }
    if wrong := [name for name, equal in right.items() if not equal]:
        raise QMoEError(f"{wrong[0]} of {rows} x {columns} is not the CPU's; please report this as a bug.")
    copies = _copies(packed.nbytes, packed, _clone)
    calls: dict[str, list[Call]] = {
        "encode": [lambda: codec.encode(digits, levels, book)],
        "decode": [lambda p=p: codec.decode(p) for p in copies],  # type: ignore[misc]
        "dense_bfloat16": [lambda p=p: codec.decode_dense(p, torch.bfloat16) for p in copies],  # type: ignore[misc]
        "dense_float32": [lambda p=p: codec.decode_dense(p) for p in copies],  # type: ignore[misc]
    }
    speeds = {name: rows * columns / 1e3 / _event_us(some) for name, some in calls.items()}
    return {"rows": rows, "columns": columns, "bits": packed.bits_per_weight, **speeds}


@launch.kernel("float32*, int32")
def _one_array_kernel(a: Any, n: int) -> None:
    if n < 0:
        a[0] = a[1]


@launch.kernel("float32*, float32*, float32*, float32*, float32*, float32*, int32, int32, int32, int32, int32, int32")
def _six_arrays_kernel(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, i: int, j: int, k: int, m: int, n: int, o: int
) -> None:
    if i < 0:
        a[0] = b[0]


def _matrix(rows: int, columns: int) -> tuple[PackedMatrix, Tensor]:
    """Return a random matrix, encoded on the CPU, and the same dense, float32; both on the GPU."""
    draws = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows))
    half = (1 - ZEROS) / 2
    digits = (draws > 1 - half).to(torch.int8) - (draws < half).to(torch.int8)
    book = Codebook.fit([int((digits == digit).sum()) for digit in (-1, 0, 1)])
    packed = cpu_encode(digits, torch.tensor([LEVELS] * rows, dtype=torch.bfloat16), book).to(_DEVICE)
    on_gpu = digits.to(_DEVICE)
    return packed, (on_gpu < 0) * LEVELS[0] + (on_gpu > 0) * LEVELS[1]


def _clone(packed: PackedMatrix) -> PackedMatrix:
    parts = {name: getattr(packed, name).clone() for name in ("codes", "row_codewords", "levels")}
    return replace(packed, **parts)


def _copies(nbytes: int, first: Any, clone: Callable[[Any], Any]) -> list[Any]:
    """Return so many copies of a matrix that taking them in turn finds none in the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
    return [first, *(clone(first) for _ in range(min(2 * cache // nbytes, _MOST_COPIES - 1)))]


def _compare(y: Tensor, dense: Tensor, x: Tensor, name: str = "decode_matmul") -> float:
    """Return the largest error over the largest result; raise QMoEError where it is no rounding error."""
    expected = x.double() @ dense.double().T
    error = float((y.double() - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE:
        message = f"{name} of {tuple(dense.shape)} and {len(x)} tokens differs by {error:.1e}"
        raise QMoEError(message + "; please report this as a bug.")
    return error


def _event_us(calls: Sequence[Call]) -> float:
    """Median microseconds of a call, the host's part included: all calls in turn between two events, in rounds."""
    calls = list(calls) * max(1, 20 // len(calls))

    def run() -> None:
        for call in calls:
            call()

    return 1e3 * _call_ms(run, _FEWEST) / len(calls)


def _graph_us(calls: Sequence[Call]) -> float:
    """Median microseconds of a call in a replayed CUDA graph of all calls; they must have run before."""
    calls = list(calls) * max(1, 20 // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return 1e3 * _call_ms(graph.replay, _FEWEST) / len(calls)


def _call_ms(call: Call, fewest: int = 3) -> float:
    """Median milliseconds between the events around a call, after a first one; as many rounds as fit, few at least."""
    call()
    found: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while len(found) < fewest or (len(found) < _MOST and time.perf_counter() < stop):
        start, end = (_event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def _host_us(call: Call, calls: int = 200, rounds: int = 15) -> float:
    """Median microseconds that a call keeps the host: fewer calls in a round than the driver queues."""
    found = []
    for _ in range(rounds + 1):  # the first one compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found[1:])


def one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {' '.join((str(error).strip() or 'no message').splitlines()[0].split())}"


def _times(ours: float | None, peer: float | None) -> str:
    return "-" if not ours or not peer else f"{peer / ours:.2f}x"


def _named(rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
    """Yield each row with its shape, once for rows that follow each other."""
    shown = ""
    for row in rows:
        name = f"{row['rows']} x {row['columns']}"
        yield row, name if name != shown else ""
        shown = name


def show_launch(rows: list[Row]) -> None:
    """Print host microseconds a call, and the copy's speed."""
    cells = ([r["call"], f"{r['host_us']:.1f}"] for r in rows if "host_us" in r)
    print_rows("Host time of a call, us", ("call", "us"), cells, text=1)
    for row in rows:
        if "gigabytes" in row:
            print_text(f"Copying memory: {row['gigabytes']:,.0f} GB/s read and written.\n")


def show_matmul(rows: list[Row]) -> None:
    """Print microseconds of our product and cuBLAS's."""
    cells = []
    for r, name in _named(rows):
        figures = []
        for way in ("us", "graph_us"):
            pair = r[f"ours_{way}"], r[f"cublas_{way}"]
            figures += [*("-" if value is None else f"{value:.1f}" for value in pair), _times(*pair)]
        cells.append([name, str(r["tokens"]), *figures])
    titles = ("as called\nours", "\ncuBLAS", "\nratio", "in a graph\nours", "\ncuBLAS", "\nratio")
    title = f"us of a product, x bfloat16; ours {rows[0]['bits']:.2f} bits a weight, cuBLAS's bfloat16"
    print_rows(title, ("rows x\ncolumns", "tokens", *titles), cells, text=1)
    for row in rows:
        if "note" in row:
            print_text(f"{row['note']}\n")


def show_solver(rows: list[Row]) -> None:
    """Print milliseconds of the solvers, in their parts."""
    cells = []
    for r in rows:
        ours, of = r["ours_ms"], r["ours_factorisation_ms"]
        parts = {
            "factorisation": [of, r["torch_factorisation_ms"], r["torch_factorisation_ms"]],
            "columns": [ours - of, r["batched_loop_ms"], r["loop_ms"]],
        }
        parts["all"] = [sum(some) for some in zip(*parts.values(), strict=True)]
        for number, (part, (mine, batched, single)) in enumerate(parts.items()):
            name = f"{r['rows']} x {r['columns']}" if number == 0 else ""
            ratios = _times(mine, batched), _times(mine, single)
            cells.append([name, part, *(f"{value:.1f}" for value in (mine, batched, single)), *ratios])
    titles = ("ours", "torch loop\nbatched", "\nsingle", "ratio to\nbatched", "\nsingle")
    print_rows(f"ms for {rows[0]['experts']} experts", ("rows x\ncolumns", "", *titles), cells, text=2)
    for r in rows:
        shape = f"{r['rows']} x {r['columns']}"
        print_text(f"{shape}: {r['same']:.3%} of the digits are the torch loop's; {r['block_us']:.1f} us a block.")
    print_text("Our columns include the outputs' error. Single: one expert's time, times all.\n")


def show_coder(rows: list[Row]) -> None:
    """Print 10^9 weights a second."""
    names = ("encode", "decode", "dense_bfloat16", "dense_float32")
    cells = ([name, *(f"{r[each]:.1f}" for each in names)] for r, name in _named(rows))
    titles = ("encode", "decode", "to dense\nbf16", "\nfp32")
    print_rows("10^9 weights a second", ("rows x\ncolumns", *titles), cells, text=1)


PARTS = {
    "launch": Part(measure_launch, show_launch, 10),
    "matmul": Part(measure_matmul, show_matmul, 45),
    "solver": Part(measure_solver, show_solver, 25),
    "coder": Part(measure_coder, show_coder, 15),
}
