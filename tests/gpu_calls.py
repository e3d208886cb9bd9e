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
    short = randn(7, 3, 16, 64)
    yield "sparse_attention, short", gradients(tokenops.sparse_attention(short, short, short, backend="cuda"), short)
    x = randn(2, 150, 72)
    packed, _ = tokenops.pack_tokens(x, index, backend="cuda")
    yield "pack_tokens", gradients(packed, x)
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

    first, state = tokenops.delta_attention(q, k, v, None, None, backend="cuda")
    yield "delta_attention, flush", gradients(first, q, k, v)
    # nothing has changed in the rows that are listed, which is as good a change as any
    again, _ = tokenops.delta_attention(q.detach(), k.detach(), v.detach(), index, state, backend="cuda")
    yield "delta_attention", [again]


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
