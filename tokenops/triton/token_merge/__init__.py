"""Token matching and merging on a GPU: who is most similar to whom (pairs), plans of that, rows along a plan and back (segments), rows into
meta tokens (soft).

Each has a file of launchers, and one of kernels, imported with Triton on the first launch: this package imports, and answers with its
objections, where Triton is missing.
"""

from __future__ import annotations

from torch import Tensor

from tokenops.triton.launch import device_objections
from tokenops.triton.token_merge.pairs import argmax as argmax
from tokenops.triton.token_merge.plans import match as match
from tokenops.triton.token_merge.plans import plan as plan
from tokenops.triton.token_merge.segments import merge as merge
from tokenops.triton.token_merge.segments import merge_backward as merge_backward
from tokenops.triton.token_merge.segments import unmerge as unmerge
from tokenops.triton.token_merge.soft import soft_merge as soft_merge
from tokenops.triton.token_merge.soft import soft_merge_backward as soft_merge_backward


def objections(*problem: Tensor, names: str = "x") -> list[str]:
    """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can."""
    return device_objections(names.split()[0], problem[0])
