"""Cases and peers of the room ``sparse_attention``.

Every case asks for the same thing of everybody: attention among the kept tokens of a grid [B, H, N, D]. Contenders differ in what they are
given (the grid and an index, or rows compacted beforehand) and in what they may leave undone; each one's note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokenops
from tokenops.dispatch import Backend, choose, ranked
from tokenops.ops.sparse_attention.arguments import as_problem
from tokenops.ops.sparse_attention.backends import BACKENDS
from tokenops.reference import sparse_attention as reference
from tokenops.types import AttentionProblem

from . import video
from .harness import DTYPES, Contender, Cost, Request, Results, Trial, bind, contenders_of_ours, variants


class Case(NamedTuple):
    name: str
    batch: int
    tokens: int  # N, of the grid
    kept: int | tuple[int, ...] | None  # K; one number per sample if ragged; None: no index
    lists: str = "shared"  # one list for all | "sample": one each | "video": by frame difference | "none"
    heads: int = 12
    width: int = 64  # D
    bias: bool = False  # log sizes of merged tokens, added to the logits of each key
    rel_grid: tuple[int, int] | None = None  # rows and columns of the grid of keys: position terms of both, as ViTDet and SAM have
    dtype: str = "fp32"
    direction: str = "fwd"
    quick: bool = False


def _cases() -> Iterator[Case]:
    # real input first: eight clips of 8 frames, 224 x 224, cut into 16 x 16 patches, and a class token
    same, ragged = Case("video-B8-N1569-K392", 8, video.TOKENS, 392, "video"), Case("video-B8-N1569-ragged", 8, video.TOKENS, (), "video")
    yield from variants(same, ["fp32 fwd", "bf16 fwd"], ["fp32 fwd+bwd", "bf16 fwd+bwd"])
    yield from variants(ragged, ["fp32 fwd"], ["bf16 fwd", "fp32 fwd+bwd"])
    yield from variants(Case("B1-N1569-K784", 1, 1569, 784), ["fp32 fwd", "bf16 fwd", "fp32 fwd+bwd", "bf16 fwd+bwd"])
    yield from variants(Case("B8-N1569-K392", 8, 1569, 392), ["fp32 fwd", "bf16 fwd"], ["fp32 fwd+bwd", "bf16 fwd+bwd"])
    yield from variants(Case("B32-N197-K137", 32, 197, 137), ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("B8-N197-K137", 8, 197, 137), ["fp32 fwd+bwd"], ["bf16 fwd+bwd"])
    for frames in (8, 16, 32):
        # attention over time: every place of a 14 x 14 grid is a sequence of frames
        case = Case(f"short-B196-N{frames}", 196, frames, None, "none")
        yield from variants(case, ["fp32 fwd"], ["bf16 fwd", "fp32 fwd+bwd", "bf16 fwd+bwd"])
    counts = tuple(range(100, 1501, 200))
    yield from variants(Case("ragged-B8-N1569-H6", 8, 1569, counts, "sample", heads=6), ["fp32 fwd"], ["bf16 fwd", "fp32 fwd+bwd"])
    yield from variants(Case("dense-B1-N1569", 1, 1569, None, "none"), ["fp32 fwd", "bf16 fwd"], ["fp32 fwd+bwd", "bf16 fwd+bwd"])
    # a global and a windowed layer of ViTDet-B at 1024 x 1024: every query adds a term for the row and one for the column of each key
    whole = Case("rel-pos-B1-N4096", 1, 4096, None, "none", rel_grid=(64, 64))
    windows = Case("rel-pos-windows-B25-N196", 25, 196, None, "none", rel_grid=(14, 14))
    yield from variants(windows, ["fp32 fwd", "bf16 fwd"], ["fp32 fwd+bwd", "bf16 fwd+bwd"])
    yield from variants(whole, [], ["fp32 fwd", "bf16 fwd", "fp32 fwd+bwd", "bf16 fwd+bwd"])
    yield from variants(Case("one-head-B1-N1569-K784", 1, 1569, 784, heads=1), ["fp32 fwd"], ["bf16 fwd", "fp32 fwd+bwd"])
    yield from variants(Case("per-sample-B8-N1569-K392", 8, 1569, 392, "sample"), [], ["fp32 fwd", "bf16 fwd", "fp32 fwd+bwd"])
    yield from variants(Case("log-size-B8-N1569-K392", 8, 1569, 392, "sample", bias=True), [], ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("wide-B1-N1569-K784-D128", 1, 1569, 784, heads=6, width=128), [], ["fp32 fwd", "bf16 fwd", "fp32 fwd+bwd"])
    # what fills a GPU: kept tokens below and above the number from which arithmetic, not memory, bounds an H100
    for kept in (392, 784, 1097):
        yield from variants(Case(f"large-B32-N1569-K{kept}", 32, 1569, kept), [], ["bf16 fwd", "bf16 fwd+bwd"])
    yield from variants(Case("large-B128-N197-K137", 128, 197, 137), [], ["bf16 fwd", "bf16 fwd+bwd"])
    wide = Case("large-B4-N8192-K2048-D128", 4, 8192, 2048, heads=16, width=128)
    yield from variants(wide, [], ["bf16 fwd", "bf16 fwd+bwd"])
    yield from variants(Case("large-short-B6272-N8", 6272, 8, None, "none"), [], ["bf16 fwd", "bf16 fwd+bwd"])


CASES: tuple[Case, ...] = tuple(_cases())


class Inputs(NamedTuple):
    query: Tensor  # [B, H, N, D]
    key: Tensor
    value: Tensor
    token_index: Tensor | None  # [K] | [B, K] int32, -1 at the end of short lists
    bias: Tensor | None  # [B, N] float32
    rel_pos: tuple[Tensor, Tensor] | None  # rel_h [B, H, N, gh], rel_w [B, H, N, gw]
    grad_out: Tensor  # [B, H, K, D], 0 in empty slots

    @property
    def grids(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return *self.grids, *(self.rel_pos or ())

    @property
    def counts(self) -> list[int]:
        """Kept tokens of each sample."""
        batch, tokens = self.query.shape[0], self.query.shape[2]
        if self.token_index is None:
            return [tokens] * batch
        return (self.token_index >= 0).sum(-1).expand(batch).tolist()

    @property
    def ragged(self) -> bool:
        return len(set(self.counts)) > 1


def make_inputs(case: Case, request: Request) -> Inputs:
    """The same numbers for every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.tokens, case.width)
    if case.lists == "video":
        tokens = request.clips(case.batch)
        index: Tensor | None = video.changed_more_than(tokens.change, video.CHANGE)
        if isinstance(case.kept, int):
            index = video.most_changed(tokens.change, case.kept)
        rows = video.project(tokens.patches, [case.heads * case.width] * 3, generator)
        grids = [_as_heads(x, case.heads) for x in rows]
    else:
        index = _random_index(case, generator)
        grids = [torch.randn(shape, generator=generator) for _ in range(3)]
    slots = case.tokens if index is None else index.shape[-1]
    grad_out = torch.randn(case.batch, case.heads, slots, case.width, generator=generator)
    if index is not None:
        grad_out.masked_fill_((index < 0).expand(case.batch, slots)[:, None, :, None], 0)
    bias = torch.randint(1, 5, (case.batch, case.tokens), generator=generator).float().log() if case.bias else None
    device, dtype = request.device, DTYPES[case.dtype]
    rel_pos = None
    if case.rel_grid is not None:
        rel_h, rel_w = (torch.randn(*shape[:3], cells, generator=generator).to(device, dtype) for cells in case.rel_grid)
        rel_pos = rel_h, rel_w
    query, key, value = (grid.to(device, dtype) for grid in grids)
    return Inputs(
        query,
        key,
        value,
        None if index is None else index.to(device),
        None if bias is None else bias.to(device),
        rel_pos,
        grad_out.to(device, dtype),
    )


def _as_heads(rows: Tensor, heads: int) -> Tensor:
    """A linear layer's memory order: [B, N, H, D] seen as [B, H, N, D]."""
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


def _random_index(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.kept is None:
        return None
    if isinstance(case.kept, int):
        lists = 1 if case.lists == "shared" else case.batch
        order = torch.rand(lists, case.tokens, generator=generator).argsort(1)
        index = order[:, : case.kept].sort(1).values.int()
        return index[0] if case.lists == "shared" else index
    index = torch.full((case.batch, max(case.kept)), -1, dtype=torch.int32)
    for sample, count in zip(index, case.kept, strict=True):
        sample[:count] = torch.randperm(case.tokens, generator=generator)[:count].sort().values
    return index


def prepare(case: Case, request: Request) -> Trial:
    inputs = make_inputs(case, request)
    differentiate = case.direction == "fwd+bwd"
    problem = _problem(inputs)
    flops, moved = reference.flops(problem), reference.bytes(problem)
    if differentiate:
        flops, moved = flops + reference.flops(problem, backward=True), moved + reference.bytes(problem, backward=True)
    return Trial(
        contenders=list(_contenders(case, inputs, request)),
        expected=lambda: _expected(inputs, differentiate),
        names=("out", *(f"gradient of {name}" for name in _needs(differentiate, inputs))),
        cost=Cost(flops, moved),
        backends=_objections(problem, _needs(differentiate, inputs)),
    )


def _problem(inputs: Inputs) -> AttentionProblem:
    index = inputs.token_index
    return as_problem(*inputs.grids, q_index=index, kv_index=index, kv_bias=inputs.bias, rel_pos=inputs.rel_pos)[0]


def _needs(differentiate: bool, inputs: Inputs) -> tuple[str, ...]:
    return ("query", "key", "value", "rel_h", "rel_w")[: len(inputs.leaves)] if differentiate else ()


def _objections(problem: AttentionProblem, needs: tuple[str, ...]) -> dict[str, list[str]]:
    return {backend.name: backend.objections(problem, needs=needs) for backend in ranked(BACKENDS, problem)}


def example_objections(device: str) -> dict[str, list[str]]:
    """Why each backend would refuse a plain float32 training call on ``device``; an empty list: it would serve it."""
    problem, _ = as_problem(**reference.example_inputs(device=device, kept=0.5, kv_kept=0.5))
    return _objections(problem, ("query", "key", "value"))


def _expected(inputs: Inputs, differentiate: bool) -> Results:
    """The definition in float64, a few samples at a time to bound the memory."""
    batch, heads, tokens, _ = inputs.query.shape
    slots = tokens if inputs.token_index is None else inputs.token_index.shape[-1]
    few = max(1, (1 << 24) // (heads * slots * slots))
    parts = []
    for begin in range(0, batch, few):
        some = slice(begin, begin + few)
        index = inputs.token_index if inputs.token_index is None or inputs.token_index.dim() == 1 else inputs.token_index[some]
        problem = _problem(
            inputs._replace(
                query=inputs.query[some].double(),
                key=inputs.key[some].double(),
                value=inputs.value[some].double(),
                token_index=index,
                bias=None if inputs.bias is None else inputs.bias[some].double(),
                rel_pos=None if inputs.rel_pos is None else (inputs.rel_pos[0][some].double(), inputs.rel_pos[1][some].double()),
            )
        )
        results = [reference.attention(problem).out]
        if differentiate:
            gradients = reference.gradients(problem, inputs.grad_out[some].double())
            results += [getattr(gradients, name) for name in _needs(differentiate, inputs)]
        parts.append(results)
    return tuple(torch.cat(result) for result in zip(*parts, strict=True))


def _contenders(case: Case, inputs: Inputs, request: Request) -> Iterator[Contender]:
    differentiate = case.direction == "fwd+bwd"
    yield from _ours(case, inputs, request)
    if inputs.rel_pos is not None:
        yield from _position_peers(inputs, inputs.rel_pos, request, differentiate)
        return
    if inputs.token_index is None:
        yield Contender("SDPA", bind(F.scaled_dot_product_attention, inputs.grids, inputs.grad_out, differentiate))
        if case.tokens <= 32:
            yield Contender("matmul + softmax", bind(_matmul_softmax, inputs.grids, inputs.grad_out, differentiate))
        return
    if inputs.ragged:
        yield from _ragged_peers(inputs, differentiate)
    else:
        yield from _gather_peers(inputs, differentiate)
    yield _masked_peer(inputs, differentiate)
    yield _flex_peer(inputs, request, differentiate)


def _ours(case: Case, inputs: Inputs, request: Request) -> Iterator[Contender]:
    differentiate = case.direction == "fwd+bwd"

    def run(backend: str | None) -> Callable[[], Results]:
        lists = partial(tokenops.sparse_attention, q_index=inputs.token_index, kv_index=inputs.token_index, kv_bias=inputs.bias)

        def attention(query: Tensor, key: Tensor, value: Tensor, *rel: Tensor) -> Any:
            return lists(query, key, value, rel_pos=(rel[0], rel[1]) if rel else None, backend=backend)

        return bind(attention, inputs.leaves, inputs.grad_out, differentiate)

    def serve(backend: str | None) -> Backend:
        return choose("sparse_attention", BACKENDS, backend, problem, needs=_needs(differentiate, inputs))

    problem = _problem(inputs)
    ours = list(contenders_of_ours(request, run, serve))
    yield from ours
    if case.heads == 1 and case.batch == 1:
        yield ours[0]._replace(name="itself, 1 thread", ours=False, threads=1, note="how well a single head fills the cores")


def _position_peers(inputs: Inputs, rel_pos: tuple[Tensor, Tensor], request: Request, differentiate: bool) -> Iterator[Contender]:
    """The terms of rows and columns, added up to a bias for every query and key."""

    def bias(rel_h: Tensor, rel_w: Tensor) -> Tensor:
        return (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias(rel_h, rel_w))

    yield Contender("SDPA + bias", bind(attention, inputs.leaves, inputs.grad_out, differentiate), note="the bias is made and added")
    if not differentiate:
        made = bias(*rel_pos)
        given = partial(F.scaled_dot_product_attention, attn_mask=made)
        yield Contender("SDPA, bias given", bind(given, inputs.grids, inputs.grad_out, False), note="the bias is made beforehand")
    objections = []
    if differentiate and torch.device(request.device).type == "cpu":
        objections.append("FlexAttention has no backward pass on the CPU")
    if not request.slow_peers:
        objections.append("compiling takes tens of seconds: use --preset full")
    if objections:
        yield Contender("FlexAttention", lambda: (), objections=objections)
        return
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled, columns = torch.compile(flex_attention, dynamic=False), rel_pos[1].shape[3]

    def flex(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        def add_position(score: Any, b: Any, h: Any, n: Any, m: Any) -> Any:
            return score + rel_h[b, h, n, m // columns] + rel_w[b, h, n, m % columns]

        return compiled(query, key, value, score_mod=add_position)

    yield Contender("FlexAttention", bind(flex, inputs.leaves, inputs.grad_out, differentiate), note="compiled")


def _matmul_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.matmul(query, key.mT).mul_(query.shape[-1] ** -0.5).softmax(-1) @ value


def _gather_peers(inputs: Inputs, differentiate: bool) -> Iterator[Contender]:
    """Every sample keeps the same number of tokens."""
    take = _row_taker(inputs)
    bias = _kept_bias(inputs)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    def gather_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(take(query), take(key), take(value))

    yield Contender("gather + SDPA", bind(gather_attention, inputs.grids, inputs.grad_out, differentiate))
    if inputs.query.is_cuda:
        yield from _named_peers(gather_attention, inputs, differentiate)
    yield Contender(
        "compact once",
        bind(attention, [take(grid).contiguous() for grid in inputs.grids], inputs.grad_out, differentiate),
        canonical=lambda results: (results[0], *(_spread(grad, inputs) for grad in results[1:])),
        note="SDPA on rows compacted beforehand: neither the gather nor the way back to the grid is timed",
    )


# SDPA's own choice on a GPU depends on its version: each of its kernels by name
SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _named_peers(gather_attention: Callable[..., Tensor], inputs: Inputs, differentiate: bool) -> Iterator[Contender]:
    for name, kernel in SDPA_KERNELS.items():

        def attention(query: Tensor, key: Tensor, value: Tensor, kernel: SDPBackend = kernel) -> Tensor:
            with sdpa_kernel(kernel):
                return gather_attention(query, key, value)

        objections = []
        if name != "efficient" and inputs.query.dtype == torch.float32:
            objections.append("takes half types only")
        if name == "flash" and inputs.bias is not None:
            objections.append("takes no mask")
        yield Contender(f"gather + {name}", bind(attention, inputs.grids, inputs.grad_out, differentiate), objections)


def _kept_bias(inputs: Inputs) -> Tensor | None:
    if inputs.bias is None or inputs.token_index is None:
        return None
    return inputs.bias.gather(1, inputs.token_index.expand(len(inputs.bias), -1).long())[:, None, None, :].to(inputs.query.dtype)


def _row_taker(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """The fastest gather that torch offers for this index and layout. Row numbers are made beforehand, as they serve many layers."""
    assert inputs.token_index is not None
    batch, heads, tokens, width = inputs.query.shape
    if inputs.token_index.dim() == 1:
        shared = inputs.token_index.long()
        return lambda grid: grid.index_select(2, shared)
    # one list per sample: copies of whole rows beat torch.gather by 5 to 10 times
    kept = inputs.token_index.shape[1]
    sample = torch.arange(batch, device=inputs.token_index.device)
    if inputs.query.is_contiguous():
        first = torch.arange(batch * heads, device=inputs.token_index.device).view(batch, heads, 1) * tokens
        rows = (first + inputs.token_index[:, None, :]).flatten()
        return lambda grid: grid.reshape(-1, width).index_select(0, rows).view(batch, heads, kept, width)
    rows = (sample[:, None] * tokens + inputs.token_index).flatten()

    def take(grid: Tensor) -> Tensor:
        return grid.transpose(1, 2).reshape(-1, heads * width).index_select(0, rows).view(batch, kept, heads, width).transpose(1, 2)

    return take


def _spread(rows: Tensor, inputs: Inputs) -> Tensor:
    """Compact rows [B, H, K, D] back to the grid, zero elsewhere. Not timed."""
    assert inputs.token_index is not None
    grid = rows.new_zeros(inputs.query.shape)
    for b, count in enumerate(inputs.counts):
        grid[b, :, _kept_rows(inputs, b)] = rows[b, :, :count]
    return grid


def _kept_rows(inputs: Inputs, b: int) -> Tensor:  # [K of sample b] int64
    assert inputs.token_index is not None
    index = inputs.token_index if inputs.token_index.dim() == 1 else inputs.token_index[b]
    return index[index >= 0].long()


def _ragged_peers(inputs: Inputs, differentiate: bool) -> Iterator[Contender]:
    """Every sample keeps another number of tokens: pad and mask, or one call per sample."""
    assert inputs.token_index is not None
    slots = inputs.token_index.shape[1]
    filled = inputs.token_index >= 0
    take = _row_taker(inputs._replace(token_index=inputs.token_index.clamp(min=0)))
    rows = [_kept_rows(inputs, b) for b in range(len(inputs.query))]

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(take(query), take(key), take(value), attn_mask=filled[:, None, None, :])

    def clear_empty(results: Results) -> Results:
        return (results[0].masked_fill(~filled[:, None, :, None], 0), *results[1:])

    yield Contender("padded + mask", bind(padded, inputs.grids, inputs.grad_out, differentiate), canonical=clear_empty)

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        grids = (query, key, value)
        out = []
        for b, kept in enumerate(rows):
            q, k, v = (grid[b : b + 1].index_select(2, kept) for grid in grids)
            out.append(F.scaled_dot_product_attention(q, k, v))
        return out

    def join(parts: Results) -> Tensor:
        """[B, H, K, D] from one [1, H, kept, D] for each sample."""
        return torch.cat([F.pad(part, (0, 0, 0, slots - part.shape[2])) for part in parts])

    def join_out(results: Results) -> Results:
        return (join(results[: len(rows)]), *results[len(rows) :])

    grads = [inputs.grad_out[b : b + 1, :, : len(kept)] for b, kept in enumerate(rows)]
    if inputs.query.is_cuda:
        yield _varlen_peer(rows, inputs, differentiate)
    yield Contender("loop of SDPA", bind(one_by_one, inputs.grids, grads, differentiate), canonical=join_out)

    compact = [grid[b : b + 1].index_select(2, kept).contiguous() for grid in inputs.grids for b, kept in enumerate(rows)]

    def compact_loop(*parts: Tensor) -> list[Tensor]:
        n = len(rows)
        return [F.scaled_dot_product_attention(*qkv) for qkv in zip(parts[:n], parts[n : 2 * n], parts[2 * n :], strict=True)]

    def join_and_spread(results: Results) -> Results:
        out, *grads = (join(results[at : at + len(rows)]) for at in range(0, len(results), len(rows)))
        return (out, *(_spread(grad, inputs) for grad in grads))

    yield Contender(
        "compact once",
        bind(compact_loop, compact, grads, differentiate),
        canonical=join_and_spread,
        note="loop of SDPA over rows compacted beforehand: neither the gather nor the way back to the grid is timed",
    )


def _varlen_peer(rows: Sequence[Tensor], inputs: Inputs, differentiate: bool) -> Contender:
    """Kept rows of all samples gathered into one packed tensor, for flash attention's own packed form."""
    if inputs.query.dtype == torch.float32 or inputs.bias is not None:
        return Contender("gather + varlen flash", lambda: (), ["takes half types only" if inputs.bias is None else "takes no mask"])
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens, width = inputs.query.shape
    slots = inputs.grad_out.shape[2]
    counts = torch.tensor([0, *(len(kept) for kept in rows)], dtype=torch.int32, device=inputs.query.device)
    bounds = counts.cumsum(0, dtype=torch.int32)
    places = torch.cat([b * tokens + kept for b, kept in enumerate(rows)])

    def take(grid: Tensor) -> Tensor:  # [T, H, D]
        return grid.transpose(1, 2).reshape(batch * tokens, heads, width).index_select(0, places)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return varlen_attn(take(query), take(key), take(value), bounds, bounds, slots, slots)

    def padded(results: Results) -> Results:
        parts = results[0].split([len(kept) for kept in rows])
        return (torch.stack([F.pad(part.transpose(0, 1), (0, 0, 0, slots - len(part))) for part in parts]), *results[1:])

    grads = torch.cat([inputs.grad_out[b, :, : len(kept)].transpose(0, 1) for b, kept in enumerate(rows)])
    return Contender("gather + varlen flash", bind(attention, inputs.grids, grads, differentiate), canonical=padded)


def _masked_peer(inputs: Inputs, differentiate: bool) -> Contender:
    """Tokens stay where they are; the dropped ones are hidden as keys, and computed as queries for nothing."""
    assert inputs.token_index is not None
    batch, _, tokens, _ = inputs.query.shape
    mask: Tensor = torch.zeros(batch, 1, 1, tokens, dtype=torch.bool, device=inputs.query.device)
    for b in range(batch):
        mask[b, 0, 0, _kept_rows(inputs, b)] = True
    if inputs.bias is not None:
        mask = torch.where(mask, inputs.bias[:, None, None, :], -torch.inf).to(inputs.query.dtype)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def kept_rows(results: Results) -> Results:
        out = torch.zeros_like(inputs.grad_out)
        for b, count in enumerate(inputs.counts):
            out[b, :, :count] = results[0][b, :, _kept_rows(inputs, b)]
        return (out, *results[1:])

    return Contender(
        "SDPA + mask",
        bind(attention, inputs.grids, _spread(inputs.grad_out, inputs), differentiate),
        canonical=kept_rows,
        note="computes the dropped queries as well",
    )


def _flex_peer(inputs: Inputs, request: Request, differentiate: bool) -> Contender:
    """FlexAttention over gathered queries; the kept keys are a block mask, made beforehand."""
    objections = []
    on_cpu = torch.device(request.device).type == "cpu"
    if on_cpu and differentiate:
        objections.append("FlexAttention has no backward pass on the CPU")
    if inputs.ragged:
        objections.append("its queries are gathered, and here every sample keeps another number")
    if inputs.bias is not None:
        objections.append("not written for a bias on the keys")
    if not request.slow_peers:
        objections.append("compiling takes tens of seconds: use --preset full")
    if objections:
        return Contender("FlexAttention", lambda: (), objections=objections)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert inputs.token_index is not None
    batch, _, tokens, _ = inputs.query.shape
    kept = torch.zeros(batch, tokens, dtype=torch.bool, device=inputs.query.device)
    for b in range(batch):
        kept[b, _kept_rows(inputs, b)] = True

    def visible(b: Any, _h: Any, _q: Any, m: Any) -> Any:
        return kept[b, m]

    take = _row_taker(inputs)
    block_mask = create_block_mask(visible, batch, None, inputs.token_index.shape[-1], tokens, device=request.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(take(query), key, value, block_mask=block_mask)

    return Contender(
        "FlexAttention", bind(attention, inputs.grids, inputs.grad_out, differentiate), note="compiled, block mask made beforehand"
    )
