"""The judge of accuracy on a small model, and the text that it is given."""

from __future__ import annotations

import json

import pytest
import tiny

from qmoe_lite.bench import rate_codes, rate_matmul
from qmoe_lite.bench._show.accuracy import draw_accuracy, print_accuracy
from qmoe_lite.bench._show.tables import print_rate_codes, print_rate_matmul
from qmoe_lite.bench.accuracy import DENSE, LLAMA_CPP, NEAREST, PAPER, AccuracyReport, Point, measure
from qmoe_lite.bench.real_model import plain, write_text
from qmoe_lite.errors import SettingError

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_experts": 4, "moe_intermediate_size": 64}


@pytest.mark.slow
def test_a_model_is_measured_at_its_rates(tmp_path, tokenizer, text_file, capsys):
    model = tiny.make_causal(tmp_path / "m", tokenizer, "qwen3_moe", **SIZES, mlp_only_layers=[], intermediate_size=48)
    settings = {"rates": (2.5, 4.0), "samples": 24, "sequence_length": 32, "held_out": 6, "directory": tmp_path}
    report = measure(model, text_file, text_file, **settings, tuned=True, settings={"validation_samples": 2})
    names = [point.name for point in report.points]
    assert [name for name in names if "tuned" not in name] == [DENSE, NEAREST, PAPER, "--rate 2.5", "--rate 4"]
    assert f"{PAPER}, tuned" in names
    before, after = (next(p for p in report.points if p.name == name) for name in (PAPER, f"{PAPER}, tuned"))
    assert after.bits == before.bits
    assert after.loss != before.loss
    bits = {point.name: point.bits for point in report.points}
    assert (bits["--rate 2.5"], bits["--rate 4"]) == pytest.approx((2.5, 4.0), rel=0.01)
    for point in report.points[1:]:
        assert point.gap == pytest.approx(point.loss - report.points[0].loss)
    assert (report.tokens, report.peers) == (6 * 31, ())
    assert not list(tmp_path.glob("qmoe-accuracy-*"))
    print_accuracy(report)
    assert "--rate 2.5" in capsys.readouterr().out
    json.dumps(report.to_json())
    with pytest.raises(SettingError, match=r"expected 0\.6 to 4"):
        measure(model, text_file, text_file, rates=(9,), baselines=False)


def test_llama_cpps_types_stand_between_ours(tmp_path, capsys):
    points = (Point(DENSE, 16.0, 3.9, 0, 0), Point("--rate 2", 2.0, 4.6, 0.7, 0.02, "degraded"))
    report = AccuracyReport("m", points, LLAMA_CPP, 32, 1024, 1000, "here")
    print_accuracy(report)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    lines = [line.split()[0] for line in printed.splitlines() if "llama.cpp IQ" in line or "--rate" in line]
    assert lines == ["llama.cpp"] * 2 + ["--rate"] + ["llama.cpp"] * 4
    draw_accuracy(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_products_at_a_rate_are_timed(monkeypatch, capsys):
    monkeypatch.setattr("qmoe_lite.bench.matmul._SECONDS", 0.001)
    monkeypatch.setattr("qmoe_lite.bench.matmul.COLD_BYTES", 1 << 16)
    monkeypatch.setitem(rate_matmul.SHAPES, "small", (64, 256))
    report = rate_matmul.measure((2.0,), ("small",), (1, 5))
    assert [speed.tokens for speed in report.speeds] == [1, 5]
    assert report.speeds[0].bits_per_weight == pytest.approx(2.0, rel=0.2)
    print_rate_matmul(report)
    assert max(map(len, capsys.readouterr().out.splitlines()[:8])) <= 80
    with pytest.raises(SettingError, match="unknown"):
        rate_matmul.measure((2.0,), ("none",))


def test_uniform_digits_are_coded_at_a_rate(capsys):
    report = rate_codes.measure((2.0,), 600_000)
    for found in report.rates:
        assert found.entropy < found.by_bits["10"] < 1.15 * found.entropy
        assert found.by_bits["10"] < min(found.stored.values())
        assert found.stored["2048"] == pytest.approx(found.rate, rel=0.03)
        assert min(found.encode_speed, found.decode_speed) > 0
    print_rate_codes(report)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    for arguments in (((9.0,), 30_000), ((2.0,), 100)):
        with pytest.raises(SettingError):
            rate_codes.measure(*arguments)


def test_a_rate_and_a_model_do_not_go_together(run):
    code, printed, noted = run("bench", "rates", "--rate", 2, "--model", "some")
    assert (code, printed, "Leave --model" in noted) == (1, "", True)


def test_tagged_text_becomes_plain_and_every_fifth_file_is_held_out(tmp_path):
    assert plain("The/at dog/nn ,/, he/pps said/vbd ./.\n``/`` So/rb ''/'' ./.") == 'The dog, he said. "So".'
    for i in range(10):
        (tmp_path / f"ca{i:02d}").write_text(f"text/nn {i}/cd ./.\n")
    write_text(tmp_path, tmp_path)
    assert (tmp_path / "held_out.txt").read_text() == "text 0.\n\ntext 5."
    assert (tmp_path / "calibration.txt").read_text().count("text") == 8
