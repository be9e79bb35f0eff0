"""What is read from compiled kernels, and the model of the product's time."""

from __future__ import annotations

import importlib.util
import json

import pytest
from typer.testing import CliRunner

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda compiles the kernels; pip install 'qmoe-lite[cuda]'", allow_module_level=True)

from qmoe_lite.bench import kernels
from qmoe_lite.cli import bench_
from qmoe_lite.cuda import launch


@pytest.fixture(scope="module")
def printed():
    """`qmoe bench kernels --static` as a table and as JSON; the kernels are compiled once."""
    table = CliRunner().invoke(bench_.app, ["kernels", "--static"], catch_exceptions=False)
    again = CliRunner().invoke(bench_.app, ["kernels", "--static", "--json"], catch_exceptions=False)
    assert table.exit_code == again.exit_code == 0
    return table.stdout, json.loads(again.stdout)


@pytest.mark.slow
def test_every_kernel_has_a_row_for_every_architecture(printed):
    table, report = printed
    rows = [(row["kernel"], row["architecture"]) for row in report["kernels"]]
    assert len(set(rows)) == len(rows) == 2 * len(kernels.all_kernels())
    assert max(map(len, table.splitlines()[:-1])) <= 80
    for row in report["kernels"]:
        assert row["kernel"] in table
        assert 0 < row["registers"] <= 128
        assert row["stack"] == row["float64"] == 0
        assert row["widest_load"] in (1, 2, 4, 8, 16)
        assert row["instructions"] > 20
    assert any(row["shared"] > 1024 for row in report["kernels"])


@pytest.mark.slow
def test_the_model_takes_less_for_more_bandwidth_and_more_for_more_weights(printed):
    _, report = printed
    for rows, columns in kernels.SHAPES:
        h100, a6000, ada = (e for e in report["estimates"] if (e["rows"], e["columns"]) == (rows, columns))
        assert h100["memory"] < ada["memory"] < a6000["memory"] < a6000["dense"] / 12


def test_the_model_is_bytes_over_bandwidth_and_instructions_over_issue_rate():
    gpu = kernels.Gpu("slow", 2, 0.5, 1.0, (8, 0))  # 4 instructions and a pass a nanosecond, 1 byte a nanosecond
    of = kernels.estimate(gpu, 100, 80, 160.0, 0.5, 0.1)
    assert of.issue == pytest.approx(1.0)
    assert of.shared == pytest.approx(0.8 * kernels.BANK_CONFLICT)
    assert of.memory == pytest.approx(1.6 + 0.8 + 0.36)
    assert of.dense == pytest.approx(16 + 0.36)
    assert of.ratio == pytest.approx(of.dense / of.shared)
    assert kernels.estimate(gpu, 100, 80, 160.0, 5.0, 0.1).ratio == pytest.approx(of.dense / 10)


@pytest.mark.parametrize(
    ("line", "width"),
    [
        ("ld.global.u8 %rs1, [%rd1];", 1),
        ("ld.global.nc.f32 %f1, [%rd1];", 4),
        ("ld.global.nc.L1::no_allocate.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];", 16),
        ("ld.global.v2.u64 {%rd2, %rd3}, [%rd1+16];", 16),
        ("ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1]; st.global.u64 [%rd1], %rd2;", 0),
    ],
)
def test_the_width_of_a_load_is_read_from_the_ptx(line, width):
    assert kernels.widest_load(line) == width


def test_a_longer_kernel_has_more_instructions():
    def _add(values):
        values[0] += values[1]

    def _add_more(values):
        values[0] += values[1] * values[2] + values[3] * values[4]

    short, long = (kernels.compiled(launch.kernel("float32*")(each), "float32*", (9, 0)) for each in (_add, _add_more))
    assert 4 <= kernels.instructions(short) < kernels.instructions(long) < 60


@pytest.mark.slow
def test_a_row_s_end_counts_in_full(printed):
    _, report = printed
    wide, narrow = (kernels.per_weight("product: 2 levels", (9, 0), columns)[0] for columns in (kernels.WIDTH, 100))
    assert narrow > 3 * wide
    shown = [row["instructions_per_weight"] for row in report["kernels"]]
    assert wide in shown
    assert len([each for each in shown if each is not None]) == 14, "six products of one token and the paper's, twice"


@pytest.mark.slow
def test_the_paper_s_algorithm_takes_a_loop_for_each_codeword(printed):
    table, _ = printed
    ours = kernels.per_weight("product: 2 levels", (9, 0), kernels.WIDTH)[0]
    for capability in kernels.CAPABILITIES:
        codeword = kernels.paper_per_weight(capability) * 16 / 0.735
        assert 12 < codeword < 30, (
            "a shuffle, two loads, an entry taken apart, a multiplication: no less, and not twice"
        )
        assert kernels.paper_per_weight(capability) > 4 * ours
    assert table.count("the paper's kernel") == 1


def test_without_the_static_option_the_command_says_where_measurements_are(run):
    code, printed, noted = run("bench", "kernels")
    assert (code, printed) == (1, "")
    assert "expected --static" in noted
    assert "python bench/gpu.py" in noted


@pytest.mark.parametrize(("name", "value"), [("cuda", None), ("_missing_library", lambda: "nvvm")])
def test_a_missing_compiler_is_said_in_one_line(run, monkeypatch, name, value):
    launch.reason.cache_clear()
    monkeypatch.setattr(launch, name, value)
    code, printed, noted = run("bench", "kernels", "--static")
    launch.reason.cache_clear()
    assert (code, printed) == (1, "")
    assert "pip install 'qmoe-lite[cuda]'" in noted
    assert noted.count("\n") == 1
