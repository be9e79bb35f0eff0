"""qm.encode, decode, decode_matmul and PackedMatrix.dense take the CUDA twin where the arrays are on a GPU.

Tensors that say they are stand for the GPU's, and an emulator for the GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("greenlet", reason="the emulator runs one greenlet a thread; pip install 'qmoe-lite[dev]'")

import emulator

import qmoe_lite as qm
from qmoe_lite.coding import validation
from qmoe_lite.cuda import codec as cuda_codec
from qmoe_lite.cuda import launch
from qmoe_lite.errors import FormatError, SettingError

CODEBOOK = qm.Codebook.fit([115, 1770, 115], bits=8)


class OnGpu(torch.Tensor):
    is_cuda = True


def on_gpu(tensor):
    return tensor.as_subclass(OnGpu)


@pytest.fixture
def launched(monkeypatch):
    """Emulate the GPU; give the names of the kernels that ran."""
    emulator.install(monkeypatch, seed=3)
    names, run = [], launch.Kernel.launch

    def noted(kernel, *arguments, **settings):
        names.append(kernel.__name__)
        run(kernel, *arguments, **settings)

    monkeypatch.setattr(launch.Kernel, "launch", noted)
    return names


@pytest.fixture
def sample():
    rng = np.random.default_rng(5)
    digits = torch.from_numpy(rng.choice([-1, 0, 0, 0, 1], size=(5, 63)).astype(np.int8))
    return digits, torch.tensor([[-0.5, 0.25]] * 5)


def moved(packed):
    return replace(packed, codes=on_gpu(packed.codes))


def test_each_function_takes_its_twin(launched, sample):
    digits, levels = sample
    packed = qm.encode(digits, levels, CODEBOOK)
    x = torch.randn(2, 63)
    dense, y = packed.dense(torch.bfloat16), qm.decode_matmul(packed, x)
    assert not launched, "the CPU has no part of it"
    ours = qm.encode(on_gpu(digits), on_gpu(levels), CODEBOOK)
    assert launched
    assert torch.equal(ours.codes, packed.codes)
    assert torch.equal(ours.row_codewords, packed.row_codewords)
    assert ours.fewest_codewords == packed.fewest_codewords
    for call, expected in (
        (lambda p: qm.decode(p)[0], digits),
        (lambda p: p.dense(torch.bfloat16), dense),
        (lambda p: qm.decode_matmul(p, x), y),
    ):
        launched.clear()
        torch.testing.assert_close(call(moved(packed)).as_subclass(torch.Tensor), expected)
        assert launched


def test_a_matrix_that_encode_did_not_make_is_validated_once(launched, sample, monkeypatch):
    monkeypatch.setattr(validation, "_check_device", lambda packed: None)
    looked = []
    look = validation._validate_kernel
    monkeypatch.setattr(validation, "_validate_kernel", lambda *arguments: looked.append(1) or look(*arguments))
    packed = replace(moved(qm.encode(*sample, CODEBOOK)), _validated=False)
    with pytest.raises(SettingError, match="validate"):
        cuda_codec.decode(packed)
    for _ in range(2):
        assert torch.equal(qm.decode(packed)[0], sample[0])
        qm.decode_matmul(packed, torch.ones(63))
        packed.dense()
    assert looked == [1]
    assert cuda_codec.decode(packed)[1] is packed.levels


def test_a_damaged_matrix_never_reaches_a_kernel(launched, sample):
    packed = qm.encode(*sample, CODEBOOK)
    codes = packed.codes.clone()
    codes[-1] = 1
    damaged = replace(packed, codes=on_gpu(codes), _validated=False)
    for call in (qm.decode, lambda p: p.dense(), lambda p: qm.decode_matmul(p, torch.ones(63))):
        with pytest.raises(FormatError, match="behind its last codeword"):
            call(damaged)
    assert not launched


def test_a_copy_on_the_cpu_is_what_is_validated(monkeypatch, sample):
    """Of a matrix whose device is no CPU; tensors are made to say so, and to lie on the CPU once they are moved."""
    packed = replace(qm.encode(*sample, CODEBOOK), _validated=False)
    copy, there = replace(packed), torch.device("cuda", 0)
    monkeypatch.setattr(type(packed), "device", property(lambda self: torch.device("cpu") if self is copy else there))
    monkeypatch.setattr(type(packed), "to", lambda self, device: copy)
    validation.validate(packed)
    assert packed._validated
    assert copy._validated


def test_several_devices_are_named_in_one_line(launched, sample):
    digits, levels = sample
    packed = qm.encode(digits, levels, CODEBOOK)
    with pytest.raises(SettingError, match=r"the packed matrix is on cpu and meta; .*packed\.to\('cpu'\)"):
        qm.decode(replace(packed, levels=levels.to("meta")))
    with pytest.raises(SettingError, match="levels is on meta, digits on the CPU"):
        qm.encode(digits, levels.to("meta"), CODEBOOK)
    with pytest.raises(SettingError, match="x is on meta but the matrix on the CPU"):
        qm.decode_matmul(packed, torch.ones(63, device="meta"))
    with pytest.raises(SettingError, match="levels is on meta; expected a GPU"):
        qm.encode(on_gpu(digits), levels.to("meta"), CODEBOOK)
    with pytest.raises(SettingError, match="x is on meta; expected a GPU"):
        qm.decode_matmul(moved(packed), torch.ones(63, device="meta"))


@pytest.mark.slow
def test_the_cpu_path_imports_nothing_of_it(forks):
    code = """
import os, sys
os.chdir(sys.argv[1])
import torch, qmoe_lite as qm
packed = qm.encode(torch.zeros(2, 9, dtype=torch.int8), torch.ones(2, 1), qm.Codebook.fit([1, 8, 1]))
qm.decode(packed), packed.dense(), qm.decode_matmul(packed, torch.ones(9))
assert not {name for name in sys.modules if name.startswith(("qmoe_lite.cuda", "numba_cuda"))}
"""
    done = forks.run(code, Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
