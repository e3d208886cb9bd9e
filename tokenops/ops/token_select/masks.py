"""Between the two ways of saying which tokens take part: a boolean mask over the grid, and a list of row ids."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.ops.arguments import as_bounds, check_tensor
from tokenops.ops.token_select.select import select_tokens
from tokenops.types import TokenIndex


def index_from_mask(mask: Tensor, max_k: int | None = None, *, cu_seqlens: Tensor | None = None) -> TokenIndex:
    """The True positions of each row as an ascending list, filled up with -1.

    Args:
        mask: [N], [B, N] or [B, H, N] bool; or packed, [T] with cu_seqlens.
        max_k: width K of the lists, default N (or T). Positions beyond it are dropped, the last ones first. The width does not depend on
            the contents, so nothing waits for the device.
        cu_seqlens: [B + 1] int32 (int64 accepted): sample b owns rows cu_seqlens[b] : cu_seqlens[b + 1] of a packed mask, and gets a list
            of its own, [B, K], of ids of packed rows. Bounds beyond the T rows are taken as T.

    Returns:
        TokenIndex of index [..., K] and count [...], both int32.

    Raises:
        ValueError: the rank of mask or of cu_seqlens, a negative max_k, two devices.
        TypeError: mask is not bool, cu_seqlens are not int32 or int64.

    >>> tokenops.index_from_mask(torch.tensor([[False, True, True], [True, False, False]]), max_k=2).index
    tensor([[ 1,  2],
            [ 0, -1]], dtype=torch.int32)
    """
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if cu_seqlens is not None and mask.dim() != 1:
        raise ValueError(f"mask must be [T] with cu_seqlens, got {list(mask.shape)}")
    if not 1 <= mask.dim() <= 3:
        raise ValueError(f"mask must be [N] | [B, N] | [B, H, N], got {list(mask.shape)}")
    width = mask.shape[-1] if max_k is None else max_k
    if width < 0:
        raise ValueError(f"max_k must not be negative, got {max_k}")
    if cu_seqlens is not None:
        return _of_packed(mask, as_bounds("cu_seqlens", cu_seqlens, "mask", mask), width)
    return _of_rows(mask, width)


def _of_rows(mask: Tensor, width: int) -> TokenIndex:
    # all True ones are as good: where there are too many, the lowest ids win
    return select_tokens(mask.to(torch.float32), threshold=0.5, max_k=width)


def _of_packed(mask: Tensor, cu_seqlens: Tensor, width: int) -> TokenIndex:
    # all kept rows in a row: each sample's list is a stretch of them
    kept = _of_rows(mask, mask.shape[0] + 1).index
    before = torch.nn.functional.pad(mask.cumsum(0, dtype=torch.int32), (1, 0))
    bounds = before[cu_seqlens.clamp(0, mask.shape[0])]
    count = bounds.diff().clamp(0, width)
    slot = torch.arange(width, dtype=torch.int32, device=mask.device)
    index = kept[(bounds[:-1, None] + slot).clamp(max=mask.shape[0])]
    return TokenIndex(torch.where(slot < count[:, None], index, -1), count)


def mask_from_index(index: Tensor | TokenIndex, n: int) -> Tensor:
    """[..., n] bool, True at the listed rows. A slot of -1 (or any id outside the n rows) marks nothing.

    Args:
        index: [K], [B, K] or [B, H, K] int32 or int64, or a TokenIndex.
        n: rows of the grid.

    Raises:
        ValueError: the rank of index, a negative n.
        TypeError: index is not int32 or int64.

    >>> tokenops.mask_from_index(torch.tensor([2, 0, -1]), 4)
    tensor([ True, False,  True, False])
    """
    if isinstance(index, TokenIndex):
        index = index.index
    check_tensor("index", index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if not 1 <= index.dim() <= 3:
        raise ValueError(f"index must be [K] | [B, K] | [B, H, K], got {list(index.shape)}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    # empty slots all write to one more column, which is cut off
    target = index.long().masked_fill((index < 0) | (index >= n), n)
    mask = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, target, True)[..., :n].contiguous()
