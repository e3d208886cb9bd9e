"""Token matching and merging on a GPU: ``pairs.py`` finds who is most similar to whom, ``plans.py`` makes plans of that."""

from __future__ import annotations

from torch import Tensor

from tokenops.triton.launch import device_objections
from tokenops.triton.token_merge.pairs import argmax as argmax
from tokenops.triton.token_merge.plans import match as match
from tokenops.triton.token_merge.plans import plan as plan


def objections(*problem: Tensor, names: str = "x") -> list[str]:
    """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can."""
    return device_objections(names.split()[0], problem[0])
