"""Methods of the literature as a few lines over the operators, each compared with a brute-force reading of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close
from token_merge_oracle import assert_plan, best_partner, clusters, clusters_of, merged, on, parents
from torch import Tensor

import tokenops
from tokenops import Role, Window

STAY, SOURCE, DESTINATION, BOTH, DROPPED = map(int, Role)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.2


def turns(tokens: int) -> list[int]:
    return [SOURCE if i % 2 == 0 else DESTINATION for i in range(tokens)]


def places(frames: int, height: int, width: int) -> list[tuple[int, int, int]]:
    return [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]


def wanted(metric: Tensor, role: Any, **options: Any) -> list[list[list[int]]]:
    """The clusters of every sample; ``role`` is a list for all or a list of lists."""

    def of(value: Any, s: int) -> Any:
        return value[s] if isinstance(value, Tensor) and value.dim() == 2 else value

    return [
        clusters(parents(sample, role[s] if isinstance(role[0], list) else role, **{name: of(value, s) for name, value in options.items()}))
        for s, sample in enumerate(metric)
    ]


# the named schemes


@pytest.mark.parametrize(
    ("r", "ratio", "merged"), [(0, None, 0), (5, None, 5), (99, None, 9), (None, 0.3, 6), (None, 1.0, 9), (None, 0.01, 0)]
)
def test_tome(r: int | None, ratio: float | None, merged: int, backend: str, device: str) -> None:
    """Bipartite soft matching: r or a share of N, capped at half of the unprotected tokens."""
    metric = normal(2, 20, 16)
    plan = tokenops.match_tokens(metric.to(device), r=r, ratio=ratio, class_token=True, backend=backend)
    assert plan.n_out == 20 - merged
    assert_plan(plan, wanted(metric, [STAY, *turns(20)[1:]], r=merged))


def test_a_ratio_is_rounded_down_as_python_does(backend: str, device: str) -> None:
    # 0.29 * 100 is 28.999999999999996
    plan = tokenops.match_tokens(normal(1, 100, 8).to(device), ratio=0.29, backend=backend)
    assert plan.n_out == 72


def test_protected_tokens_keep_their_rows(backend: str, device: str) -> None:
    metric = normal(2, 24, 8)
    # the class token's twin would be its first choice
    metric[:, 3], metric[:, 4] = metric[:, 0], metric[:, 1]
    plan = tokenops.match_tokens(metric.to(device), r=20, class_token=True, distill_token=True, backend=backend)
    assert plan.slot[:, :2].tolist() == [[0, 1]] * 2
    assert [clusters_of(plan, s)[:2] for s in range(2)] == [[[0], [1]]] * 2
    assert plan.n_out == 24 - 11


def test_by_threshold(backend: str, device: str) -> None:
    """As many as are alike: the number of rows in use is data, the rows behind are empty."""
    metric = normal(3, 30, 8)
    plan = tokenops.match_tokens(metric.to(device), threshold=0.6, backend=backend)
    want = wanted(metric, turns(30), threshold=0.6)
    assert plan.n_out == 30
    assert len({len(rows) for rows in want}) > 1
    assert_plan(plan, want)
    sizes = tokenops.merge_tokens(torch.ones(3, 30, device=device), plan, mode="sum", backend=backend)
    rows = tokenops.merge_tokens(metric.to(device), plan, backend=backend)
    for s, used in enumerate(plan.count.tolist()):
        assert sizes[s, :used].min() >= 1
        assert sizes[s, used:].count_nonzero() == rows[s, used:].count_nonzero() == 0
    # the next layer: empty rows take no part, and merge with size 0 into nothing
    filled = sizes > 0
    again = tokenops.match_tokens(rows, threshold=0.5, source_mask=filled, destination_mask=filled, backend=backend)
    both = tokenops.compose_plans(plan, again)
    got = tokenops.merge_tokens(rows, again, size=sizes, backend=backend)
    assert_close("two layers", got, tokenops.merge_tokens(metric.to(device), both, backend=backend), torch.float32)
    # a threshold is strict
    ones = torch.ones(1, 8, 8, device=device)
    best, _ = tokenops.pairwise_argmax(ones, ones, normalize=False, backend=backend)
    assert tokenops.match_tokens(ones, threshold=8.0, normalize=False, backend=backend).count.tolist() == [8]
    assert tokenops.match_tokens(ones, threshold=7.9, normalize=False, backend=backend).count.tolist() == [4]
    assert best.tolist() == [[8.0] * 8]


@pytest.mark.parametrize(("tokens", "k"), [(12, 3), (13, 3), (14, 4), (5, 1), (2, 3)])
def test_kth(tokens: int, k: int, backend: str, device: str) -> None:
    metric = normal(2, tokens, 8)
    plan = tokenops.match_tokens(metric.to(device), scheme="kth", k=k, backend=backend)
    used = tokens // k * k
    role = [DROPPED if i >= used else DESTINATION if i % k == k - 1 else SOURCE for i in range(tokens)]
    assert plan.n_out == tokens // k
    assert_plan(plan, wanted(metric, role))


@pytest.mark.parametrize("r", [0, 6, 99])
def test_random(r: int, backend: str, device: str) -> None:
    metric = normal(3, 17, 8)
    plan = tokenops.match_tokens(
        metric.to(device), r=r, scheme="random", class_token=True, generator=torch.Generator(device).manual_seed(5), backend=backend
    )
    r = min(r, 15)
    assert plan.n_out == 17 - r
    roles = []
    for s in range(3):
        rows = clusters_of(plan, s)
        assert rows[0] == [0]
        left = {i for members in rows for i in members[1:]}
        assert len(left) == r
        roles.append([STAY, *(SOURCE if i in left else DESTINATION for i in range(1, 17))])
    assert_plan(plan, wanted(metric, roles))
    if r == 6:
        assert roles[0] != roles[1]
        again = tokenops.match_tokens(
            metric.to(device), r=r, scheme="random", class_token=True, generator=torch.Generator(device).manual_seed(5), backend=backend
        )
        assert torch.equal(plan.slot, again.slot)


@pytest.mark.parametrize(
    ("grid", "cell", "class_token"), [((4, 6), (2, 2), False), ((2, 5, 7), (2, 3), True), ((1, 1), (2, 2), False)], ids=str
)
def test_tomesd(grid: tuple[int, ...], cell: tuple[int, int], class_token: bool, backend: str, device: str) -> None:
    """Stable Diffusion: one random destination in every cell, half of all tokens merge."""
    frames, height, width = (1, *grid) if len(grid) == 2 else grid
    lead = int(class_token)
    tokens = frames * height * width + lead
    metric = normal(2, tokens, 8)
    generator = torch.Generator(device).manual_seed(3)
    plan = tokenops.match_tokens(
        metric.to(device), ratio=0.5, scheme="grid", grid=grid, cell=cell, class_token=class_token, generator=generator, backend=backend
    )
    cells = (height // cell[0]) * (width // cell[1]) * frames
    r = min(tokens // 2, tokens - lead - cells) if cells else 0
    assert plan.n_out == tokens - r
    torch.manual_seed(0)
    # the draw itself, by the same generator
    drawn = torch.randint(
        cell[0] * cell[1], (frames, height // cell[0], width // cell[1]), generator=generator.manual_seed(3), device=device
    )
    role = [SOURCE] * tokens
    role[:lead] = [STAY] * lead
    for t in range(frames):
        for cy in range(height // cell[0]):
            for cx in range(width // cell[1]):
                dy, dx = divmod(int(drawn[t, cy, cx]), cell[1])
                role[lead + (t * height + cy * cell[0] + dy) * width + cx * cell[1] + dx] = DESTINATION
    assert_plan(plan, wanted(metric, role, r=r))


@pytest.mark.parametrize("locality", [None, "location", (1, 1)], ids=str)
@pytest.mark.parametrize("amount", [{"threshold": 0.0}, {"r": 11}], ids=str)
def test_chains_to_the_previous_frame(locality: Any, amount: dict[str, Any], backend: str, device: str) -> None:
    """As HYUNJS/STTM merges over time: a token joins its best in the frame before, and goes where that one goes."""
    frames, height, width = 4, 3, 3
    metric = normal(2, 37, 8)
    plan = tokenops.match_tokens(
        metric.to(device),
        scheme="previous_frame",
        grid=(frames, height, width),
        class_token=True,
        locality=locality,
        **amount,
        backend=backend,
    )
    place = [(-9, 0, 0), *places(frames, height, width)]
    reach = {None: 9, "location": 0, (1, 1): 1}[locality]

    def allowed(i: int, j: int) -> bool:
        (ti, yi, xi), (tj, yj, xj) = place[i], place[j]
        return tj == ti - 1 and abs(yj - yi) <= reach and abs(xj - xi) <= reach

    want = wanted(metric, [STAY, *[BOTH] * 36], allowed=allowed, **amount)
    assert plan.n_out == (37 if "threshold" in amount else 26)
    assert_plan(plan, want)
    # some chain is longer than one step: a cluster with members of three frames
    assert any(len({place[i][0] for i in members}) > 2 for rows in want for members in rows)


# locality


@pytest.mark.parametrize(
    ("locality", "near"),
    [
        ("frame", lambda d: d[0] == 0),
        ("location", lambda d: d[1] == d[2] == 0),
        ((1, 0), lambda d: abs(d[1]) <= 1 and d[2] == 0),
        ((1, 2, 2), lambda d: abs(d[0]) <= 1 and max(abs(d[1]), abs(d[2])) <= 2),
        (Window(0, 1, 1, 1), lambda d: 0 <= d[0] <= 1 and max(abs(d[1]), abs(d[2])) <= 1),
    ],
    ids=["frame", "TESTA's same location", "spatial", "near in all", "window"],
)
@pytest.mark.parametrize("form", ["grid", "place", "place per sample"])
def test_locality(locality: Any, near: Any, form: str, backend: str, device: str) -> None:
    metric = normal(2, 46, 8)
    place = torch.tensor([(0, 0, 0), *places(3, 3, 5)])
    per_sample = torch.stack([place, place.flip(-1)])
    where = {"grid": {"grid": (3, 3, 5)}, "place": {"place": place.to(device)}, "place per sample": {"place": per_sample.int().to(device)}}
    plan = tokenops.match_tokens(metric.to(device), r=9, class_token=True, locality=locality, **where[form], backend=backend)
    role = [STAY, *turns(46)[1:]]
    # a source without a near destination stays, so nobody knows the number of rows beforehand
    assert plan.n_out == 46
    for s in range(2):
        at = (per_sample if form == "place per sample" else torch.stack([place, place]))[s].tolist()

        def allowed(i: int, j: int, at: Any = at) -> bool:
            return near([there - here for here, there in zip(at[i], at[j], strict=True)])

        want = wanted(metric[s : s + 1], role, r=9, allowed=allowed)
        one = {name: t[s : s + 1] if isinstance(t, Tensor) else t for name, t in plan._asdict().items()}
        assert_plan(type(plan)(**one), want)


# policies over them


def test_vid_tldr(backend: str, device: str) -> None:
    """Sources scaled by saliency: the score that decides who leaves is similarity times a weight of the source."""
    metric, saliency = normal(2, 31, 8), uniform(2, 31)
    plan = tokenops.match_tokens(metric.to(device), r=8, source_scale=saliency.to(device), backend=backend)
    assert_plan(plan, wanted(metric, turns(31), r=8, source_scale=saliency))


def test_mctf(backend: str, device: str) -> None:
    """Similarity by informativeness by size, for source and destination; then once more in the opposite direction."""
    metric, attention, size = normal(2, 30, 8), uniform(2, 30), uniform(2, 30, seed=2)
    scale = (1.0 / attention) * size.pow(-0.5)
    scales = {"source_scale": scale, "destination_scale": scale}
    on_device = {name: x.to(device) for name, x in scales.items()}
    plan = tokenops.match_tokens(metric.to(device), r=6, **on_device, backend=backend)
    assert_plan(plan, wanted(metric, turns(30), r=6, **scales))
    opposite = [DESTINATION if role == SOURCE else SOURCE for role in turns(30)]
    plan = tokenops.match_tokens(
        metric.to(device), r=6, n_out=24, scheme=torch.tensor(opposite, device=device), **on_device, backend=backend
    )
    assert_plan(plan, wanted(metric, opposite, r=6, **scales))


def test_masks(backend: str, device: str) -> None:
    """PiToMe and its like: an energy says which tokens may merge, all others are protected."""
    metric, energy = normal(2, 32, 8), uniform(2, 32)
    may = energy > energy.median(-1, keepdim=True).values
    plan = tokenops.match_tokens(metric.to(device), r=5, source_mask=may.to(device), destination_mask=may[0].to(device), backend=backend)
    role = [
        [(kind & SOURCE) * may[s, i].item() | (kind & DESTINATION) * may[0, i].item() for i, kind in enumerate(turns(32))] for s in (0, 1)
    ]
    assert plan.n_out == 32
    assert_plan(plan, wanted(metric, role, r=5))


def test_pitome(backend: str, device: str) -> None:
    """The 2r tokens of highest energy in turns, the other tokens protected: roles of one's own, and a known number of rows."""
    metric, r = normal(2, 32, 8), 6
    unit = torch.nn.functional.normalize(metric, dim=-1)
    energy = (unit @ unit.mT).mean(-1)
    ranked = energy.argsort(dim=-1, descending=True)
    role = torch.zeros(2, 32, dtype=torch.int64)
    role.scatter_(1, ranked[:, 0 : 2 * r : 2], SOURCE).scatter_(1, ranked[:, 1 : 2 * r : 2], DESTINATION)
    plan = tokenops.match_tokens(metric.to(device), scheme=role.to(device), n_out=32 - r, backend=backend)
    assert_plan(plan, wanted(metric, role.tolist()))


def test_full_matching(backend: str, device: str) -> None:
    """Everybody may merge into a better-placed one: a chain over the rank of a score, in one call."""
    metric = normal(2, 25, 8)
    rank = torch.arange(25)
    place = torch.stack([rank, rank * 0, rank * 0], dim=-1)
    plan = tokenops.match_tokens(
        metric.to(device),
        threshold=0.4,
        scheme=torch.full((25,), BOTH, device=device),
        place=place.to(device),
        locality=Window(-25, -1, 0, 0),
        backend=backend,
    )
    assert_plan(plan, wanted(metric, [BOTH] * 25, threshold=0.4, allowed=lambda i, j: j < i))


def test_a_token_may_choose_itself(backend: str, device: str) -> None:
    metric = normal(1, 9, 8)
    plan = tokenops.match_tokens(metric.to(device), scheme=torch.full((9,), BOTH, device=device), backend=backend)
    assert_plan(plan, [[[i] for i in range(9)]])
    # by the dot product the longest one is everybody's best, its own too
    metric = torch.nn.functional.normalize(metric[:, :1], dim=-1) * torch.arange(1.0, 10.0).view(1, 9, 1)
    plan = tokenops.match_tokens(metric.to(device), scheme=torch.full((9,), BOTH, device=device), normalize=False, backend=backend)
    assert_plan(plan, [[[8, 0, 1, 2, 3, 4, 5, 6, 7]]])


def test_hard_sttm(backend: str, device: str) -> None:
    """Every token to its meta token: an assignment and a segment mean, with mass; a meta token nobody chose stays empty."""
    x, meta, mass = normal(2, 40, 16), normal(2, 13, 16, seed=1), uniform(2, 40)
    _, index = tokenops.pairwise_argmax(x.to(device), meta.to(device), backend=backend)
    plan = tokenops.plan_from_slots(index, 13, backend=backend)
    for s in range(2):
        assert index[s].tolist() == [best_partner(row, meta[s], list(range(13)))[1] for row in x[s]]
    got = tokenops.merge_tokens(x.to(device), plan, size=mass.to(device), backend=backend)
    assert_close("merged", got, merged(x, on(plan, "cpu"), mass, "mean"), torch.float32)
    # soft assignment at a low temperature is the hard one
    soft, _ = tokenops.soft_merge(x.to(device), x.to(device), meta.to(device), temperature=2e-5, mass=mass.to(device), backend=backend)
    chosen = (plan.offsets.diff(dim=-1) > 0)[..., None]
    torch.testing.assert_close(soft.masked_fill(~chosen, 0.0), got, rtol=1e-4, atol=1e-4)


def test_one_match_for_the_whole_batch(backend: str, device: str) -> None:
    """VidToMe shares a match among the samples, and keeps destinations instead of means."""
    x = normal(3, 20, 8).to(device)
    plan = tokenops.match_tokens(x.mean(0, keepdim=True), r=6, backend=backend)
    kept = tokenops.merge_tokens(x, plan, mode="replace", backend=backend)
    ids = torch.tensor([members[0] for members in clusters_of(plan, 0)], device=device)
    assert torch.equal(kept, x[:, ids])
    assert tokenops.unmerge_tokens(kept, plan, backend=backend).shape == x.shape


def test_a_number_of_rows_of_ones_own(backend: str, device: str) -> None:
    metric = normal(2, 20, 8)
    plan = tokenops.match_tokens(metric.to(device), r=4, n_out=19, backend=backend)
    assert_plan(plan, wanted(metric, turns(20), r=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_compared_exactly(dtype: torch.dtype, backend: str, device: str) -> None:
    """Products of half types are exact in float32, so the same tokens merge as by the definition on the rounded numbers."""
    metric = normal(2, 60, 32).to(dtype)
    plan = tokenops.match_tokens(metric.to(device), r=20, class_token=True, backend=backend)
    assert_plan(plan, wanted(metric, [STAY, *turns(60)[1:]], r=20))
