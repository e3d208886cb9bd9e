"""Video transformers on the operators of this package, with their published weights."""

from tokenops.models.conversion import Eventful, eventful
from tokenops.models.eventful import BackboneConfig, EventfulBackbone, EventfulState
from tokenops.models.haltingvt import HaltingConfig, HaltingVT
from tokenops.models.sttm import STTM, STTMAttachment, attach_sttm
from tokenops.models.tome import ToMe, attach_tome
from tokenops.models.vidtr import CompactVidTr, TopKStd, VidTr, VidTrConfig
from tokenops.models.vitdet import VITDET_B_672, VITDET_B_1024, ViTDetBackbone, ViTDetConfig
from tokenops.models.vivit import VIVIT_B_EPIC100, VIVIT_B_K400, ViViT, ViViTConfig

__all__ = [
    "STTM",
    "VITDET_B_672",
    "VITDET_B_1024",
    "VIVIT_B_EPIC100",
    "VIVIT_B_K400",
    "BackboneConfig",
    "CompactVidTr",
    "Eventful",
    "EventfulBackbone",
    "EventfulState",
    "HaltingConfig",
    "HaltingVT",
    "STTMAttachment",
    "ToMe",
    "TopKStd",
    "ViTDetBackbone",
    "ViTDetConfig",
    "ViViT",
    "ViViTConfig",
    "VidTr",
    "VidTrConfig",
    "attach_sttm",
    "attach_tome",
    "eventful",
]
