"""`qmoe_lite.models.hf` under the short name that other programs import."""

from qmoe_lite.models.hf import QMoEConfig, QMoEQuantizer, load

__all__ = ["QMoEConfig", "QMoEQuantizer", "load"]
