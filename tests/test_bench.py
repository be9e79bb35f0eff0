"""Measurements: small, seeded, and what they print."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qmoe_lite.bench import matmul
from qmoe_lite.bench.rates import UNIT, measure
from qmoe_lite.cli import bench_
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.matmul import decode_matmul


def test_rates_stand_between_entropy_and_two_bits_and_print_within_80_columns():
    plain = CliRunner().invoke(bench_.app, ["rates", "--weights", "1"])
    assert plain.exit_code == 0, plain.output
    *lines, machine = plain.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "qmoe-lite" in machine
    assert "numba" in machine
    printed = CliRunner().invoke(bench_.app, ["rates", "--weights", "1", "--json"])
    report = json.loads(printed.stdout)
    assert report["rates"][2] == json.loads(json.dumps(measure(UNIT, zeros=(0.885,)).to_json()))["rates"][0]
    assert [r["zeros"] for r in report["rates"]] == [0.8, 0.85, 0.885, 0.92, 0.95]
    for r in report["rates"]:
        assert all(f"{value:.3f}" in plain.stdout for value in (r["entropy"], r["paper"], *r["tunstall"].values()))
        for value in (*r["tunstall"].values(), *r["zstd"].values(), r["paper"]):
            assert 0.97 * r["entropy"] < value < 2, "few digits: their own entropy differs a little"
        assert [w["columns"] for w in r["widths"]] == [768, 2048, 3072, 14336]
        for w in r["widths"]:
            assert w["ours_stored"] - w["ours"] == pytest.approx(48 / w["columns"])
            assert w["paper_stored"] - w["paper"] == pytest.approx(64 / w["columns"])
            assert w["ours_stored"] < w["paper_stored"]


def test_no_weights_and_impossible_shares_are_refused():
    for arguments in ({"weights": 0}, {"zeros": (1.0,)}, {"zeros": (0.5, -0.1)}):
        with pytest.raises(SettingError):
            measure(**arguments)


def test_products_are_timed_beside_torchs(monkeypatch):
    monkeypatch.setattr(matmul, "_SECONDS", 1e-4)
    monkeypatch.setattr(matmul, "COLD_BYTES", 1 << 20)
    monkeypatch.setitem(matmul.SHAPES, "small", (64, 100))
    options = ["matmul", "--shape", "small", "--tokens", "1", "--tokens", "20"]
    plain = CliRunner().invoke(bench_.app, options)
    assert plain.exit_code == 0, plain.output
    assert max(map(len, plain.stdout.splitlines()[:-1])) <= 80
    assert "64 x 100" in plain.stdout
    report = json.loads(CliRunner().invoke(bench_.app, [*options, "--json"]).stdout)
    assert [row["tokens"] for row in report["speeds"]] == [1, 20]
    assert all(row[kind] > 0 for row in report["speeds"] for kind in ("one_level", "two_levels", "float32", "bfloat16"))
    assert 0.6 < report["bits_per_weight"] < 2


def test_nothing_is_timed_when_the_products_differ(monkeypatch):
    monkeypatch.setitem(matmul.SHAPES, "small", (64, 100))
    monkeypatch.setattr(matmul, "decode_matmul", lambda packed, x: 2 * decode_matmul(packed, x))
    with pytest.raises(QMoEError, match="differ"):
        matmul.measure(("small",), (1,))


def test_unknown_shapes_and_too_many_threads_are_refused():
    for arguments in ((("huge",), (1,)), (("mixtral",), (0,)), (("mixtral",), (1,), 10**4)):
        with pytest.raises(SettingError):
            matmul.measure(*arguments)
