"""Token Merging (D. Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), attached to a vision transformer as it is.

In each block, between attention and MLP, the r tokens that are most like another one merge into it. What tokens are compared by is their
key, averaged over the heads. A merged token is the mean of its members, and attention counts it as often as it has members: the logarithm
of its size is added to the logits of its key.

Letters: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenops.models.attach import Attachment, leading_tokens
from tokenops.models.blocks import MultiplyAdds
from tokenops.ops.token_merge import merge_schedule, merge_tokens, pairwise_argmax, plan_from_slots, unmerge_tokens
from tokenops.types import MergePlan

# for every block, for each one, or (r, inflection): see merge_schedule
Amount = int | list[int] | tuple[int, float]


class Merging(NamedTuple):
    """What a forward has merged so far."""

    size: Tensor | None  # [B, N] float32, how many of the first tokens each one is; None: nothing has merged
    plans: tuple[MergePlan | None, ...]  # of each block so far, None where it merged nothing


class ToMe(Attachment[Merging]):
    """Token Merging on a model, until ``detach``; as a context manager, until its end. See ``attach_tome``.

    ``r`` may be set at any time. ``last`` says what the latest forward merged.
    """

    def __init__(self, model: nn.Module, r: Amount, *, prop_attn: bool, class_token: bool, distill_token: bool, unmerge: bool) -> None:
        self._numbers: list[int] = []
        super().__init__(model)
        self.prop_attn, self.class_token, self.distill_token, self.unmerge = prop_attn, class_token, distill_token, unmerge
        try:
            self.r = r
        except ValueError:
            self.detach()
            raise

    @property
    def r(self) -> Amount:
        return list(self._numbers)

    @r.setter
    def r(self, r: Amount) -> None:
        self._numbers = merge_schedule(r, len(self.blocks))

    def step(self, at: int, x: Tensor, state: Merging | None) -> tuple[Tensor, Merging]:
        size, plans = Merging(None, ()) if state is None else state
        block = self.blocks[at]
        x, key = block.attention(x, size.log() if self.prop_attn and size is not None else None)
        r = most_merged(self._numbers[at], x.shape[1], self.class_token + self.distill_token)
        if r == 0:
            return block.mlp(x), Merging(size, (*plans, None))
        plan = match_keys(key, r, class_token=self.class_token, distill_token=self.distill_token)
        x, size = _merged(x, plan, size)
        return block.mlp(x), Merging(size, (*plans, plan))

    def finish(self, x: Tensor, state: Merging) -> tuple[Tensor, Merging]:
        plans = [plan for plan in state.plans if plan is not None]
        return unmerge_tokens(x, plans) if self.unmerge and plans else x, state


def attach_tome(
    model: nn.Module,
    r: Amount = 8,
    *,
    prop_attn: bool = True,
    class_token: bool | None = None,
    distill_token: bool | None = None,
    unmerge: bool = False,
) -> ToMe:
    """Merge similar tokens in every block of a trained vision transformer, for images or video. Nothing is trained again.

    Args:
        model: with blocks as ``tokenops.models.blocks.Block``, timm's VisionTransformer, or transformers' ViT, ViViT or VideoMAE, has
            them. It is changed in place, but for its parameters and their names; call it as ever.
        r: how many tokens to merge in each block: a number, a list with one for each block, or (r, inflection); see
            ``tokenops.merge_schedule``. Never more than half of the tokens that are not protected.
        prop_attn: add the logarithm of a token's size to the logits of its key. As published: on for models trained with labels or with
            ToMe, off for masked autoencoders off the shelf.
        class_token, distill_token: whether tokens 0 and 1 are what they are called, which never merge. None: the model has a parameter
            ``cls_token``, ``dist_token`` or ``distillation_token``.
        unmerge: after the last block give every token the row it was merged into, for models that go on with all tokens: dense
            predictions, or a mean over tokens.

    Returns:
        The attachment: ``detach()`` takes it off, and so does the end of ``with attach_tome(model, r=8):``.

    Tokens come out in the published order: those that stayed, the destinations. Every block is first tried beside its own forward.

    Raises:
        ValueError: the model has no block that is known, a block computes something else than its parts say, something is attached
            already, r does not fit the number of blocks, or there are tokens before the patches that cannot be protected.
    """
    has_class, has_distill = leading_tokens(model, class_token, distill_token)
    return ToMe(model, r, prop_attn=prop_attn, class_token=has_class, distill_token=has_distill, unmerge=unmerge)


def most_merged(r: int, tokens: int, protected: int) -> int:
    """At most half of the unprotected tokens can leave: every other one is a source."""
    return max(min(r, (tokens - protected) // 2), 0)


@torch.no_grad()
def match_keys(key: Tensor, r: int, *, class_token: bool = False, distill_token: bool = False) -> MergePlan:
    """Who merges: of the tokens at even positions the r most like one at an odd position, into that.

    Args:
        key: [B, H, N, D]; their mean over the heads is compared, by angle.
        r: at most ``most_merged``.

    ``match_tokens`` makes the same pairs, and rows in the order of the tokens. The published order is another: the sources that stay
    (ascending with a class token, else the most similar first), then all destinations; a distillation token behind the class token.
    It matters, as who stands at an even position in the next block depends on it.
    """
    metric = key.mean(1)
    batch, tokens = metric.shape[:2]
    sources, staying = (tokens + 1) // 2, (tokens + 1) // 2 - r
    at = torch.arange(sources, device=key.device)
    a_mask = at > 0 if class_token else None
    b_mask = at[: tokens - sources] > 0 if distill_token else None
    best, match = pairwise_argmax(metric[:, ::2], metric[:, 1::2], a_mask=a_mask, b_mask=b_mask)
    # stable: of equal scores the lowest position goes first
    order = best.argsort(dim=1, descending=True, stable=True)
    leaving, unmerged = order[:, :r], order[:, r:]
    if class_token:
        unmerged = unmerged.sort(1).values
    slot = torch.empty(batch, tokens, dtype=torch.int64, device=key.device)
    slot[:, 1::2] = staying + at[: tokens - sources]
    even = torch.empty(batch, sources, dtype=torch.int64, device=key.device)
    even.scatter_(1, unmerged, at[:staying].expand(batch, -1))
    even.scatter_(1, leaving, staying + match.gather(1, leaving).long())
    slot[:, ::2] = even
    if distill_token:
        # rows [class, the other sources, distillation, ...] become [class, distillation, the other sources, ...]
        slot = torch.where(slot == staying, 1, slot + ((slot > 0) & (slot < staying)))
    return plan_from_slots(slot, tokens - r)


def _merged(x: Tensor, plan: MergePlan, size: Tensor | None) -> tuple[Tensor, Tensor]:
    merged = merge_tokens(x, plan, size=size, return_size=True)
    assert isinstance(merged, tuple)
    return merged


def token_counts(r: Amount, *, depth: int, tokens: int, protected: int = 0) -> list[int]:
    """How many tokens enter each block, and leave the last: depth + 1 numbers."""
    counts = [tokens]
    for wanted in merge_schedule(r, depth):
        counts.append(counts[-1] - most_merged(wanted, counts[-1], protected))
    return counts


def flops(r: Amount = 0, *, depth: int, dim: int, num_heads: int, tokens: int, patch: int, protected: int = 0) -> MultiplyAdds:
    """Multiply-adds of a model for one clip or image: patch embedding and blocks. The published count leaves out matching.

    Args:
        r: as in ``attach_tome``; 0 is the model without ToMe.
        tokens: that enter the first block, ``protected`` of them class and distillation tokens.
        patch: numbers in a patch, say 2 x 16 x 16 x 3.
    """
    counts = token_counts(r, depth=depth, tokens=tokens, protected=protected)
    matching, published = 0, (tokens - protected) * patch * dim
    for n, left in pairwise(counts):
        published += 4 * n * dim**2 + 2 * n**2 * dim + 8 * left * dim**2
        if left < n:
            matching += ((n + 1) // 2) * (n // 2) * (dim // num_heads)
    return MultiplyAdds(published + matching, published)
