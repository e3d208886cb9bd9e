"""What token selection is compared with: loops over tokens, the halting step as it is printed, and calls to try them on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from oracle import assert_close
from torch import Tensor

from tokenops.types import HaltState

Call = dict[str, Any]  # keyword arguments of a public function

# choosing


def select_loop(row: list[float], k: int, threshold: float | None, protect: int) -> list[int]:
    """The kept ids, ascending."""
    passing = [n for n, score in enumerate(row) if n < protect or threshold is None or score > threshold]
    # protected first, then by score; sorted() is stable, so that of equal scores the lowest id comes first
    best = sorted(passing, key=lambda n: (n >= protect, -row[n] if n >= protect else 0.0))
    return sorted(best[:k])


def scores(*shape: int, dtype: torch.dtype = torch.float32, kind: str = "normal", seed: int = 0) -> Tensor:
    """Scores as they come: all different, many equal, sorted, or with everything that a float can be but NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "ties":
        x = (2 * x).round() / 2
    elif kind == "equal":
        x = torch.full(shape, 0.25)
    elif kind == "ascending":
        x = x.sort(-1).values
    elif kind == "descending":
        x = x.sort(-1, descending=True).values
    elif kind == "clustered":
        # the leading bits say nothing
        x = 1.0 + x * 1e-6
    elif kind == "special":
        tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        values = torch.tensor(
            [torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, largest, -largest, 1.0], dtype=torch.float64
        )
        return values[torch.randint(len(values), shape, generator=generator)].to(dtype)
    return x.to(dtype)


SCORES = ("normal", "ties", "equal", "ascending", "descending", "clustered", "special")

# halting


def halt_as_printed(x: Tensor, state: HaltState, *, scale: float, center: float, eps: float = 0.01, last: bool = False) -> HaltState:
    """Steps 3 to 8 of the method on all tokens [B, N, C], in the state's dtype. Masks carry no gradient."""
    z = x.to(state.cum.dtype)
    m = state.active.to(z.dtype)
    h = torch.ones_like(m) if last else torch.sigmoid(scale * z[..., 0] - center)
    c = state.cum + h
    rho = state.rho + m
    reached = ((c > 1 - eps) & state.active).to(z.dtype)
    going = (c < 1 - eps).to(z.dtype)
    weight = m * (reached * state.remain + going * h)
    out = state.out + z * weight[..., None] if state.out.dim() == 3 else state.out + z[:, 0] * weight[:, :1]
    return HaltState(c, state.remain - going * h, going.bool(), rho + reached * state.remain, state.counter + going, out)


class Halting(NamedTuple):
    """A call of halt_tokens from its second step on."""

    x: Tensor
    state: HaltState
    options: Call


def halting_call(
    batch: int = 2,
    tokens: int = 19,
    channels: int = 24,
    *,
    output: str = "all",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Halting:
    """Rows of every kind: some go on, some reach the bound in this step, some have halted. None stands within rounding of the bound."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(batch, tokens, channels, generator=generator)
    x[..., 0] = x[..., 0] * 0.2 + 0.45
    kind = torch.randint(3, (batch, tokens), generator=generator)
    cum = torch.tensor([0.1, 0.7, 1.3])[kind] + 0.05 * torch.rand(batch, tokens, generator=generator)
    scale, center = options.pop("scale", 10.0), options.pop("center", 5.0)
    # a decision that rounding could turn is no test of anything
    x = x.to(dtype)
    distance = (cum.double() + torch.sigmoid(scale * x[..., 0].double() - center) - 0.99).abs()
    cum = cum + (distance < 1e-3) * 4e-3
    out = torch.randn((batch, tokens, channels) if output == "all" else (batch, channels), generator=generator)
    state = HaltState(
        cum.to(device, wide),
        torch.rand(batch, tokens, generator=generator).to(device, wide),
        (kind < 2).to(device),
        torch.randint(1, 5, (batch, tokens), generator=generator).to(device, wide),
        torch.randint(1, 5, (batch, tokens), generator=generator).to(device, wide),
        out.to(device, wide),
    )
    return Halting(x.to(device), state, {"scale": scale, "center": center, **options})


def assert_state_close(got: HaltState, want: HaltState, dtype: torch.dtype) -> None:
    for name, have, expect in zip(HaltState._fields, got, want, strict=True):
        if name == "active":
            assert torch.equal(have.cpu(), expect.cpu()), f"active differs at {(have.cpu() != expect.cpu()).nonzero().tolist()}"
        else:
            # the state is float32 also of half types, and so are its sums
            assert_close(name, have, expect, torch.float64 if dtype == torch.float64 else torch.float32)


GRADIENTS = ("x", "cum", "remain", "rho", "out")


def halting_gradients(call: Halting, function: Any, wanted: tuple[str, ...] = GRADIENTS, seed: int = 1) -> dict[str, Tensor]:
    """Of a random number times each result that has a gradient."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in {"x": call.x, **call.state._asdict()}.items()}
    new = function(leaves["x"], HaltState(**{name: leaves[name] for name in HaltState._fields}), **call.options)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=call.x.device)
    for name in GRADIENTS[1:]:
        result = getattr(new, name)
        total = total + (result * torch.randn(result.shape, generator=generator).to(result.device)).sum()
    return dict(zip(wanted, torch.autograd.grad(total, [leaves[name] for name in wanted]), strict=True))


def packed_halting(call: Halting, lengths: list[int], padding: int = 0) -> Halting:
    """The first rows of each sample of a padded call, packed; rows behind them come from nowhere in particular."""
    mask = torch.arange(call.x.shape[1], device=call.x.device) < torch.tensor(lengths, device=call.x.device)[:, None]

    def rows(t: Tensor) -> Tensor:
        return torch.cat([t[mask], t.flatten(0, 1)[:padding]])

    # an output of class tokens stays: it has a row for each sample
    state = HaltState._make(t if name == "out" and t.dim() == 2 else rows(t) for name, t in call.state._asdict().items())
    bounds = torch.tensor([0, *lengths], device=call.x.device).cumsum(0).int()
    return Halting(rows(call.x), state, {**call.options, "cu_seqlens": bounds})


# packing


def pack_loop(x: Tensor, index: Tensor, total: int) -> tuple[Tensor, list[int]]:
    """x [B, N, ...], index [B, K]."""
    rows, bounds = [], [0]
    for b in range(x.shape[0]):
        rows += [x[b, int(n)] for n in index[b] if n >= 0]
        bounds.append(len(rows))
    return torch.stack([*rows, *[torch.zeros_like(x[0, 0])] * (total - len(rows))]), bounds


def lists(batch: int, rows: int, slots: int, *, empty: float = 0.3, seed: int = 0) -> Tensor:
    """[B, K] int32: different ids in any order, some slots empty."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, rows, generator=generator).argsort(-1)[:, :slots].int()
    return index.masked_fill(torch.rand(index.shape, generator=generator) < empty, -1)


def same_bits(function: Any, threads: tuple[int, ...]) -> None:
    """One run for each number of threads, all of them equal to the last bit."""
    runs = []
    for number in threads:
        torch.set_num_threads(number)
        runs.append(tuple(function()))
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            assert torch.equal(first, other)
