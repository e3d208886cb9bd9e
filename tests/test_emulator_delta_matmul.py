"""The CUDA kernels of work on changed tokens, on the emulator: random calls under several orders of threads."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import test_delta_matmul_attention as attending
import test_delta_matmul_gate as gating
import test_delta_matmul_linear as layers
import torch
from delta_matmul_oracle import DTYPES, lists, normal, widened
from emulator_checks import RandomCalls, assert_every_site_counts, emulated, in_every_order
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from torch import Tensor

import tokenops

pytestmark = emulated
