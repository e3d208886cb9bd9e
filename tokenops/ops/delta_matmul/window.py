"""Attention within the windows of a token grid, of which only those with a changed token are computed."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops.ops.arguments import as_lists, as_rel_pos, check_device, check_in_place, check_tensor, refuse_forward_mode
from tokenops.ops.delta_matmul.arguments import as_attention_grids, check_cells, plain_index
from tokenops.ops.sparse_attention import sparse_attention_varlen
from tokenops.ops.wings import reads_contents
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaGate, TokenIndex, WindowState

_library = torch.library.Library("tokenops", "FRAGMENT")
# the rows of all windows of all samples, window after window, those that a listed token lies in first; and where each of these ends
_library.define(
    "changed_windows(Tensor index, SymInt batch, SymInt[] grid, SymInt[] window) -> (Tensor rows, Tensor bounds)",
    tags=torch.Tag.pt2_compliant_tag,
)


def delta_window_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    index: Tensor | TokenIndex | DeltaGate | None = None,
    state: WindowState | None = None,
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    rel_pos: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, WindowState]:  # out [B, H, N, Dv]
    """Attention of each token to the tokens of its window. Windows without a listed token are not computed: they keep their result.

    What is kept is what would be computed again: nothing is approximated. Work goes with the number of windows that hold a listed token.

    Args:
        query, key, value: the whole buffers, already updated. float32, bfloat16, float16 or float64. Read in place; one kernel serves the
            call if samples follow one another as rows do (views of [B, N, H, D], or one sample), else one a sample.
        index: the tokens whose rows of query, key, value or rel_pos changed since ``state``: [B, K] per sample or [K] for all, int32 (int64
            accepted), TokenIndex or DeltaGate. -1 marks an empty slot, anywhere in the list; ids in one list differ. All other rows must be
            as they were: nobody looks. None: a first frame or a scene cut.
        state: what the call for the frame before returned.
        grid: (h, w) of the tokens in rows, N = h w.
        window: (wh, ww), which must divide the grid.
        rel_pos: (rel_h [B, H, N, wh], rel_w [B, H, N, ww]), float32 or query's dtype, broadcast as in ``sparse_attention``: adds
            rel_h[n, y] + rel_w[n, x] to the logit of the key in row y and column x of n's window.
        scale: of the logits, default D ** -0.5.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Returns:
        out, and the state for the next frame. The state holds the result itself: whoever wants to write into out clones it first.

    Where the window does not divide the grid, keep buffers of a padded grid, as the published models pad: rows to the right and below hold
    what zeros would project to (the bias of the qkv layer), take part as keys, and never change. Token n of h x w is then token
    n // w * padded_w + n % w of the buffers, and the result is cropped: out.unflatten(2, (padded_h, padded_w))[:, :, :h, :w].

    The gradient is that of attention in all windows, in query, key, value and rel_pos, once; where it is asked for all windows are
    computed. The state is constant. Under autocast query, key and value are cast.

    Raises:
        ValueError: sizes, ranks or devices disagree (those of the state too), the grid does not hold N tokens or the window does not
            divide it, an index without a state; an id is out of range or repeated (checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice.

    >>> q, k, v = torch.randn(3, 1, 2, 64, 8)
    >>> out, state = tokenops.delta_window_attention(q, k, v, grid=(8, 8), window=(4, 4))
    >>> k[:, :, 3] += 1.0
    >>> new, state = tokenops.delta_window_attention(q, k, v, torch.tensor([3]), state, grid=(8, 8), window=(4, 4))
    >>> (new != out).any(-1).any(1).nonzero()[:, 1].tolist()
    [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27]
    """
    query, key, value, rel = _checked(query, key, value, grid, window, rel_pos, scale)
    lists = None
    if index is not None:
        if state is None:
            raise ValueError("index must not be given without a state: in a first frame every token is new (index=None)")
        _check_state(state, query, value)
        lists = as_lists(plain_index(index), query.shape[0], "query", query)
    attend = partial(_attend, Windows(grid, window), (query, key, value, *rel), scale, backend)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, *rel)):
        if lists is not None:
            # all windows are computed, but a bad list is an error here too
            torch.ops.tokenops.changed_windows.default(lists, query.shape[0], grid, window)
        out = attend(None, None)
        return out, WindowState(out.detach())
    if lists is None or state is None:
        # in the memory order of a linear layer's result, which the rows of all samples can be written into at once
        out = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
    else:
        out = state.output.detach().clone()
    attend(lists, out)
    return out, WindowState(out)


def delta_window_attention_(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    index: Tensor | TokenIndex | DeltaGate,
    state: WindowState,
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    rel_pos: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # state.output
    """``delta_window_attention`` that writes into the state's output and returns it. Only where no gradient is needed.

    Raises:
        RuntimeError: a gradient is needed.
        ValueError: the output is expanded, has a last dimension that is not dense, or shares memory with another argument; and as
            ``delta_window_attention``.
    """
    if index is None:
        raise TypeError("index must list the tokens that changed, got None: delta_window_attention(query, key, value) starts afresh")
    query, key, value, rel = _checked(query, key, value, grid, window, rel_pos, scale)
    _check_state(state, query, value)
    check_in_place("state.output", state.output, (query, key, value, *rel), "use delta_window_attention")
    if state.output.shape[3] > 1 and state.output.stride(3) != 1:
        raise ValueError(f"state.output must have a dense last dimension, got strides {state.output.stride()}")
    lists = as_lists(plain_index(index), query.shape[0], "query", query)
    _attend(Windows(grid, window), (query, key, value, *rel), scale, backend, lists, state.output)
    return state.output


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    rel_pos: tuple[Tensor, Tensor] | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    query, key, value = as_attention_grids(query, key, value)
    batch, _, tokens, _ = query.shape
    check_cells("window", window, grid, tokens, " (pad the buffers once, see the docstring)")
    rel_h, rel_w = as_rel_pos(rel_pos, (batch,), query, window[0] * window[1])
    if rel_h is not None and rel_h.shape[3] != window[0]:
        raise ValueError(f"rel_pos must be for windows of {window[0]} x {window[1]}, got {rel_h.shape[3]} rows")
    refuse_forward_mode(query, key, value, rel_h, rel_w)
    return query, key, value, (rel_h, rel_w)


def _check_state(state: WindowState, query: Tensor, value: Tensor) -> None:
    if not isinstance(state, WindowState):
        raise TypeError(f"state must be a WindowState, got {type(state).__name__}")
    check_tensor("state.output", state.output)
    shape = (*query.shape[:3], value.shape[3])
    if state.output.shape != shape:
        raise ValueError(f"state.output must be {list(shape)} as in this call, got {list(state.output.shape)}")
    if state.output.dtype != query.dtype:
        raise TypeError(f"state.output must be {query.dtype} as in this call, got {state.output.dtype}")
    check_device("state.output", state.output, "query", query)


class Windows(NamedTuple):
    """How a grid of tokens falls into windows."""

    grid: tuple[int, int]
    window: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def down(self) -> int:
        return self.grid[0] // self.window[0]

    @property
    def across(self) -> int:
        return self.grid[1] // self.window[1]

    def in_order(self, batch: int, device: torch.device) -> Tensor:
        """[windows of all samples, rows of a window] int32, rows counted through the samples."""
        rows = torch.arange(batch * self.down * self.across * self.rows, dtype=torch.int32, device=device)
        return rows.view(batch * self.down, self.window[0], self.across, self.window[1]).transpose(1, 2).reshape(-1, self.rows)

    def bounds(self, batch: int, device: torch.device) -> Tensor:
        """Where each of them begins, and where the last one ends."""
        return torch.arange(batch * self.down * self.across + 1, dtype=torch.int32, device=device) * self.rows

    def to_grid(self, rows: Tensor, batch: int) -> Tensor:
        """[B, N, H, C] from the rows [B N, H, C] of windows in order."""
        x = rows.view(batch, self.down, self.across, *self.window, *rows.shape[1:])
        return x.transpose(2, 3).reshape(batch, self.grid[0] * self.grid[1], *rows.shape[1:])


def _changed_windows(index: Tensor, batch: int, grid: tuple[int, int], window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    windows, device = Windows(grid, window), index.device
    tokens, count = grid[0] * grid[1], windows.down * windows.across
    # no C++ kernel sees this list, so its contents are checked here as the reference's are
    if reads_contents(device, "reference"):
        reference.check_index(index, tokens)
    ids = index.long().expand(batch, -1)
    place = ids // grid[1] // window[0] * windows.across + ids % grid[1] // window[1]
    # empty slots mark one more window, which is cut off
    place = place.masked_fill((ids < 0) | (ids >= tokens), count)
    changed = torch.zeros(batch, count + 1, dtype=torch.bool, device=device).scatter(1, place, True)[:, :count].flatten()
    rows = windows.in_order(batch, device)[changed.to(torch.int8).argsort(descending=True, stable=True)]
    # the windows behind the changed ones are sequences without a row, so that nothing waits for the device to count them
    return rows.flatten(), torch.minimum(windows.bounds(batch, device), changed.sum().int() * windows.rows)


def _changed_windows_fake(index: Tensor, batch: int, grid: tuple[int, int], window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    count = batch * (grid[0] // window[0]) * (grid[1] // window[1])
    rows = index.new_empty((count * window[0] * window[1],), dtype=torch.int32)
    return rows, index.new_empty((count + 1,), dtype=torch.int32)


_library.impl("changed_windows", _changed_windows, "CompositeExplicitAutograd")
torch.library.register_fake("tokenops::changed_windows", _changed_windows_fake, lib=_library)


def _attend(
    windows: Windows,
    inputs: tuple[Tensor | None, ...],  # query, key, value, rel_h, rel_w
    scale: float | None,
    backend: str | None,
    index: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """The windows with a listed token, or all of them, written into out. Without one: a new result with a gradient, of all windows."""
    parts = []
    device = _given(inputs[0]).device
    for first, samples in _samples((*inputs, out)):
        part = [None if x is None else x.narrow(0, first, samples) for x in (*inputs, out)]
        query, key, value, rel_h, rel_w, rows_out = (None if x is None else x.transpose(1, 2).flatten(0, 1) for x in part)
        if index is None:
            rows, bounds = windows.in_order(samples, device).flatten(), windows.bounds(samples, device)
        else:
            lists = index if index.shape[0] == 1 else index.narrow(0, first, samples)
            rows, bounds = torch.ops.tokenops.changed_windows.default(lists, samples, windows.grid, windows.window)
        result = sparse_attention_varlen(
            _given(query),
            _given(key),
            _given(value),
            bounds,
            bounds,
            windows.rows,
            windows.rows,
            q_index=rows,
            kv_index=rows,
            rel_pos=None if rel_h is None or rel_w is None else (rel_h, rel_w),
            scale=scale,
            out=rows_out,
            backend=backend,
        )
        assert isinstance(result, Tensor)
        if out is None:
            parts.append(windows.to_grid(result, samples))
    if out is not None:
        return out
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _samples(tensors: tuple[Tensor | None, ...]) -> list[tuple[int, int]]:
    """(first sample, how many) of pieces of which every tensor can be seen as packed rows [B N, H, C]: one piece, or one a sample."""
    batch = next(x.shape[0] for x in tensors if x is not None)
    if all(x is None or x.stride(0) == x.shape[2] * x.stride(2) for x in tensors) or batch == 1:
        return [(0, batch)]
    return [(b, 1) for b in range(batch)]
