"""The package without numba-cuda, and NVIDIA's packages beside our folder `cuda`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*lines, forks=None):
    """Run statements in a fresh interpreter, or one that has imported torch, that sees the repository's root first."""
    code = "\n".join(["import sys", f"sys.path.insert(0, {str(ROOT)!r})", *lines])
    if forks is None:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    else:
        result = forks.run(code)
    assert result.returncode == 0, result.stderr
    return result.stdout


HIDDEN = "sys.modules['numba_cuda'] = None"


@pytest.mark.slow
def test_everything_imports_without_numba_cuda():
    out = python(
        HIDDEN,
        "import qmoe_lite, qmoe_lite.cuda",
        "assert not {'torch', 'numba'} & set(sys.modules)",
        "import qmoe_lite.cuda.solver, qmoe_lite.cuda.codec, qmoe_lite.cuda.matmul",
        "assert 'numba.cuda' not in sys.modules",
        "print(qmoe_lite.cuda.available(), qmoe_lite.cuda.reason())",
    )
    assert out.startswith("False numba-cuda is not installed")
    assert "pip install 'qmoe-lite[cuda]'" in out


@pytest.mark.slow
def test_a_launch_without_numba_cuda_says_what_to_install(forks):
    out = python(
        HIDDEN,
        "from qmoe_lite.cuda.codec import _pack_kernel",
        "from qmoe_lite.errors import DeviceError",
        "try: _pack_kernel._load(_pack_kernel.signatures[0], 0)",
        "except DeviceError as error: print(error)",
        forks=forks,
    )
    assert out.startswith("numba-cuda is not installed")


needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="needs numba-cuda; pip install 'qmoe-lite[cuda]'"
)


@pytest.mark.slow
@needs_numba_cuda
def test_our_folder_joins_nvidia_s_namespace(forks):
    out = python(
        "import cuda, cuda.bindings, cuda.core, cuda.pathfinder",
        "from numba import cuda as target",
        "import qmoe_lite.cuda.launch as launch",
        "assert launch.cuda is target",
        "print(cuda.__file__)",
        forks=forks,
    )
    assert Path(out.strip()) == ROOT / "cuda" / "__init__.py"


@pytest.mark.slow
@needs_numba_cuda
def test_numpy_without_row_stack_is_mended(forks):
    out = python(
        "import numpy",
        "vars(numpy).pop('row_stack', None)",
        "import qmoe_lite.cuda.launch",
        "print(numpy.row_stack is numpy.vstack)",
        forks=forks,
    )
    assert out == "True\n"
