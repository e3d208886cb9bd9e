"""Eventful Transformers: a vision transformer on video that computes only the tokens that changed since they were last computed.

M. Dutson, Y. Li, M. Gupta, "Eventful Transformers: Leveraging Temporal Redundancy in Vision Transformers", ICCV 2023 (arXiv 2308.13494).
Letters: B batch, N tokens, K chosen tokens, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import MultiplyAdds, initialise, load_strictly, renamed
from tokenops.models.eventful_block import GATES, BlockConfig, BlockState, EventfulBlock, Policy, choice_of, sizes_of

# released names and ours, behind any prefix
OFFICIAL_NAMES = (
    (r"(.*)position_encoding\.encoding$", r"\1pos_embed"),
    (r"(.*blocks\.\d+\.)input_layer_norm\.", r"\1norm1."),
    (r"(.*blocks\.\d+\.)qkv\.", r"\1attn.qkv."),
    (r"(.*blocks\.\d+\.)relative_position\.y_embedding$", r"\1attn.rel_pos_h"),
    (r"(.*blocks\.\d+\.)relative_position\.x_embedding$", r"\1attn.rel_pos_w"),
    (r"(.*blocks\.\d+\.)projection\.", r"\1attn.proj."),
    (r"(.*blocks\.\d+\.)mlp_layer_norm\.", r"\1norm2."),
    (r"(.*blocks\.\d+\.)mlp_([12])\.", r"\1mlp.fc\2."),
)

Config = TypeVar("Config", bound=NamedTuple)


def as_config(kind: type[Config], given: Mapping[str, Any] | tuple[Any, ...], name: str) -> Config:
    if isinstance(given, tuple):
        if not isinstance(given, kind):
            raise TypeError(f"{name} must be a {kind.__name__} or a mapping, got {type(given).__name__}")
        return given
    unknown = sorted(set(given) - set(kind._fields))
    missing = sorted(set(kind._fields) - set(kind._field_defaults) - set(given))
    if unknown or missing:
        raise ValueError(f"{name} must have keys of {', '.join(kind._fields)}; missing {missing}, unknown {unknown}")
    values = {**kind._field_defaults, **given}
    return kind._make(values[field] for field in kind._fields)


class BackboneConfig(NamedTuple):
    """Of a stack of blocks, under the released configurations' names."""

    block_config: Mapping[str, Any]
    depth: int
    position_encoding_size: Any
    input_size: Any = None  # of the grid of tokens; default: that of the position encoding
    block_class: str = "Block"
    has_class_token: bool = False
    window_indices: tuple[int, ...] = ()
    windowed_class: str | None = None
    windowed_overrides: Mapping[str, Any] | None = None

    def block(self, at: int) -> tuple[str, BlockConfig]:
        """Class and configuration of a block: only those at window_indices have windows."""
        given = dict(self.block_config)
        if at not in self.window_indices:
            return self.block_class, as_config(BlockConfig, {**given, "window_size": None}, "block_config")
        given |= self.windowed_overrides or {}
        return self.windowed_class or self.block_class, as_config(BlockConfig, given, "block_config with windowed_overrides")


_VIT_B = {"dim": 768, "heads": 12, "mlp_ratio": 4}
_VITDET_B = BackboneConfig(
    block_config={**_VIT_B, "relative_embedding_size": (64, 64), "window_size": (14, 14)},
    depth=12,
    position_encoding_size=(14, 14),
    block_class="EventfulBlock",
    window_indices=(0, 1, 3, 4, 6, 7, 9, 10),
    windowed_class="EventfulTokenwiseBlock",
)
_VIVIT_B = BackboneConfig(_VIT_B, depth=12, position_encoding_size=(14, 14), block_class="EventfulBlock", has_class_token=True)


class EventfulState(NamedTuple):
    """What a backbone keeps of the last frame."""

    encoding: Tensor | None  # [1, N, C] the position encoding for this grid, if there is one
    blocks: tuple[BlockState | None, ...]  # None: a dense block

    def detach(self) -> EventfulState:
        """Without the gradient of earlier frames."""
        return _detached(self)

    def batch(self, otherwise: int = 1) -> int:
        """B, or what was given if every block is dense."""
        return next((len(block.qkv) for block in self.blocks if block is not None), otherwise)

    def indices(self) -> dict[str, Tensor]:
        """The choices in the last frame by gate, [B, K] int32 with -1 in empty slots: what ``indices`` of the next call may be. Empty after
        a first frame.
        """
        chosen = ((at, block.chosen) for at, block in enumerate(self.blocks) if block is not None and block.chosen is not None)
        return {f"blocks.{at}.{gate}": index for at, lists in chosen for gate, index in zip(GATES, lists, strict=True)}


def _detached(part: Any) -> Any:
    if isinstance(part, tuple):
        parts = [_detached(inner) for inner in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return part.detach() if isinstance(part, Tensor) else part


class EventfulBackbone(nn.Module):
    """Position encoding and blocks, without a last norm: tokens [B, N, C] of a frame in and out."""

    # the detector at its two sizes, and the spatial half of the action recogniser on its two data sets; section 5 of the paper
    PRESETS: ClassVar[dict[str, BackboneConfig]] = {
        "vitdet_b_1024": _VITDET_B._replace(input_size=(64, 64)),
        "vitdet_b_672": _VITDET_B._replace(input_size=(42, 42)),
        "vivit_b_k400": _VIVIT_B,
        "vivit_b_epic100": _VIVIT_B._replace(position_encoding_size=(20, 20)),
    }

    def __init__(
        self,
        config: BackboneConfig | Mapping[str, Any],
        policy: Policy = ("topk", {"k": 16}),
        mode: str = "paper",
    ) -> None:
        super().__init__()
        self.config = config = as_config(BackboneConfig, config, "config")
        learned = sizes_of(config.position_encoding_size)
        self.grid = learned if config.input_size is None else sizes_of(config.input_size)
        if len(self.grid) != len(learned) or (len(learned) == 1 and self.grid != learned):
            raise ValueError(f"input_size must be two numbers, or one as position_encoding_size = {learned}, got {self.grid}")
        first = config.block(0)[1] if config.depth else as_config(BlockConfig, config.block_config, "block_config")
        tokens = int(config.has_class_token) + torch.Size(learned).numel()
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, first.dim).normal_(std=0.02))
        blocks = nn.ModuleList(
            EventfulBlock(options, self.grid, kind, class_token=config.has_class_token, policy=policy, mode=mode)
            for kind, options in map(config.block, range(config.depth))
        )
        self.blocks = cast("list[EventfulBlock]", blocks)
        initialise(self)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        config: BackboneConfig | Mapping[str, Any],
        policy: Policy = ("topk", {"k": 16}),
        mode: str = "paper",
    ) -> EventfulBackbone:
        """With released weights.

        Args:
            state_dict: position_encoding.encoding and blocks.*, as released, or under our names; a prefix "backbone." may stand before.
            config: one of PRESETS or another BackboneConfig, or a mapping with its keys.
            policy: which tokens a gate lets through: ("topk", {"k"}), ("fraction", {"fraction"}) or ("threshold", {"threshold"}), each
                with an "order" of the norm of changes if it shall not be 2.
            mode: "paper": the published update of the attention matrix, in EventfulBlock. "exact": attention on the buffers.

        Raises:
            ValueError: an option or an entry of the state is wrong; all wrong entries are in one message.
            NotImplementedError: ats_fraction.
        """
        model = cls(config, policy, mode)
        load_strictly(model, renamed(renamed(state_dict, [(r"backbone\.", "")]), OFFICIAL_NAMES), "EventfulBackbone")
        return model.eval()

    def set_policy(self, policy: Policy) -> None:
        """From now on; states stay good."""
        for block in self.blocks:
            block.choice = choice_of(policy)

    def encoding(self) -> Tensor:
        """[1, N, C] for the grid of this model: a class token's row stays, the others are an image that is resized."""
        learned, lead = sizes_of(self.config.position_encoding_size), int(self.config.has_class_token)
        if learned == self.grid:
            return self.pos_embed
        image = self.pos_embed[:, lead:].unflatten(1, learned).permute(0, 3, 1, 2)
        image = F.interpolate(image, self.grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :lead], image.flatten(2).mT], 1)

    def forward(
        self, x: Tensor, state: EventfulState | None = None, indices: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, EventfulState]:
        """The next frame of each of B videos.

        Args:
            x: [B, N, C], a class token first if there is one.
            state: what the call for the frame before returned; None: a first frame, computed in full. **Without gradients it is written
                over**: that is what makes a frame cheap. To go on from one state twice, copy it. With gradients it stays, and the gradient
                goes through all frames; ``state.detach()`` cuts it.
            indices: what the gates choose, instead of the policy: {"blocks.0.qkv_gate": [B, K], ...} for each gate ("qkv_gate",
                "projection_gate", "mlp_gate") of each block that has gates, -1 in empty slots. As ``state.indices()`` gives them.

        Returns:
            [B, N, C], and the state for the next frame.

        Raises:
            ValueError: a size is wrong, indices do not name the gates, or the state is another model's.
        """
        tokens, width = self._tokens(), self.pos_embed.shape[2]
        if x.dim() != 3 or x.shape[1:] != (tokens, width):
            raise ValueError(f"x must be [B, N, C] = [*, {tokens}, {width}], got {list(x.shape)}")
        if state is not None and len(state.blocks) != len(self.blocks):
            raise ValueError(f"state must be of {len(self.blocks)} blocks, got {len(state.blocks)}")
        forced = self._forced(indices, state)
        kept = None if state is None or torch.is_grad_enabled() else state.encoding
        encoding = self.encoding() if kept is None else kept
        x = x + encoding
        states = []
        for at, block in enumerate(self.blocks):
            x, new = block(x, None if state is None else state.blocks[at], forced.get(at))
            states.append(new)
        return x, EventfulState(encoding, tuple(states))

    def _tokens(self) -> int:
        return int(self.config.has_class_token) + torch.Size(self.grid).numel()

    def _forced(self, indices: Mapping[str, Tensor] | None, state: EventfulState | None) -> dict[int, tuple[Tensor, ...]]:
        if indices is None:
            return {}
        if state is None:
            raise ValueError("indices must not be given without a state: in a first frame every token is new")
        indices = {name.removeprefix("backbone."): index for name, index in indices.items()}
        names = {at: [f"blocks.{at}.{gate}" for gate in GATES] for at, block in enumerate(self.blocks) if block.kind != "Block"}
        wanted = {name for gates in names.values() for name in gates}
        if wanted != set(indices):
            raise ValueError(
                f"indices must name every gate; missing {sorted(wanted - set(indices))}, unknown {sorted(set(indices) - wanted)}"
            )
        return {at: tuple(indices[name] for name in gates) for at, gates in names.items()}

    def counters(self, chosen: EventfulState | int | None = None, batch: int = 1) -> dict[str, int]:
        """The published operation counters of one frame: "linear_flops", "matmul_flops" and so on, those that are not 0. See ``flops``."""
        counted = self._count(chosen, batch)[0]
        return {f"{name}_flops": number for name, number in sorted(counted.items()) if number}

    def flops(self, chosen: EventfulState | int | None = None, batch: int = 1) -> MultiplyAdds:
        """What one frame costs.

        Args:
            chosen: None: a first frame. A number: every gate lets so many tokens through, which lie in as many cells of pooled keys,
                and in all windows. A state: what was chosen in the frame that returned it, which is read from the device.
            batch: B, where chosen is no state.

        Returns:
            total: multiply-adds of linear layers, attention and position tables as done here. published: the counters of the released code
            for the same choices, which also hold biases, sums and the subtractions of gates; in mode "exact" too they are mode "paper"'s.
        """
        counted, done = self._count(chosen, batch)
        return MultiplyAdds(done, sum(counted.values()))

    def _count(self, chosen: EventfulState | int | None, batch: int) -> tuple[Counter[str], int]:
        counted, done = count_blocks(self.blocks, self._tokens(), chosen, batch)
        counted["add"] += (chosen.batch(batch) if isinstance(chosen, EventfulState) else batch) * self._tokens() * self.pos_embed.shape[2]
        return counted, done


def count_blocks(blocks: Iterable[EventfulBlock], tokens: int, chosen: EventfulState | int | None, batch: int) -> tuple[Counter[str], int]:
    """The published counters and all multiply-adds of these blocks in a frame; ``chosen`` as in ``EventfulBackbone.flops``."""
    counted: Counter[str] = Counter()
    total = 0
    if isinstance(chosen, EventfulState):
        batch = chosen.batch(batch)
    for at, block in enumerate(blocks):
        lengths: Any = [(chosen, chosen, chosen, None)] * batch if isinstance(chosen, int) else None
        state = chosen.blocks[at] if isinstance(chosen, EventfulState) else None
        if state is not None and state.chosen is not None:
            each = [(index >= 0).sum(-1).tolist() for index in state.chosen]
            touched = [block.touched(ids[ids >= 0]) for ids in state.chosen[0]]
            lengths = list(zip(*each, touched, strict=True))
        part, done = block.count(tokens, lengths, batch)
        counted.update(part)
        total += done
    return counted, total
