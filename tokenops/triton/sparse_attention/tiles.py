"""Tile sizes as data: a pure function from the shape of a problem to the blocks, warps and pipeline depth of one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tiles(NamedTuple):
    """How one program cuts its work."""

    block_q: int  # query slots
    block_k: int  # key slots
    num_warps: int
    num_stages: int


# (kernel, bytes of an element) -> {widest padded head: candidates, best first}
TABLE: dict[tuple[str, int], dict[int, Sequence[Tiles]]] = {
    ("forward", 2): {64: [Tiles(128, 64, 4, 3)], 128: [Tiles(128, 64, 8, 3)], 256: [Tiles(64, 32, 4, 3)]},
    ("forward", 4): {64: [Tiles(64, 32, 4, 2)], 128: [Tiles(32, 32, 4, 2)], 256: [Tiles(16, 16, 4, 2)]},
    ("backward_query", 2): {64: [Tiles(128, 64, 8, 3)], 128: [Tiles(64, 64, 4, 3)], 256: [Tiles(64, 32, 4, 2)]},
    ("backward_query", 4): {64: [Tiles(32, 32, 4, 2)], 128: [Tiles(32, 16, 4, 2)], 256: [Tiles(16, 16, 4, 2)]},
    ("backward_key_value", 2): {64: [Tiles(64, 128, 8, 3)], 128: [Tiles(32, 64, 4, 3)], 256: [Tiles(32, 64, 8, 2)]},
    ("backward_key_value", 4): {64: [Tiles(32, 32, 4, 2)], 128: [Tiles(16, 32, 4, 2)], 256: [Tiles(16, 16, 4, 2)]},
}


def pad(width: int) -> int:
    """Head widths are padded to a power of two, and to the 16 columns that a tensor core instruction takes at least."""
    return max(16, 1 << (width - 1).bit_length())


def shared_bytes(kernel: str, tiles: Tiles, head: int, value_head: int, itemsize: int) -> int:
    """An upper bound on the shared memory of one program, in bytes."""
    width = pad(head) + pad(value_head)
    streamed, held = (tiles.block_q, tiles.block_k) if kernel == "backward_key_value" else (tiles.block_k, tiles.block_q)
    return itemsize * width * (max(1, tiles.num_stages - 1) * streamed + held)


def choose_tiles(
    kernel: str, head: int, value_head: int, itemsize: int, queries: int, keys: int, limit: int | None
) -> Tiles:
    widest = max(64, pad(head), pad(value_head))
    candidates = TABLE[kernel, itemsize][widest]
    return candidates[0]
