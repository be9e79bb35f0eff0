"""Seeds, threads, a kept folder of compiled kernels, and small models that several test files use."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import sharing

os.environ.setdefault("NUMBA_CACHE_DIR", str(sharing.kernel_cache()))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# workers take a core each; numba may have two threads, of which only the tests of threads use the second
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")

# full collections walk all that torch, transformers and numba have made: an eighth of the suite's time, by default
gc.set_threshold(100_000, 20, 20)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: tests send Ctrl-C to programs
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported stays


@pytest.fixture(scope="session", autouse=True)
def _compiled_once() -> None:
    from numba.core.caching import IndexDataCacheFile
    from numba.core.dispatcher import Dispatcher

    from qmoe_lite.coding import dictionary

    sharing.compile_once(Dispatcher, IndexDataCacheFile)
    sharing.fit_once(dictionary)
    if (launch := sys.modules.get("qmoe_lite.cuda.launch")) is not None:  # whoever compiles kernels has imported it
        sharing.keep_ptx(launch.Kernel)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import numba
    import numpy as np
    import torch

    np.random.seed(0)
    torch.manual_seed(0)
    numba.set_num_threads(1)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Give a function: name, function that makes something at a path -> that path, made once for all workers."""
    return functools.partial(sharing.made_once, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A process that runs code in forks of itself, each as good as new: see forking.Forks."""
    import forking

    found = forking.Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def tokenizer():
    import tiny

    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    import tiny

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny.make_text(seed=0, words=4000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def switch(made_once, tokenizer):
    """A random Switch, every second block sparse, whose experts matter: see tiny.make_switch."""
    import tiny

    return made_once("switch", lambda place: tiny.make_switch(place, tokenizer))


@pytest.fixture(scope="session")
def causal(made_once, tokenizer):
    """Give a function that makes a tiny random model of a causal family, once each."""
    import tiny

    def make(model_type: str) -> Path:
        return made_once(model_type, lambda place: tiny.make_causal(place, tokenizer, model_type))

    return make


@pytest.fixture(scope="session")
def compressed_causal(made_once, causal, text_file):
    """Give a function that compresses such a model, once each."""

    def make(model_type: str) -> Path:
        return made_once(f"{model_type}-compressed", lambda place: _compress(causal(model_type), place, text_file))

    return make


@pytest.fixture(scope="session")
def compressed(made_once, switch, text_file):
    """The same model, compressed with calibration; the report beside it."""

    def make(place: Path) -> None:
        report = _compress(switch, place, text_file)
        place.with_suffix(".report").write_bytes(pickle.dumps(report))

    place = made_once("switch-compressed", make)
    return place, pickle.loads(place.with_suffix(".report").read_bytes())


def _compress(model: Path, out: Path, text: Path):
    import torch

    from qmoe_lite import MinMaxTernary, compress

    # one width of codewords for all models: each other one would be a variant of the kernels to compile
    settings = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "codeword_bits": 10}
    return compress(model, out, calibration=text, grid=MinMaxTernary(torch.bfloat16), **settings)


@pytest.fixture(scope="session")
def in_windows(made_once, compressed, compressed_causal):
    """Give a function that puts digits of codes of windows into such a model, once each."""
    from checks import recode_in_windows

    def make(model_type: str) -> Path:
        found = compressed[0] if model_type == "switch_transformers" else compressed_causal(model_type)
        return made_once(f"{model_type}-windows", lambda place: recode_in_windows(shutil.copytree(found, place)))

    return make


@pytest.fixture
def directory(request, compressed, tmp_path):
    """Give a function: model type -> a copy of its compressed directory, where counts may be written.

    "mixtral of windows": with digits of such codes.
    """

    def get(name="qwen3_moe"):
        model_type = name.removesuffix(" of windows")
        found = compressed[0]
        if model_type != name:
            found = request.getfixturevalue("in_windows")(model_type)
        elif model_type != "switch_transformers":
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
        capsys.readouterr()  # what fixtures printed
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call
