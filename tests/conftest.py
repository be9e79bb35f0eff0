"""Seeds, a compilation cache per state of the sources, and small models that several test files use."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_sources = sorted([*(ROOT / "qmoe_lite").rglob("*.py"), *(ROOT / "cuda").rglob("*.py")])
_state = hashlib.sha256(b"".join(p.read_bytes() for p in _sources)).hexdigest()[:16]
# numba's cache does not notice an edit in an imported helper: one folder for each state of the sources
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"qmoe-numba-{os.getuid()}-{_state}"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: tests send Ctrl-C to programs
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny.make_text(seed=0, words=4000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def switch(tmp_path_factory, tokenizer):
    """A random Switch, every second block sparse, whose experts matter: see tiny.make_switch."""
    return tiny.make_switch(tmp_path_factory.mktemp("switch") / "model", tokenizer)


@pytest.fixture(scope="session")
def causal(tmp_path_factory, tokenizer):
    """Give a function that makes a tiny random model of a causal family, once each."""

    @functools.cache
    def make(model_type: str) -> Path:
        return tiny.make_causal(tmp_path_factory.mktemp(model_type) / "model", tokenizer, model_type)

    return make


@pytest.fixture(scope="session")
def compressed_causal(tmp_path_factory, causal, text_file):
    """Give a function that compresses such a model, once each."""

    @functools.cache
    def make(model_type: str) -> Path:
        from qmoe_lite import compress

        out = tmp_path_factory.mktemp(model_type) / "out"
        compress(causal(model_type), out, calibration=text_file, samples=24, sequence_length=32, validation_samples=2)
        return out

    return make


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, switch, text_file):
    """The same model, compressed with calibration; the report beside it."""
    from qmoe_lite import compress

    out = tmp_path_factory.mktemp("compressed") / "out"
    report = compress(switch, out, calibration=text_file, samples=24, sequence_length=32, validation_samples=2)
    return out, report


@pytest.fixture
def directory(request, compressed, tmp_path):
    """Give a function: model type -> a copy of its compressed directory, where counts may be written."""

    def get(model_type="qwen3_moe"):
        found = compressed[0]
        if model_type != "switch_transformers":
            found = request.getfixturevalue("compressed_causal")(model_type)
        shutil.copytree(found, tmp_path / model_type)
        return tmp_path / model_type

    return get


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `qmoe ARGS`; give (exit code, stdout, stderr)."""

    from qmoe_lite.cli.main import main

    def call(*args: object):
        monkeypatch.setattr(sys, "argv", ["qmoe", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call
