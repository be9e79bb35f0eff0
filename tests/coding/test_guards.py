"""What the kernels cannot do is refused in one line: to run in a forked process, or to be recorded by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import qmoe_lite as qm
from qmoe_lite.errors import SettingError

# torch's own, about the recorders that are refused here
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def packed():
    digits = np.random.default_rng(0).integers(-1, 2, (8, 64)).astype(np.int8)
    return qm.encode(digits, np.tile(np.float32([[-0.5, 0.25]]), (8, 1)), qm.Codebook.fit([1, 4, 1]))


def test_a_trace_would_hold_garbage(packed):
    with pytest.raises(SettingError, match=r"torch\.jit\.trace cannot record"):
        torch.jit.trace(lambda x: qm.decode_matmul(packed, x), torch.ones(2, 64))


def test_a_forward_mode_tangent_is_not_dropped(packed):
    x = torch.ones(2, 64)
    with forward_ad.dual_level():
        with pytest.raises(SettingError, match="forward-mode"):
            qm.decode_matmul(packed, forward_ad.make_dual(x, x))
        assert qm.decode_matmul(packed, x).shape == (2, 8)


def test_compiled_code_goes_around_a_product_or_says_that_it_must(packed):
    def shifted(x):
        return qm.decode_matmul(packed, x) + 1

    x = torch.ones(2, 64)
    assert torch.equal(torch.compile(shifted, backend="eager")(x), shifted(x))
    with pytest.raises(Exception, match="Numba's kernels are not traced: leave fullgraph out"):
        torch.compile(lambda x: qm.decode_matmul(packed, x) * 2, backend="eager", fullgraph=True)(x)


def test_a_models_experts_refuse_both(compressed):
    model = qm.load(compressed[0], dtype=torch.float32)
    experts = next(module for module in model.modules() if hasattr(module, "run_expert"))
    hidden = torch.randn(3, experts.layer.shapes["wi"][1])
    routing = torch.zeros(3, 1, experts.num_experts, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(SettingError, match=r"torch\.jit\.trace cannot record"):
        torch.jit.trace(experts, (hidden, *routing), check_trace=False)
    with forward_ad.dual_level(), pytest.raises(SettingError, match="forward-mode"):
        experts(forward_ad.make_dual(hidden, hidden), *routing)


@pytest.mark.slow
def test_a_process_forked_after_kernels_ran_is_told_to_spawn(forks):
    """In a process of its own, whose children OpenMP would end by SIGTERM."""
    code = """
import os
import numpy as np
import qmoe_lite as qm
digits, levels = np.ones((2, 16), dtype=np.int8), np.float32([[-1, 1]] * 2)
book = qm.Codebook.fit([1, 1, 1])
packed = qm.encode(digits, levels, book)
x = np.ones(16, dtype=np.float32)
if (child := os.fork()) == 0:
    for call in (
        lambda: qm.decode_matmul(packed, x), lambda: qm.decode(packed), packed.dense,
        lambda: qm.encode(digits, levels, book),
    ):
        try:
            call()
        except qm.QMoEError as error:
            print(error, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], qm.decode_matmul(packed, x)[0])
"""
    done = forks.run(code)
    *lines, last = done.stdout.splitlines()
    assert last == "0 16.0", done.stderr
    assert len(lines) == 4
    assert all("forked" in line and "spawn" in line for line in lines)


FIRST_KERNELS = {
    "the solver": "qm.gptq(np.ones((2, 8), dtype=np.float32), np.eye(8, dtype=np.float32), qm.UniformGrid(1.0))",
    "a codebook": "qm.Codebook.fit([1, 4, 1]).rate(np.ones((2, 8), dtype=np.int8))",
    "a dictionary": "qm.Dictionary.fit([9, 3, 1], bits=9).rate(np.ones((2, 8), dtype=np.int16))",
    "encoding": "qm.encode(np.ones((2, 8), dtype=np.int8), np.float32([[-1, 1]] * 2), qm.Codebook.fit([1, 4, 1]))",
}


@pytest.mark.slow
@pytest.mark.parametrize("call", FIRST_KERNELS.values(), ids=FIRST_KERNELS)
def test_a_process_s_first_kernel_leaves_torch_its_threads(forks, call):
    """Numba's OpenMP would set them to its own number: torch's sums would come out otherwise from then on."""
    code = f"""
import os
os.environ["NUMBA_NUM_THREADS"] = "2"
import numpy as np, torch
torch.set_num_threads(1)
import qmoe_lite as qm
{call}
import numba
print(torch.get_num_threads(), numba.get_num_threads())
"""
    assert forks.run(code).stdout.split() == ["1", "2"]
