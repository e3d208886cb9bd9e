"""The gate, on every backend: against a loop over tokens, forward and backward, and over several frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_matmul_oracle import DTYPES, assert_gradients, lists, normal
from oracle import assert_close, assert_same_numbers
from torch import Tensor
from torch.library import opcheck

import tokenops
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaGate, GateProblem

ops = torch.ops.tokenops
RESULTS = ("values", "delta", "reference", "total")


def call_of(batch: int = 2, tokens: int = 9, width: int = 6, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    grids = {name: normal(batch, tokens, width, dtype=dtype, device=device, seed=at) for at, name in enumerate(("x", "reference", "skip"))}
    # changes of very different size: a choice that rounding could turn is no test of anything
    size = torch.arange(1, tokens + 1).float().flip(0).roll(3).view(1, -1, 1)
    grids["x"] = (grids["x"].float().cpu() * size).to(device, dtype)
    return {
        **grids,
        "norm_weight": 1.0 + 0.3 * normal(width, device=device, seed=4),
        "norm_bias": 0.3 * normal(width, device=device, seed=5),
    }


def as_called(options: dict[str, Any], forms: tuple[str, ...], backend: str | None) -> Any:
    def run(x: Tensor, reference: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> DeltaGate:
        return tokenops.delta_gate(
            x,
            reference if "first" not in forms else None,
            **options,
            skip=skip if "skip" in forms else None,
            norm=(norm_weight, norm_bias) if "norm" in forms else None,
            norm_eps=1e-5,
            whole="whole" in forms,
            backend=backend,
        )

    return run


def as_loop(chosen: list[list[int]], forms: tuple[str, ...]) -> Any:
    """What the gate gives for tokens that were chosen, token after token."""

    def run(x: Tensor, reference: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, ...]:
        total = x + skip if "skip" in forms else x
        current = F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, 1e-5) if "norm" in forms else total
        values, delta, new = [], [], []
        zero = torch.zeros_like(current[0, 0])
        for sample, ids in enumerate(chosen):
            old = [zero] * x.shape[1] if "first" in forms else list(reference[sample])
            values.append(torch.stack([current[sample, at] if at >= 0 else zero for at in ids]))
            delta.append(torch.stack([current[sample, at] - old[at] if at >= 0 else zero for at in ids]))
            new.append(torch.stack([current[sample, at] if at in ids or "whole" in forms else old[at] for at in range(x.shape[1])]))
        return torch.stack(values), torch.stack(delta), torch.stack(new), total

    return run


def choose_loop(call: dict[str, Any], forms: tuple[str, ...], *, order: float = 2.0, k: int, threshold: float = -1.0) -> list[list[int]]:
    """Ascending ids of the k greatest changes above the threshold, filled up with -1."""
    exact = {name: x.double().cpu() for name, x in call.items()}
    every = [list(range(exact["x"].shape[1]))] * exact["x"].shape[0]
    delta = as_loop(every, forms)(**exact)[1]
    chosen = []
    for sample in delta:
        norms = [float(torch.linalg.vector_norm(row, order)) for row in sample]
        best = sorted((at for at in range(len(norms)) if norms[at] > threshold), key=lambda at: -norms[at])[:k]
        chosen.append(sorted(best) + [-1] * (k - len(best)))
    return chosen


def continuous(gate: DeltaGate) -> tuple[Tensor, ...]:
    return tuple(getattr(gate, name) for name in RESULTS)


def assert_right(
    call: dict[str, Any], options: dict[str, Any], forms: tuple[str, ...], want: list[list[int]], backend: str
) -> tuple[Tensor, ...]:
    """The tokens that were to be chosen are, and everything about them is right; returns what was computed."""
    run = as_called(options, forms, backend)
    gate = run(**call)
    assert gate.index.tolist() == want
    assert gate.index.dtype == gate.count.dtype == torch.int32
    assert gate.count.tolist() == [sum(at >= 0 for at in ids) for ids in want]
    wanted = ["x", *(name for name in ("skip",) if name in forms), *(["norm_weight", "norm_bias"] if "norm" in forms else [])]
    wanted += [] if "first" in forms else ["reference"]
    results = assert_gradients(lambda **given: continuous(run(**given)), as_loop(want, forms), call, wanted)
    return (gate.index, gate.count, *results)


FORMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "skip": ("skip",),
    "norm": ("norm",),
    "skip and norm": ("skip", "norm"),
    "whole": ("whole", "skip", "norm"),
    "first": ("first", "skip", "norm"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_k_is_the_loop(dtype: torch.dtype, form: str, backend: str, device: str) -> None:
    call, forms = call_of(dtype=dtype, device=device), FORMS[form]
    k = 9 if "first" in forms else 4
    # under a normalisation all changes are of one size: half types may choose others of nearly equal size
    options: dict[str, Any] = {"k": 4}
    want = choose_loop(call, forms, k=k)
    if "norm" in forms and "first" not in forms and dtype != torch.float32:
        options = {"index": torch.tensor(want, device=device)}
    assert_right(call, options, forms, want, backend)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0, torch.inf])
def test_any_order(order: float, backend: str, device: str) -> None:
    call = call_of(device=device)
    assert_right(call, {"k": 4, "order": order}, ("skip",), choose_loop(call, ("skip",), order=order, k=4), backend)


def test_order_decides(backend: str, device: str) -> None:
    frame = torch.tensor([[[2.0, 2.0, 2.0], [3.0, 0.0, 0.0], [1.8, 2.9, 0.0]]], device=device)
    for order, want in ((0.0, 0), (1.0, 0), (2.0, 0), (torch.inf, 1)):
        assert tokenops.delta_gate(frame, torch.zeros_like(frame), k=1, order=order, backend=backend).index.tolist() == [[want]]


def test_fraction_threshold_and_lists(backend: str, device: str) -> None:
    call = call_of(device=device)
    assert_right(call, {"fraction": 0.5}, (), choose_loop(call, (), k=4), backend)
    norms = (call["x"] - call["reference"]).norm(dim=-1)
    # the samples keep different numbers of tokens
    bound = float(norms.flatten().sort().values[10:12].mean())
    want = choose_loop(call, (), k=9, threshold=bound)
    assert want[0].count(-1) != want[1].count(-1)
    assert_right(call, {"threshold": bound}, (), want, backend)
    assert_right(call, {"threshold": bound, "max_k": 2}, (), choose_loop(call, (), k=2, threshold=bound), backend)
    assert_right(call, {"threshold": 1e9, "max_k": 3}, (), [[-1] * 3] * 2, backend)
    index = lists(2, 9, 5, device=device)
    assert_right(call, {"index": index}, ("whole",), index.tolist(), backend)


def test_nothing_and_everything(backend: str, device: str) -> None:
    call = call_of(device=device)
    everything = tokenops.delta_gate(call["x"], call["reference"], k=9, backend=backend)
    assert torch.equal(everything.values, call["x"])
    assert torch.equal(everything.reference, call["x"])
    nothing = tokenops.delta_gate(call["x"], call["reference"], k=0, backend=backend)
    assert nothing.values.shape == (2, 0, 6)
    assert torch.equal(nothing.reference, call["reference"])
    assert tokenops.delta_gate(call["x"], call["x"], threshold=0.0, backend=backend).count.tolist() == [0, 0]
    for shape in ((0, 4, 3), (2, 0, 3)):
        x = torch.zeros(shape, device=device)
        assert tokenops.delta_gate(x, x, threshold=0.0, backend=backend).reference.shape == shape


def test_equal_changes_go_to_the_lowest_ids(backend: str, device: str) -> None:
    x = torch.ones(1, 8, 3, device=device)
    assert tokenops.delta_gate(x, 0 * x, k=3, backend=backend).index.tolist() == [[0, 1, 2]]


def test_a_slow_drift_adds_up(backend: str, device: str) -> None:
    """In the reference; not where it is the whole frame."""
    x = torch.zeros(1, 3, 2, device=device)
    for whole, want in ((False, [0, 0, 0, 1, 0, 0]), (True, [0] * 6)):
        kept, counts = tokenops.delta_gate(x, backend=backend).reference, []
        for frame in range(6):
            drift = x.clone()
            drift[0, 1] = 0.3 * (frame + 1)
            gate = tokenops.delta_gate(drift, kept, threshold=1.5, whole=whole, backend=backend)
            kept = gate.reference
            counts.append(int(gate.count))
        assert counts == want


def test_the_first_reference_is_not_the_frame_itself(backend: str, device: str) -> None:
    frame = torch.ones(1, 3, 2, device=device)
    first = tokenops.delta_gate(frame, backend=backend)
    tokenops.delta_gate_(2 * frame, first.reference, k=1, backend=backend)
    assert (frame == 1).all()
    assert first.total is frame


@pytest.mark.parametrize("form", ["plain", "skip and norm", "whole"])
def test_in_place_gives_the_same(form: str, backend: str, device: str) -> None:
    call, forms = call_of(device=device), FORMS[form]
    want = as_called({"k": 4}, forms, backend)(**call)
    old = call["reference"].clone()
    got = tokenops.delta_gate_(
        call["x"],
        old,
        k=4,
        skip=call["skip"] if "skip" in forms else None,
        norm=(call["norm_weight"], call["norm_bias"]) if "norm" in forms else None,
        norm_eps=1e-5,
        whole="whole" in forms,
        backend=backend,
    )
    assert got.reference is old
    for name, mine, other in zip(DeltaGate._fields, got, want, strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("form", ["plain", "skip and norm", "whole"])
def test_in_place_with_tokens_that_are_given(form: str, backend: str, device: str) -> None:
    """No change decides, so none is measured: the path is another. The reference is a view, and nothing beside it is written."""
    call, forms = call_of(device=device), FORMS[form]
    options: dict[str, Any] = {"index": torch.tensor([[-1, 7, 2, -1, 0], [3, -1, -1, 8, 1]], device=device)}
    want = as_called(options, forms, backend)(**call)
    around = normal(9, 2, 11, device=device, seed=8)
    grid = around.clone()
    old = grid.transpose(0, 1)[..., 2:8]
    old.copy_(call["reference"])
    norm = (call["norm_weight"], call["norm_bias"]) if "norm" in forms else None
    skip = call["skip"] if "skip" in forms else None
    got = tokenops.delta_gate_(call["x"], old, **options, skip=skip, norm=norm, norm_eps=1e-5, whole="whole" in forms, backend=backend)
    assert got.reference is old
    for name, mine, other in zip(DeltaGate._fields, got, want, strict=True):
        assert torch.equal(mine, other), name
    for columns in (slice(0, 2), slice(8, None)):
        assert torch.equal(grid[..., columns], around[..., columns])


def test_any_layout(backend: str, device: str) -> None:
    grids = normal(3, 9, 2, 24, device=device)
    weight, bias = normal(2, 16, device=device, seed=1)[:, ::2]
    dense = [grid.transpose(0, 1)[..., :8] for grid in grids]
    spread = [grid.transpose(0, 1)[..., ::3] for grid in grids]
    expanded = [grid[:, :1, :8].transpose(0, 1).expand(2, -1, -1) for grid in grids]
    for x, old, skip in (dense, spread, expanded):
        plain = [part.contiguous() for part in (x, old, skip, weight, bias)]
        want = tokenops.delta_gate(plain[0], plain[1], k=4, skip=plain[2], norm=(plain[3], plain[4]), backend=backend)
        got = tokenops.delta_gate(x, old, k=4, skip=skip, norm=(weight, bias), backend=backend)
        for name, mine, other in zip(DeltaGate._fields, got, want, strict=True):
            assert_same_numbers(name, mine, other, backend)


def test_norms_neither_overflow_nor_vanish(backend: str, device: str) -> None:
    """Of an order whose powers would; and infinite changes are the greatest of all."""
    x = torch.zeros(1, 4, 5, device=device)
    for size in (1e25, 1e-25):
        x[0, :, :] = size * torch.tensor([[1.0], [3.0], [2.0], [0.0]], device=device)
        if backend.startswith("cpu"):
            assert tokenops.delta_gate(x, 0 * x, k=2, order=3.0, backend=backend).index.tolist() == [[1, 2]]
    x[0, 3, 2] = -torch.inf
    for order in (0.5, 1.0, 2.0, 3.0, torch.inf):
        assert tokenops.delta_gate(x, torch.zeros_like(x), threshold=1e30, order=order, backend=backend).index[0, 0] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_the_caches_hold(dtype: torch.dtype, backend: str, device: str) -> None:
    """Grids of that size are written past them; what was written is read again. Widths end within a vector."""
    call = call_of(1, 2100, 1001, dtype=dtype, device=device)
    # few and far more changed than the others, so that no rounding decides
    call["x"] = call["reference"] + 0.01 * call["x"] / 2100
    call["x"][0, 5::100] = normal(21, 1001, dtype=dtype, device=device, seed=9)
    forms = ("skip",)
    call["skip"] = (0.01 * call["skip"].float()).to(dtype)
    gate = as_called({"k": 21}, forms, backend)(**call)
    assert gate.index.tolist() == [list(range(5, 2100, 100))]
    want = as_loop(gate.index.tolist(), forms)(**{name: part.double().cpu() for name, part in call.items()})
    for name, mine, other in zip(RESULTS, continuous(gate), want, strict=True):
        assert_close(name, mine, other, dtype)


def test_the_same_bits_for_any_number_of_threads(backend: str, device: str) -> None:
    call = call_of(2, 700, 24, device=device)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        leaves = {name: part.clone().requires_grad_() for name, part in call.items()}
        gate = as_called({"k": 90}, ("skip", "norm"), backend)(**leaves)
        loss = sum((part * normal(*part.shape, device=device, seed=at)).sum() for at, part in enumerate(continuous(gate)))
        results.append([*gate, *torch.autograd.grad(loss, list(leaves.values()))])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


CONTENTS = {
    "NaN": ({"k": 2}, "x must not differ from reference by NaN, got NaN in token 6 of sample 1"),
    "an id of another grid": ({"index": torch.tensor([[0, 9], [0, 1]])}, r"ids in \[0, 9\)"),
    "a negative id": ({"index": torch.tensor([[0, -2], [0, 1]])}, r"ids in \[0, 9\)"),
    "an id twice": ({"index": torch.tensor([[0, 1], [3, 3]])}, "index must not repeat an id"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_contents_are_found_before_the_reference_is_touched(
    name: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU if asked to look."""
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    options, message = CONTENTS[name]
    options = {how: x.to(device) if isinstance(x, Tensor) else x for how, x in options.items()}
    call = call_of(device=device)
    if name == "NaN":
        call["x"][1, 6, 3] = torch.nan
    old = call["reference"].clone()
    with pytest.raises(ValueError, match=message):
        tokenops.delta_gate_(call["x"], old, **options, backend=backend)
    assert torch.equal(old, call["reference"])


def test_the_definition_passes_gradcheck() -> None:
    call = {name: x.double().requires_grad_() for name, x in call_of(1, 4, 3).items()}

    def run(x: Tensor, skip: Tensor, old: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return continuous(reference.gated(GateProblem(x, skip, old, weight, bias, 1e-5, None, None, 2.0, False), 2))

    assert torch.autograd.gradcheck(run, [call[name] for name in ("x", "skip", "reference", "norm_weight", "norm_bias")])


@pytest.mark.parametrize("detach", [False, True])
def test_frames_step_by_step_are_the_unrolled_ones(detach: bool, backend: str, device: str) -> None:
    """Gate, layer and buffer over several frames against the definitions under autograd, in float64; detach cuts between frames."""
    frames = [normal(2, 7, 4, device=device, seed=at) for at in range(4)]
    weight = normal(3, 4, device=device, seed=9)

    def run(frames: list[Tensor], weight: Tensor, plain: bool) -> Tensor:
        kept, buffer, total = None, None, torch.zeros((), dtype=torch.float64)
        for at, frame in enumerate(frames):
            if detach and kept is not None:
                kept, buffer = kept.detach(), buffer.detach()
            if plain:
                gate = reference.gated(GateProblem(frame, None, kept, None, None, 1e-6, None, None, 2.0, False), 7 if kept is None else 3)
                rows, ids = gate.values @ weight.T, gate.index.long()
                buffer = rows if buffer is None else torch.stack([b.index_copy(0, i, r) for b, i, r in zip(buffer, ids, rows, strict=True)])
            else:
                gate = tokenops.delta_gate(frame, kept, k=3, backend=backend)
                # the reference holds the values of every chosen token, so its rows are theirs
                rows = tokenops.gathered_linear(gate.reference, weight, index=gate, backend=backend)
                buffer = rows if buffer is None else tokenops.update_tokens(buffer, rows, index=gate, backend=backend)
            kept = gate.reference
            total = total + (buffer.cpu().double() * normal(2, 7, 3, dtype=torch.float64, seed=20 + at)).sum()
        return total

    leaves = [x.clone().requires_grad_() for x in (*frames, weight)]
    exact = [x.double().requires_grad_() for x in (*frames, weight)]
    got, want = run(leaves[:-1], leaves[-1], False), run(exact[:-1], exact[-1], True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for mine, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, exact), strict=True):
        assert_close("gradient", mine, other, torch.float32)


# the operators


@pytest.mark.parametrize("form", FORMS)
def test_passes_opcheck(form: str, backend: str, device: str) -> None:
    call, forms = call_of(device=device), FORMS[form]
    first = "first" in forms
    slots = 9 if first else 4
    leaves = {name: x.requires_grad_() for name, x in call.items()}
    given = (
        leaves["x"],
        leaves["skip"] if "skip" in forms else None,
        None if first else leaves["reference"],
        *((leaves["norm_weight"], leaves["norm_bias"]) if "norm" in forms else (None, None)),
        1e-6,
        None,
        None,
        2.0,
        "whole" in forms,
        slots,
        backend,
    )
    opcheck(ops.delta_gate.default, given)
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
    if not first:
        opcheck(ops.delta_gate_.default, plain)
    rows, grid = normal(2, slots, 6, device=device), normal(2, 9, 6, device=device)
    index = lists(2, 9, slots, device=device)
    wanted = [True, not first, "norm" in forms, False]
    opcheck(
        ops.delta_gate_backward.default,
        (plain[0], *plain[3:6], index, plain[9], first, rows, None, grid, grid if "skip" in forms else None, wanted, backend),
    )


def test_double_backward_and_forward_mode_are_refused(device: str) -> None:
    x = normal(1, 3, 4, device=device).requires_grad_()
    function = lambda x: tokenops.delta_gate(x, torch.zeros(1, 3, 4, device=device), k=2).values  # noqa: E731
    [grad] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="delta_gate cannot be differentiated twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x.detach(),), (x.detach(),))


X = torch.ones(2, 4, 3)
ERRORS: dict[str, tuple[Any, ...]] = {
    "k > N": ((X, X), {"k": 5}, ValueError, r"k must be at most the number of tokens 4 \(strict=True\), got 5"),
    "negative threshold": ((X, X), {"threshold": -0.1}, ValueError, r"threshold must not be negative \(a norm never is\), got -0.1"),
    "threshold NaN": ((X, X), {"threshold": torch.nan}, ValueError, "threshold must not be negative .*, got nan"),
    "negative order": ((X, X), {"k": 1, "order": -1.0}, ValueError, "order must not be negative, got -1.0"),
    "no policy": ((X, X), {}, ValueError, "exactly one of k, fraction, threshold and index must be given, got none"),
    "two policies": ((X, X), {"k": 1, "index": torch.tensor([0])}, ValueError, "exactly one of .* got k, index"),
    "another N": ((X, X[:, :3]), {"k": 1}, ValueError, r"reference must be \[B, N, C\] = \[2, 4, 3\], got \[2, 3, 3\]"),
    "another batch": ((X, X[:1]), {"k": 1}, ValueError, r"reference must be \[B, N, C\] = \[2, 4, 3\], got \[1, 4, 3\]"),
    "another dtype": ((X, X.half()), {"k": 1}, TypeError, "reference must have x's dtype torch.float32, got torch.float16"),
    "first with an index": ((X,), {"index": torch.tensor([0])}, ValueError, "index must not be given without a reference"),
    "index of another N": ((X, X), {"index": torch.tensor([4])}, ValueError, r"index must hold ids in \[0, 4\)"),
    "NaN": ((X * torch.nan, X), {"k": 1}, ValueError, "x must not differ from reference by NaN, got NaN in token 0 of sample 0"),
    "skip": ((X, X), {"k": 1, "skip": X[0]}, ValueError, r"skip must be \[B, N, C\]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name: str) -> None:
    arguments, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        tokenops.delta_gate(*arguments, **options)


def test_errors_in_place() -> None:
    with pytest.raises(TypeError, match="reference must be a Tensor"):
        tokenops.delta_gate_(X, None, k=1)
    with pytest.raises(RuntimeError, match=r"reference is written in place and has no gradient: .*use delta_gate"):
        tokenops.delta_gate_(X.clone().requires_grad_(), X.clone(), k=1)
    with pytest.raises(ValueError, match="reference must not share memory with x"):
        tokenops.delta_gate_(X, X, k=1)
    with pytest.raises(ValueError, match="reference must not be expanded"):
        tokenops.delta_gate_(X, torch.zeros(1, 1, 3).expand(2, 4, 3), k=1)
