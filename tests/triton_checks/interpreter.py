"""The interpreter itself: what triton_interpreter.py taught it."""

from __future__ import annotations

import math

import torch

from triton_checks import Checks

CHECKS = Checks()


@CHECKS.add
def bfloat16_of_the_interpreter_is_torchs() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def cast(source, narrow, wide, n: tl.constexpr):
        at = tl.arange(0, n)
        x = tl.load(source + at).to(tl.bfloat16)
        tl.store(narrow + at, x)
        tl.store(wide + at, x.to(tl.float32))

    @triton.jit
    def add(source, n: tl.constexpr):
        at = tl.arange(0, n)
        x = tl.load(source + at)
        tl.store(source + at, x + x)

    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.00390625, 1.01171875, 3.3895e38, 1e-40])
    source = torch.cat([special, torch.randn(1024 - len(special)) * torch.logspace(-30, 30, 1024 - len(special))])
    narrow, wide = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    cast[(1,)](source, narrow, wide, 1024)
    assert torch.equal(narrow.nan_to_num(nan=1.0), source.bfloat16().nan_to_num(nan=1.0))
    assert torch.equal(wide.nan_to_num(nan=1.0), source.bfloat16().float().nan_to_num(nan=1.0))
    refused = ""
    try:
        add[(1,)](narrow, 1024)
    except Exception as error:
        refused = f"{error} {error.__cause__}"
    assert "bfloat16 may only be" in refused, "the interpreter added the bit patterns of bfloat16"
