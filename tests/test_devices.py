"""Which device a name stands for, on machines that are made up."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from qmoe_lite.devices import find_device
from qmoe_lite.errors import DeviceError, SettingError


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see two GPUs, and the kernels say what the test wants."""
    from qmoe_lite.cuda import launch

    def make(reason):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(launch, "reason", lambda index=0: reason)

    return make


def test_the_cpu_is_taken_where_torch_sees_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == find_device("auto") == find_device("cpu") == torch.device("cpu")


def test_a_gpu_is_taken_where_the_kernels_can_use_it(gpus):
    gpus(None)
    assert find_device() == find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cuda:1") == find_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    from qmoe_lite.cuda import launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "cuda", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(launch, "_missing_library", lambda: None)
    launch.reason.cache_clear()
    with pytest.raises(DeviceError, match="device cuda:2: GPU 2 is not there; torch sees 2"):
        find_device("cuda:2")
    launch.reason.cache_clear()


def test_a_gpu_that_cannot_be_used_is_refused_by_name_and_passed_over_by_auto(gpus):
    gpus("libnvvm was not found. Run: pip install x")
    assert find_device() == torch.device("cpu")
    with pytest.raises(DeviceError, match="device cuda: libnvvm was not found"):
        find_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "mps"])
def test_other_names_are_refused(gpus, name):
    gpus(None)
    with pytest.raises(SettingError, match="expected auto, cpu, cuda or cuda:N"):
        find_device(name)


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is not None, reason="numba-cuda is there")
def test_without_numba_cuda_it_says_what_to_install():
    with pytest.raises(DeviceError, match="numba-cuda"):
        find_device("cuda")
