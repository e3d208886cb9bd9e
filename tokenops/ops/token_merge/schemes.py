"""The published ways of choosing which tokens may merge into which: each only names roles, a window and how many can leave.

Sources: D. Bolya et al., "Token Merging: Your ViT But Faster", 2023 (bipartite, kth, random); D. Bolya and J. Hoffman, "Token Merging for
Fast Stable Diffusion", 2023 (grid); J. Hyun et al., "Multi-Granular Spatio-Temporal Token Merging", 2025 (previous_frame).
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from tokenops.ops.arguments import check_device
from tokenops.ops.token_merge.arguments import FAR, as_place, as_window
from tokenops.reference.token_merge import turns
from tokenops.types import Role, Window


class Request(NamedTuple):
    """The arguments of ``match_tokens`` that schemes read. The metric lends its shape and device, never its numbers."""

    metric: Tensor  # [B, N, C]
    class_token: bool
    distill_token: bool
    r: int | None
    k: int | None
    grid: tuple[int, ...] | None
    cell: tuple[int, int] | None
    locality: str | tuple[int, ...] | Window | None
    place: Tensor | None
    generator: torch.Generator | None

    @property
    def tokens(self) -> int:
        return self.metric.shape[1]

    @property
    def protected(self) -> int:
        return int(self.class_token) + int(self.distill_token)


class Scheme(NamedTuple):
    """Who may merge into whom."""

    role: Tensor | None  # [1|B, N] int8; None: turns, but for the protected tokens
    place: Tensor | None  # [1|B, N, 3] int32, given if and only if window is
    window: Window | None
    most: int  # no more sources than this can leave
    certain: bool  # so many really do, whatever the tensors hold
    dropped: int = 0  # tokens that go nowhere


def bipartite(request: Request) -> Scheme:
    """Even tokens may merge into odd ones."""
    place, window = _locality(request)
    destinations = request.tokens // 2 - int(request.distill_token)
    most = max(request.tokens - request.protected, 0) // 2 if destinations > 0 else 0
    return Scheme(None, place, window, most, window is None)


def kth(request: Request) -> Scheme:
    """The last of every k tokens receives, the others of the group leave, an incomplete group at the end is dropped."""
    tokens, k = request.tokens, request.k
    if k is not None and not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k is None or k < 1:
        raise ValueError(f"k must be at least 1 in scheme 'kth', got {k}")
    if request.protected > 0:
        raise ValueError("class_token and distill_token must be False in scheme 'kth', it protects no token")
    place, window = _locality(request)
    groups = tokens // k
    position = torch.arange(tokens, device=request.metric.device)
    role = torch.where(position % k == k - 1, int(Role.DESTINATION), int(Role.SOURCE))
    role = role.masked_fill(position >= groups * k, int(Role.DROPPED)).to(torch.int8)
    return Scheme(role.unsqueeze(0), place, window, groups * (k - 1), window is None, tokens - groups * k)


def random(request: Request) -> Scheme:
    """r tokens drawn for each sample leave, all others receive."""
    place, window = _locality(request)
    free = max(request.tokens - request.protected, 0)
    most = max(free - 1, 0)
    assert request.r is not None
    noise = torch.rand((request.metric.shape[0], free), generator=request.generator, device=request.metric.device)
    drawn = noise.argsort(-1).narrow(1, 0, min(request.r, most))
    role = torch.full(noise.shape, int(Role.DESTINATION), dtype=torch.int8, device=noise.device).scatter(1, drawn, int(Role.SOURCE))
    return Scheme(_behind_protected(request, role), place, window, most, window is None)


def grid(request: Request) -> Scheme:
    """One token drawn in every cell of the grid receives, the same for all samples; all others may leave."""
    frames, height, width = _grid(request)
    if not _are_sizes(request.cell, (2,)) or min(request.cell) < 1:
        raise ValueError(f"cell must be (sy, sx), both at least 1, in scheme 'grid', got {request.cell}")
    sy, sx = request.cell
    place, window = _locality(request)
    cells = (frames, height // sy, width // sx)
    device = request.metric.device
    drawn = torch.randint(sy * sx, cells, generator=request.generator, device=device)
    t, y, x = (torch.arange(size, device=device) for size in cells)
    y, x = y.view(-1, 1) * sy + drawn // sx, x * sx + drawn % sx
    chosen = (t.view(-1, 1, 1) * height + y) * width + x
    tokens = frames * height * width
    role = torch.full((1, tokens), int(Role.SOURCE), dtype=torch.int8, device=device)
    role = role.scatter(1, chosen.view(1, -1), int(Role.DESTINATION))
    most = tokens - prod(cells) if prod(cells) > 0 else 0
    return Scheme(_behind_protected(request, role), place, window, most, window is None)


def previous_frame(request: Request) -> Scheme:
    """Every token may merge into one of the frame before, and so on along the chain."""
    if request.locality is None:
        window = Window(-1, -1, FAR, FAR)
    else:
        window = as_window("locality", request.locality)._replace(t_low=-1, t_high=-1)
    free = max(request.tokens - request.protected, 0)
    role = torch.full((1, free), int(Role.BOTH), dtype=torch.int8, device=request.metric.device)
    most = free
    if request.place is None:
        frames, height, width = _grid(request)
        most = max(frames - 1, 0) * height * width
    # on a full grid the same location of the frame before always is there
    return Scheme(_behind_protected(request, role), _place(request), window, most, request.place is None)


SCHEMES = {"bipartite": bipartite, "kth": kth, "random": random, "grid": grid, "previous_frame": previous_frame}
# arguments that only these schemes read; grid and place are read by locality too
_READS = {"k": ("kth",), "cell": ("grid",), "generator": ("random", "grid")}


def as_scheme(scheme: str | Tensor, request: Request) -> Scheme:
    """What the named scheme makes of a request, or these roles [N] | [B, N]."""
    for name, readers in _READS.items():
        if getattr(request, name) is not None and (isinstance(scheme, Tensor) or scheme not in readers):
            raise ValueError(f"{name} must be left out unless scheme is {' or '.join(map(repr, readers))}, got {getattr(request, name)!r}")
    if isinstance(scheme, Tensor):
        return _given(scheme, request)
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise ValueError(f"scheme must be a Tensor of roles or one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
    if request.distill_token and not request.class_token and scheme != "bipartite":
        raise ValueError(f"distill_token must come with class_token in scheme {scheme!r}: it is token 1, and the free tokens follow")
    if request.locality is None and scheme not in ("grid", "previous_frame") and (request.grid is not None or request.place is not None):
        raise ValueError("grid and place must be left out where locality is None: nothing reads them")
    return SCHEMES[scheme](request)


def _given(role: Tensor, request: Request) -> Scheme:
    batch, tokens = request.metric.shape[0], request.tokens
    if role.dtype not in (torch.int8, torch.int32, torch.int64, torch.uint8):
        raise TypeError(f"scheme must hold roles as integers (tokenops.Role), got {role.dtype}")
    check_device("scheme", role, "metric", request.metric)
    role = role.unsqueeze(0) if role.dim() == 1 else role
    if role.dim() != 2 or role.shape[0] not in (1, batch) or role.shape[1] != tokens:
        raise ValueError(f"scheme must hold a role per token, [{tokens}] | [{batch}, {tokens}], got {list(role.shape)}")
    if request.protected > 0:
        raise ValueError("class_token and distill_token must be False beside roles: give those tokens Role.STAY")
    place, window = _locality(request)
    # a number beyond int8 must stay unknown instead of wrapping around
    return Scheme(role.clamp(-1, max(Role) + 1).to(torch.int8).contiguous(), place, window, tokens, False)


def with_masks(role: Tensor | None, request: Request, source_mask: Tensor | None, destination_mask: Tensor | None) -> Tensor:
    """The roles without the sources and destinations that are masked out."""
    if role is None:
        role = turns(request.tokens, request.class_token, request.distill_token, request.metric.device)
    for mask, bit in ((source_mask, Role.SOURCE), (destination_mask, Role.DESTINATION)):
        if mask is not None:
            role = torch.where(mask, role, role & ~int(bit))
    return role.contiguous()


def _behind_protected(request: Request, role: Tensor) -> Tensor:
    """[., N] from the roles of the free tokens."""
    stay = min(request.protected, request.tokens)
    return torch.nn.functional.pad(role, (stay, 0), value=int(Role.STAY)) if stay > 0 else role


def _locality(request: Request) -> tuple[Tensor | None, Window | None]:
    if request.locality is None:
        return None, None
    return _place(request), as_window("locality", request.locality)


def _are_sizes(value: object, lengths: tuple[int, ...]) -> TypeGuard[tuple[int, ...]]:
    integers = (int, torch.SymInt)
    return isinstance(value, (tuple, list)) and len(value) in lengths and all(isinstance(size, integers) for size in value)


def _grid(request: Request) -> tuple[int, int, int]:
    """(frames, height, width)."""
    grid = request.grid
    if not _are_sizes(grid, (2, 3)) or min(grid) < 0:
        raise ValueError(f"grid must be (height, width) or (frames, height, width), got {grid}")
    frames, height, width = grid if len(grid) == 3 else (1, *grid)
    if frames * height * width != request.tokens - request.protected:
        free = f"{request.tokens} tokens" + (f" less {request.protected} protected" if request.protected else "")
        raise ValueError(f"grid must have as many places as metric has free tokens ({free}), got {tuple(grid)}")
    return frames, height, width


def _place(request: Request) -> Tensor:
    """[1|B, N, 3] int32: as given, or that of a grid's rows. Protected tokens match nobody, wherever they are."""
    if request.place is not None:
        if request.grid is not None:
            raise ValueError(f"grid must be left out where place is given, got {request.grid}")
        return as_place("place", request.place, "metric", request.metric)
    sizes = _grid(request)
    device = request.metric.device
    place = torch.cartesian_prod(*(torch.arange(size, dtype=torch.int32, device=device) for size in sizes))
    if request.protected > 0:
        place = torch.nn.functional.pad(place, (0, 0, request.protected, 0))
    return place.unsqueeze(0)
