"""EventfulBackbone: equal to the published model, to the equations in float64, and to itself in other ways of running it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eventful_block import Options
from eventful_golden import CASES, GOLDEN, TOLERANCE, chosen, drawn
from eventful_oracle import Oracle
from oracle import assert_close
from test_delta_matmul_block import film, weights_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenops.models import EventfulBackbone, EventfulState

HEADS, WIDTH, GRID = 2, 16, (4, 6)
NAMES = {"qkv": "qkv_gate", "projection": "projection_gate", "mlp": "mlp_gate"}


# the published model


def golden_config(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "block_config": {
            "dim": case["inputs"].shape[2],
            "heads": case["heads"],
            "mlp_ratio": 4,
            "relative_embedding_size": case["grid"] if case["rel_pos"] else None,
            "window_size": case["window"],
        },
        "depth": case["depth"],
        "position_encoding_size": case["grid"],
        "input_size": case["grid"],
        "block_class": "EventfulBlock",
        "has_class_token": case["class_token"],
        "window_indices": case["window_blocks"],
        "windowed_class": "EventfulTokenwiseBlock",
    }


def golden_model(case: dict[str, Any], mode: str = "paper") -> EventfulBackbone:
    name = "threshold" if "threshold" in case["choice"] else "topk"
    weights = {key: x for key, x in drawn(case).items() if key.startswith(("position_encoding.", "blocks."))}
    return EventfulBackbone.from_official(weights, golden_config(case), (name, case["choice"]), mode)


def golden_indices(case: dict[str, Any], frame: int) -> dict[str, Tensor]:
    """As the files of the published implementation name them."""
    names = {f"{at}.{segment}": f"blocks.{at}.{gate}" for at in range(case["depth"]) for segment, gate in NAMES.items()}
    return {names[key]: lists[None, frame - 1].int() for key, lists in case["indices"].items()}


def check_golden(name: str, *, dtype: torch.dtype = torch.float32, forced: bool = False, tolerance: float = TOLERANCE) -> None:
    case, state = GOLDEN[name], None
    model, weights = golden_model(case).to(dtype), drawn(case)
    for frame, tokens in enumerate(case["inputs"].to(dtype)):
        x = tokens[None]
        if case["class_token"]:
            x = torch.cat([weights["class_token"].to(dtype), x], 1)
        x, state = model(x, state, golden_indices(case, frame) if forced and frame else None)
        if case["class_token"]:
            x = F.layer_norm(x[:, 0], x.shape[-1:], weights["layer_norm.weight"].to(dtype), weights["layer_norm.bias"].to(dtype), 1e-6)
        error = (x[0] - case["outputs"][frame]).abs().max().item()
        assert error <= tolerance, (frame, error)
        for gate, ids in golden_indices(case, frame).items() if frame else ():
            assert chosen(state.indices()[gate]) == chosen(ids), (frame, gate)
        counts = {counter: number for counter, number in case["counts"][frame].items() if number}
        assert model.counters(state) == counts, frame


@pytest.mark.parametrize("grad", [False, True], ids=["in place", "with gradients"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, grad: bool) -> None:
    """Outputs, choices and counters of the released code."""
    with torch.set_grad_enabled(grad):
        check_golden(name)


@torch.no_grad()
def test_golden_on_the_reference() -> None:
    """Which alone serves float64."""
    check_golden("topk", dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["threshold_relpos", "windowed_pad"])
def test_golden_choices_forced(name: str) -> None:
    check_golden(name, forced=True)


# the equations, block by block


def backbone_of(
    kind: str = "EventfulBlock",
    policy: tuple[str, dict[str, Any]] = ("topk", {"k": 7}),
    mode: str = "paper",
    *,
    depth: int = 1,
    grid: tuple[int, int] = GRID,
    windowed: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[EventfulBackbone, list[dict[str, Tensor]], Tensor]:
    """A model, the weights of its blocks under the released names, and its position encoding."""
    table = None
    if options.get("relative_embedding_size"):
        table = options["window_size"] if windowed else options["relative_embedding_size"]
    blocks = [weights_of(table=table, seed=seed + at) for at in range(depth)]
    for block in blocks:
        for name in ("relative_position.y_embedding", "relative_position.x_embedding"):
            if name in block:
                block[name] = block[name].repeat(1, WIDTH // HEADS // block[name].shape[1])
    encoding = 0.3 * torch.randn(1, grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(9))
    state = {"position_encoding.encoding": encoding}
    state |= {f"blocks.{at}.{name}": x for at, block in enumerate(blocks) for name, x in block.items()}
    config = {
        "block_config": {"dim": WIDTH, "heads": HEADS, "mlp_ratio": 2, **options},
        "depth": depth,
        "position_encoding_size": grid,
        "block_class": kind,
        "window_indices": tuple(range(depth)) if windowed else (),
    }
    return EventfulBackbone.from_official(state, config, policy, mode), blocks, encoding


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # how the model is made, and what the equations call it
    "EventfulBlock": ({}, {}),
    "no token": ({"policy": ("topk", {"k": 0})}, {"choice": {"k": 0}}),
    "every token": ({"policy": ("topk", {"k": 24})}, {"choice": {"k": 24}}),
    "fraction": ({"policy": ("fraction", {"fraction": 0.4})}, {"choice": {"fraction": 0.4}}),
    "threshold": ({"policy": ("threshold", {"threshold": 2.0})}, {"choice": {"threshold": 2.0}}),
    "order 1": ({"policy": ("topk", {"k": 7, "order": 1})}, {"order": 1.0}),
    "stgt": ({"stgt": True, "kind": "EventfulTokenwiseBlock"}, {"whole": True, "mode": "exact"}),
    "gate before norm": ({"gate_before_ln": True}, {"gate_first": True}),
    "position bias": ({"relative_embedding_size": GRID}, {"rel_pos": True}),
    "pooled": ({"pool_size": 2}, {"pool": (2, 2)}),
    "pooled, position bias": ({"pool_size": (2, 3), "relative_embedding_size": GRID}, {"pool": (2, 3), "rel_pos": True}),
    "exact, pooled, position bias": (
        {"pool_size": 2, "relative_embedding_size": GRID, "mode": "exact"},
        {"pool": (2, 2), "rel_pos": True, "mode": "exact"},
    ),
    "Matmul1": ({"kind": "EventfulMatmul1Block"}, {"mode": "exact"}),
    "Tokenwise": ({"kind": "EventfulTokenwiseBlock"}, {"mode": "exact"}),
    "Tokenwise, pooled": (
        {"kind": "EventfulTokenwiseBlock", "pool_size": 2, "relative_embedding_size": GRID},
        {"mode": "exact", "pool": (2, 2), "rel_pos": True},
    ),
    "windows": ({"kind": "EventfulTokenwiseBlock", "window_size": (2, 3), "windowed": True}, {"window": (2, 3)}),
    "windows that do not fit": (
        {"kind": "EventfulTokenwiseBlock", "window_size": (3, 4), "relative_embedding_size": (3, 4), "windowed": True},
        {"window": (3, 4), "rel_pos": True},
    ),
    "windows, gate before norm, threshold": (
        {
            "kind": "EventfulTokenwiseBlock",
            "window_size": (3, 4),
            "windowed": True,
            "gate_before_ln": True,
            "policy": ("threshold", {"threshold": 2.0}),
        },
        {"window": (3, 4), "gate_first": True, "choice": {"threshold": 2.0}},
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["in place", "with gradients"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_is_the_published_one(variant: str, grad: bool) -> None:
    """Two samples that change in different tokens, over six frames: the choices and outputs of the equations in float64."""
    made, said = VARIANTS[variant]
    model, [weights], encoding = backbone_of(**made)
    oracles = [Oracle(weights, Options(HEADS, GRID, **{"choice": {"k": 7}, **said})) for _ in range(2)]
    state = None
    for frame, x in enumerate(film(6, 2, 24)):
        with torch.set_grad_enabled(grad):
            out, state = model(x, state)
        for sample, oracle in enumerate(oracles):
            want = oracle.frame((x[sample] + encoding[0]).double())
            assert oracle.margin > 1e-4, "a choice that rounding could turn would say nothing"
            for gate, ids in zip(state.indices().values(), oracle.chosen, strict=False):
                assert sorted(chosen(gate[sample])) == ids.tolist(), (frame, sample)
            assert_close(f"frame {frame}", out[sample], want, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("cast", ["bfloat16", "float16"])
def test_attention_kept_in_half_types(cast: str) -> None:
    """Choices are the oracle's: rounded attention may make others of its own."""
    model, [weights], encoding = backbone_of(matmul_2_cast=cast)
    oracle, state = Oracle(weights, Options(HEADS, GRID, {"k": 7})), None
    for frame, x in enumerate(film(6, 1, 24)):
        want = oracle.frame((x + encoding)[0].double())
        indices = {f"blocks.0.{gate}": ids[None] for gate, ids in zip(NAMES.values(), oracle.chosen, strict=True)}
        out, state = model(x, state, indices if frame else None)
        assert state.blocks[0].attention.probability.dtype == getattr(torch, cast)
        assert_close(f"frame {frame}", out[0], want, getattr(torch, cast))


@pytest.mark.parametrize("grad", [False, True], ids=["in place", "with gradients"])
@pytest.mark.parametrize("variant", ["EventfulBlock", "gate before norm", "windows that do not fit", "exact, pooled, position bias"])
def test_autocast(variant: str, grad: bool) -> None:
    """Layers and attention in bfloat16, tokens in float32; the choices of the model without autocast."""
    model, _, _ = backbone_of(**VARIANTS[variant][0], depth=2)
    state, want_state = None, None
    for x in film(4, 2, 24):
        with torch.set_grad_enabled(grad):
            want, want_state = model(x, want_state)
            with torch.autocast("cpu", torch.bfloat16):
                out, state = model(x, state, None if state is None else want_state.indices())
        assert out.dtype == torch.float32
        assert state.blocks[0].qkv.dtype == torch.bfloat16
        assert_close("out", out, want, torch.bfloat16)


@torch.no_grad()
def test_a_released_list_may_be_empty() -> None:
    """A threshold that nothing passed, as the published files have it."""
    model, _, _ = backbone_of(depth=1)
    x, y = film(2, 1, 24)
    _, state = model(x)
    indices = {f"backbone.blocks.0.{gate}": torch.zeros(1, 0, dtype=torch.int64) for gate in NAMES.values()}
    out, state = model(y, state, indices)
    want, _ = backbone_of(depth=1, policy=("topk", {"k": 0}))[0](y, model(x)[1])
    assert torch.equal(out, want)
    assert {index.shape[1] for index in state.indices().values()} == {0}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["EventfulTokenwiseBlock", "EventfulMatmul1Block", "EventfulBlock"])
@pytest.mark.parametrize("mode", ["paper", "exact"])
def test_every_token_is_the_dense_model(kind: str, mode: str) -> None:
    """In a first frame, and wherever the gates let everything through."""
    dense, _, _ = backbone_of("Block", depth=3)
    model, _, _ = backbone_of(kind, ("fraction", {"fraction": 1.0}), mode, depth=3)
    state, none = None, None
    for x in film(3, 2, 24):
        out, state = model(x, state)
        want, none = dense(x, none)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert none is not None
    assert none.indices() == {}
    assert none.blocks == (None,) * 3


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet() -> None:
    model, _, _ = backbone_of(depth=2, policy=("threshold", {"threshold": 2.0}), relative_embedding_size=GRID)
    frames, together = film(4, 3, 24), None
    alone: list[Any] = [None] * 3
    for x in frames:
        out, together = model(x, together)
        for sample in range(3):
            single, alone[sample] = model(x[sample : sample + 1], alone[sample])
            torch.testing.assert_close(out[sample], single[0], rtol=1e-5, atol=1e-5)


# positions


def test_position_encoding_of_another_grid() -> None:
    """The class token's row stays, the others are an image."""
    config = {"block_config": {"dim": 8, "heads": 1}, "depth": 0, "position_encoding_size": (3, 3), "has_class_token": True}
    model = EventfulBackbone({**config, "input_size": (6, 4)})
    made = model.encoding()
    assert made.shape == (1, 25, 8)
    assert torch.equal(made[:, 0], model.pos_embed[:, 0])
    image = F.interpolate(model.pos_embed[0, 1:].T.reshape(1, 8, 3, 3), (6, 4), mode="bicubic", align_corners=False)
    assert torch.equal(made[0, 1:], image[0].flatten(1).T)
    x = torch.zeros(2, 25, 8)
    assert torch.equal(model(x)[0], made.expand(2, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Block", "EventfulBlock"])
def test_position_tables_of_another_grid(kind: str) -> None:
    """As published: the table of differences by place and place is resized; also where the grid is no square."""
    model, [weights], encoding = backbone_of(kind, relative_embedding_size=(5, 5))
    x = film(1, 1, 24)[0]
    tokens = (x + encoding).double()[0]

    def normalized(name: str, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, (WIDTH,), weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double(), 1e-6)

    def linear(name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double())

    query, key, value = linear("qkv", normalized("input_layer_norm", tokens)).view(24, 3, HEADS, -1).permute(1, 2, 0, 3)
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    for axis, (name, size) in enumerate((("y_embedding", GRID[0]), ("x_embedding", GRID[1]))):
        learned = weights[f"relative_position.{name}"].double()
        table = torch.stack([torch.stack([learned[i - j + 4] for j in range(5)]) for i in range(5)])
        table = F.interpolate(table.movedim(2, 0)[None], (size, size), mode="bicubic", align_corners=False)[0].movedim(0, 2)
        for n in range(24):
            for m in range(24):
                i, j = (n // 6, m // 6) if axis == 0 else (n % 6, m % 6)
                logits[:, n, m] += query[:, n] @ table[i, j]
    attended = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
    total = tokens + linear("projection", attended)
    want = total + linear("mlp_2", F.gelu(linear("mlp_1", normalized("mlp_layer_norm", total))))
    assert_close("out", model(x)[0][0], want, torch.float32)


# state and gradients


@torch.no_grad()
def test_without_gradients_the_state_is_written_over() -> None:
    model, _, _ = backbone_of(depth=2)
    first, second, third = film(3, 2, 24)
    state = model(first)[1]
    spare = copy.deepcopy(state)
    out, new = model(second, state)
    for old, now in zip(state.blocks, new.blocks, strict=True):
        for name in ("qkv_reference", "qkv", "projection_reference", "projection", "mlp_reference", "mlp"):
            assert getattr(now, name).data_ptr() == getattr(old, name).data_ptr(), name
        assert now.attention.probability.data_ptr() == old.attention.probability.data_ptr()
    # a copy goes on from where it was made
    assert torch.equal(model(second, spare)[0], out)
    assert torch.equal(model(third, spare)[0], model(third, new)[0])


@pytest.mark.parametrize("detach", [False, True], ids=["unrolled", "detached"])
@pytest.mark.parametrize("variant", ["Tokenwise", "Matmul1", "gate before norm", "windows that do not fit", "exact, pooled, position bias"])
def test_gradients_through_frames(variant: str, detach: bool) -> None:
    """Those of autograd through the equations of all frames at once, in every weight and frame."""
    made, said = VARIANTS[variant]
    # in mode "paper" the gradient is dense attention's by definition
    model, [weights], encoding = backbone_of(**{**made, "mode": "exact"})
    options = Options(HEADS, GRID, **{"choice": {"k": 7}, **said, "mode": "exact"})
    leaves = {name: x.double().requires_grad_() for name, x in {**weights, "encoding": encoding}.items()}
    oracle = Oracle(leaves, options)
    frames = [x.requires_grad_() for x in film(3, 1, 24)]
    exact_frames = [x.detach().double().requires_grad_() for x in frames]
    state: EventfulState | None = None
    total, exact_total = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for at, (x, exact_x) in enumerate(zip(frames, exact_frames, strict=True)):
        if state is not None and detach:
            state = state.detach()
            oracle.kept = {name: part.detach() for name, part in oracle.kept.items()}
        out, state = model(x, state)
        want = oracle.frame((exact_x + leaves["encoding"])[0])
        assert oracle.margin > 1e-4
        direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(at))
        total, exact_total = total + (out[0] * direction).sum(), exact_total + (want * direction).sum()
    own = [model.pos_embed if name == "encoding" else dict(model.blocks[0].named_parameters())[OWN[name]] for name in leaves]
    grads = torch.autograd.grad(total, [*own, *frames])
    exact_grads = torch.autograd.grad(exact_total, [*leaves.values(), *exact_frames])
    for name, grad, want in zip([*leaves, "frame 0", "frame 1", "frame 2"], grads, exact_grads, strict=True):
        assert_close(f"gradient of {name}", grad, want, torch.float32)


OWN = {
    f"{official}.{part}": f"{ours}.{part}"
    for official, ours in {
        "input_layer_norm": "norm1",
        "qkv": "attn.qkv",
        "projection": "attn.proj",
        "mlp_layer_norm": "norm2",
        "mlp_1": "mlp.fc1",
        "mlp_2": "mlp.fc2",
    }.items()
    for part in ("weight", "bias")
} | {"relative_position.y_embedding": "attn.rel_pos_h", "relative_position.x_embedding": "attn.rel_pos_w"}


def test_drop_path_is_for_training() -> None:
    model, _, _ = backbone_of(drop_path_rate=0.5, depth=2)
    x = film(1, 64, 24)[0]
    want = model(x)[0]
    torch.manual_seed(0)
    got = model.train()(x)[0]
    same = (got - want).abs().amax((1, 2)) < 1e-6
    # four branches, each kept with probability 1/2 and doubled: none is as it was, and the mean stays
    assert not same.any()
    assert torch.equal(model.eval()(x)[0], want)


@pytest.fixture
def compiling() -> Iterator[None]:
    """Inductor has its own ideas of deterministic mode, and a cache that must not answer for an earlier test."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiling")
@torch.no_grad()
def test_a_frame_compiles_without_a_graph_break() -> None:
    """In place; with gradients it is made of what test_delta_matmul_block compiles."""
    model, _, _ = backbone_of(relative_embedding_size=GRID, mode="exact")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, *frames = film(3, 2, 24)
    state = model(first)[1]
    want_state = copy.deepcopy(state)
    for x in frames:
        got, state = compiled(x, state)
        want, want_state = model(x, want_state)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# what is refused


def test_all_faults_of_a_state_in_one_message() -> None:
    case = GOLDEN["topk"]
    weights = {key: x for key, x in drawn(case).items() if key != "blocks.2.qkv.bias"}
    weights |= {"blocks.0.projection.weight": torch.zeros(96, 95), "blocks.1.token_gate.p": torch.zeros(3)}
    with pytest.raises(ValueError, match="does not fit") as error:
        EventfulBackbone.from_official(weights, golden_config(case))
    for part in (
        r"missing blocks.2.attn.qkv.bias [288]",
        r"unexpected blocks.1.token_gate.p [3]",
        r"blocks.0.attn.proj.weight must be [96, 96], got [96, 95]",
    ):
        assert part in str(error.value)


def test_a_prefix_may_stand_before() -> None:
    case = GOLDEN["topk"]
    weights = drawn(case)
    model = EventfulBackbone.from_official({f"backbone.{name}": x for name, x in weights.items()}, golden_config(case))
    assert torch.equal(model.blocks[3].mlp.fc2.weight, weights["blocks.3.mlp_2.weight"])
    # and our own names are as good
    again = EventfulBackbone.from_official(model.state_dict(), golden_config(case))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ats_fraction": 0.9}, NotImplementedError, "ats_fraction must be None"),
        ({"matmul_2_cast": "int8"}, ValueError, "matmul_2_cast must be"),
        ({"kind": "EventfulBlok"}, ValueError, "block_class must be one of Block"),
        ({"mode": "fast"}, ValueError, "mode must be 'paper' or 'exact', got 'fast'"),
        ({"policy": ("random", {"k": 3})}, ValueError, "policy must be one of"),
        ({"policy": ("topk", {"threshold": 3})}, ValueError, "policy must be one of"),
        ({"pool_size": 5}, ValueError, r"pool_size must divide the grid \(4, 6\)"),
        ({"window_size": 2, "windowed": True}, ValueError, "window_size goes with Block or EventfulTokenwiseBlock"),
        ({"relative_embedding_size": (1, 2, 3)}, ValueError, "one or two positive numbers"),
        ({"tempo": 3}, ValueError, r"unknown \['tempo'\]"),
    ],
    ids=lambda part: str(next(iter(part))) if isinstance(part, dict) else "",
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    kind, policy, mode = options.pop("kind", "EventfulBlock"), options.pop("policy", ("topk", {"k": 3})), options.pop("mode", "paper")
    indices = (0,) if options.pop("windowed", False) else ()
    config = {"block_config": {"dim": 16, "heads": 2, **options}, "depth": 1, "position_encoding_size": GRID, "block_class": kind}
    with pytest.raises(error, match=message):
        EventfulBackbone({**config, "window_indices": indices}, policy, mode)


def test_refusals_of_a_frame() -> None:
    model, _, _ = backbone_of(depth=2)
    x, *_ = film(1, 1, 24)
    state = model(x)[1]
    with pytest.raises(ValueError, match=r"x must be \[B, N, C\] = \[\*, 24, 16\], got \[1, 23, 16\]"):
        model(x[:, 1:])
    with pytest.raises(ValueError, match="state must be of 2 blocks, got 1"):
        model(x, EventfulState(state.encoding, state.blocks[:1]))
    with pytest.raises(ValueError, match="indices must not be given without a state"):
        model(x, None, {})
    lists = {f"blocks.{at}.{gate}": torch.tensor([3]) for at in range(2) for gate in NAMES.values()}
    lists["blocks.2.mlp_gate"] = lists.pop("blocks.1.mlp_gate")
    with pytest.raises(ValueError, match=r"missing \['blocks.1.mlp_gate'\], unknown \['blocks.2.mlp_gate'\]"):
        model(x, state, lists)
    model.set_policy(("topk", {"k": 25}))
    with pytest.raises(ValueError, match="k must be"):
        model(x, state)
    for grid, message in (((3, 3), "a grid of two dimensions"), ((4,), "input_size must be two numbers")):
        config = {"block_config": {"dim": 8, "heads": 1, "pool_size": 1}, "depth": 1, "position_encoding_size": (3, 3)}
        with pytest.raises(ValueError, match=message):
            EventfulBackbone({**config, "input_size": grid, "has_class_token": True})


# what a frame costs


@pytest.mark.parametrize(
    ("name", "tokens", "tensors"),
    [("vitdet_b_1024", 4096, 169), ("vitdet_b_672", 1764, 169), ("vivit_b_k400", 197, 145), ("vivit_b_epic100", 401, 145)],
)
def test_presets(name: str, tokens: int, tensors: int) -> None:
    """As many entries as released; a first frame's multiply-adds in linear layers, products and position tables."""
    with torch.device("meta"):
        model = EventfulBackbone(EventfulBackbone.PRESETS[name])
    assert len(model.state_dict()) == tensors
    counted = model.counters()
    assert counted["linear_flops"] == 12 * 12 * 768**2 * tokens
    if name.startswith("vitdet"):
        side, windows = int(tokens**0.5), math.ceil(tokens**0.5 / 14) ** 2
        assert counted["matmul_flops"] == 768 * (4 * 2 * tokens**2 + 8 * 2 * windows * 196**2)
        assert counted["einsum_flops"] == 768 * (4 * 2 * tokens * side + 8 * windows * 196 * 28)
    else:
        assert counted["matmul_flops"] == 768 * 12 * 2 * tokens**2


@torch.no_grad()
@pytest.mark.parametrize("chosen", [None, 7])
@pytest.mark.parametrize("variant", ["EventfulBlock", "Tokenwise", "Matmul1", "exact, pooled, position bias", "windows that do not fit"])
def test_multiply_adds_are_those_that_torch_counts(variant: str, chosen: int | None) -> None:
    model, _, _ = backbone_of(**VARIANTS[variant][0], depth=2)
    first, second = film(2, 2, 24)
    state = model(first)[1] if chosen else None
    with FlopCounterMode(display=False) as counter:
        _, state = model(second, state)
    # torch counts a multiplication and an addition as two; of pooled keys the slots of lists, not the cells in them
    cost = model.flops(chosen, batch=2)
    if "pooled" not in variant:
        assert model.flops(state).published == cost.published
        cost = model.flops(state)
    assert 2 * cost.total == counter.get_total_flops()


@torch.no_grad()
def test_multiply_adds_of_windows_and_cells_that_changed() -> None:
    windowed, _, _ = backbone_of(**VARIANTS["windows that do not fit"][0])
    pooled, _, _ = backbone_of(pool_size=2, policy=("topk", {"k": 3}))
    [x] = film(1, 1, 24)
    # windows of 3 x 4 on 4 x 6: tokens 0 and 3 lie in the first, 22 in the last; cells of 2 x 2: all three in others
    lists = torch.tensor([[0, 3, -1, 22]])
    indices = {f"blocks.0.{gate}": lists for gate in NAMES.values()}
    _, state = windowed(x, windowed(x)[1], indices)
    # position terms are those of the chosen queries
    linear, bias_terms = 3 * 16 * 16 * 8, 3 * 16 * (3 + 4)
    assert windowed.flops(state).total == linear + bias_terms + 2 * (2 * 12) * 12 * 16
    for ids, cells in (([0, 1, 6], 1), ([0, 3, 22], 3)):
        indices = {f"blocks.0.{gate}": torch.tensor([ids]) for gate in NAMES.values()}
        _, state = pooled(x, pooled(x)[1], indices)
        assert pooled.flops(state).total == linear + 24 * 6 * 16 + 2 * 24 * cells * 16
