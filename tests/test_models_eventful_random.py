"""EventfulBackbone under configurations drawn at random, written as the released ones are: stacks of blocks against the equations."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from eventful_block import Options
from eventful_golden import chosen, drawn
from eventful_oracle import Oracle
from oracle import assert_close
from test_delta_matmul_block import film
from torch import Tensor

from tokenops.models import EventfulBackbone

GATES = ("qkv_gate", "projection_gate", "mlp_gate")
GATED = ("EventfulTokenwiseBlock", "EventfulMatmul1Block", "EventfulBlock")
Pair = tuple[int, int]


class Drawn(NamedTuple):
    """A configuration, and what the equations need to know of it."""

    config: dict[str, Any]
    policy: tuple[str, dict[str, Any]]
    mode: str
    batch: int
    frames: int

    @property
    def grid(self) -> Pair:
        return self.config["input_size"]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.config["has_class_token"]

    def block(self, at: int) -> tuple[str, dict[str, Any]]:
        """Class and options: windows are where they are wanted, and nowhere else."""
        options = self.config["block_config"]
        if at not in self.config["window_indices"]:
            return self.config["block_class"], {**options, "window_size": None}
        return self.config["windowed_class"] or self.config["block_class"], {**options, **(self.config["windowed_overrides"] or {})}


def drawn_config(seed: int) -> Drawn:
    rng = random.Random(seed)

    def maybe(chance: float) -> bool:
        return rng.random() < chance

    def sizes(low: int, high: int) -> Pair:
        return rng.randint(low, high), rng.randint(low, high)

    grid, heads, class_token = sizes(3, 7), rng.choice((2, 3)), maybe(0.2)
    pool, window, table = None, None, None
    if not class_token:
        divisors = [(h, w) for h in range(1, 4) for w in range(1, 4) if grid[0] % h == 0 and grid[1] % w == 0]
        pool = rng.choice(divisors) if maybe(0.35) else None
        window = sizes(2, 5) if maybe(0.5) else None
        table = (sizes(2, 9) if maybe(0.4) else grid) if maybe(0.6) else None
    depth = rng.randint(1, 3)
    windowed = tuple(at for at in range(depth) if maybe(0.5)) if window is not None else ()
    width = heads * rng.choice((8, 16))
    block_class = rng.choice(("Block", *GATED, "EventfulBlock", "EventfulBlock"))
    # those two may be windowed themselves
    alike = block_class in ("Block", "EventfulTokenwiseBlock") and maybe(0.5)
    cast = rng.choice((None, None, "float16", "bfloat16"))
    config = {
        "block_config": {
            "dim": width,
            "heads": heads,
            "mlp_ratio": rng.choice((1, 2, 4)),
            "relative_embedding_size": table,
            "window_size": window,
            "pool_size": pool,
            "matmul_2_cast": cast,
            "ats_fraction": None,
            "drop_path_rate": rng.choice((0.0, 0.1)),
            "stgt": maybe(0.15),
            "gate_before_ln": maybe(0.25),
        },
        "depth": depth,
        "position_encoding_size": sizes(2, 8) if maybe(0.4) else grid,
        "input_size": grid,
        "block_class": block_class,
        "has_class_token": class_token,
        "window_indices": windowed,
        "windowed_class": None if alike else rng.choice(("Block", "EventfulTokenwiseBlock", "EventfulTokenwiseBlock")),
        "windowed_overrides": {"pool_size": None, "matmul_2_cast": None} if pool or cast else None,
    }
    tokens = grid[0] * grid[1] + class_token
    order = rng.choice((1, 2, 2, 2, 3, math.inf))
    # the norm of a change of 0.4 in every channel
    limit = 0.4 * (1.0 if math.isinf(order) else width ** (1.0 / order))
    policy: tuple[str, dict[str, Any]] = rng.choice(
        (
            ("topk", {"k": rng.choice((0, 1, tokens // 4, tokens // 3, tokens // 2, tokens))}),
            ("fraction", {"fraction": rng.random()}),
            ("threshold", {"threshold": limit * rng.choice((0.3, 1.0, 1.0, 100.0))}),
        )
    )
    if order != 2 or maybe(0.5):
        policy[1]["order"] = order
    return Drawn(config, policy, rng.choice(("paper", "paper", "exact")), rng.randint(1, 2), 6)


def published_state(case: Drawn, seed: int) -> dict[str, Tensor]:
    """Under the released names."""
    width, hidden = case.config["block_config"]["dim"], case.config["block_config"]["dim"] * case.config["block_config"]["mlp_ratio"]
    learned = math.prod(case.config["position_encoding_size"]) + case.config["has_class_token"]
    shapes: dict[str, tuple[int, ...]] = {"position_encoding.encoding": (1, learned, width)}
    layers = {"input_layer_norm": (width,), "qkv": (3 * width, width), "projection": (width, width)}
    layers |= {"mlp_layer_norm": (width,), "mlp_1": (hidden, width), "mlp_2": (width, hidden)}
    for at in range(case.config["depth"]):
        for name, shape in layers.items():
            shapes |= {f"blocks.{at}.{name}.weight": shape, f"blocks.{at}.{name}.bias": shape[:1]}
        _, options = case.block(at)
        if options["relative_embedding_size"] is not None:
            sides = options["window_size"] or options["relative_embedding_size"]
            for axis, side in zip("yx", sides, strict=True):
                shapes[f"blocks.{at}.relative_position.{axis}_embedding"] = (2 * side - 1, width // options["heads"])
    return drawn({"shapes": shapes, "seed": seed})


class Stack:
    """The equations of the blocks, one after the other, on one sample."""

    def __init__(self, case: Drawn, state: dict[str, Tensor]) -> None:
        self.dense, self.oracles = [], []
        how, given = case.policy
        given = dict(given)
        order = given.pop("order", 2)
        for at in range(case.config["depth"]):
            kind, o = case.block(at)
            self.dense.append(kind == "Block")
            options = Options(
                o["heads"],
                case.grid,
                {"k" if how == "topk" else how: next(iter(given.values()))},
                mode=case.mode if kind == "EventfulBlock" else "exact",
                order=order,
                whole=o["stgt"],
                gate_first=o["gate_before_ln"],
                rel_pos=o["relative_embedding_size"] is not None,
                pool=o["pool_size"],
                window=o["window_size"],
            )
            lead = f"blocks.{at}."
            self.oracles.append(Oracle({name.removeprefix(lead): x for name, x in state.items() if name.startswith(lead)}, options))
        encoding, lead = state["position_encoding.encoding"].double(), int(case.config["has_class_token"])
        image = encoding[:, lead:].mT.unflatten(2, case.config["position_encoding_size"])
        if case.config["position_encoding_size"] != case.grid:
            image = F.interpolate(image, case.grid, mode="bicubic", align_corners=False)
        self.encoding = torch.cat([encoding[0, :lead], image[0].flatten(1).mT])

    def frame(self, x: Tensor) -> Tensor:  # [N, C]
        x = x.double() + self.encoding
        for dense, oracle in zip(self.dense, self.oracles, strict=True):
            if dense:
                oracle.kept.clear()
            x = oracle.frame(x)
        return x

    def indices(self) -> dict[str, Tensor]:
        """[K] of each gate."""
        gated = [(at, oracle.chosen) for at, (dense, oracle) in enumerate(zip(self.dense, self.oracles, strict=True)) if not dense]
        return {f"blocks.{at}.{gate}": ids for at, lists in gated for gate, ids in zip(GATES, lists, strict=True)}


def check(case: Drawn, seed: int) -> int:
    """How many tokens were chosen. Float64 chooses as the equations do; float32 and half attention are told what to choose."""
    state = published_state(case, seed)
    cast = getattr(torch, case.config["block_config"]["matmul_2_cast"] or "float32")
    exact = None
    if cast == torch.float32:
        exact = EventfulBackbone.from_official(state, case.config, case.policy, case.mode).double()
    single = EventfulBackbone.from_official({f"backbone.{name}": x for name, x in state.items()}, case.config, case.policy, case.mode)
    stacks = [Stack(case, state) for _ in range(case.batch)]
    exact_state, single_state, choices = None, None, 0
    for at, x in enumerate(film(case.frames, case.batch, case.tokens, case.config["block_config"]["dim"], seed=seed)):
        want = torch.stack([stack.frame(sample) for stack, sample in zip(stacks, x, strict=True)])
        each = [stack.indices() for stack in stacks]
        lists = {name: torch.nn.utils.rnn.pad_sequence([own[name] for own in each], True, -1) for name in each[0]} if at else None
        if exact is not None:
            out, exact_state = exact(x.double(), exact_state)
            for name, given in exact_state.indices().items():
                for row, own in zip(given, each, strict=True):
                    assert chosen(row) == chosen(own[name]), (at, name)
            assert_close(f"frame {at}", out, want, torch.float64)
        out, single_state = single(x, single_state, lists)
        assert_close(f"frame {at} in float32", out, want, cast)
        choices += sum(int((ids >= 0).sum()) for ids in (lists or {}).values())
    return choices


SEEDS = range(48)


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_any_configuration(seed: int) -> None:
    check(drawn_config(seed), seed)


def kinds(case: Drawn) -> set[str]:
    """What a configuration is an example of."""
    found = {case.policy[0], f"order {case.policy[1].get('order')}", case.mode, f"batch {case.batch}"}
    for at in range(case.config["depth"]):
        kind, o = case.block(at)
        table, window, pool = o["relative_embedding_size"], o["window_size"], o["pool_size"]
        has = {
            "": True,
            ", pooled": pool is not None,
            ", table": table is not None,
            ", pooled, table": pool is not None and table is not None,
            ", table resized": table is not None and window is None and table != case.grid,
            ", stgt": o["stgt"],
            ", gate_before_ln": o["gate_before_ln"],
            ", cast": o["matmul_2_cast"] is not None,
            ", class token": case.config["has_class_token"],
            ", filled up, table": table is not None and window is not None and any(n % w for n, w in zip(case.grid, window, strict=True)),
        }
        found |= {f"{'windowed ' if window else ''}{kind}{what}" for what, there in has.items() if there}
    return found


def test_the_configurations_are_of_every_kind() -> None:
    seen = set().union(*(kinds(drawn_config(seed)) for seed in SEEDS))
    options = ("", ", pooled", ", table", ", pooled, table", ", table resized", ", stgt", ", gate_before_ln", ", cast", ", class token")
    wanted = {f"EventfulBlock{option}" for option in options} | {f"EventfulTokenwiseBlock{option}" for option in ("", *options[3:7])}
    wanted |= {"EventfulMatmul1Block", "Block", "windowed Block", "windowed EventfulTokenwiseBlock, filled up, table"}
    wanted |= {"topk", "fraction", "threshold", "order 1", "order 2", "order 3", "order inf", "paper", "exact", "batch 1", "batch 2"}
    assert not wanted - seen


BLOCK = {"dim": 32, "heads": 2, "relative_embedding_size": (6, 6), "window_size": (4, 4)}
# the twelve blocks of ViTDet-B, narrow
VITDET = {
    "block_config": BLOCK,
    "depth": 12,
    "position_encoding_size": (3, 3),
    "input_size": (6, 7),
    "block_class": "EventfulBlock",
    "has_class_token": False,
    "window_indices": (0, 1, 3, 4, 6, 7, 9, 10),
    "windowed_class": "EventfulTokenwiseBlock",
    "windowed_overrides": None,
}
# the spatial blocks of ViViT
VIVIT = VITDET | {"block_config": {"dim": 32, "heads": 2}, "depth": 4, "has_class_token": True, "window_indices": ()}
FILMS = {
    "ViTDet": (VITDET, ("topk", {"k": 9}), 1),
    "ViTDet, threshold": (VITDET, ("threshold", {"threshold": 2.0}), 1),
    "ViTDet, pooled keys": (
        VITDET | {"block_config": BLOCK | {"pool_size": (2, 1)}, "windowed_overrides": {"pool_size": None}},
        ("topk", {"k": 9}),
        1,
    ),
    "ViViT, two views": (VIVIT, ("fraction", {"fraction": 0.25}), 2),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "mode"), [*((name, "paper") for name in FILMS), ("ViTDet", "exact"), ("ViViT, two views", "exact")])
def test_24_frames(name: str, mode: str) -> None:
    """Whole stacks: what is stale, and what rounding leaves behind, stay what the equations say."""
    config, policy, batch = FILMS[name]
    block = {"mlp_ratio": 4, "relative_embedding_size": None, "window_size": None, "pool_size": None, "matmul_2_cast": None}
    block |= {"stgt": False, "gate_before_ln": False, **config["block_config"]}
    case = Drawn({**config, "block_config": block}, policy, mode, batch, frames=24)
    assert check(case, seed=3) > 23 * config["depth"]
