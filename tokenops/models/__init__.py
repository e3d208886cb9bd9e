"""Video transformers on the operators of this package, with their published weights."""

from tokenops.models.haltingvt import HaltingConfig, HaltingVT

__all__ = ["HaltingConfig", "HaltingVT"]
