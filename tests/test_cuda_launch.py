"""What stands between a twin and the GPU: reasons, arrays, and what a launch hands to the driver."""

from __future__ import annotations

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

from qmoe_lite.cuda import launch
from qmoe_lite.errors import DeviceError, DtypeError, SettingError, ShapeError


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that everybody reports."""
    monkeypatch.setattr(launch, "cuda", types.SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
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
def driver(gpu, monkeypatch):
    """A driver that writes down what it is told; CPU tensors stand for the GPU's."""
    told = []
    core = types.SimpleNamespace(
        Device=lambda index: types.SimpleNamespace(set_current=lambda: told.append(("current", index))),
        LaunchConfig=lambda **settings: settings,
        Stream=types.SimpleNamespace(from_handle=lambda handle: f"stream {handle}"),
        launch=lambda *arguments: told.append(arguments),
    )
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(launch, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(launch.Kernel, "ptx", lambda self, signature, capability: f".visible .entry {signature[:5]}(")
    code = types.SimpleNamespace(get_kernel=lambda name: f"kernel {name}")
    monkeypatch.setattr(launch, "link", lambda ptx, capability: code)
    launch._stream.cache_clear()
    yield told
    launch._stream.cache_clear()


@launch.kernel("float16*, uint8*, int32, float32", "int64*, uint8*, int32, float32")
def _idle_kernel(values, codes, count, scale):
    pass


def test_a_launch_hands_over_addresses_and_scalars_of_the_declared_width(driver):
    values, codes = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8)
    _idle_kernel.launch((5, 2), 64, values, codes, 9, 0.1, shared_bytes=16)
    current, (stream, config, compiled, *arguments) = driver
    assert current[0] == "current"
    assert (stream, compiled) == ("stream 7", "kernel int64")
    assert config == {"grid": (5, 2), "block": 64, "shmem_size": 16}
    assert arguments == [values.data_ptr(), codes.data_ptr(), np.int32(9), np.float32(0.1)]
    assert [type(argument) for argument in arguments] == [int, int, np.int32, np.float32]


def test_arguments_that_no_signature_takes_are_refused(driver):
    values, codes = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(DtypeError, match="_idle_kernel got"):
        _idle_kernel.launch(1, 32, values.int(), codes, 9, 0.1)
    with pytest.raises(DtypeError, match="_idle_kernel got"):
        _idle_kernel.launch(1, 32, values, 3, 9, 0.1)
    with pytest.raises(ShapeError, match="strides"):
        _idle_kernel.launch(1, 32, values[::2], codes, 9, 0.1)
    with pytest.raises(SettingError, match="cpu and meta"):
        _idle_kernel.launch(1, 32, values, codes.to("meta"), 9, 0.1)
    with pytest.raises(OverflowError):
        _idle_kernel.launch(1, 32, values, codes, 1 << 31, 0.1)
    assert not driver
