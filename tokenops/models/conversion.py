"""Any vision transformer of usual blocks on video, without training it again: the claim of "Eventful Transformers".

Which blocks it knows: attach.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenops.models.attach import Parts, find_blocks, kind_of, part, qkv_bias
from tokenops.models.blocks import ACTIVATIONS, Mlp, MultiplyAdds
from tokenops.models.eventful import EventfulState, count_blocks
from tokenops.models.eventful_block import BLOCK_CLASSES, GATES, BlockConfig, BlockState, EventfulBlock, Policy, choice_of


class _Frame:
    """States of the blocks during one call of the model, which knows nothing of them."""

    old: EventfulState | None = None
    new: list[BlockState | None]
    forced: Mapping[str, Tensor] | None = None


class _InPlace(nn.Module):
    """Stands where a block stood and is called as that was."""

    def __init__(self, block: EventfulBlock, at: int, frame: _Frame, gives_tuple: bool) -> None:
        super().__init__()
        self.block, self.at, self.frame, self.gives_tuple = block, at, frame, gives_tuple

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Any:
        if any(isinstance(part, Tensor) for part in (*masks, *options.values())):
            raise NotImplementedError("a converted block takes no mask: every token sees every other")
        old = None if self.frame.old is None else self.frame.old.blocks[self.at]
        forced = None
        if self.frame.forced is not None:
            names = (f"blocks.{self.at}.{gate}" for gate in GATES)
            forced = tuple(self.frame.forced[name] for name in names)
        out, new = self.block(x, old, forced)
        self.frame.new[self.at] = new
        return (out,) if self.gives_tuple else out


class Eventful(nn.Module):
    """A converted model: called as the model was, and with ``state``, for one frame after the other. See ``eventful``."""

    def __init__(self, model: nn.Module, policy: Policy, mode: str, block_class: str) -> None:
        super().__init__()
        if block_class not in BLOCK_CLASSES[1:]:
            raise ValueError(f"block_class must be one of {', '.join(BLOCK_CLASSES[1:])}, got {block_class!r}")
        self.model, self._frame = model, _Frame()
        blocks = []
        for at, (parent, name, original) in enumerate(find_blocks(model)):
            block, gives_tuple = _converted(original, policy, mode, block_class)
            blocks.append(block)
            parent.register_module(name, _InPlace(block, at, self._frame, gives_tuple))
        self._blocks = blocks

    def forward(
        self, *inputs: Any, state: EventfulState | None = None, indices: Mapping[str, Tensor] | None = None, **options: Any
    ) -> tuple[Any, EventfulState]:
        """(what the model returns, the state for the next frame). ``state`` and ``indices`` as in ``EventfulBackbone``: without gradients
        the state that is given is written over.
        """
        if state is None and indices is not None:
            raise ValueError("indices must not be given without a state: in a first frame every token is new")
        if state is not None and len(state.blocks) != len(self._blocks):
            raise ValueError(f"state must be of {len(self._blocks)} blocks, got {len(state.blocks)}")
        frame = self._frame
        frame.old, frame.new, frame.forced = state, [None] * len(self._blocks), indices
        try:
            out = self.model(*inputs, **options)
            return out, EventfulState(None, tuple(frame.new))
        finally:
            # nothing of a video stays behind in the module
            frame.old, frame.new, frame.forced = None, [], None

    def set_policy(self, policy: Policy) -> None:
        """From now on; states stay good."""
        for block in self._blocks:
            block.choice = choice_of(policy)

    def flops(self, state: EventfulState) -> MultiplyAdds:
        """Of the blocks, in the frame that returned this state; the conventions are ``EventfulBackbone.flops``'s."""
        tokens = next(block.qkv.shape[1] for block in state.blocks if block is not None)
        counted, done = count_blocks(self._blocks, tokens, state, 1)
        return MultiplyAdds(done, sum(counted.values()))


def eventful(model: nn.Module, policy: Policy = ("topk", {"k": 16}), mode: str = "paper", block_class: str = "EventfulBlock") -> Eventful:
    """A copy of a trained vision transformer that computes only what changed between frames. Nothing is trained again.

    Args:
        model: with blocks as timm's VisionTransformer, or transformers' ViT, ViViT or VideoMAE, has them. It stays as it is.
        policy, mode: as in ``EventfulBackbone.from_official``.
        block_class: "EventfulBlock", or "EventfulTokenwiseBlock" or "EventfulMatmul1Block", which keep attention exact.

    Returns:
        A module that is called as the model, and gives (its output, state): ``out, state = video(frame, state=state)``.

    Dropout of the blocks is left out, layer scale is multiplied into the layers. Every block is tried beside the one it replaces.

    Raises:
        ValueError: no block is known, or a block computes something else than its parts say.
    """
    return Eventful(copy.deepcopy(model), policy, mode, block_class)


@torch.no_grad()
def _converted(original: nn.Module, policy: Policy, mode: str, block_class: str) -> tuple[EventfulBlock, bool]:
    """The block, and whether the one it replaces gives its result in a tuple."""
    kind = cast("Parts", kind_of(original))
    get: dict[str, Any] = {name: part(original, path) for name, path in kind._asdict().items()}
    fc1, proj = get["fc1"], get["proj"]
    width, hidden = proj.weight.shape[0], fc1.weight.shape[0]
    name, act = type(original).__name__, _activation(get["activation"])
    if act is None:
        raise ValueError(f"the activation of {name} must be one of {', '.join(ACTIVATIONS)}, got {get['activation']}")
    config = BlockConfig(width, get["heads"], hidden / width)
    everything = ("fraction", {"fraction": 1.0})
    block = EventfulBlock(config, (), block_class, class_token=False, policy=everything, mode=mode)
    # the ratio may have been rounded
    block.mlp = Mlp(width, hidden, act)
    block.to(fc1.weight.device, fc1.weight.dtype)
    for own, given in ((block.norm1, get["norm1"]), (block.norm2, get["norm2"])):
        own.load_state_dict(given.state_dict())
        own.eps = given.eps
    block.attn.qkv.weight.copy_(torch.cat([layer.weight for layer in get["qkv"]]))
    block.attn.qkv.bias.copy_(qkv_bias(original, get["qkv"]))
    for layer, given, scale in ((block.attn.proj, proj, "ls1"), (block.mlp.fc1, fc1, ""), (block.mlp.fc2, get["fc2"], "ls2")):
        gamma = getattr(getattr(original, scale, None), "gamma", torch.ones_like(layer.bias))
        layer.weight.copy_(given.weight * gamma[:, None])
        layer.bias.copy_(gamma * given.bias if given.bias is not None else torch.zeros_like(layer.bias))

    # what the names of the parts do not say (a norm of queries, another scale, parallel branches) shows in the numbers
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(fc1.weight)
    training = original.training
    want = original.eval()(x)
    original.train(training)
    gives_tuple = isinstance(want, tuple)
    want = want[0] if gives_tuple else want
    got = block(x)[0]
    limit = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
    if got.shape != want.shape or not (got - want).norm() <= limit * want.norm():
        raise ValueError(f"{name} must be a block of norm, attention, norm and MLP alone: with its own weights it computes something else")
    block.choice = choice_of(policy)
    return block.train(training), gives_tuple


def _activation(given: Any) -> str | None:
    """Which of ours it is, by its values: the names are many."""
    x = torch.linspace(-6.0, 6.0, 97)
    return next((name for name, own in ACTIVATIONS.items() if torch.allclose(given(x), own()(x), rtol=0.0, atol=1e-5)), None)
