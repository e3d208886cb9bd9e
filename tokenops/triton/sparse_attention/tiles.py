"""Tile sizes as data: a pure function from the shape of a problem to the blocks, warps and pipeline depth of one kernel.

How the table came about: for every row the candidates were compiled for sm_80, sm_90 and sm_100, largest first, and the first that spilled
no register on any of them was kept (``make gpu-check`` compiles the table again). Candidates begin where published FlashAttention kernels
are (128 x 64 with a double buffer and more) and get smaller; within one size, fewer warps came first, since a warp with more rows reads
less shared memory. No entry was chosen by time: that takes a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Tiles(NamedTuple):
    """How one program cuts its work."""

    block_q: int  # query slots
    block_k: int  # key slots
    num_warps: int
    num_stages: int  # blocks in flight: one is computed, the others are copied


class Rows(NamedTuple):
    """Tiles by what is added to the plain products; each costs registers."""

    plain: Tiles
    biased: Tiles  # kv_bias or causal: a term or a row id for every key of the tile
    masked: Tiles  # attn_mask or rel_pos: a tile of its own, gathered by two lists


# (kernel, bytes of an element) -> {widest padded head: tiles}
TABLE: dict[tuple[str, int], dict[int, Rows]] = {
    ("forward", 2): {
        64: Rows(plain=Tiles(128, 64, 8, 3), biased=Tiles(128, 32, 8, 3), masked=Tiles(64, 32, 4, 2)),
        128: Rows(plain=Tiles(128, 64, 8, 3), biased=Tiles(128, 32, 8, 3), masked=Tiles(64, 32, 8, 2)),
        256: Rows(plain=Tiles(64, 32, 8, 3), biased=Tiles(64, 32, 8, 3), masked=Tiles(32, 32, 4, 3)),
    },
    ("backward_query", 2): {
        64: Rows(plain=Tiles(128, 64, 8, 3), biased=Tiles(128, 32, 8, 3), masked=Tiles(64, 32, 8, 2)),
        128: Rows(plain=Tiles(64, 64, 8, 3), biased=Tiles(64, 64, 8, 3), masked=Tiles(64, 32, 8, 2)),
        256: Rows(plain=Tiles(64, 32, 8, 3), biased=Tiles(64, 32, 8, 3), masked=Tiles(64, 16, 8, 2)),
    },
    ("backward_key_value", 2): {
        64: Rows(plain=Tiles(32, 128, 8, 3), biased=Tiles(32, 128, 8, 2), masked=Tiles(16, 64, 8, 2)),
        128: Rows(plain=Tiles(32, 64, 8, 3), biased=Tiles(32, 64, 8, 2), masked=Tiles(16, 64, 8, 2)),
        256: Rows(plain=Tiles(32, 32, 8, 3), biased=Tiles(32, 32, 8, 3), masked=Tiles(32, 32, 8, 3)),
    },
    # float32 products run on the ordinary cores unless TF32 is allowed, and those hold both operands in registers: hence the small blocks
    ("forward", 4): {
        64: Rows(plain=Tiles(64, 16, 8, 3), biased=Tiles(64, 32, 8, 2), masked=Tiles(32, 16, 4, 2)),
        128: Rows(plain=Tiles(32, 16, 8, 2), biased=Tiles(16, 16, 8, 2), masked=Tiles(16, 16, 4, 2)),
        256: Rows(plain=Tiles(16, 16, 4, 2), biased=Tiles(16, 16, 4, 2), masked=Tiles(16, 16, 4, 2)),
    },
    ("backward_query", 4): {
        64: Rows(plain=Tiles(32, 16, 8, 2), biased=Tiles(32, 16, 8, 2), masked=Tiles(32, 16, 4, 2)),
        128: Rows(plain=Tiles(32, 16, 8, 2), biased=Tiles(16, 16, 8, 2), masked=Tiles(16, 16, 4, 2)),
        256: Rows(plain=Tiles(32, 16, 8, 2), biased=Tiles(16, 16, 4, 2), masked=Tiles(16, 16, 4, 2)),
    },
    ("backward_key_value", 4): {
        64: Rows(plain=Tiles(32, 32, 8, 2), biased=Tiles(16, 32, 4, 2), masked=Tiles(16, 16, 4, 2)),
        128: Rows(plain=Tiles(16, 32, 8, 2), biased=Tiles(16, 16, 8, 1), masked=Tiles(16, 16, 4, 2)),
        256: Rows(plain=Tiles(16, 16, 8, 2), biased=Tiles(16, 16, 8, 2), masked=Tiles(16, 16, 8, 2)),
    },
}

# tl.dot takes no smaller block, and the table has no larger one
SMALLEST, LARGEST = 16, 128


def pad(size: int) -> int:
    """Blocks are powers of two, of which tl.dot takes 16 or more."""
    return max(SMALLEST, 1 << max(0, size - 1).bit_length())


def pad_heads(head: int, value_head: int) -> tuple[int, int]:
    """Columns of key and value tiles: within a factor of 4, or the warps that share the wider one find nothing to do in the other."""
    d, dv = pad(head), pad(value_head)
    return max(d, dv // 4), max(dv, d // 4)


def choose_tiles(
    kernel: str,
    head: int,  # D
    value_head: int,  # Dv
    itemsize: int,  # bytes of a query element
    queries: int,  # slots a head (or a sequence) has at most
    keys: int,
    *,
    biased: bool,
    gathered: int,  # bytes that attn_mask and rel_pos have for an element of a tile; 0: neither is given
    limit: int | None,  # bytes of shared memory one program may use
    table: Mapping[tuple[str, int], dict[int, Rows]] = TABLE,
) -> Tiles:
    """The table's tiles, cut to the problem and to the device."""
    rows = table[kernel, itemsize][max(64, *pad_heads(head, value_head))]
    tiles = _cut(kernel, rows.masked if gathered else rows.biased if biased else rows.plain, queries, keys)
    while limit is not None and shared_bytes(kernel, tiles, head, value_head, itemsize, gathered) > limit:
        smaller = _step_down(kernel, tiles)
        if smaller == tiles:
            break
        tiles = smaller
    return tiles


def row_tiles(value_head: int, itemsize: int) -> Tiles:
    """For the kernel that reads rows once and multiplies nothing: 128 bytes of each tensor a thread, which it holds in registers."""
    return Tiles(block_q=min(LARGEST, 16384 // (pad(value_head) * itemsize)), block_k=0, num_warps=4, num_stages=1)


def _cut(kernel: str, tiles: Tiles, queries: int, keys: int) -> Tiles:
    """A short sequence gets a short block, and as many fewer warps: 8 to 32 frames otherwise leave most of a program idle.

    Nor are more blocks in flight than there are, but for a second one in the backward kernels: copies then go straight to shared memory,
    and sm_80 lacks the registers to take them through.
    """
    block_q, block_k = min(tiles.block_q, pad(queries)), min(tiles.block_k, pad(keys))
    if kernel == "backward_key_value":
        before, held, streamed = tiles.block_k, block_k, -(-queries // block_q)
    else:
        before, held, streamed = tiles.block_q, block_q, -(-keys // block_k)
    fewest = 1 if kernel == "forward" else min(2, tiles.num_stages)
    return Tiles(block_q, block_k, max(1, tiles.num_warps * held // before), max(fewest, min(tiles.num_stages, streamed)))


def _step_down(kernel: str, tiles: Tiles) -> Tiles:
    """The next cheaper tiles: first without what hides latency, then with smaller blocks."""
    if tiles.num_stages > 1:
        return tiles._replace(num_stages=tiles.num_stages - 1)
    streamed, held = ("block_q", "block_k") if kernel == "backward_key_value" else ("block_k", "block_q")
    for name in (streamed, held):
        if getattr(tiles, name) > SMALLEST:
            return tiles._replace(**{name: getattr(tiles, name) // 2})
    return tiles


def shared_bytes(kernel: str, tiles: Tiles, head: int, value_head: int, itemsize: int, gathered: int) -> int:
    """An upper bound on the shared memory of one program; ``make gpu-check`` holds it against the compilers."""
    d, dv = pad_heads(head, value_head)
    # the rows that a program keeps, and those that pass by
    held, streamed = (tiles.block_k, tiles.block_q) if kernel == "backward_key_value" else (tiles.block_q, tiles.block_k)
    held *= d if kernel == "forward" else d + dv
    streamed *= d + dv
    tile = tiles.block_q * tiles.block_k
    # p, and ds in a backward pass, on their way into the next product (sm_100 reads them from shared memory)
    between = tile if kernel == "forward" else 2 * tile
    # per-slot vectors are copied ahead too; reductions and layout changes take the rest, on sm_100 the most
    vectors = 16 * (tiles.block_q + tiles.block_k) * tiles.num_stages + 8192
    return itemsize * (held + streamed * tiles.num_stages + between) + gathered * tile * tiles.num_stages + vectors
