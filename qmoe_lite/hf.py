"""`qmoe_lite.models.hf` and `load` under the short name that other programs import."""

from qmoe_lite.models.hf import QMoEConfig, QMoEQuantizer
from qmoe_lite.offload.loading import load

__all__ = ["QMoEConfig", "QMoEQuantizer", "load"]
