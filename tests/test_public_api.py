"""What `import qmoe_lite` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import qmoe_lite


def test_names_are_sorted_and_all_there():
    assert qmoe_lite.__all__ == sorted(qmoe_lite._HOMES)
    for name in qmoe_lite.__all__:
        assert getattr(qmoe_lite, name).__doc__


def test_importing_loads_neither_torch_nor_numba():
    code = (
        "import sys, qmoe_lite, qmoe_lite.cuda, qmoe_lite.cli.main;"
        "print([m for m in ('torch', 'numba', 'transformers', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors():
    assert not hasattr(qmoe_lite, "compres")


def test_errors_are_one_tree():
    from qmoe_lite import errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, qmoe_lite.QMoEError)
            assert name in errors.__doc__
