"""Every kernel compiles to machine code without a GPU, and to code of the kind we mean."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda compiles the kernels; pip install 'qmoe-lite[cuda]'", allow_module_level=True)

from qmoe_lite.bench import kernels
from qmoe_lite.cuda import launch

KERNELS = kernels.all_kernels()
MOST_REGISTERS = 128


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("kernel", "signature"), KERNELS, ids=[f"{k.__name__}-{s}" for k, s in KERNELS])
def test_kernel_fits_the_gpu(kernel, signature, capability):
    code = kernels.compiled(kernel, signature, capability)
    assert ".f64" not in code.ptx
    assert ".local" not in code.ptx
    found = kernels.resources(code)
    assert 0 < found.registers <= MOST_REGISTERS
    assert found.stack == 0
    assert not re.search(r"cvt\.\w+\.f32\.[su]64", code.ptx)
    assert kernels.instructions(code) > 20


def test_every_kernel_of_the_folder_is_compiled_here():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(launch.__file__).parent.glob("*.py"))
    of_the_folder = {k.py_func.__name__ for k, _ in KERNELS if k.py_func.__module__.startswith("qmoe_lite.cuda.")}
    assert len(re.findall(r"^ *@kernel\(", source, re.MULTILINE)) == len(of_the_folder)


def test_float64_would_be_noticed():
    def _halve(values):
        values[0] = values[0] * 0.1 + 1.0

    assert ".f64" in kernels.compiled(launch.kernel("float32*")(_halve), "float32*", (8, 0)).ptx


def test_stack_would_be_noticed():
    cuda = launch.cuda

    def _pick(values, index):
        held = cuda.local.array(64, "float32")
        for i in range(64):
            held[i] = values[i] * values[index]
        values[0] = held[index]

    code = kernels.compiled(launch.kernel("float32*, int32")(_pick), "float32*, int32", (8, 0))
    assert ".local" in code.ptx
    assert kernels.resources(code).stack == 256
