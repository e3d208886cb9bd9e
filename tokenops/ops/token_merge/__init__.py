"""Matching and merging tokens: the door of this room. Behind it: reference/, triton/ and csrc/ under the same name."""

from __future__ import annotations

from tokenops.ops.token_merge import operators as operators
from tokenops.ops.token_merge import transforms as transforms
from tokenops.ops.token_merge.backends import BACKENDS as BACKENDS
from tokenops.ops.token_merge.matching import match_tokens as match_tokens
from tokenops.ops.token_merge.matching import pairwise_argmax as pairwise_argmax
from tokenops.ops.token_merge.merging import merge_tokens as merge_tokens
from tokenops.ops.token_merge.merging import unmerge_tokens as unmerge_tokens
from tokenops.ops.token_merge.plans import compose_plans as compose_plans
from tokenops.ops.token_merge.plans import merge_schedule as merge_schedule
from tokenops.ops.token_merge.plans import plan_from_parents as plan_from_parents
from tokenops.ops.token_merge.plans import plan_from_slots as plan_from_slots
from tokenops.ops.token_merge.soft import soft_merge as soft_merge
