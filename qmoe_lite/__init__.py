"""Compress Mixture-of-Experts models to 0.6 to 4 bits a weight in experts, and run them (QMoE, arXiv:2310.16795)."""

from __future__ import annotations

import importlib
import os as _os
from typing import TYPE_CHECKING, Any

from qmoe_lite._cache import provide_cache_directory as _provide_cache_directory
from qmoe_lite._hook import register_with_transformers as _register_with_transformers

if TYPE_CHECKING:
    from qmoe_lite.checkpoint.packing import pack as pack
    from qmoe_lite.checkpoint.packing import unpack as unpack
    from qmoe_lite.checkpoint.report import Report as Report
    from qmoe_lite.coding.codebook import Codebook as Codebook
    from qmoe_lite.coding.codec import decode as decode
    from qmoe_lite.coding.codec import encode as encode
    from qmoe_lite.coding.dictionary import Dictionary as Dictionary
    from qmoe_lite.coding.matmul import decode_matmul as decode_matmul
    from qmoe_lite.coding.packed import PackedMatrix as PackedMatrix
    from qmoe_lite.compression.importing import import_qmoe as import_qmoe
    from qmoe_lite.compression.layer_sensitivity import sensitivity as sensitivity
    from qmoe_lite.compression.run import compress as compress
    from qmoe_lite.errors import QMoEError as QMoEError
    from qmoe_lite.inspection.estimation import Estimate as Estimate
    from qmoe_lite.inspection.estimation import estimate as estimate
    from qmoe_lite.inspection.verification import verify as verify
    from qmoe_lite.models.experts import PackedExperts as PackedExperts
    from qmoe_lite.models.hf import QMoEConfig as QMoEConfig
    from qmoe_lite.offload.loading import load as load
    from qmoe_lite.quantization.grid import MinMaxTernary as MinMaxTernary
    from qmoe_lite.quantization.grid import MinMaxTwoBit as MinMaxTwoBit
    from qmoe_lite.quantization.grid import Quantized as Quantized
    from qmoe_lite.quantization.grid import UniformGrid as UniformGrid
    from qmoe_lite.quantization.solver import gptq as gptq
    from qmoe_lite.text.evaluation import evaluate as evaluate
    from qmoe_lite.tuning.run import tune as tune

__version__ = "0.1.0"

_HOMES = {
    "Codebook": "coding.codebook",
    "Dictionary": "coding.dictionary",
    "Estimate": "inspection.estimation",
    "MinMaxTernary": "quantization.grid",
    "MinMaxTwoBit": "quantization.grid",
    "PackedExperts": "models.experts",
    "PackedMatrix": "coding.packed",
    "QMoEConfig": "models.hf",
    "QMoEError": "errors",
    "Quantized": "quantization.grid",
    "Report": "checkpoint.report",
    "UniformGrid": "quantization.grid",
    "compress": "compression.run",
    "decode": "coding.codec",
    "decode_matmul": "coding.matmul",
    "encode": "coding.codec",
    "estimate": "inspection.estimation",
    "evaluate": "text.evaluation",
    "gptq": "quantization.solver",
    "import_qmoe": "compression.importing",
    "load": "offload.loading",
    "pack": "checkpoint.packing",
    "sensitivity": "compression.layer_sensitivity",
    "tune": "tuning.run",
    "unpack": "checkpoint.packing",
    "verify": "inspection.verification",
}

__all__ = [  # sorted; a test compares it with _HOMES
    "Codebook",
    "Dictionary",
    "Estimate",
    "MinMaxTernary",
    "MinMaxTwoBit",
    "PackedExperts",
    "PackedMatrix",
    "QMoEConfig",
    "QMoEError",
    "Quantized",
    "Report",
    "UniformGrid",
    "compress",
    "decode",
    "decode_matmul",
    "encode",
    "estimate",
    "evaluate",
    "gptq",
    "import_qmoe",
    "load",
    "pack",
    "sensitivity",
    "tune",
    "unpack",
    "verify",
]

# a source checkout keeps cuda/, cli/ and bench/ beside this folder; an installed package holds them
_here = _os.path.dirname(_os.path.abspath(__file__))
_root = _os.path.dirname(_here)
if not _os.path.isdir(_os.path.join(_here, "cuda")) and _os.path.isfile(_os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)


def __getattr__(name: str) -> Any:
    # lazily: `qmoe --help` must not wait for torch and numba
    if name in _HOMES:
        return getattr(importlib.import_module(f"qmoe_lite.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qmoe_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


_provide_cache_directory()
_register_with_transformers()
