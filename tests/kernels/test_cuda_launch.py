"""What stands between a twin and the GPU: reasons, arrays, and what a launch hands to the driver."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.cuda import codec, cubins, gather, launch, variants
from qmoe_lite.errors import DeviceError, DtypeError, SettingError, ShapeError


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """One that is the same with and without numba-cuda."""
    monkeypatch.setattr(cubins, "_compiler", lambda: ("numba 1",))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that everybody reports."""
    monkeypatch.setattr(launch, "cuda", types.SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "_missing_library", lambda: None)
    launch.reason.cache_clear()
    yield
    launch.reason.cache_clear()


def test_a_whole_installation_is_available(gpu):
    assert launch.available()
    assert launch.reason() is None


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        (launch, "cuda", None, r"numba-cuda is not installed.*pip install 'qmoe-lite\[cuda\]'"),
        (launch, "cuda", types.SimpleNamespace(is_available=lambda: False), "no NVIDIA GPU or driver.*Install"),
        (torch.cuda, "is_available", lambda: False, "torch .* cannot use the GPU.*pytorch.org"),
        (launch, "_missing_library", lambda: "nvvm", "libnvvm was not found.*CUDA_HOME"),
        (torch.cuda, "get_device_capability", lambda index: (7, 5), r"capability 7\.5; expected 8\.0"),
    ],
)
def test_what_is_missing_is_said_in_one_line(gpu, monkeypatch, where, name, value, message):
    monkeypatch.setattr(where, name, value)
    assert not launch.available()
    kernel = launch.kernel("int8*")(lambda values: None)
    with pytest.raises(DeviceError, match=message) as caught:
        kernel._load("int8*", 0)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_the_libraries_are_looked_for_by_name(monkeypatch):
    class Missing(RuntimeError):
        pass

    def load(name):
        if name == "nvrtc":
            raise Missing

    pathfinder = types.SimpleNamespace(DynamicLibNotFoundError=Missing, load_nvidia_dynamic_lib=load)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    assert launch._missing_library() == "nvrtc"
    pathfinder.load_nvidia_dynamic_lib = lambda name: None
    assert launch._missing_library() is None


def test_arrays_that_are_not_on_a_gpu_are_refused():
    for array in (torch.zeros(3), np.zeros(3)):
        with pytest.raises(SettingError, match=r"x is on .*; expected a GPU"):
            launch.as_tensor(array, "x")
    with pytest.raises(DtypeError, match="x is a list"):
        launch.as_tensor([1.0], "x")


def test_an_array_of_another_library_is_taken_without_a_copy(monkeypatch):
    class Foreign:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **settings):
            return self.tensor.__dlpack__()

    tensor = torch.arange(3)
    monkeypatch.setattr(launch, "from_dlpack", lambda array: array.tensor)
    assert launch.as_tensor(Foreign(tensor), "x").data_ptr() == tensor.data_ptr()


@pytest.fixture
def driver(gpu, monkeypatch, tmp_path):
    """A driver that writes down what it is told; CPU tensors stand for the GPU's, whose number is None."""
    told = []
    here = types.SimpleNamespace(told=told, current=None, stream=7, compiled=[])

    @contextlib.contextmanager
    def switch(index):
        before, here.current = here.current, index
        yield
        here.current = before

    class Code:
        def __init__(self, code):
            self.code = code

        @staticmethod
        def from_cubin(code):
            return Code(code)

        def get_kernel(self, name):
            return f"{name} of {self.code.decode()}"

    def ptx(kernel, signature):
        here.compiled.append(signature)
        return f".visible .entry {signature[:5]}("

    core = types.SimpleNamespace(
        Device=lambda index: types.SimpleNamespace(set_current=lambda: told.append(("current", index))),
        LaunchConfig=lambda **settings: settings,
        ObjectCode=Code,
        Stream=types.SimpleNamespace(from_handle=lambda handle: f"stream {handle}"),
        launch=lambda *arguments: told.append(arguments),
    )
    monkeypatch.setattr(launch, "_core", lambda: core)
    monkeypatch.setattr(launch, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(launch, "_current_device", lambda: here.current)
    monkeypatch.setattr(launch, "_current_stream", lambda index: here.stream)
    monkeypatch.setattr(launch, "_entered", launch._Entered())
    monkeypatch.setattr(launch, "_open_shared", lambda *arguments: told.append(("opened", *arguments)))
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(launch.Kernel, "ptx", ptx)
    monkeypatch.setattr(launch, "link", lambda ptx, capability: Code(f"code {capability}".encode()))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    for cached in (launch._stream, launch._config):
        cached.cache_clear()
    yield here
    for cached in (launch._stream, launch._config):
        cached.cache_clear()


def idle(values, codes, count, scale):
    pass


@pytest.fixture
def kernel(driver):
    return launch.kernel("float16*, uint8*, int32, float32", "int64*, uint8*, int32, float32")(idle)


VALUES, CODES = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8)


def test_a_launch_hands_over_addresses_and_scalars_of_the_declared_width(driver, kernel):
    for _ in range(2):
        kernel.launch((5, 2), 64, VALUES, CODES, 9, 0.1, shared_bytes=16)
        stream, config, compiled, *arguments = driver.told[-1]
        assert (stream, compiled) == ("stream 7", "int64 of code (9, 0)")
        assert config == {"grid": (5, 2), "block": 64, "shmem_size": 16}
        assert arguments == [VALUES.data_ptr(), CODES.data_ptr(), 9, np.float32(0.1)]
        assert [type(argument) for argument in arguments] == [int, int, int, np.float32]
    kernel.launch(1, 32, VALUES, CODES, np.int8(9), np.float64(0.1))
    assert [type(argument) for argument in driver.told[-1][3:]] == [int, int, int, np.float32]
    assert len(driver.compiled) == 1


def test_arguments_that_no_signature_takes_are_refused(driver, kernel):
    for _ in range(2):  # the second time with a kernel that is ready
        with pytest.raises(DtypeError, match="idle got"):
            kernel.launch(1, 32, VALUES.int(), CODES, 9, 0.1)
        with pytest.raises(DtypeError, match="idle got"):
            kernel.launch(1, 32, VALUES, 3, 9, 0.1)
        with pytest.raises(DtypeError, match="idle got"):
            kernel.launch(1, 32, VALUES, CODES, CODES, 0.1)
        with pytest.raises(DtypeError, match="idle got"):
            kernel.launch(1, 32, VALUES, CODES, 9)
        with pytest.raises(ShapeError, match="strides"):
            kernel.launch(1, 32, torch.zeros(6, dtype=torch.int64)[::2], CODES, 9, 0.1)
        with pytest.raises(SettingError, match="cpu and meta"):
            kernel.launch(1, 32, VALUES, CODES.to("meta"), 9, 0.1)
        with pytest.raises(OverflowError):
            kernel.launch(1, 32, VALUES, CODES, 1 << 31, 0.1)
        with pytest.raises((TypeError, ValueError)):
            kernel.launch(1, 32, VALUES, CODES, 9, "x")
        assert not any(isinstance(each[0], str) and each[0].startswith("stream") for each in driver.told)
        driver.told.clear()
        kernel.launch(1, 32, VALUES, CODES, 9, 0.1)
        driver.told.clear()


def test_the_current_stream_is_asked_for_at_each_launch(driver, kernel):
    for driver.stream in (7, 8, 7):
        kernel.launch(1, 32, VALUES, CODES, 9, 0.1)
        assert driver.told[-1][0] == f"stream {driver.stream}"


def test_a_thread_s_first_launch_makes_the_context_current(driver, kernel):
    def launches():
        driver.told.clear()
        for _ in range(3):
            kernel.launch(1, 32, VALUES, CODES, 9, 0.1)
        return [each[0] for each in driver.told]

    assert launches()[-4:] == ["current", "stream 7", "stream 7", "stream 7"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(launches).result() == ["current", "stream 7", "stream 7", "stream 7"]


def test_another_current_gpu_stays_current(driver, kernel):
    kernel.launch(1, 32, VALUES, CODES, 9, 0.1)
    driver.told.clear()
    driver.current = 3
    streams = []
    launch_it = launch._core().launch
    launch._core().launch = lambda *arguments: (streams.append(driver.current), launch_it(*arguments))
    for _ in range(2):
        kernel.launch(1, 32, VALUES, CODES, 9, 0.1)
    assert driver.current == 3
    assert streams == [None, None], "the arrays' GPU was current at the launch"
    assert [each[0] for each in driver.told] == ["current", "stream 7"] * 2


def test_more_shared_memory_is_asked_for_once(driver, kernel):
    for shared_bytes in (1 << 10, 60 << 10, 50 << 10, 60 << 10, 70 << 10):
        kernel.launch(1, 32, VALUES, CODES, 9, 0.1, shared_bytes=shared_bytes)
    opened = [each[2] for each in driver.told if each[0] == "opened"]
    assert opened == [60 << 10, 70 << 10]


def test_a_compiled_kernel_is_found_again_by_another_process(driver, kernel, tmp_path):
    def again():
        driver.compiled.clear()
        launch.kernel(*kernel.signatures)(idle).launch(1, 32, VALUES, CODES, 9, 0.1)
        assert driver.told[-1][2] == "int64 of code (9, 0)"
        return len(driver.compiled)

    assert again() == 1
    assert again() == 0
    (entry,) = (tmp_path / "qmoe-lite" / "cuda").iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole[:-1] + b"?", whole + b"?"):
        entry.write_bytes(damaged)
        assert again() == 1
        assert entry.read_bytes() == whole
    entry.unlink()
    entry.mkdir()  # neither to be read nor to be written
    assert again() == 1
    assert again() == 1
    assert [each.name for each in entry.parent.iterdir()] == [entry.name], "no half-written file stays"


@pytest.mark.parametrize("place", ["/proc/nothing", "relative", ""])
def test_a_place_that_cannot_be_written_to_costs_nothing_but_time(driver, kernel, monkeypatch, tmp_path, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", place)
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    kernel.launch(1, 32, VALUES, CODES, 9, 0.1)
    assert len(driver.compiled) == 1
    assert not list(tmp_path.iterdir())


def test_the_user_s_cache_directory_is_taken(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cubins.directory() == Path("/x/qmoe-lite/cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/y")
    assert cubins.directory() == Path("/home/y/.cache/qmoe-lite/cuda")


def test_the_compiler_s_own_libraries_are_asked_for_their_versions(monkeypatch):
    monkeypatch.undo()
    if launch.cuda is None:
        pytest.skip("numba-cuda is missing")
    found = cubins._compiler()
    assert f"numba {numba.__version__}" in found
    assert any(re.fullmatch(r"libnvvm \(\d+, \d+\)", each) for each in found)
    assert any(re.fullmatch(r"libnvjitlink \(\d+, \d+\)", each) for each in found)


SCALE = 3


def scaled(value):
    return value * SCALE


def factory(width, table):
    def uses(values):
        for i in range(width):
            values[i] = scaled(values[i]) + table[0]

    return uses


def test_a_kernel_is_known_by_all_that_it_is_made_of(monkeypatch):
    def key(function, *settings):
        return cubins.cubin_key(function, *settings)

    function = factory(2, (1, 2))
    name = key(function, "int32*", (9, 0))
    assert name == key(factory(2, (1, 2)), "int32*", (9, 0))
    others = [
        key(factory(3, (1, 2)), "int32*", (9, 0)),
        key(factory(2, (1, 3)), "int32*", (9, 0)),
        key(factory(2, np.array([1, 2])), "int32*", (9, 0)),
        key(function, "int64*", (9, 0)),
        key(function, "int32*", (8, 0)),
    ]
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "SCALE", 4)
        others.append(key(function, "int32*", (9, 0)))
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "scaled", numba.njit(inline="always")(scaled))
        others.append(key(function, "int32*", (9, 0)))
        patch.setitem(globals(), "scaled", numba.njit(inline="always")(lambda value: value + SCALE))
        others.append(key(function, "int32*", (9, 0)))
    with monkeypatch.context() as patch:
        patch.setattr(cubins, "_compiler", lambda: ("numba 0",))
        others.append(key(function, "int32*", (9, 0)))
    assert len({name, *others}) == 1 + len(others)
    assert key(factory(2, object())) is None, "what cannot be told apart is not kept"


def test_kernels_of_one_source_have_names_of_their_own():
    codebook, wider = (Codebook.fit([115, 1770, 115], bits=bits) for bits in (10, 11))
    both = [variants.choose_variant((each,), 1, 4096, 1, None, 96 << 10) for each in (codebook, wider)]
    first, second = (cubins.cubin_key(gather.gather_kernel(variant).py_func) for variant in both)
    assert first is not None
    assert first != second
    gather.gather_kernel.cache_clear()
    assert cubins.cubin_key(gather.gather_kernel(both[0]).py_func) == first


def test_a_changed_helper_is_noticed(monkeypatch):
    variant = variants.choose_variant((Codebook.fit([1, 8, 1]),), 1, 64, 1, None, 96 << 10)
    product = gather.gather_kernel(variant).py_func
    decode = codec._decode_kernel.py_func
    named = [name for name in product.__code__.co_names if hasattr(getattr(gather, name, None), "_defn")]
    helpers = [(codec, decode, "entry_field", "py_func"), *((gather, product, name, "_defn") for name in named)]
    assert len(helpers) > 1 or launch.cuda is None
    for module, kernel, name, inner in helpers:
        before = cubins.cubin_key(kernel)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, types.SimpleNamespace(**{inner: lambda *arguments: 0}))
            assert cubins.cubin_key(kernel) not in (before, None)
        assert cubins.cubin_key(kernel) == before
