"""What `qmoe bench` prints: tables within 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qmoe_lite.bench._show.text import plural, print_rows, print_text

if TYPE_CHECKING:
    from qmoe_lite.bench.gptq import GptqReport
    from qmoe_lite.bench.kernels import KernelsReport
    from qmoe_lite.bench.layer import LayerReport
    from qmoe_lite.bench.matmul import MatmulReport, Speed
    from qmoe_lite.bench.offload import OffloadReport
    from qmoe_lite.bench.rate_codes import CodeReport
    from qmoe_lite.bench.rate_matmul import RateReport
    from qmoe_lite.bench.rates import ModelRatesReport, ProjectionRates, RatesReport


def _figures(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _over(value: float, entropy: float) -> str:
    """How much a rate is above entropy, in at most six characters."""
    if not entropy:
        return "-"
    more = value / entropy - 1
    return f"{more:+.0%}" if more >= 1 else f"{more:+.1%}"


def _ratio(ours: float, peer: float | None) -> str:
    """How many times a peer's figure ours is, in at most five characters."""
    if not peer:
        return "-"
    return f"{ours / peer:.2f}x" if ours < 9.995 * peer else f"{ours / peer:.1f}x"


def _zstd(names: Iterable[str]) -> list[str]:
    return [name.replace(" -", "\n-") for name in names]


def print_rates(report: RatesReport) -> None:
    """Print the rates of random digits: codes, zstd, and with what is stored of a row."""
    from qmoe_lite.bench.rates import BITS, WIDTH, WIDTHS

    print_rows(
        f"Code bits per weight, {report.weights:,} ternary digits in rows of {WIDTH}",
        ["P(0)", "entropy", *(f"b={bits}" for bits in BITS), "auto", "over", "paper", "over"],
        (
            [
                *_figures(r.zeros, r.entropy, *r.by_bits.values()),
                str(r.bits),
                _over(r.ours, r.entropy),
                *_figures(r.paper),
                _over(r.paper, r.entropy),
            ]
            for r in report.rates
        ),
        tight=True,
    )
    print_text("b: bits of a codeword, the code fitted to the counts; auto: what qmoe chooses.\n")
    print_rows(
        "The same digits through zstd (all rows at once)",
        ["P(0)", "entropy", "ours", *_zstd(report.rates[0].zstd), "best over"],
        (
            [*_figures(r.zeros, r.entropy, r.ours, *r.zstd.values()), _over(min(r.zstd.values()), r.entropy)]
            for r in report.rates
        ),
    )
    print_rows(
        "With all that is stored of a row and its two levels, by columns",
        ["P(0)", *(heading for width in WIDTHS for heading in (f"{width:,}\nours", "\npaper"))],
        (
            _figures(r.zeros, *(value for w in r.widths for value in (w.ours_stored, w.paper_stored)))
            for r in report.rates
        ),
    )
    print_text(
        f"One thread encodes {report.encode_speed:,.0f} and decodes {report.decode_speed:,.0f} million weights a "
        f"second at P(0) = {report.speed_zeros}."
    )


def print_model_rates(report: ModelRatesReport) -> None:
    """Print the rates of a model's digits, a row a projection."""
    rows = [*report.projections, report.total]

    def names(r: ProjectionRates) -> list[str]:
        return [r.layer, r.projection]

    print_rows(
        "Bits per weight of the model's digits: codes, and with all that is stored",
        ["layer", "projection", "P(0)", "entropy", "bits", "ours", "over", "stored", "paper", "over", "stored"],
        (
            [
                *names(r),
                *_figures(r.zeros, r.entropy),
                str(r.bits or "-"),
                *_figures(r.ours),
                _over(r.ours, r.entropy),
                *_figures(r.stored, r.paper),
                _over(r.paper, r.entropy),
                *_figures(r.paper_stored),
            ]
            for r in rows
        ),
        text=2,
        tight=True,
    )
    print_rows(
        "The same digits through zstd (all experts at once)",
        ["layer", "projection", "entropy", "ours", *_zstd(report.total.zstd)],
        ([*names(r), *_figures(r.entropy, r.ours, *r.zstd.values())] for r in rows),
        text=2,
    )


def print_matmul(report: MatmulReport) -> None:
    """Print speeds against torch's dense products, and against dequantising."""
    from qmoe_lite.bench.matmul import SHAPES

    def names() -> Iterable[tuple[Speed, list[str]]]:
        shown = ""
        for row in report.speeds:
            yield row, ["{} x {}".format(*SHAPES[row.shape]) if row.shape != shown else "", str(row.tokens)]
            shown = row.shape

    def figures(*speeds: float | None) -> list[str]:
        return ["-" if speed is None else f"{speed:.1f}" for speed in speeds]

    def against_dense(row: Speed) -> list[str]:
        ours, peers = row.two_levels, (row.dense_float32, row.dense_bfloat16, row.dense_int8)
        return figures(row.one_level, ours, *peers) + [_ratio(ours, peer) for peer in peers]

    def against_dequantised(row: Speed) -> list[str]:
        pairs = (row.two_levels, row.dequantised_float32), (row.bfloat16_input, row.dequantised_bfloat16)
        return [cell for ours, peer in pairs for cell in (*figures(ours, peer), _ratio(ours, peer))]

    first = ("rows x\ncolumns", "tokens")
    threads, bits = plural(report.threads, "thread"), f"{report.bits_per_weight:.2f} bits a weight"
    dense = ("one\nlevel", "two\nlevels", "torch\nfp32", "\nbf16", "\nint8", "ours /\nfp32", "\nbf16", "\nint8")
    print_rows(
        f"10^9 multiply-adds a second, {threads}, {bits}",
        (*first, *dense),
        (name + against_dense(row) for row, name in names()),
        text=1,
    )
    anew = ("x fp32\nours", "\nanew", "\nratio", "x bf16\nours", "\nanew", "\nratio")
    print_rows(
        "Against dequantising the matrix for each of torch's dense products",
        (*first, *anew),
        (name + against_dequantised(row) for row, name in names()),
        text=1,
    )
    print_text("Ratios: two levels a row, as qmoe compress stores them; above 1 ours is faster.")
    print_text("int8: torch's dynamic product, rows of weights and x rounded to 8 bits.")
    if report.int8_left_out is not None:
        print_text(f"int8 was left out: {report.int8_left_out}.")
    print_text("Not measured here: ggml TQ1_0 25, IQ1_S 8.2 (one token, a thread of a Xeon).")
    print_text(f"Copying float32 in memory: {report.copy_gigabytes:.1f} GB/s read and written.")


def print_rate_matmul(report: RateReport) -> None:
    """Print the speeds of products from codes at a rate, and llama.cpp's."""
    from qmoe_lite.bench.matmul import SHAPES
    from qmoe_lite.bench.rate_matmul import LLAMA_CPP

    rows, before = [], ("", 0.0)
    for s in report.speeds:
        new, before = (s.shape, s.bits_per_weight) != before, (s.shape, s.bits_per_weight)
        name = "{} x {}".format(*SHAPES[s.shape]) if new else ""
        peers = (s.dense_float32, s.dense_bfloat16, s.anew_float32)
        figures = [f"{value:.1f}" for value in (s.ours, *peers)]
        shares = [_ratio(s.ours, peer) for peer in peers]
        rows.append([name, f"{s.bits_per_weight:.2f}" if new else "", str(s.tokens), *figures, *shares])
    headings = ("rows x\ncolumns", "bits", "tokens", "ours", "torch\nfp32", "\nbf16", "\nanew")
    ratios = ("ours /\nfp32", "\nbf16", "\nanew")
    title = f"10^9 multiply-adds a second, {plural(report.threads, 'thread')}, weights from memory"
    print_rows(title, (*headings, *ratios), rows, text=1)
    others = ", ".join(f"{name} ({bits:g} bits) {speed:g}" for name, bits, speed in LLAMA_CPP)
    print_text("anew: the matrix dequantised for each of torch's float32 products.")
    print_text(f"llama.cpp, one token, not measured here (a thread of a Zen 3): {others}.")


def print_rate_codes(report: CodeReport) -> None:
    """Print the bits of the code of windows at each rate."""
    from qmoe_lite.bench.rate_codes import BITS, WIDTH, WIDTHS
    from qmoe_lite.coding.windows_product import USUAL_BITS

    usual = str(USUAL_BITS)
    print_rows(
        f"Bits per weight, {report.weights:,} uniform digits in rows of {WIDTH}",
        ["rate", "entropy", *(f"b={bits}" for bits in BITS), f"over\nb={usual}", "clip", "exceptions"],
        (
            [
                f"{r.rate:g}",
                *_figures(r.entropy, *r.by_bits.values()),
                _over(r.by_bits[usual], r.entropy),
                str(r.clip),
                f"{r.exceptions:.3%}",
            ]
            for r in report.rates
        ),
    )
    print_text("b: bits of a codeword; codewords and exceptions are counted. Speeds: one thread.\n")
    print_rows(
        f"With all that is stored of a matrix, by columns (b={usual}); million weights/s",
        ["rate", *(f"{width:,}" for width in WIDTHS), "encode", "decode"],
        (
            [f"{r.rate:g}", *_figures(*r.stored.values()), f"{r.encode_speed:,.0f}", f"{r.decode_speed:,.0f}"]
            for r in report.rates
        ),
    )


def print_layer(report: LayerReport) -> None:
    """Print the milliseconds of a layer's call, ours and transformers'."""

    peers = list(report.speeds[0].peers)
    print_rows(
        f"A layer of {report.layer}'s experts: milliseconds a call, {plural(report.threads, 'thread')}",
        ("tokens", "ours", *(f"{peer}\nbf16" for peer in peers), "ours /\nfastest"),
        (
            [str(s.tokens), f"{s.ours:.2f}", *(f"{s.peers[peer]:.2f}" for peer in peers), f"{s.ratio:.2f}x"]
            for s in report.speeds
        ),
    )
    print_text(f"Ours: {report.bits_per_weight:.2f} bits a weight, everything counted. Above 1 ours is faster.")


def print_gptq(report: GptqReport) -> None:
    """Print the seconds of both solvers, in their parts."""

    rows = []
    for s in report.speeds:
        parts = {
            "all": (s.ours, s.torch),
            "factorisation": (s.ours_factorisation, s.torch_factorisation),
            "columns, error": (s.ours - s.ours_factorisation, s.torch - s.torch_factorisation),
        }
        for number, (part, (ours, peer)) in enumerate(parts.items()):
            name = f"{s.rows} x {s.columns}" if number == 0 else ""
            rows.append([name, part, f"{ours:.3f}", f"{peer:.3f}", _ratio(peer, ours)])
        size = s.rows * s.columns / 1e6
        rows.append(["", "10^6 weights/s", f"{size / s.ours:.2f}", f"{size / s.torch:.2f}", ""])
    print_rows(
        f"Seconds an expert, {plural(report.experts, 'expert')}, {plural(report.threads, 'thread')}",
        ("rows x columns", "", "ours", "torch loop", "ratio"),
        rows,
        text=2,
    )
    same = ", ".join(f"{s.same:.2%} of {s.rows} x {s.columns}" for s in report.speeds)
    print_text(f"Equal digits: {same}.")


def print_kernels(report: KernelsReport) -> None:
    """Print what each kernel compiles to, and the model of the product's time."""
    from qmoe_lite.bench.kernels import WIDTH

    def rows() -> Iterable[list[str]]:
        shown = ""
        for k in sorted(report.kernels, key=lambda k: order.index(k.kernel)):
            counts = map(str, (k.registers, k.stack, k.shared, k.float64, k.widest_load, k.instructions))
            each = "-" if k.instructions_per_weight is None else f"{k.instructions_per_weight:.3f}"
            name = k.kernel if k.kernel != shown else ""
            yield [name, k.architecture, *counts, each]
            shown = k.kernel

    order = [k.kernel for k in report.kernels]
    print_rows(
        "CUDA kernels, compiled without a GPU",
        ("kernel", "code", "regis-\nters", "stack", "shared", ".f64", "widest\nload", "instruc-\ntions", "a weight"),
        rows(),
        text=2,
        tight=True,
    )
    print_text("stack: bytes a thread, spilled registers among them. shared: bytes a block, as")
    print_text("the code declares; 1,024 of sm_90's are its own. widest load: bytes, of global")
    print_text(f"memory. a weight: warp instructions in rows of {WIDTH} columns; of ternary")
    print_text("digits at P(0) = .885.")
    print_text()
    print_rows(
        f"A model of one token's product, unmeasured: us, packets of {report.bits_per_weight:.2f} bits a weight",
        ("GPU", "rows x columns", "our\nbytes", "instruc-\ntions", "shared\nloads", "bf16\nbytes", "ratio"),
        (
            [
                e.gpu,
                f"{e.rows} x {e.columns}",
                f"{e.memory:.2f}",
                f"{e.issue:.2f}",
                f"{e.shared:.2f}",
                f"{e.dense:.2f}",
                f"{e.ratio:.1f}x",
            ]
            for e in report.estimates
        ),
        text=2,
    )
    print_text("Bytes over bandwidth, instructions over issue rate, shared loads at 3.53 passes")
    print_text("each (random banks), all at the makers' peaks; the ratio takes the longest of")
    print_text("ours. Launch, latency and what a block loads before it begins are left out.")


def print_offload(report: OffloadReport) -> None:
    """Print tokens a second and memory of all contenders, the parts of a token, and the cache policies."""

    slowest = {r.routing: r.tokens_per_second for r in report.runs if r.contender == "ours" and r.budget is not None}

    def rows() -> Iterable[list[str]]:
        for r in report.runs:
            yield [
                r.contender,
                r.routing,
                "none" if r.contender == "accelerate" else "all" if r.budget is None else f"{r.budget:.0%}",
                f"{r.tokens_per_second:.2f}",
                _ratio(slowest[r.routing], r.tokens_per_second) if slowest else "-",
                "-" if r.hit_rate is None else f"{r.hit_rate:.1%}",
                "-" if r.disk_bytes_per_token is None else f"{r.disk_bytes_per_token / 1e6:.1f}",
                "-" if r.load_seconds is None else f"{r.load_seconds:.1f}",
                f"{r.anonymous_bytes / 1e6:,.0f}",
                f"{r.file_bytes / 1e6:,.0f}",
            ]

    print_rows(
        f"{plural(report.layers, 'layer')} of Qwen3-30B-A3B: experts {report.packed_bytes / 1e6:,.0f} MB, "
        f"in bfloat16 {report.dense_bytes / 1e6:,.0f} MB",
        (
            "contender",
            "routing",
            "budget",
            "token\n/s",
            "least /\nthis",
            "hits",
            "MB read\n/token",
            "load\ns",
            "memory\nMB",
            "maps\nMB",
        ),
        rows(),
        text=2,
        tight=True,
    )
    print_text("memory: anonymous, above what the process had before.")
    if slowest:
        print_text("least / this: ours with the smallest budget over this one.")
        print_text("The files are dropped from the page cache before each token.")
    for note in report.notes:
        print_text(note)
    print_text()
    if (parts := report.parts) is not None:
        print_rows(
            "One token, all in memory: milliseconds",
            ("", "ours", "dense bf16", "ratio", "share of\ndense"),
            (
                [name, f"{ours:.2f}", f"{dense:.2f}", _ratio(dense, ours), f"{dense / parts.dense['whole']:.0%}"]
                for name, ours, dense in (
                    ("MoE blocks", parts.ours["blocks"], parts.dense["blocks"]),
                    ("  experts in them", parts.ours["experts"], parts.dense["experts"]),
                    ("attention", parts.ours["attention"], parts.dense["attention"]),
                    ("output head", parts.ours["head"], parts.dense["head"]),
                    ("whole model", parts.ours["whole"], parts.dense["whole"]),
                )
            ),
            text=1,
        )
        print_text(f"Experts take {parts.share:.0%} of the dense model; Amdahl's law then predicts")
        print_text(f"{parts.predicted:.2f}x for the whole.\n")
    if report.policies:
        names = {"0.0": "LRU", "inf": "LFU"}
        lives = list(report.policies[0].hit_rates)
        print_rows(
            "Hits of a cache, by the passes after which a use counts half",
            ("trace", "budget", *(names.get(life, f"{float(life):.0f}") for life in lives)),
            ([p.trace, f"{p.budget:.0%}", *(f"{p.hit_rates[life]:.1%}" for life in lives)] for p in report.policies),
            text=1,
        )
