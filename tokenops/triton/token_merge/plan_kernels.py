"""Who merges into whom, and from that a MergePlan: the Triton kernels.

Members of an output row stand in a fixed order, the destination first and then ascending. Their places are found by counting how many
tokens come before each one, which needs no sort, no atomics and no second pass: the same plan in every run. Nothing is read back to the
host, and whatever parents or slots hold, nothing outside the tensors is touched: what leads nowhere is dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenops.types import Role

SOURCE = tl.constexpr(int(Role.SOURCE))
DESTINATION = tl.constexpr(int(Role.DESTINATION))
DROPPED = tl.constexpr(int(Role.DROPPED))
# above every key
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["N"])
def list_roles(
    role,  # [1|B, N] int8
    sources,  # [B, N] int32: the tokens that may leave, ascending
    destinations,  # [B, N] int32: those that may receive
    source_count,  # [B] int32
    destination_count,
    role_strides,
    N,
    BLOCK: tl.constexpr,
):
    """One program a sample."""
    b = tl.program_id(0).to(tl.int64)
    leaving = 0
    receiving = 0
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        bits = tl.load(role + b * role_strides[0] + ids.to(tl.int64) * role_strides[1], mask=ids < N, other=0).to(tl.int32)
        leaves = (bits & SOURCE) != 0
        receives = (bits & DESTINATION) != 0
        tl.store(sources + b * N + leaving + tl.cumsum(leaves.to(tl.int32), 0) - 1, ids, mask=leaves)
        tl.store(destinations + b * N + receiving + tl.cumsum(receives.to(tl.int32), 0) - 1, ids, mask=receives)
        leaving += tl.sum(leaves.to(tl.int32), 0)
        receiving += tl.sum(receives.to(tl.int32), 0)
    tl.store(source_count + b, leaving)
    tl.store(destination_count + b, receiving)


@triton.jit(do_not_specialize=["N", "S", "K", "first", "step", "threshold"])
def choose_parents(
    role,  # [1|B, N] int8 or None
    chosen,  # [B, K] int32: the slots of sources that merge, -1 = none; None: the first K whose score is greater than the threshold
    score,  # [B, S] float32, -inf without a candidate
    partner,  # [B, S] int32: token ids
    sources,  # [B, N] int32, or None: slot s is token first + s * step
    parent,  # [B, N] int32
    role_strides,
    N,
    S,
    K,
    first,
    step,
    threshold,
    BLOCK: tl.constexpr,
):
    """Everybody stays or is dropped, but for the chosen. One program a sample."""
    b = tl.program_id(0).to(tl.int64)
    parent += b * N
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        stays = ids
        if role is not None:
            bits = tl.load(role + b * role_strides[0] + ids.to(tl.int64) * role_strides[1], mask=ids < N, other=0)
            stays = tl.where(bits == DROPPED, -1, ids)
        tl.store(parent + ids, stays, mask=ids < N)
    # the chosen are written a second time
    tl.debug_barrier()
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if chosen is None:
            slots = at
            merges = tl.load(score + b * S + at, mask=at < K, other=float("-inf")) > threshold
        else:
            slots = tl.load(chosen + b * K + at, mask=at < K, other=-1)
            merges = slots >= 0
        ids = first + slots * step
        if sources is not None:
            ids = tl.load(sources + b * N + slots, mask=merges, other=-1)
        into = tl.load(partner + b * S + slots, mask=merges, other=-1)
        tl.store(parent + ids, into, mask=merges & (ids >= 0) & (ids < N))


@triton.jit(do_not_specialize=["N", "n_out", "rounds"])
def number_rows(
    parent,  # [B, N] integers
    root,  # [B, N] int32, scratch: where chains end
    number,  # [B, N] int32, scratch: how many roots come before
    slot,  # [B, N] int32
    key,  # [B, N] int32: twice the output row, and one more for all but its destination; 2 n_out = none
    count,  # [B] int32
    parent_strides,
    N,
    n_out,
    rounds,  # 2**rounds > N
    BLOCK: tl.constexpr,
):
    """Follows every chain to its root by doubling the steps of each round, and numbers the roots. One program a sample."""
    b = tl.program_id(0).to(tl.int64)
    parent += b * parent_strides[0]
    root += b * N
    number += b * N
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        at = tl.load(parent + ids.to(tl.int64) * parent_strides[1], mask=ids < N, other=-1)
        at = tl.where((at >= 0) & (at < N), at, -1).to(tl.int32)
        tl.store(root + ids, at, mask=ids < N)
    tl.debug_barrier()
    # a token that another one overtakes in the same round is further up the same chain: the end does not depend on who is first
    moved = 1
    turn = 0
    while (turn < rounds) & (moved > 0):
        moved = 0
        for start in range(0, N, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            at = tl.load(root + ids, mask=ids < N, other=-1)
            above = tl.load(root + at, mask=at >= 0, other=-1)
            moved = tl.maximum(moved, tl.max((above != at).to(tl.int32), 0))
            tl.store(root + ids, above, mask=ids < N)
        tl.debug_barrier()
        turn += 1

    roots = 0
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        # not where the chain ended: a circle's length may divide the steps taken
        is_root = (tl.load(parent + ids.to(tl.int64) * parent_strides[1], mask=ids < N, other=-1) == ids).to(tl.int32)
        tl.store(number + ids, roots + tl.cumsum(is_root, 0) - is_root, mask=ids < N)
        roots += tl.sum(is_root, 0)
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        at = tl.load(root + ids, mask=ids < N, other=-1)
        # in a circle nobody is its own parent
        ends = (at >= 0) & (tl.load(parent + at.to(tl.int64) * parent_strides[1], mask=at >= 0, other=-1) == at)
        row = tl.load(number + at, mask=ends, other=n_out)
        row = tl.where(row < n_out, row, n_out)
        tl.store(slot + b * N + ids, tl.where(row < n_out, row, -1), mask=ids < N)
        tl.store(key + b * N + ids, 2 * row + ((row < n_out) & (at != ids)).to(tl.int32), mask=ids < N)
    tl.store(count + b, tl.minimum(roots, n_out))


@triton.jit(do_not_specialize=["N", "n_out", "blocks"])
def copy_slots(
    target,  # [B, N] integers
    slot,  # [B, N] int32
    key,  # [B, N] int32, as number_rows writes it
    target_strides,
    N,
    n_out,
    blocks,
    BLOCK: tl.constexpr,
):
    """Slots that are given: those that there are."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    ids = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(target + b * target_strides[0] + ids.to(tl.int64) * target_strides[1], mask=ids < N, other=-1)
    kept = (row >= 0) & (row < n_out)
    row = tl.where(kept, row, n_out).to(tl.int32)
    tl.store(slot + b * N + ids, tl.where(kept, row, -1), mask=ids < N)
    tl.store(key + b * N + ids, 2 * row, mask=ids < N)


@triton.jit(do_not_specialize=["N", "n_out", "blocks"])
def order_tokens(
    key,  # [B, N] int32
    order,  # [B, N] int32
    offsets,  # [B, n_out + 1] int32
    N,
    n_out,
    blocks,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How many tokens come before each token, and before each output row: its place in the order, and where the row begins."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    asking = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    is_token = asking < N
    # the first N ask for tokens, the others for rows: nobody comes before a row's first key but keys below it
    rows = asking - N
    own = tl.load(key + b * N + asking, mask=is_token, other=0)
    limit = tl.where(is_token, own, 2 * rows)
    # one count for each column of a tile, to be added up once
    counts = tl.zeros([BLOCK, BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        ids = start + tl.arange(0, BLOCK_N)
        keys = tl.load(key + b * N + ids, mask=ids < N, other=HIGHEST)
        # of equal keys those with a lower id
        lower = (ids[None, :] < asking[:, None]) & is_token[:, None]
        counts += (keys[None, :] < limit[:, None] + lower.to(tl.int32)).to(tl.int32)
    before = tl.sum(counts, 1)
    tl.store(order + b * N + before, tl.where(own < 2 * n_out, asking, -1), mask=is_token)
    tl.store(offsets + b * (n_out + 1) + rows, before, mask=~is_token & (rows <= n_out))


@triton.jit(do_not_specialize=["n_out"])
def count_rows(
    offsets,  # [B, n_out + 1] int32
    count,  # [B] int32
    n_out,
    BLOCK: tl.constexpr,
):
    """How many output rows have members. One program a sample."""
    b = tl.program_id(0).to(tl.int64)
    offsets += b * (n_out + 1)
    total = 0
    for start in range(0, n_out, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        begin = tl.load(offsets + rows, mask=rows < n_out, other=0)
        end = tl.load(offsets + rows + 1, mask=rows < n_out, other=0)
        total += tl.sum((end > begin).to(tl.int32), 0)
    tl.store(count + b, total)
