"""patch_sdpa: which calls are routed, and that nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tokenops
from tokenops.ops import sdpa


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The queries of all calls that were routed to us."""
    seen: list[Tensor] = []

    def record(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(query)
        return tokenops.sparse_attention(query, *args, **kwargs)

    monkeypatch.setattr(sdpa, "sparse_attention", record)
    return seen


@pytest.fixture
def qkv(device: str) -> tuple[Tensor, Tensor, Tensor]:
    if all(
        backend.objections(tokenops.ops.sparse_attention.as_problem(*[torch.zeros(1, 1, 8, 8, device=device)] * 3)[0])
        for backend in sdpa.BACKENDS[:-1]
    ):
        pytest.skip("no kernels here, so nothing is routed")
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 19, 16, generator=generator).to(device) for _ in range(3))


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.2}, {"attn_mask": torch.ones(19, 19, dtype=torch.bool).tril()}], ids=str
)
def test_calls_are_routed(options: dict, qkv: tuple[Tensor, ...], routed: list[Tensor], device: str) -> None:
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    want = scaled_dot_product_attention(*qkv, **options)
    assert not routed
    with tokenops.patch_sdpa():
        # under the name imported above, and under the one that most code uses
        results = scaled_dot_product_attention(*qkv, **options), torch.nn.functional.scaled_dot_product_attention(*qkv, **options)
    assert len(routed) == 2
    for got in results:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    scaled_dot_product_attention(*qkv, **options)
    assert len(routed) == 2
    assert torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention


@pytest.mark.usefixtures("qkv")
def test_calls_made_by_torch_modules_are_routed(routed: list[Tensor], device: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 32, dropout=0.0, batch_first=True).to(device)
    x = torch.randn(2, 19, 64, device=device)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))

    want = gradients()
    with tokenops.patch_sdpa():
        got = gradients()
    assert len(routed) == 1
    for have, expect in zip(got, want, strict=True):
        torch.testing.assert_close(have, expect, rtol=1e-3, atol=1e-4)
    layer.eval()
    with torch.no_grad():
        want = layer(x)
        with tokenops.patch_sdpa():
            got = layer(x)
    assert len(routed) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_calls_that_only_the_reference_could_serve_stay_with_torch(qkv: tuple[Tensor, ...], routed: list[Tensor]) -> None:
    q, k, v = qkv
    with tokenops.patch_sdpa():
        torch.manual_seed(0)
        got = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        scaled_dot_product_attention(q.double(), k.double(), v.double())
        scaled_dot_product_attention(q[..., :12], k[..., :12], v)
        scaled_dot_product_attention(q, k, v, torch.zeros(19, 19, device=q.device, requires_grad=True))
    assert not routed
    # and torch's random numbers are where they would have been
    torch.manual_seed(0)
    assert torch.equal(got, scaled_dot_product_attention(q, k, v, dropout_p=0.5))


def test_torch_reports_its_own_errors(qkv: tuple[Tensor, ...], routed: list[Tensor]) -> None:
    with tokenops.patch_sdpa(), pytest.raises(RuntimeError):
        scaled_dot_product_attention(qkv[0], qkv[1][..., :8], qkv[2])
    assert not routed


def test_it_nests_decorates_and_ends(qkv: tuple[Tensor, ...], routed: list[Tensor]) -> None:
    @tokenops.patch_sdpa()
    def attend() -> Tensor:
        return scaled_dot_product_attention(*qkv)

    attend()
    attend()
    with tokenops.patch_sdpa(), tokenops.patch_sdpa():
        scaled_dot_product_attention(*qkv)
    assert len(routed) == 3
    with pytest.raises(KeyError), tokenops.patch_sdpa():
        raise KeyError
    scaled_dot_product_attention(*qkv)
    assert len(routed) == 3


def test_other_threads_are_left_alone(qkv: tuple[Tensor, ...], routed: list[Tensor]) -> None:
    with tokenops.patch_sdpa():
        for function in (scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
            thread = threading.Thread(target=function, args=qkv)
            thread.start()
            thread.join()
    assert not routed


@pytest.mark.parametrize("name", ["imported", "looked up"])
def test_it_compiles(name: str, qkv: tuple[Tensor, ...]) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name == "imported":
            return scaled_dot_product_attention(q * 2.0, k, v)
        return torch.nn.functional.scaled_dot_product_attention(q * 2.0, k, v)

    q, k, v = qkv
    with tokenops.patch_sdpa():
        got = attend(q, k, v)
    torch.testing.assert_close(got, scaled_dot_product_attention(q * 2.0, k, v), rtol=1e-4, atol=1e-5)
