"""Every kernel compiles to machine code without a GPU, and to code of the kind we mean."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import types
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda compiles the kernels; pip install 'qmoe-lite[cuda]'", allow_module_level=True)

from qmoe_lite.cuda import codec, launch, matmul, solver

KERNELS = [
    (kernel, signature)
    for module in (solver, codec, matmul)
    for kernel in vars(module).values()
    if isinstance(kernel, launch.Kernel)
    for signature in kernel.signatures
]
MOST_REGISTERS = 128
REGISTERS, FRAME, STACK = 0x2F, 0x11, 0x12  # attributes of an .nv.info section


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    """Let numba-cuda take a GPU for granted: it asks the driver when it compiles a helper."""
    from numba.cuda import dispatcher

    device = types.SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)


def resources(cubin, name):
    """Registers, stack bytes and what the driver reserves for a kernel, from the ELF file's own tables."""
    offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, name_section = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]

    def text(section, start):
        start += sections[section][4]
        return cubin[start : cubin.index(b"\0", start)].decode()

    by_name = {text(name_section, section[0]): section for section in sections}
    symbols = by_name[".symtab"]
    found = {}
    place, end = by_name[".nv.info"][4], by_name[".nv.info"][4] + by_name[".nv.info"][5]
    while place < end:
        form, attribute, length = struct.unpack_from("<BBH", cubin, place)
        place += 4
        if form == 4:  # a value that has its size before it
            if attribute in (REGISTERS, FRAME, STACK):
                symbol, value = struct.unpack_from("<II", cubin, place)
                symbol_name = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)[0]
                if text(symbols[6], symbol_name) == name:
                    found[attribute] = value
            place += length
    return found


def nvdisasm():
    """Path of the disassembler, from its wheel or the toolkit; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations
    in_wheel = [path for folder in folders for path in Path(folder).glob("*/bin/nvdisasm")]
    return str(in_wheel[0]) if in_wheel else shutil.which("nvdisasm")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("kernel", "signature"), KERNELS, ids=[f"{k.__name__}-{s}" for k, s in KERNELS])
def test_kernel_fits_the_gpu(kernel, signature, capability, tmp_path):
    ptx = kernel.ptx(signature, capability)
    assert ".f64" not in ptx
    assert ".local" not in ptx
    cubin = launch.link(ptx, capability).code
    found = resources(cubin, launch.entry_name(ptx))
    assert set(found) == {REGISTERS, FRAME, STACK}
    assert 0 < found[REGISTERS] <= MOST_REGISTERS
    assert found[FRAME] == found[STACK] == 0
    tool = nvdisasm()
    if tool:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(cubin)
        machine_code = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
        assert "EXIT" in machine_code
        assert "I2F.S64" not in machine_code


def test_every_kernel_of_the_folder_is_compiled_here():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(launch.__file__).parent.glob("*.py"))
    assert source.count("\n@kernel(") == len({kernel.__name__ for kernel, _ in KERNELS})


def test_float64_would_be_noticed():
    def _halve(values):
        values[0] = values[0] * 0.1 + 1.0

    assert ".f64" in launch.kernel("float32*")(_halve).ptx("float32*", (8, 0))


def test_stack_would_be_noticed():
    cuda = launch.cuda

    def _pick(values, index):
        held = cuda.local.array(64, "float32")
        for i in range(64):
            held[i] = values[i] * values[index]
        values[0] = held[index]

    ptx = launch.kernel("float32*, int32")(_pick).ptx("float32*, int32", (8, 0))
    assert ".local" in ptx
    assert resources(launch.link(ptx, (8, 0)).code, launch.entry_name(ptx))[FRAME] == 256
