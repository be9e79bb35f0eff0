"""Measurements: small, seeded, and what they print and draw."""

from __future__ import annotations

import json
import sys

import matplotlib.image
import pytest
import torch
from naive import dampen
from naive import gptq as naive_gptq
from typer.testing import CliRunner

from qmoe_lite.bench import gptq, layer, matmul, rates
from qmoe_lite.bench._parts.common import limited_threads
from qmoe_lite.cli import bench_
from qmoe_lite.coding.matmul import decode_matmul
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.inspection.contents import inspect_model
from qmoe_lite.quantization.grid import MinMaxTwoBit


@pytest.fixture
def bench(tmp_path):
    """Run `qmoe bench ARGS` twice: for its table and picture, within 80 columns and not empty, and for its JSON."""

    def call(*arguments):
        arguments = [str(a) for a in arguments]
        picture = tmp_path / "picture.png"
        plain = CliRunner().invoke(bench_.app, [*arguments, "--plot", str(picture)], catch_exceptions=False)
        assert plain.exit_code == 0, plain.output
        assert max(map(len, plain.stdout.splitlines())) <= 80
        pixels = matplotlib.image.imread(picture)
        assert len({tuple(color) for row in pixels for color in row}) > 20, "nothing is drawn"
        printed = CliRunner().invoke(bench_.app, [*arguments, "--json"], catch_exceptions=False)
        found = json.loads(printed.stdout)
        assert "qmoe-lite" in found["machine"]
        assert "numba" in found["machine"]
        assert plain.stdout.replace("\n", " ").endswith(f" {found['machine']} "), "the last line, or two of them"
        return plain.stdout, found

    return call


@pytest.fixture
def quick(monkeypatch):
    """Spend no time on timing, and add a small matrix."""
    monkeypatch.setattr(matmul, "_SECONDS", 1e-4)
    monkeypatch.setattr(matmul, "COLD_BYTES", 1 << 20)
    monkeypatch.setitem(matmul.SHAPES, "small", (64, 100))


@pytest.mark.slow
def test_rates_stand_between_entropy_and_two_bits(bench, monkeypatch):
    monkeypatch.setattr(rates, "ZEROS", (0.8, 0.885, 0.97))
    table, report = bench("rates", "--weights", 43_008)
    again = json.loads(json.dumps(rates.measure(43_008, zeros=rates.ZEROS).to_json()))
    assert min(report.pop(name) for name in ("encode_speed", "decode_speed")) > 0
    assert all(again[name] == value for name, value in report.items())
    assert report["speed_zeros"] == 0.885
    assert [r["zeros"] for r in report["rates"]] == [0.8, 0.885, 0.97]
    for r in report["rates"]:
        assert all(f"{value:.3f}" in table for value in (r["entropy"], r["paper"], *r["by_bits"].values()))
        assert r["ours"] == r["by_bits"][str(r["bits"])] <= 1.02 * min(r["by_bits"].values())
        for value in (*r["by_bits"].values(), *r["zstd"].values(), r["paper"]):
            assert 0.95 * r["entropy"] < value < 2, "few digits: their own entropy differs a little"
        assert [w["columns"] for w in r["widths"]] == [768, 2048, 2080, 6144, 14336]
        for w in r["widths"]:
            assert w["ours_stored"] - w["ours"] > 32 / w["columns"], "two levels and more"
            assert w["paper_stored"] - w["paper"] == pytest.approx(64 / w["columns"])
            assert w["ours_stored"] < w["paper_stored"]


def test_more_even_digits_take_more_bits_up_to_those_of_three_equal_ones():
    entropies = [r.entropy for r in rates.measure(14336, zeros=(1 / 3, 0.5, 0.9)).rates]
    assert entropies == pytest.approx([1.5849625, 1.5, 0.5689956])


def test_a_models_digits_are_coded_in_every_way(bench, compressed):
    directory, _ = compressed
    table, report = bench("rates", "--model", directory)
    found = inspect_model(str(directory))
    assert len(report["projections"]) == len(found.projections) > 2
    for r, p in zip(report["projections"], found.projections, strict=True):
        assert (r["layer"], r["projection"], r["bits"]) == (p.short, p.projection, p.codeword_bits)
        assert r["weights"] == p.weights
        assert r["zeros"] == pytest.approx(p.zeros)
        assert r["stored"] == pytest.approx(p.bits_per_weight)
        assert r["ours"] < p.stored_code_bits_per_weight
        assert r["paper_stored"] == pytest.approx(r["paper"] + 64 / p.columns)
        assert f"{r['stored']:.3f}" in table
    total = report["total"]
    assert total["stored"] == pytest.approx(found.totals["bits_per_weight"])
    assert total["zeros"] == pytest.approx(found.totals["zeros"])
    assert total["weights"] == found.totals["expert_weights"]


def test_of_a_large_model_as_many_whole_experts_are_read_as_asked_for(compressed):
    directory, _ = compressed
    whole, two, one = (rates.measure_model(str(directory), weights) for weights in (10**9, 0, 1))
    first = inspect_model(str(directory)).projections[0]
    assert whole.projections[0].weights == first.weights
    assert two.projections[0].weights == one.projections[0].weights == first.rows * first.columns
    assert one.projections[0].stored == whole.projections[0].stored, "of the whole projection all the same"
    assert one.projections[0].entropy != whole.projections[0].entropy


def test_models_of_two_bit_digits_are_refused(tmp_path, switch):
    from qmoe_lite import compress

    compress(switch, tmp_path / "out", recipe="nearest", grid=MinMaxTwoBit())
    with pytest.raises(SettingError, match="other digits than ternary"):
        rates.measure_model(str(tmp_path / "out"))


def test_too_few_weights_and_impossible_shares_are_refused():
    for arguments in ({"weights": 14335}, {"zeros": (1.0,)}, {"zeros": (0.5, -0.1)}):
        with pytest.raises(SettingError):
            rates.measure(**arguments)


@pytest.mark.slow
def test_products_are_timed_beside_torchs(bench, quick):
    table, report = bench("matmul", "--shape", "small", "--tokens", 1, "--tokens", 20)
    assert "64 x 100" in table
    assert [row["tokens"] for row in report["speeds"]] == [1, 20]
    for row in report["speeds"]:
        assert len(row) == 10
        assert all(speed > 0 for name, speed in row.items() if name != "shape" and speed is not None)
    assert 0.6 < report["bits_per_weight"] < 2
    without = [row["dense_int8"] is None for row in report["speeds"]]
    assert without == [report["int8_left_out"] is not None] * 2, "left out of a shape or timed for all its tokens"


@pytest.mark.parametrize(
    "product",
    [lambda w, x: torch.full((x.numel() // 100, 64), torch.nan), lambda w, x: torch.zeros(x.numel() // 100, 64)],
    ids=["not finite", "saturated"],
)
def test_an_int8_product_that_this_processor_gets_wrong_is_left_out_and_said_so(bench, quick, monkeypatch, product):
    monkeypatch.setattr(matmul, "_int8_product", product)
    table, report = bench("matmul", "--shape", "small", "--tokens", 1, "--tokens", 20)
    assert [row["dense_int8"] for row in report["speeds"]] == [None, None]
    assert report["int8_left_out"].startswith("its error is ")
    assert f"int8 was left out: {report['int8_left_out']}." in table


def test_a_torch_without_int8_products_leaves_their_column_empty(bench, quick, monkeypatch):
    monkeypatch.setattr(torch, "quantize_per_channel", None)
    monkeypatch.delattr(torch, "quantize_per_channel")
    table, report = bench("matmul", "--shape", "small", "--tokens", 1)
    assert report["speeds"][0]["dense_int8"] is None
    assert report["int8_left_out"] == "this torch has none"
    (row,) = [line for line in table.splitlines() if line.startswith("64 x 100") and " - " in line]
    assert row.split().count("-") == 2


@pytest.mark.parametrize("wrong", ["one_level", "two_levels", "bfloat16_input", "dense_int8", "dequantised_bfloat16"])
def test_nothing_is_timed_when_a_product_is_wrong(quick, monkeypatch, wrong):
    make = matmul._contenders
    monkeypatch.setitem(matmul.TOLERANCES, "int8", 0.5)  # so that int8 is there on every processor

    def doubled(*matrices):
        found = make(*matrices)
        of = found[wrong]
        found[wrong] = matmul.Contender(lambda w, x: 2 * of.product(w, x), of.matrices, of.dtype, of.tolerance)
        return found

    monkeypatch.setattr(matmul, "_contenders", doubled)
    monkeypatch.setattr(matmul, "rates_of", None)
    with pytest.raises(QMoEError, match=f"{wrong} of small differs"):
        matmul.measure(("small",), (1, 20))


def test_our_product_itself_is_compared(quick, monkeypatch):
    monkeypatch.setattr(matmul, "decode_matmul", lambda packed, x: 2 * decode_matmul(packed, x))
    with pytest.raises(QMoEError, match="differ"):
        matmul.measure(("small",), (1,))


def test_unknown_shapes_and_too_many_threads_are_refused():
    for arguments in ((("huge",), (1,)), (("mixtral",), (0,)), (("mixtral",), ()), (("mixtral",), (1,), 10**4)):
        with pytest.raises(SettingError):
            matmul.measure(*arguments)


@pytest.fixture
def small_layer(monkeypatch):
    sizes = {"hidden_size": 96, "moe_intermediate_size": 40, "num_experts": 5, "num_experts_per_tok": 2}
    monkeypatch.setitem(layer.LAYERS, "small", ("qwen3_moe", sizes))
    monkeypatch.setattr(layer, "_SECONDS", 1e-3)


@pytest.mark.slow
def test_a_layer_is_timed_beside_transformers(bench, small_layer):
    table, report = bench("layer", "--layer", "small", "--tokens", 1, "--tokens", 6)
    assert "a layer of small" in table.lower()
    assert [row["tokens"] for row in report["speeds"]] == [1, 6]
    for row in report["speeds"]:
        assert sorted(row["peers"]) == sorted(layer.PEERS)
        assert min(row["ours"], *row["peers"].values()) > 0


def test_a_layer_at_a_rate_is_timed_beside_transformers(small_layer):
    report = layer.measure("small", (1, 6), rate=3.0)
    assert report.bits_per_weight == pytest.approx(3.0, rel=0.25)  # its rows are narrow
    assert [speed.tokens for speed in report.speeds] == [1, 6]
    with pytest.raises(SettingError, match=r"expected 0\.6 to 4"):
        layer.measure("small", (1,), rate=5.0)


def test_no_layer_is_timed_that_differs_from_its_experts(small_layer, monkeypatch):
    whole = layer.PackedExperts.forward
    monkeypatch.setattr(layer.PackedExperts, "forward", lambda self, *arguments: 1.01 * whole(self, *arguments))
    with pytest.raises(QMoEError, match="differs from its dense experts"):
        layer.measure("small", (1,))


def test_unknown_layers_and_no_tokens_are_refused():
    for arguments in (("huge", (1,)), ("olmoe-1b-7b", (0,)), ("olmoe-1b-7b", (1,), 10**4)):
        with pytest.raises(SettingError):
            layer.measure(*arguments)


def test_solvers_are_timed_on_equal_digits(bench, monkeypatch):
    monkeypatch.setattr(gptq, "SHAPES", ((20, 140), (7, 30)))
    table, report = bench("gptq", "--experts", 5)
    assert "20 x 140" in table
    assert [(s["rows"], s["columns"]) for s in report["speeds"]] == [(20, 140), (7, 30)]
    for s in report["speeds"]:
        assert s["same"] >= gptq.SAME
        assert min(s["ours"], s["ours_factorisation"], s["torch_factorisation"]) > 0
        assert s["torch"] > s["torch_factorisation"]


def test_no_figure_is_given_when_the_solvers_differ(monkeypatch):
    monkeypatch.setattr(gptq, "column_loop", lambda weight, factor, levels: (torch.zeros_like(weight), None))
    with pytest.raises(QMoEError, match=r"the solvers agree on .* of the digits of 8 x 30"):
        gptq.measure(1, shapes=((8, 30),))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 29), (5, 128), (4, 150)])
def test_the_plain_loop_finds_the_naive_solvers_digits(rows, columns):
    weight, hessian = (each[0] for each in gptq._draw(1, rows, columns, torch.Generator().manual_seed(3)))
    levels = torch.stack((weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)), 1)
    rounded, losses = gptq.column_loop(weight, gptq.inverse_factor(hessian), levels)
    whole = [each[None].double().numpy() for each in (weight, hessian, levels)]
    _, expected = naive_gptq(*whole[:2], "ternary", gptq.DAMPENING, whole[2])
    assert rounded.numpy() == pytest.approx(expected[0])
    lost, damped = weight - rounded, dampen(whole[1][0], gptq.DAMPENING)
    assert 2 * float(losses.sum()) == pytest.approx(float((lost.numpy() @ damped * lost.numpy()).sum()), rel=1e-4)


def test_no_experts_are_refused():
    with pytest.raises(SettingError, match="experts is 0"):
        gptq.measure(0)


def test_threads_are_as_before_after_an_error():
    def fail():
        with limited_threads(1):
            raise ZeroDivisionError(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError, match="1"):
            fail()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("command", ["rates", "matmul", "layer", "gptq"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(run, tmp_path, command, monkeypatch):
    for module in (rates, matmul, layer, gptq):
        monkeypatch.setattr(module, "measure", None)
    code, printed, noted = run("bench", command, "--plot", tmp_path / "a.jpg")
    assert (code, printed) == (1, "")
    assert "expected one that ends in .png" in noted
    assert "matplotlib.pyplot" not in sys.modules


def test_packing_is_measured_beside_zstd(tmp_path, monkeypatch, capsys):
    from qmoe_lite.bench import pack

    monkeypatch.setattr(pack, "BYTES", 2e5)
    monkeypatch.setattr("sys.argv", ["pack", "--threads", "1"])
    pack.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    ways = [line[13:27].strip() for line in lines if line[13:14] in ("t", "q", "f")]
    assert ways == ["tar, zstd -3", "qmoe pack", "floats of it"] * 2
