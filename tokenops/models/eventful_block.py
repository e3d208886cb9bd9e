"""The block of Eventful Transformers: attention and MLP of the tokens that changed since they were last computed.

Letters: B batch, N tokens, M key cells (the tokens, or fewer where keys are pooled), K chosen tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import Block, attend, fused_linear, fused_mlp, merge_heads
from tokenops.ops.delta_matmul import (
    delta_attention,
    delta_attention_,
    delta_gate,
    delta_gate_,
    delta_window_attention,
    delta_window_attention_,
    gathered_linear,
    gathered_mlp,
    update_tokens,
    update_tokens_,
)
from tokenops.types import DeltaGate, DeltaState, WindowState

# how much a block takes over from the frame before: nothing; what its linear layers made; also the logits; also the product with the values
BLOCK_CLASSES = ("Block", "EventfulTokenwiseBlock", "EventfulMatmul1Block", "EventfulBlock")
GATES = ("qkv_gate", "projection_gate", "mlp_gate")
# names of policies, and the argument of delta_gate that each stands for
POLICIES = {"topk": "k", "fraction": "fraction", "threshold": "threshold"}
Policy = tuple[str, Mapping[str, Any]]
Pair = tuple[int, int]


class BlockConfig(NamedTuple):
    """Of a block, under the released configurations' names. Sizes are one number or (height, width)."""

    dim: int
    heads: int
    mlp_ratio: float = 4
    relative_embedding_size: Any = None  # of the grid that the position tables were learned on; windowed blocks: of the window
    window_size: Any = None
    pool_size: Any = None  # keys and values are averages over cells of so many tokens
    ats_fraction: float | None = None  # refused
    matmul_2_cast: str | None = None  # "float16" or "bfloat16": how mode "paper" keeps attention matrix and values; others keep none
    drop_path_rate: float = 0.0
    stgt: bool = False  # gates compare with the frame before
    gate_before_ln: bool = False


class BlockState(NamedTuple):
    """What a block keeps of the last frame: what each gate let through, and what was made of it."""

    qkv_reference: Tensor  # [B, N, C]
    qkv: Tensor  # [B, N, 3 C], in windowed blocks with the tokens that fill the last windows
    attention: DeltaState | WindowState | None  # None: attention is computed afresh
    projection_reference: Tensor  # [B, N, C]
    projection: Tensor  # [B, N, C]
    mlp_reference: Tensor  # [B, N, C]
    mlp: Tensor  # [B, N, C]
    tables: tuple[Tensor, Tensor] | None  # position tables for this grid, which change only with the weights
    rel_pos: tuple[Tensor, Tensor] | None  # [B, N, H h / ph], [B, N, H w / pw] products of queries and tables, in windowed blocks as qkv
    chosen: tuple[Tensor, Tensor, Tensor] | None  # [B, K] each, the three gates' choices; None after a first frame


class EventfulBlock(Block):
    """A pre-norm block, frame after frame: three segments of gate, linear layers on what it lets through, and a buffer of their results.

    ``kind`` is one of BLOCK_CLASSES (section 4 of the paper; the middle two are its ablations), ``grid`` (height, width) of the tokens.
    """

    def __init__(
        self,
        config: BlockConfig,
        grid: tuple[int, ...],
        kind: str,
        *,
        class_token: bool,
        policy: Policy,
        mode: str,
    ) -> None:
        super().__init__(config.dim, config.heads, config.mlp_ratio, drop_path=config.drop_path_rate)
        if kind not in BLOCK_CLASSES:
            raise ValueError(f"block_class must be one of {', '.join(BLOCK_CLASSES)}, got {kind!r}")
        if mode not in ("paper", "exact"):
            raise ValueError(f"mode must be 'paper' or 'exact', got {mode!r}")
        if config.ats_fraction is not None:
            raise NotImplementedError(
                "ats_fraction must be None: the released code scores tokens by the first column of the attention matrix, not the class "
                "token's row, and over the batch, not the heads; there is nothing to be equal to"
            )
        if config.matmul_2_cast not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"matmul_2_cast must be None, 'float32', 'float16' or 'bfloat16', got {config.matmul_2_cast!r}")
        self.kind, self.mode, self.config, self.grid = kind, mode, config, grid
        self.choice = choice_of(policy)
        self.window, self.pool, table = (_pair(size) for size in (config.window_size, config.pool_size, config.relative_embedding_size))
        if (self.window or self.pool or table) and (class_token or len(grid) != 2):
            raise ValueError("window_size, pool_size and relative_embedding_size need a grid of two dimensions without a class token")
        if self.window and (kind not in BLOCK_CLASSES[:2] or self.pool):
            raise ValueError(f"window_size goes with Block or EventfulTokenwiseBlock and no pool_size, got {kind}, pool_size={self.pool}")
        if self.pool and (grid[0] % self.pool[0] or grid[1] % self.pool[1]):
            raise ValueError(f"pool_size must divide the grid {grid}, got {self.pool}")
        # up to whole windows, below and on the right
        self.padded = tuple(-(-side // w) * w for side, w in zip(grid, self.window, strict=True)) if self.window else grid
        if table is not None:
            height, width = self.window or table
            for name, size in (("rel_pos_h", height), ("rel_pos_w", width)):
                self.attn.register_parameter(name, nn.Parameter(torch.zeros(2 * size - 1, config.dim // config.heads)))
        self.has_tables = table is not None

    def forward(  # type: ignore[override]  # a frame needs the state of the one before
        self, x: Tensor, state: BlockState | None = None, forced: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, BlockState | None]:
        """One frame [B, N, C]. Without gradients the new state is written over the one given. ``forced``: what the three gates choose."""
        tables = None
        if self.has_tables:
            # the tables of the state would be constants
            tables = self.tables() if state is None or torch.is_grad_enabled() else state.tables
        if self.kind == "Block":
            qkv = fused_linear(x, self.attn.qkv.weight, self.attn.qkv.bias, self.norm1)
            qkv = self._filled(qkv)
            attended, _ = self._attend(qkv, None, None, self._rel_pos(qkv, tables))
            x = x + self.drop_path(fused_linear(attended, self.attn.proj.weight, self.attn.proj.bias))
            return x + self.drop_path(fused_mlp(x, self.mlp, self.norm2)), None
        old: Any = state or BlockState(*[None] * len(BlockState._fields))  # type: ignore[arg-type]  # a first frame has no buffers
        qkv_list, projection_list, mlp_list = forced or (None,) * 3
        # gates compare normalised tokens, unless they stand before the norms, which then are part of the layers
        norms = [{"norm": (norm.weight, norm.bias), "norm_eps": norm.eps} for norm in (self.norm1, self.norm2)]
        none: list[dict[str, Any]] = [{}, {}]
        early, late = (none, norms) if self.config.gate_before_ln else (norms, none)

        g1 = self._gate(x, old.qkv_reference, qkv_list, **early[0])
        qkv = self._qkv(g1, old.qkv, **late[0])
        changed = None if state is None else self._places(g1.index)
        rel_pos = self._rel_pos(qkv, tables, changed, old.rel_pos)
        attended, attention = self._attend(qkv, changed, old.attention, rel_pos)
        g2 = self._gate(attended, old.projection_reference, projection_list)
        projection = _updated(old.projection, g2, (self.attn.proj,))
        # under autocast layers give a half type, and the sum is x's
        g3 = self._gate(self.drop_path(projection).to(x.dtype), old.mlp_reference, mlp_list, skip=x, **early[1])
        mlp = _updated(old.mlp, g3, (self.mlp.fc1, self.mlp.fc2), activation=self.mlp.activation, **late[1])
        chosen = None if state is None else (g1.index, g2.index, g3.index)
        new = BlockState(g1.reference, qkv, attention, g2.reference, projection, g3.reference, mlp, tables, rel_pos, chosen)
        branch = self.drop_path(mlp)
        return g3.total + branch if torch.is_grad_enabled() else g3.total.add_(branch), new

    def _gate(self, x: Tensor, reference: Tensor | None, forced: Tensor | None, **options: Any) -> DeltaGate:
        choice = self.choice if forced is None else {"index": forced, "order": self.choice["order"]}
        options = {**choice, **options, "whole": self.config.stgt}
        if reference is None or torch.is_grad_enabled():
            return delta_gate(x, reference, **options)
        return delta_gate_(x, reference, **options)

    def _qkv(self, gate: DeltaGate, buffer: Tensor | None, **norm: Any) -> Tensor:
        if self.padded == self.grid:
            return _updated(buffer, gate, (self.attn.qkv,), **norm)
        rows = gathered_linear(gate.reference, self.attn.qkv.weight, self.attn.qkv.bias, index=gate, **norm)
        if buffer is None:
            return self._filled(rows)
        if torch.is_grad_enabled():
            # what fills the windows is the layer's bias of today
            return self._filled(update_tokens(self._cropped(buffer), rows, index=gate))
        return update_tokens_(buffer, rows, index=self._places(gate.index))

    def _attend(
        self, qkv: Tensor, index: Any, state: Any, rel_pos: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, DeltaState | WindowState | None]:
        """[B, N, C], and the state for the next frame: whichever the operator of this block makes."""
        query, key, value = self.attn.heads(qkv)
        if rel_pos is not None:
            by_row, by_column = (part.unflatten(2, (self.attn.num_heads, -1)).transpose(1, 2) for part in rel_pos)
            rel_pos = by_row, by_column
        options: dict[str, Any] = {"rel_pos": rel_pos}
        in_place = state is not None and not torch.is_grad_enabled()
        if self.window is not None:
            options |= {"grid": self.padded, "window": self.window}
            if in_place:
                out = delta_window_attention_(query, key, value, index, state, **options)
            else:
                out, state = delta_window_attention(query, key, value, index, state, **options)
            return self._cropped(merge_heads(out)), state
        if self.kind in BLOCK_CLASSES[:2]:
            key, value = (x if self.pool is None else _pooled(x, self.grid, self.pool) for x in (key, value))
            return attend(query, key, value, **options), None
        options |= {"pool": self.pool, "grid": self.grid if self.pool else None}
        if in_place:
            out = delta_attention_(query, key, value, index, state, **options)
        else:
            # EventfulMatmul1Block leaves the product with the values dense: attention on the buffers, which mode "exact" is
            mode = self.mode if self.kind == "EventfulBlock" else "exact"
            cast = getattr(torch, self.config.matmul_2_cast) if self.config.matmul_2_cast and mode == "paper" else None
            out, state = delta_attention(query, key, value, index, state, mode=mode, cast=cast, **options)
        return merge_heads(out), state

    def _rel_pos(
        self, qkv: Tensor, tables: tuple[Tensor, Tensor] | None, index: Tensor | None = None, kept: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """[B, N, H h / ph], [B, N, H w / pw]: of unscaled queries, the grid being one window if there are no others.

        Those of the frame before are written over where queries changed; long lists, as a threshold's, are slower than all.
        """
        if tables is None:
            return None
        h, w = self.window or self.grid
        heads = self.attn.num_heads
        if kept is None or index is None or torch.is_grad_enabled() or not self._is_short(index.shape[1]):
            query = self.attn.heads(qkv)[0].transpose(1, 2)
            on_grid = query.unflatten(1, (self.padded[0] // h, h, self.padded[1] // w, w))
            by_row, by_column = (torch.einsum(f"baicjhd,{at}kd->baicjhk", on_grid, table) for at, table in zip("ij", tables, strict=True))
            return by_row.flatten(5, 6).flatten(1, 4), by_column.flatten(5, 6).flatten(1, 4)
        ids = index.clamp(min=0).long()
        rows = qkv.gather(1, ids[..., None].expand(-1, -1, self.config.dim)).unflatten(2, (heads, -1))  # [B, K, H, D]
        places = (ids // self.padded[1] % h, ids % self.padded[1] % w)
        for part, table, at in zip(kept, tables, places, strict=True):
            update_tokens_(part, (rows @ table[at].mT).flatten(2), index=index)
        return kept

    def _is_short(self, slots: int) -> bool:
        """Whether a list is worth the tables that each of its tokens needs of its own."""
        return 2 * slots <= self.padded[0] * self.padded[1]

    def _places(self, ids: Tensor) -> Tensor:
        """Of these tokens in the padded grid."""
        if self.padded == self.grid:
            return ids
        width, wide = self.grid[1], self.padded[1]
        return torch.where(ids < 0, -1, ids // width * wide + ids % width)

    def _filled(self, qkv: Tensor) -> Tensor:
        """[B, N', 3 C]: on the padded grid, whose new tokens are what the layer makes of zeros: its bias."""
        if self.padded == self.grid:
            return qkv
        grid = self.attn.qkv.bias.to(qkv.dtype).expand(qkv.shape[0], *self.padded, -1).clone()
        grid[:, : self.grid[0], : self.grid[1]] = qkv.unflatten(1, self.grid)
        return grid.flatten(1, 2)

    def _cropped(self, x: Tensor) -> Tensor:  # [B, N', C] -> [B, N, C]
        if self.padded == self.grid:
            return x
        return x.unflatten(1, self.padded)[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    def tables(self) -> tuple[Tensor, Tensor]:
        """[h, h / ph, D], [w, w / pw, D]: for each place of a query and of a key along an axis the learned row of their distance."""
        sizes, cells = self.window or self.grid, self.pool or (1, 1)
        made = []
        for name, size, cell in zip(("rel_pos_h", "rel_pos_w"), sizes, cells, strict=True):
            learned = self.attn.get_parameter(name)
            own = (len(learned) + 1) // 2
            at = torch.arange(own, device=learned.device)
            table = learned[at[:, None] - at[None] + own - 1]
            if own != size:
                # as published: the table of both places is an image, where other models stretch the list of distances
                table = F.interpolate(table.permute(2, 0, 1)[None], (size, size), mode="bicubic")[0].permute(1, 2, 0)
            made.append(table.unflatten(1, (-1, cell)).mean(2))
        return made[0], made[1]

    def touched(self, ids: Tensor) -> int:
        """How many key cells these tokens change; in windows, how many tokens have another result."""
        if self.window is not None:
            (_, width), (h, w) = self.grid, self.window
            return h * w * len(torch.unique(ids // width // h * (self.padded[1] // w) + ids % width // w))
        if self.pool is not None:
            (_, width), (h, w) = self.grid, self.pool
            return len(torch.unique(ids // width // h * (width // w) + ids % width // w))
        return len(ids)

    def count(self, tokens: int, chosen: list[tuple[int, int, int, int | None]] | None, batch: int) -> tuple[Counter[str], int]:
        """The published counters of a frame, and all multiply-adds; see ``EventfulBackbone.flops``.

        ``chosen``: for each sample how many tokens the gates chose, and what the first of them ``touched``; None: as much as can be.
        """
        width, hidden, heads = self.config.dim, self.mlp.fc1.out_features, self.config.heads
        gated = chosen is not None and self.kind != "Block"
        made = chosen if gated and chosen is not None else [(tokens, tokens, tokens, None)] * batch
        qkv, projection, mlp = sum(m[0] for m in made), sum(m[1] for m in made), sum(m[2] for m in made)
        c: Counter[str] = Counter()
        c["linear"] = width * width * (3 * qkv + projection) + 2 * width * hidden * mlp
        c["bias"] = width * (3 * qkv + projection) + (hidden + width) * mlp
        c["add"] = 2 * batch * tokens * width
        if gated:
            c["gate"] = 3 * batch * tokens * width
        queries, keys, sides = tokens, tokens, self.grid
        if self.window is not None:
            sides = self.window
            queries, keys = self.padded[0] * self.padded[1], sides[0] * sides[1]
            c["bias"] += 3 * width * (self.padded != self.grid)
        elif self.pool is not None:
            sides = (self.grid[0] // self.pool[0], self.grid[1] // self.pool[1])
            keys = sides[0] * sides[1]
        done = c["linear"]
        if self.has_tables:
            row = width * (sides[0] + sides[1])
            c["einsum"] = batch * queries * row
            # a threshold's lists have a slot for every token
            short = gated and "threshold" not in self.choice and self._is_short(max(m[0] for m in made))
            done += (qkv if short else batch * queries) * row
            c["add"] += 2 * batch * heads * queries * keys
        product = queries * keys * width
        for rows, _, _, touched in made:
            logits, average, ours = product, product, 2 * product
            if gated and self.window is not None and touched is not None:
                ours = 2 * touched * keys * width
            elif gated and self.kind in BLOCK_CLASSES[2:]:
                cells = min(rows, keys) if touched is None else touched
                logits = (rows * keys + cells * tokens) * width
                if self.kind == "EventfulBlock":
                    average = 2 * tokens * cells * width
                    c["gate"] += keys * width + heads * tokens * keys
                    c["accumulator"] += cells * width + 2 * tokens * width
                # what the operator does: mode "paper" all logits, mode "exact" chosen rows and twice the changed columns of the others
                if self.kind == "EventfulBlock" and self.mode == "paper":
                    ours = product + average
                elif cells <= 0.5 * keys:
                    ours = 2 * (rows * keys + 2 * (tokens - rows) * cells) * width
            c["matmul"] += logits + average
            done += ours
        return c, done


def choice_of(policy: Policy) -> dict[str, Any]:
    """The policy as arguments of ``delta_gate``."""
    name, options = policy
    if name not in POLICIES or not {POLICIES[name]} <= set(options) <= {POLICIES[name], "order"}:
        forms = ", ".join(f"({known!r}, {{{argument!r}, 'order'}})" for known, argument in POLICIES.items())
        raise ValueError(f"policy must be one of {forms}, 'order' being optional; got {policy!r}")
    return {"order": 2.0, **options}


def _updated(buffer: Tensor | None, gate: DeltaGate, layers: tuple[nn.Linear, ...], **options: Any) -> Tensor:
    """The buffer [B, N, O] with what one or two layers make of the tokens that the gate let through: the rows of its new reference."""
    weights = [part for layer in layers for part in (layer.weight, layer.bias)]
    layer: Any = gathered_linear if len(layers) == 1 else gathered_mlp
    if buffer is not None and not torch.is_grad_enabled():
        return layer(gate.reference, *weights, index=gate, out=buffer, **options)
    rows = layer(gate.reference, *weights, index=gate, **options)
    return rows if buffer is None else update_tokens(buffer, rows, index=gate)


def _pooled(x: Tensor, grid: tuple[int, ...], pool: Pair) -> Tensor:
    """[B, H, M, D]: averages over cells of the grid."""
    return x.unflatten(2, (grid[0] // pool[0], pool[0], grid[1] // pool[1], pool[1])).mean((3, 5)).flatten(2, 3)


def sizes_of(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _pair(size: Any) -> Pair | None:
    """(height, width) of one number for both, of two, or of none."""
    if size is None:
        return None
    sizes = sizes_of(size) * (2 if isinstance(size, int) else 1)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"a size must be one or two positive numbers, got {size!r}")
    return sizes[0], sizes[1]
