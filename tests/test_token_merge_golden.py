"""Parity with the published implementation of ToMe: its outputs for random, tie-free float32 inputs, kept in data/tome.pt.

It lists output rows as [the sources that stay, in the order it left them; the destinations], with a distillation token behind the first.
Ours ascend by destination; ``rows`` says which of its rows are which of ours. Its unmerge ignores its own order where there is a
distillation token, so that case is not compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close
from token_merge_oracle import clusters_of
from torch import Tensor

import tokenops
from tokenops.types import MergePlan

GOLDEN: dict[str, Any] = torch.load(Path(__file__).parent / "data" / "tome.pt")
Golden = dict[str, Any]

bipartite = pytest.mark.parametrize(
    "golden", GOLDEN["bipartite"], ids=lambda golden: f"{golden['metric'].shape[1]} tokens, r {golden['r']}"
)


def matched(golden: Golden, backend: str, device: str) -> MergePlan:
    flags = {name: golden[name] for name in ("class_token", "distill_token")}
    return tokenops.match_tokens(golden["metric"].to(device), r=golden["r"], **flags, backend=backend)


def destinations(golden: Golden) -> Tensor:
    """[B, n_out] the token that each of its rows stands for."""
    batch, tokens = golden["metric"].shape[:2]
    stay, receive = golden["unm_idx"] * 2, torch.arange(1, tokens, 2).expand(batch, -1)
    if golden["distill_token"]:
        return torch.cat([stay[:, :1], receive[:, :1], stay[:, 1:], receive[:, 1:]], dim=1)
    return torch.cat([stay, receive], dim=1)


def rows(golden: Golden, name: str) -> Tensor:
    """Its result in our order of rows."""
    return golden[name].take_along_dim(destinations(golden).argsort(-1)[..., None], dim=1)


@bipartite
def test_the_same_tokens_merge(golden: Golden, backend: str, device: str) -> None:
    plan = matched(golden, backend, device)
    for s in range(golden["metric"].shape[0]):
        into = {2 * int(i): 2 * int(j) + 1 for i, j in zip(golden["src_idx"][s], golden["dst_idx"][s], strict=True)}
        want = {i: [i] for i in range(golden["metric"].shape[1]) if i not in into}
        for i, j in sorted(into.items()):
            want[j].append(i)
        assert clusters_of(plan, s) == [want[j] for j in sorted(want)]


@bipartite
def test_the_same_rows_come_out(golden: Golden, backend: str, device: str) -> None:
    plan, x, size = matched(golden, backend, device), golden["x"].to(device), golden["size"].to(device)

    def run(x: Tensor, **options: Any) -> Tensor:
        return tokenops.merge_tokens(x, plan, **options, backend=backend)

    assert_close("weighted mean", run(x, size=size), rows(golden, "wavg_size_x"), torch.float32)
    assert_close("sizes", run(size, mode="sum"), rows(golden, "wavg_size_size"), torch.float32)
    if "merge_mean" not in golden:
        return
    for mode in ("mean", "sum", "amax"):
        assert_close(mode, run(x, mode=mode), rows(golden, f"merge_{mode}"), torch.float32)
    assert_close("first mean", run(x), rows(golden, "wavg_none_x"), torch.float32)
    assert_close("first sizes", run(torch.ones_like(size), mode="sum"), rows(golden, "wavg_none_size"), torch.float32)
    if not golden["distill_token"]:
        assert_close("unmerged", tokenops.unmerge_tokens(run(x), plan, backend=backend), golden["unmerge_of_mean"], torch.float32)


@pytest.mark.parametrize("golden", [golden for golden in GOLDEN["bipartite"] if "metric2" in golden], ids=lambda golden: f"r {golden['r']}")
def test_a_second_layer_merges_the_same(golden: Golden, backend: str, device: str) -> None:
    """Who is even and who odd depends on the order of the rows: the second match sees them in its order."""
    first = matched(golden, backend, device)
    to_golden = destinations(golden).argsort(-1).argsort(-1).to(device)
    # row k of ours is the k-th smallest destination, which is its row place[k]
    place = destinations(golden).argsort(-1).to(device)
    assert torch.equal(place.gather(1, to_golden), torch.arange(place.shape[1], device=device).expand_as(place))
    first = tokenops.plan_from_slots(place.gather(1, first.slot.long()), first.n_out, backend=backend)
    flags = {name: golden[name] for name in ("class_token", "distill_token")}
    second = tokenops.match_tokens(golden["metric2"].to(device), r=golden["r2"], **flags, backend=backend)
    x, size = golden["x"].to(device), torch.ones_like(golden["size"]).to(device)
    for plan in (first, second):
        x, size = (
            tokenops.merge_tokens(x, plan, size=size, backend=backend),
            tokenops.merge_tokens(size, plan, mode="sum", backend=backend),
        )

    def sorted_rows(x: Tensor) -> Tensor:
        """Its second order is not recorded: rows by their first channel."""
        return x.cpu().take_along_dim(x.cpu()[..., :1].argsort(1), dim=1)

    assert_close("x", sorted_rows(x), sorted_rows(golden["chain_x"]), torch.float32)
    assert_close("size", size.cpu().sort(1).values, golden["chain_size"].sort(1).values, torch.float32)
    if not golden["distill_token"]:
        for plans in ([first, second], tokenops.compose_plans(first, second)):
            assert_close("unmerged", tokenops.unmerge_tokens(x, plans, backend=backend), golden["chain_unmerged"], torch.float32)


@pytest.mark.parametrize("golden", GOLDEN["kth"], ids=lambda golden: f"k {golden['k']}")
def test_every_kth_token_receives(golden: Golden, backend: str, device: str) -> None:
    k = golden["k"]
    plan = tokenops.match_tokens(golden["metric"].to(device), scheme="kth", k=k, backend=backend)
    x, size = golden["x"].to(device), golden["size"].to(device)
    sources = [i for i in range(golden["metric"].shape[1]) if i % k != k - 1]
    assert torch.equal(plan.slot[:, sources].long().cpu(), golden["dst_idx"])
    for mode in ("mean", "sum", "amax"):
        assert_close(mode, tokenops.merge_tokens(x, plan, mode=mode, backend=backend), golden[f"merge_{mode}"], torch.float32)
    assert_close("weighted mean", tokenops.merge_tokens(x, plan, size=size, backend=backend), golden["wavg_x"], torch.float32)
    assert_close("sizes", tokenops.merge_tokens(size, plan, mode="sum", backend=backend), golden["wavg_size"], torch.float32)
    back = tokenops.unmerge_tokens(tokenops.merge_tokens(x, plan, backend=backend), plan, backend=backend)
    assert_close("unmerged", back, golden["unmerge_of_mean"], torch.float32)


@pytest.mark.parametrize("golden", GOLDEN["schedules"], ids=lambda golden: f"{golden['r']} in {golden['layers']} layers")
def test_schedules(golden: Golden) -> None:
    assert tokenops.merge_schedule(golden["r"], golden["layers"]) == golden["numbers"]


def test_an_inflection_may_be_a_whole_number() -> None:
    assert tokenops.merge_schedule((16, -1), 12) == tokenops.merge_schedule((16, -1.0), 12)


@pytest.mark.parametrize("golden", GOLDEN["attention"], ids=lambda golden: f"{golden['heads']} heads")
def test_attention_and_its_metric(golden: Golden, backend: str, device: str) -> None:
    x, state = golden["x"].to(device), {name: weight.to(device) for name, weight in golden["state"].items()}
    qkv = torch.nn.functional.linear(x, state["qkv.weight"], state["qkv.bias"])
    q, k, v = qkv.unflatten(-1, (3, golden["heads"], -1)).permute(2, 0, 3, 1, 4)
    assert_close("metric", k.mean(1), golden["metric"], torch.float32)
    sizes = torch.ones(x.shape[:2], device=device)
    out = tokenops.sparse_attention(q, k, v, kv_bias=sizes.log()).transpose(1, 2).flatten(2)
    out = torch.nn.functional.linear(out, state["proj.weight"], state["proj.bias"])
    assert_close("out", out, golden["out"], torch.float32)


def test_log_sizes_stand_for_merged_tokens(backend: str, device: str) -> None:
    """Attention over equal tokens is attention over one of them with the log of their number added: proportional attention."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(2, 4, 9, 16, generator=generator).to(device)
    slot = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 7, 0, 8, 8, 8], device=device)
    plan = tokenops.plan_from_slots(slot[None], 9, backend=backend)
    many = tokenops.unmerge_tokens(few.transpose(1, 2), plan, backend=backend)
    sizes = tokenops.merge_tokens(torch.ones(1, 16, device=device), plan, mode="sum", backend=backend)
    merged = tokenops.merge_tokens(many, plan, size=torch.ones(1, 16, device=device), backend=backend).transpose(1, 2)
    want = tokenops.sparse_attention(few, many.transpose(1, 2), many.transpose(1, 2))
    got = tokenops.sparse_attention(few, merged, merged, kv_bias=sizes.log())
    assert_close("out", got, want, torch.float32)
