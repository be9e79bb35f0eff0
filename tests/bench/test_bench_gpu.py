"""bench/gpu.py without a GPU: what it measures runs on CPU tensors and emulated kernels, and how it minds its parts."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import draw_digits

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("greenlet") is None:
    pytest.skip("needs numba-cuda and greenlet; pip install 'qmoe-lite[dev]'", allow_module_level=True)

import emulator
import naive
from fake_device import EmulatedDevice

from qmoe_lite.bench import gptq, gpu, layer
from qmoe_lite.bench._parts import gpu as parts
from qmoe_lite.bench._parts import gpu_choice, gpu_demo, gpu_layer, gpu_offload, gpu_paper, gpu_rates
from qmoe_lite.bench._parts import offload as offload_parts
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode
from qmoe_lite.cuda import codec, gather, launch, matmul, packets, variants, windows_product
from qmoe_lite.cuda import experts as experts_twin
from qmoe_lite.errors import QMoEError, ShapeError
from qmoe_lite.models.experts import PackedExperts

ROOT = Path(__file__).parents[2]
FOR_EVER = float("inf")
PAPER = Codebook.paper()


def on_a_gpu(experts, x, index, weights):
    """What `PackedExperts.forward` does where its buffers are on a GPU, or its source's."""
    if (source := experts.source) is not None:
        sizes = source.begin_layer(experts, x, index)
        return source.run_layer(experts, x, index, weights, sizes).to(x.dtype)
    return experts._forward_on_gpu(x, index, weights).to(x.dtype)


def demo_without_a_gpu(*arguments):
    """A program that answers as a `qmoe demo` does that knows --device."""
    result = {"dense": {"loss": 3.0}, "rtn": {"loss": 4.0}, "qmoe": {"loss": 3.25}, "recovered": 0.75, "seconds": 9.5}
    answers = {("--help",): "Options: --device TEXT", ("--device", "cuda", "--json"): json.dumps(result)}
    return [sys.executable, "-c", f"print({answers[arguments]!r})"]


@pytest.fixture
def emulated(monkeypatch):
    """All parts on the CPU, small; a clock that counts calls: the n-th one took n."""
    emulator.install(monkeypatch, seed=1)
    calls = iter(range(1, 10**6))

    def clock(call):
        (call[0] if isinstance(call, list) else call)()
        return float(next(calls))

    for name in ("_event_us", "_graph_us", "_call_ms", "_host_us"):
        monkeypatch.setattr(parts, name, clock)
    monkeypatch.setattr(parts, "_DEVICE", "cpu")
    monkeypatch.setattr(parts, "SHAPES", ((3, 200), (2, 90)))
    monkeypatch.setattr(parts, "QUICK_SHAPES", ((3, 200),))
    monkeypatch.setattr(parts, "TOKENS", (1, 3, 6))
    monkeypatch.setattr(parts, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(parts, "_MOST_COPIES", 3)
    monkeypatch.setattr(gptq, "SHAPES", ((7, 150),))
    monkeypatch.setattr(gptq, "EXPERTS", 2)
    sizes = {"hidden_size": 24, "moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
    monkeypatch.setattr(layer, "LAYERS", {name: ("qwen3_moe", sizes) for name, _ in gpu_layer.CASES})
    monkeypatch.setattr(gpu_layer, "CASES", tuple((name, rate and 8.0) for name, rate in gpu_layer.CASES))
    monkeypatch.setattr(PackedExperts, "forward", on_a_gpu)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 6}
    shape = offload_parts.SHAPE | sizes | heads | {"num_experts_per_tok": 2}
    for name, value in {"LAYERS": 2, "VOCABULARY": 50, "PROMPT": 3, "WARM": 1, "TOKENS": 2, "SHARE": 0.75}.items():
        monkeypatch.setattr(gpu_offload, name, value)
    monkeypatch.setattr(offload_parts, "SHAPE", shape)
    monkeypatch.setattr(offload_parts, "demo_trace", functools.partial(offload_parts.demo_trace, 128))
    monkeypatch.setattr(gpu_offload, "_device", EmulatedDevice)
    monkeypatch.setattr(gpu_choice, "TOKENS", (2, 3))
    monkeypatch.setattr(gpu_choice, "LANES", (4, 32))
    monkeypatch.setattr(gpu_paper, "WARPS", (1, 2))
    monkeypatch.setattr(gpu_rates, "RATES", (7.5, 8.0))  # of which three rows spend 5.3 on the scales
    monkeypatch.setattr(windows_product, "WARPS", (1, 2))
    monkeypatch.setattr(gpu_demo, "_command", demo_without_a_gpu)
    monkeypatch.setattr(gather, "WARPS", (1, 2))
    properties = type("Properties", (), {"L2_cache_size": 1 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def measured_and_shown(capsys, name, quick):
    """Rows of a part, all of them JSON values, and what is printed of them, within 80 columns."""
    rows = list(gpu.PARTS[name].measure(quick, FOR_EVER))
    assert json.loads(json.dumps(rows)) == rows
    gpu.PARTS[name].show(rows)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for row in rows:
        if "rows" in row:
            assert f"{row['rows']} x {row['columns']}" in printed
        assert all(value > 0 for key, value in row.items() if key.endswith(("_us", "_ms")))
    return rows, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quick"),  # the whole offload is measured below, where its rows are looked at
    [(name, quick) for name in gpu.PARTS for quick in (True, False) if (name, quick) != ("offload", False)],
)
def test_every_part_measures_rows_and_shows_them_within_80_columns(emulated, capsys, name, quick):
    rows, printed = measured_and_shown(capsys, name, quick)
    if name == "matmul":
        shapes = parts.QUICK_SHAPES if quick else parts.SHAPES
        assert [(r["rows"], r["columns"]) for r in rows] == [
            s for s in shapes for _ in ((1, 6) if quick else (1, 3, 6))
        ]
        assert "0.67x" in printed, "the first of three figures over the other two's smaller"


@pytest.mark.parametrize("columns", [1, 27, 60, 331])
@pytest.mark.parametrize("warps", [1, 3])
def test_the_paper_s_kernel_gives_the_naive_product(monkeypatch, columns, warps):
    emulator.install(monkeypatch, seed=columns)
    digits = draw_digits(np.random.default_rng(columns), PAPER.counts, (4, columns))
    digits[1:3] = [[1], [-1]]
    levels, x = torch.randn(4, 2).bfloat16(), torch.randn(columns).bfloat16()
    y = gpu_paper.paper_product(gpu_paper.paper_matrix(encode(digits, levels, PAPER)), x, warps)
    expected = naive.matmul(digits, levels.tolist(), x.float().numpy()[None])[0]
    sizes = np.abs(naive.dequantize(digits, levels.tolist())) @ np.abs(x.float().numpy())
    assert (np.abs(y.float().numpy() - expected) <= 2**-8 * np.abs(expected) + 1e-5 * sizes).all()


def test_the_paper_s_table_is_the_published_one():
    table = gpu_paper.published_table().astype("<u4").tobytes()
    assert hashlib.sha256(table).hexdigest() == "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"


def test_x_too_wide_for_the_paper_s_kernel_is_refused(monkeypatch):
    emulator.install(monkeypatch, seed=0)
    packed = encode(np.zeros((1, 13_000), dtype=np.int8), torch.ones(1, 2).bfloat16(), PAPER)
    with pytest.raises(ShapeError, match="x has 13000 columns"):
        gpu_paper.paper_product(gpu_paper.paper_matrix(packed), torch.zeros(13_000).bfloat16())


def test_a_demo_without_the_option_and_one_that_fails_are_told_apart(monkeypatch, capsys):
    monkeypatch.setattr(gpu_demo, "_command", lambda *_: [sys.executable, "-c", "print('Usage: qmoe demo')"])
    rows = list(gpu_demo.measure_demo(False, FOR_EVER))
    gpu_demo.show_demo(rows)
    assert capsys.readouterr().out == "qmoe demo has no option --device: not run.\n\n"
    monkeypatch.setattr(gpu_demo, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no GPU')"])
    with pytest.raises(QMoEError, match="qmoe demo: no GPU"):
        list(gpu_demo.measure_demo(False, FOR_EVER))
    monkeypatch.setattr(gpu_demo, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(QMoEError, match="did not end within 1 s"):
        list(gpu_demo.measure_demo(False, time.monotonic()))


def test_choices_are_those_that_the_product_makes(emulated, capsys):
    rows = list(gpu_choice.measure_choice(False, FOR_EVER))
    assert matmul.GATHERED_TOKENS == 32
    assert [sorted(row["by_lanes"]) for row in rows if "by_lanes" in row] == [["32", "4"]]
    packed, _ = parts._matrix(3, 200)
    assert rows[0]["chosen"] == variants.choose_lanes(len(packets.make_packets(packed).words) / 3, 3, 1)
    assert [row["tokens"] for row in rows[1:]] == [2, 3]
    assert all(row["gathers"] for row in rows[1:])
    swapped = [row | {"gathered_us": row["tiles_us"], "tiles_us": row["gathered_us"]} for row in rows[1:]]
    gpu_choice.show_choice([*rows[:1], *rows[1:]])
    assert "for none of up to 3 tokens; chosen above 32" in capsys.readouterr().out
    gpu_choice.show_choice([*rows[:1], *swapped])
    assert "from 2 tokens on" in capsys.readouterr().out


@pytest.mark.slow
def test_three_ways_go_through_the_same_experts_and_the_cache_is_counted(emulated, capsys):
    rows, _ = measured_and_shown(capsys, "offload", quick=False)
    assert [(row["way"], row["routing"]) for row in rows] == [
        (way, routing) for way in ("dense", "all", "cached") for routing in ("even", "a text's")
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert {row["peer"] for row in rows[:2]} <= {"grouped_mm", "eager"}
    for row in rows[4:]:
        assert 0 < row["hit_rate"] < 1
        assert row["copied_bytes"] > 0
        assert row["lost_share"] is None, "no GPU waited"
    gpu_offload.show_offload([row | {"lost_share": 0.125} if "lost_share" in row else row for row in rows])
    printed = capsys.readouterr().out
    assert "12%" in printed
    assert "75% on the GPU" in printed


def test_what_does_not_fit_the_time_is_named(emulated):
    for name in ("matmul", "layer", "offload", "solver", "paper", "coder", "choice", "rates"):
        rows = list(gpu.PARTS[name].measure(False, time.monotonic() + 1))
        assert rows
        assert all(list(row) == ["skipped"] for row in rows)


@pytest.mark.slow
def test_nothing_is_timed_that_is_wrong(emulated, monkeypatch):
    right = matmul.decode_matmul
    monkeypatch.setattr(matmul, "decode_matmul", lambda packed, x: 1.1 * right(packed, x))
    with pytest.raises(QMoEError, match=r"decode_matmul of \(3, 200\)"):
        list(parts.measure_matmul(True, FOR_EVER))
    with pytest.raises(QMoEError, match=r"same_codes of \(3, 200\)"):
        list(gpu_paper.measure_paper(True, FOR_EVER))
    with pytest.raises(QMoEError, match=r"decode_matmul of \(3, 200\)"):
        list(gpu_choice.measure_choice(True, FOR_EVER))
    total = experts_twin.ExpertsCall.total
    monkeypatch.setattr(experts_twin.ExpertsCall, "total", lambda call: 1.1 * total(call))
    with pytest.raises(QMoEError, match="the layer differs"):
        list(gpu_layer.measure_layer(True, FOR_EVER))
    monkeypatch.setattr(experts_twin.ExpertsCall, "total", lambda call: 50 * total(call))
    with pytest.raises(QMoEError, match="the logits differ from the dense model's"):
        list(gpu_offload.measure_offload(True, FOR_EVER))
    monkeypatch.setattr(experts_twin.ExpertsCall, "total", total)
    there = PackedExperts._forward_on_gpu
    monkeypatch.setattr(PackedExperts, "_forward_on_gpu", lambda *given: 3 * there(*given))
    with pytest.raises(QMoEError, match="not the same bits"):
        list(gpu_offload.measure_offload(True, FOR_EVER))
    monkeypatch.setattr(gpu_paper, "paper_product", lambda matrix, x, warps: torch.zeros(3))
    monkeypatch.setattr(matmul, "decode_matmul", right)
    with pytest.raises(QMoEError, match=r"paper_1 of \(3, 200\)"):
        list(gpu_paper.measure_paper(True, FOR_EVER))
    monkeypatch.setattr(codec, "decode", lambda packed: (torch.zeros(3, 200, dtype=torch.int8), packed.levels))
    with pytest.raises(QMoEError, match="decode of 3 x 200"):
        list(parts.measure_coder(True, FOR_EVER))
    monkeypatch.setattr(parts, "batched_loop", lambda weight, factor, levels: torch.zeros_like(weight))
    with pytest.raises(QMoEError, match=r"ours: .* of the digits of 7 x 150"):
        list(parts.measure_solver(True, FOR_EVER))


def test_a_product_that_cannot_be_captured_is_timed_without_a_graph(emulated, monkeypatch, capsys):
    graph = parts._graph_us
    refused = []

    def capture(calls):
        if "decode_matmul" in calls[0].__code__.co_names:
            refused.append(1)
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return graph(calls)

    monkeypatch.setattr(parts, "_graph_us", capture)
    rows = list(parts.measure_matmul(True, FOR_EVER))
    assert len(refused) == 1, "it is tried once"
    assert [row["ours_graph_us"] for row in rows] == [None, None]
    assert all(row["cublas_graph_us"] for row in rows)
    parts.show_matmul(rows)
    assert "RuntimeError: operation not permitted\n" in capsys.readouterr().out


def test_the_batched_loop_rounds_as_the_plain_one():
    weight, hessian = gptq._draw(3, 10, 300, torch.Generator().manual_seed(1))
    levels = torch.stack((weight.amin(-1), weight.amax(-1)), -1)
    factor = torch.stack([gptq.inverse_factor(each) for each in hessian])
    ours = parts.batched_loop(weight, factor, levels)
    for expert in range(3):
        single = gptq.column_loop(weight[expert], factor[expert], levels[expert])[0]
        assert (ours[expert] == single).float().mean() > 0.99


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """`run` with a GPU by name, tests that pass, and for parts small programs of ours; give (exit code, report)."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla X")
    programs = {}

    def command(name, quick, seconds):
        return [sys.executable, "-c", programs.get(name, "")]

    monkeypatch.setattr(gpu, "_part_command", command)
    monkeypatch.setattr(
        gpu, "_tests_command", lambda *_: [sys.executable, "-c", programs.get("tests", "print('9 passed in 3 s')")]
    )
    monkeypatch.setattr(gpu, "_LEAST", 0.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    def run(seconds=60.0, debug=False, **given):
        programs.update(given)
        code = gpu.run(True, tmp_path / "out" / "x", debug, seconds)
        return code, json.loads((tmp_path / "out" / "x.json").read_text())

    return run


ROW = '{"call": "a", "host_us": 4.25}'


def test_results_are_written_as_they_were_printed(driver, capsys, tmp_path):
    code, report = driver(launch=f"print('noise')\nprint('{ROW}')")
    assert code == 0
    assert report["gpu"] == "Tesla X"
    assert report["tests"]["summary"] == "9 passed"
    assert report["parts"]["launch"] == [json.loads(ROW)]
    printed = capsys.readouterr().out
    assert "4.2" in printed
    assert (tmp_path / "out" / "x.txt").read_text() == printed


def test_a_part_that_fails_costs_no_other(driver, capsys):
    row = json.dumps(
        {"rows": 2, "columns": 3, "bits": 1.0, "encode": 1, "decode": 2, "dense_bfloat16": 3, "dense_float32": 4}
    )
    code, report = driver(
        launch=f"print('{ROW}')\nprint('{{\"failed\": \"E: what\"}}')\nraise SystemExit(1)",
        matmul="import os\nos.abort()",
        solver="raise ValueError('one\\ntwo')",
        coder=f"print('{row}')",
        tests="print('FAILED tests/gpu/x.py::y - z')\nprint('1 failed, 8 passed')\nraise SystemExit(1)",
    )
    assert code == 1
    assert report["failed"]["launch"] == "E: what"
    assert "code -6" in report["failed"]["matmul"]
    assert report["failed"]["solver"] == "two"
    assert report["failed"]["tests"] == "1 failed, 8 passed"
    assert report["parts"]["launch"] == [json.loads(ROW)], "what came before the error is kept"
    assert report["parts"]["coder"] == [json.loads(row)]
    printed = capsys.readouterr()
    assert "FAILED tests/gpu/x.py::y" in printed.out
    assert "Traceback" not in printed.out + printed.err
    driver(debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_skipped_tests_are_no_proof(driver):
    code, report = driver(tests="print('1 skipped in 2 s')")
    assert code == 1
    assert report["failed"]["tests"] == "1 skipped"


def test_each_part_has_its_seconds_and_what_was_left_over(driver, monkeypatch):
    limits = {}
    monkeypatch.setattr(gpu, "_test", lambda report, seconds, debug: limits.update(tests=seconds))
    monkeypatch.setattr(gpu, "_measure", lambda report, name, quick, seconds, debug: limits.update({name: seconds}))
    driver(seconds=gpu.BUDGET)
    own = {"tests": gpu.TEST_SECONDS} | {name: part.seconds for name, part in gpu.PARTS.items()}
    assert sum(own.values()) == gpu.BUDGET < 480
    assert list(limits) == list(own)
    assert limits["tests"] == pytest.approx(own["tests"], abs=5)
    assert limits["matmul"] == pytest.approx(own["tests"] + own["matmul"], abs=5), "the tests took no time"
    assert limits["demo"] == pytest.approx(gpu.BUDGET, abs=5)
    limits.clear()
    driver(seconds=50.0)
    assert all(limit <= 50 for limit in limits.values())


def test_tests_are_shared_among_processes_and_counted_together(driver, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    _, report = driver()
    assert report["tests"]["summary"] == "27 passed"
    code, report = driver(tests="raise ValueError('no share')")
    assert code == 1
    assert report["failed"]["tests"] == "3 share ended without a result: ValueError: no share"


@pytest.mark.parametrize("shares", [1, 3, 7])
def test_every_test_is_in_one_share(shares):
    items = [
        types.SimpleNamespace(function=name, case=case) for name in "abc" for case in range(10 if name > "a" else 1)
    ]
    shared = [gpu.share_of(items, number, shares) for number in range(shares)]
    assert sorted((item.function, item.case) for some in shared for item in some) == [
        (item.function, item.case) for item in items
    ]
    assert max(map(len, shared)) - min(map(len, shared)) <= 3


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_and_the_rest_is_skipped(driver):
    begun = time.monotonic()
    hang = f"import time\nprint('{ROW}', flush=True)\ntime.sleep(100)"
    code, report = driver(seconds=6.0, launch=hang)
    assert time.monotonic() - begun < 30
    assert code == 1
    assert report["failed"]["launch"].startswith("did not end within")
    assert report["parts"]["launch"] == [json.loads(ROW)]
    assert report["skipped"] == ["paper", "coder", "choice", "demo"]


def test_a_part_in_its_own_process_says_rows_and_its_error(monkeypatch, capsys):
    def measure(quick, end):
        yield {"call": "a"}
        raise RuntimeError("no\nmore")

    monkeypatch.setitem(gpu.PARTS, "launch", parts.Part(measure, parts.show_launch, 1))
    assert gpu.measure_part("launch", True, 1.0) == 1
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == [{"call": "a"}, {"failed": "RuntimeError: no"}]
    assert "Traceback" in printed.err


@pytest.mark.slow
@pytest.mark.skipif(launch.available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_needs_neither_zstandard_nor_an_installation(tmp_path):
    (tmp_path / "gpu.py").write_text(
        f"import sys; sys.modules['zstandard'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
        "import qmoe_lite.bench.layer, qmoe_lite.offload\n"
        "import runpy; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, tmp_path / "gpu.py", ROOT / "bench" / "gpu.py", "--out", tmp_path / "x"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr == f"bench/gpu.py: {launch.reason()}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.py"]


@pytest.mark.slow
@pytest.mark.skipif(launch.available(), reason="there is a GPU, so the tests would run")
def test_the_tests_of_the_gpu_need_none_of_pytest_s_plugins():
    """The suite's own options ask for pytest-xdist."""
    code = "from qmoe_lite.bench import gpu; raise SystemExit(gpu.run_tests(0, 1000))"
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, out.stdout + out.stderr
    assert "3 skipped" in out.stdout, "a module each"
