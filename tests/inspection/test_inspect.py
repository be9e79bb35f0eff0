"""`qmoe inspect`: figures against the files, and what contradicts itself."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys

import matplotlib.image
import pytest
import tiny
from safetensors.torch import load_file

import qmoe_lite as qm
from qmoe_lite.compression.notes import ranges as _ranges
from qmoe_lite.errors import FormatError
from qmoe_lite.inspection.contents import inspect_model, short_name

REPORT = "qmoe_report.json"


@pytest.fixture
def copied(tmp_path, compressed):
    """A compressed directory that a test may damage."""
    return shutil.copytree(compressed[0], tmp_path / "copied")


def edit(file, change):
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def stored(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_against_files(directory):
    """Count bytes and digits anew, from the tensors themselves."""
    tensors, model = stored(directory), qm.load(directory)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, qm.PackedExperts)}
    found = inspect_model(directory)
    assert {row.layer for row in found.projections} == set(layers)
    for row in found.projections:
        experts = layers[row.layer]
        parts = {part: experts.get_buffer(f"{row.projection}_{part}") for part in row.part_bytes}
        assert row.part_bytes == {part: tensor.nbytes for part, tensor in parts.items()}
        digits = [qm.decode(experts.packed(e, row.projection))[0] for e in range(row.experts)]
        assert [tuple(d.shape) for d in digits] == [(row.rows, row.columns)] * experts.num_experts
        zeros = sum(int((d == 0).sum()) for d in digits)
        assert row.zeros == pytest.approx(zeros / row.weights, rel=1e-12)
        assert row.bits_per_weight == 8 * sum(t.nbytes for t in parts.values()) / sum(d.numel() for d in digits)
    assert found.expert_bytes == sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    assert found.other_bytes == sum(t.nbytes for name, t in tensors.items() if ".experts." not in name)
    return found


def test_figures_are_those_of_the_files(compressed):
    out, report = compressed
    found = check_against_files(out)
    assert [row.report for row in found.projections] == report.projections
    assert found.totals["bits_per_weight"] == report.bits_per_weight
    assert found.totals["zeros"] == pytest.approx(report.zeros)
    assert found.held_out_error == report.held_out_error


def test_two_bit_digits_and_fused_families_are_counted_too(tmp_path, switch, tokenizer):
    qm.compress(switch, tmp_path / "two", recipe="nearest", grid=qm.MinMaxTwoBit())
    assert check_against_files(tmp_path / "two").projections[0].level_dtype == "float32"
    source = tiny.make_causal(tmp_path / "mixtral", tokenizer, "mixtral")
    qm.compress(source, tmp_path / "three", recipe="nearest")
    assert any(".block_sparse_moe." in name for name in stored(tmp_path / "three"))
    found = check_against_files(tmp_path / "three")
    assert [row.projection for row in found.projections[:3]] == ["gate_proj", "up_proj", "down_proj"]
    assert [row.short for row in found.projections[::3]] == ["layers.0", "layers.1", "layers.2"]


def test_the_json_document_holds_everything(run, compressed):
    out, report = compressed
    code, printed, noted = run("inspect", out, "--json")
    assert code == 0, noted
    found = json.loads(printed)
    assert [row["report"]["tokens"] for row in found["projections"]] == [p.tokens for p in report.projections]
    assert found["projections"][0]["bits_per_weight"] == report.projections[0].bits_per_weight
    assert found["report"]["settings"]["dampening"] == 0.1
    assert found["report"]["held_out_error"] == report.held_out_error
    assert found["totals"]["matrices"] == 16
    assert "projections" not in found["report"], "each stands in its own row"


def test_the_tables_show_every_figure_within_80_columns(run, compressed):
    out, report = compressed
    code, printed, noted = run("inspect", out)
    assert (code, noted) == (0, "")
    assert max(map(len, printed.splitlines())) <= 80
    words = [line.split() for line in printed.splitlines()]
    for row in report.projections:
        line = next(w for w in words if w[:2] == [short_name(row.layer.partition(".layer.")[0]), row.projection])
        assert line[2] == f"{row.bits_per_weight:.3f}"
        assert line[4:6] == [f"{row.zeros:.3f}", f"{row.error:.4f}"]
    for layer, error in report.held_out_error.items():
        tokens = next(row.tokens for row in report.projections if row.layer == layer)
        figures = [f"{figure:,.0f}" for figure in (min(tokens), statistics.median(tokens), max(tokens))]
        short = short_name(layer.partition(".layer.")[0])
        assert any(w[0] == short and w[1:5] == [*figures, f"{error:.4f}"] for w in words if w)
    assert ["all", "all", f"{report.bits_per_weight:.3f}"] in [w[:3] for w in words]


def test_a_directory_s_name_is_shown_as_it_is(run, tmp_path, compressed):
    odd = shutil.copytree(compressed[0], tmp_path / "a[b]$c$[x]")
    code, printed, _ = run("inspect", odd, "--plot", tmp_path / "a.png")
    assert code == 0
    assert str(odd) in "".join(line.strip() for line in printed.splitlines()[:4])


def test_inspect_has_help_and_an_example(run):
    code, printed, _ = run("inspect", "--help")
    assert code == 0
    assert "Example: qmoe inspect" in " ".join(printed.split())


def test_experts_without_a_token_are_named(run, tmp_path, switch, text_file):
    few = {"samples": 1, "sequence_length": 32, "validation_samples": 0, "blend_tokens": 0}
    report = qm.compress(switch, tmp_path / "out", calibration=text_file, **few)
    code, printed, _ = run("inspect", tmp_path / "out")
    assert code == 0
    tables = printed.partition("Calibration tokens per expert")
    for row in report.projections:
        empty = [e for e, count in enumerate(row.tokens) if count == 0]
        line = next(t for t in tables[2].splitlines() if t.startswith(short_name(row.layer.partition(".layer.")[0])))
        assert line.rstrip().endswith(f" {_ranges(empty)}" if empty else "-")
    assert any(0 in row.tokens for row in report.projections)
    nearest = sum(row.hessian_classes.get("nearest", 0) for row in report.projections)
    last = next(line.split() for line in tables[0].splitlines() if line.startswith("all        all"))
    assert int(last[-1]) == nearest > 0
    assert "near = none: to nearest" in " ".join(tables[0].split())
    assert report.degraded
    assert all(f"note: {line}" in printed for line in report.degraded)


def test_ranges_are_short():
    assert _ranges([]) == ""
    assert _ranges([3]) == "3"
    assert _ranges([0, 1, 5, 7, 8, 9]) == "0-1, 5, 7-9"


@pytest.mark.parametrize(
    ("block", "short"),
    [("encoder.block.1", "encoder.1"), ("model.layers.12", "layers.12"), ("model.decoder.layers.3", "decoder.3")],
)
def test_layers_have_short_names(block, short):
    assert short_name(block) == short


def test_layers_can_be_chosen_and_the_head_stays_whole(run, compressed):
    code, printed, _ = run("inspect", compressed[0], "--layers", "enc*")
    assert code == 0
    assert "encoder.1" in printed
    assert "decoder.1" not in printed
    assert "16 matrices" in printed
    code, printed, noted = run("inspect", compressed[0], "--layers", "layers.*")
    assert (code, printed) == (1, "")
    assert "no layer fits 'layers.*'; expected a pattern for encoder.1 to decoder.1" in noted


def test_a_model_that_transformers_saved_again_has_no_report(run, tmp_path, compressed):
    qm.load(compressed[0]).save_pretrained(tmp_path / "again")
    code, printed, noted = run("inspect", tmp_path / "again")
    assert code == 0, noted
    assert "There is no qmoe_report.json: errors, Hessians and tokens are not known." in printed
    heading = next(line for line in printed.splitlines() if line.startswith("layer"))
    assert heading.split() == ["layer", "projection", "bits", "codes", "zeros"]
    before, after = inspect_model(compressed[0]), inspect_model(tmp_path / "again")
    assert [row.part_bytes for row in after.projections] == [row.part_bytes for row in before.projections]
    assert after.totals == before.totals
    assert after.report is None


def test_what_config_json_does_not_say_is_unknown(run, copied):
    def forget(config):
        for name in ("grid", "recipe", "versions"):
            del config["quantization_config"][name]

    edit(copied / "config.json", forget)
    code, printed, _ = run("inspect", copied)
    assert code == 0
    assert "qmoe-lite unknown, recipe unknown" in printed
    books = json.loads((copied / "config.json").read_text())["quantization_config"]["codebooks"]
    bits = ", ".join(map(str, sorted({book["bits"] for book in books})))
    assert f"unknown, levels bfloat16, codewords of {bits} bits" in printed


def test_rounding_without_text_has_no_tokens_to_show(run, tmp_path, switch):
    qm.compress(switch, tmp_path / "out", recipe="nearest")
    code, printed, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert "Rounded without calibration text" in printed
    assert "experts without a token" not in printed


def rows_of(content):
    return content["projections"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: rows_of(c)[1].update(bits_per_weight=0.5), r"wo has bits_per_weight 0\.5; the directory has"),
        (lambda c: rows_of(c)[0].update(codeword_bits=13), "wi has codeword_bits 13; the directory has"),
        (lambda c: rows_of(c)[0].update(zeros=0.5), r"wi has zeros 0\.5"),
        (lambda c: rows_of(c)[0].update(columns=25), "has columns 25; the directory has 24"),
        (lambda c: rows_of(c)[0]["tokens"].pop(), "has experts with a count of tokens 3"),
        (lambda c: rows_of(c)[0].update(hessian_classes={}), "has experts with a Hessian class 0"),
        (lambda c: rows_of(c).pop(), "says nothing of decoder.block.1.*wo"),
        (lambda c: rows_of(c).append({**rows_of(c)[0], "projection": "wx"}), r"reports on .*wx, which the model lacks"),
        (lambda c: c["held_out_error"].update(elsewhere=0.1), "reports on elsewhere"),
        (lambda c: rows_of(c)[0].update(error="small"), "is no report of qmoe compress"),
        (lambda c: rows_of(c)[0].pop("error"), "is no report of qmoe compress"),
        (lambda c: c["sizes"].clear(), "is no report of qmoe compress"),
        (lambda c: c.update(degraded=None), "is no report of qmoe compress"),
    ],
)
def test_a_report_that_contradicts_the_directory_is_an_error(copied, change, message):
    edit(copied / REPORT, change)
    with pytest.raises(FormatError, match=message) as caught:
        inspect_model(copied)
    assert "emove" in str(caught.value)


def test_a_report_of_a_later_version_is_read(copied):
    edit(copied / REPORT, lambda content: (content.update(weather="fine"), rows_of(content)[0].update(colour=7)))
    assert inspect_model(copied).report is not None


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"projections": 3}'])
def test_a_damaged_report_is_one_line(run, copied, content):
    (copied / REPORT).write_text(content)
    code, printed, noted = run("inspect", copied)
    assert (code, printed, len(noted.splitlines())) == (1, "", 1)
    assert "qmoe_report.json is no report of qmoe compress. Remove it" in noted


def test_a_truncated_or_missing_shard_is_one_line(run, copied):
    shard = sorted(copied.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    code, printed, noted = run("inspect", copied)
    assert (code, printed, len(noted.splitlines())) == (1, "", 1)
    assert f"{shard} is damaged" in noted
    shard.unlink()
    code, _, noted = run("inspect", copied)
    assert code == 1
    assert f"lacks the shard {shard.name}" in noted


def test_what_is_not_compressed_is_refused(run, tmp_path, switch):
    for path, message in ((switch, "is not compressed by qmoe. Run: qmoe compress"), (tmp_path, "no config.json")):
        code, printed, noted = run("inspect", path)
        assert (code, printed, len(noted.splitlines())) == (1, "", 1)
        assert message in noted


def test_zeros_are_not_known_where_the_code_was_fitted_to_other_digits(run, copied):
    def double(config):  # the same shares give the same table
        for book in config["quantization_config"]["codebooks"]:
            book["counts"] = [2 * count for count in book["counts"]]

    edit(copied / "config.json", double)
    code, printed, _ = run("inspect", copied)
    assert code == 0
    assert next(line.split() for line in printed.splitlines() if line.startswith("all        all"))[4] == "-"
    assert "% zeros" not in printed
    assert inspect_model(copied).totals["zeros"] is None


def test_layers_that_config_json_does_not_name_are_an_error(copied):
    edit(copied / "config.json", lambda config: config["quantization_config"]["layers"].popitem())
    with pytest.raises(FormatError, match="names other compressed layers"):
        inspect_model(copied)


def test_the_picture_has_a_panel_for_what_is_known(run, tmp_path, copied):
    assert run("inspect", copied, "--plot", tmp_path / "all.png")[0] == 0
    (copied / REPORT).unlink()
    assert run("inspect", copied, "--plot", tmp_path / "one.png", "--json")[0] == 0
    pixels = [matplotlib.image.imread(tmp_path / name) for name in ("all.png", "one.png")]
    assert pixels[0].shape[0] == 3 * pixels[1].shape[0]
    for picture in pixels:
        assert len({tuple(color) for row in picture for color in row}) > 20, "nothing is drawn"
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.jpg", "the picture's name is a.jpg; expected one that ends in .png"), ("no/a.png", "cannot be written")],
)
def test_a_picture_that_cannot_be_written_is_one_line(run, tmp_path, compressed, name, message):
    code, printed, noted = run("inspect", compressed[0], "--plot", tmp_path / name)
    assert (code, printed, len(noted.splitlines())) == (1, "", 1)
    assert message in noted


def test_without_matplotlib_a_picture_is_refused_with_what_to_install(run, tmp_path, compressed, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, printed, noted = run("inspect", compressed[0], "--plot", tmp_path / "a.png")
    assert (code, printed) == (1, "")
    assert "pip install 'qmoe-lite[plot]'" in noted
    assert run("inspect", compressed[0])[0] == 0, "tables need no matplotlib"


def test_a_narrow_terminal_cuts_no_digit(run, compressed, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    code, out, _ = run("inspect", compressed[0])
    plain = re.sub("\x1b\\[[0-9;]*m", "", out)
    assert code == 0
    assert "…" not in plain
    assert max(map(len, plain[plain.index("layer ") : plain.index("Largest")].splitlines())) <= 40
