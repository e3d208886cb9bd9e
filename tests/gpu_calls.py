"""A few calls of every operation, forward and backward, by the CUDA kernels: what compute-sanitizer watches.

``python tests/gpu_calls.py cuda``, or cpu for the emulator. Numbers are the tests' affair; here a result only has to be finite.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import tokenops
from tokenops import native


def calls(device: str, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    """Name and results. Sizes are odd on purpose: nothing fills a tile."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    q, k, v = randn(2, 3, 150, 64), randn(2, 3, 150, 64), randn(2, 3, 150, 64)
    index = tokenops.select_tokens(torch.rand(2, 150, device=device), k=77, protect=1, backend="cuda")
    yield "select_tokens", [index.index, index.count]
    attention = {"q_index": index, "kv_index": index, "kv_bias": torch.rand(2, 150, device=device), "backend": "cuda"}
    yield "sparse_attention", gradients(tokenops.sparse_attention(q, k, v, **attention), q, k, v)
    biases = randn(2, 3, 150, 10), randn(2, 3, 150, 15)
    attention = {"attn_mask": torch.rand(150, 150, device=device) < 0.5, "rel_pos": biases, "is_causal": True, "backend": "cuda"}
    yield "sparse_attention, mask and rel_pos", gradients(tokenops.sparse_attention(q, k, v, **attention), q, k, v, *biases)
    grids = randn(150, 3, 64), randn(150, 3, 64), randn(150, 3, 64)
    bounds = torch.tensor([0, 41, 41, 150], device=device, dtype=torch.int32)
    yield "sparse_attention_varlen", gradients(tokenops.sparse_attention_varlen(*grids, bounds, bounds, backend="cuda"), *grids)
    short = randn(7, 3, 16, 64)
    yield "sparse_attention, short", gradients(tokenops.sparse_attention(short, short, short, backend="cuda"), short)
    x = randn(2, 150, 72)
    packed, bounds = tokenops.pack_tokens(x, index, backend="cuda")
    yield "pack_tokens", gradients(packed, x)
    rows = packed.detach().requires_grad_()
    yield "unpack_tokens", gradients(tokenops.unpack_tokens(rows, bounds, index, n=150, backend="cuda"), rows)
    state = tokenops.halt_tokens(x, scale=10.0, center=0.0, backend="cuda")
    state = tokenops.halt_tokens(x, state, scale=10.0, center=0.0, last=True, backend="cuda")
    yield "halt_tokens", gradients(state.out, x)
    yield "pairwise_argmax", list(tokenops.pairwise_argmax(x.detach(), packed.detach()[None, :60].expand(2, -1, -1), backend="cuda"))
    plan = tokenops.match_tokens(x.detach(), r=40, class_token=True, backend="cuda")
    merged = tokenops.merge_tokens(x, plan, backend="cuda")
    yield "merge_tokens", gradients(merged, x)
    rows = merged.detach().requires_grad_()
    yield "unmerge_tokens", gradients(tokenops.unmerge_tokens(rows, plan, backend="cuda"), rows)
    meta = randn(2, 9, 72)
    yield "soft_merge", gradients(tokenops.soft_merge(x, x.detach(), meta, temperature=0.5, backend="cuda")[0], x, meta)
    before = torch.randn(2, 150, 72, device=device, dtype=dtype)
    gate = tokenops.delta_gate(x.detach(), before, k=40, backend="cuda")
    yield "delta_gate", [gate.index, gate.values]
    weight = randn(96, 72)
    yield "gathered_linear", gradients(tokenops.gathered_linear(x, weight, index=gate.index, backend="cuda"), x, weight)
    parts, norm = (randn(96, 72), randn(96), randn(72, 96), randn(72)), (randn(72), randn(72))
    mlp = tokenops.gathered_mlp(x, *parts, index=gate.index, norm=norm, backend="cuda")
    yield "gathered_mlp", gradients(mlp, x, *parts, *norm)
    rows = mlp.detach().requires_grad_()
    yield "update_tokens", gradients(tokenops.update_tokens(x, rows, index=gate.index, backend="cuda"), x, rows)

    for mode in ("exact", "paper"):
        first, state = tokenops.delta_attention(q, k, v, mode=mode, backend="cuda")
        yield f"delta_attention, {mode}, first frame", gradients(first, q, k, v)
        # nothing has changed in the rows that are listed, which is as good a change as any
        grids = q.detach(), k.detach(), v.detach()
        yield f"delta_attention, {mode}", [tokenops.delta_attention(*grids, gate, state, mode=mode, backend="cuda")[0]]
    first, state = tokenops.delta_window_attention(*grids, grid=(10, 15), window=(5, 5), backend="cuda")
    again, _ = tokenops.delta_window_attention(*grids, gate, state, grid=(10, 15), window=(5, 5), backend="cuda")
    yield "delta_window_attention", [first, again]


def main() -> int:
    device = sys.argv[1]
    if device == "cpu":
        native.emulate_cuda()
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for name, results in calls(device, dtype):
            finite = all(bool(result.isfinite().all()) for result in results)
            print(f"{name}, {str(dtype).removeprefix('torch.')}: {'finite' if finite else 'NOT FINITE'}", flush=True)
            if not finite:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
