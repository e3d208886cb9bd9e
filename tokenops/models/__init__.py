"""Video transformers on the operators of this package, with their published weights."""

from tokenops.models.vidtr import CompactVidTr, TopKStd, VidTr, VidTrConfig

__all__ = ["CompactVidTr", "TopKStd", "VidTr", "VidTrConfig"]
