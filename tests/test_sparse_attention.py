"""Numbers: every backend against the definition, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, build
from oracle import assert_right

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_definition(case: Case, dtype: torch.dtype, serve, device: str) -> None:
    call = build(case, dtype, device)
    assert_right(call, serve(call))
