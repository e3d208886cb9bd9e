"""Getting into the blocks of a vision transformer that somebody else built: finding them, opening them, and running them another way.

Knows the blocks of this package, of timm's VisionTransformer, and of transformers' ViT, ViViT and VideoMAE (4 and 5), by the names of
their parts; neither library is needed here.

Letters: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokenops.models.blocks import Mlp, attend, fused_linear, fused_mlp, gathers

State = TypeVar("State")


class Parts(NamedTuple):
    """Where a kind of block has its parts."""

    heads: str
    norm1: str
    qkv: tuple[str, ...]  # one layer for all three, or one each
    proj: str
    norm2: str
    fc1: str
    activation: str
    fc2: str


_TRANSFORMERS_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
KINDS = (
    Parts("attn.num_heads", "norm1", ("attn.qkv",), "attn.proj", "norm2", activation="mlp.act", **_MLP),
    # transformers 5
    Parts(
        "attention.num_attention_heads",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        proj="attention.o_proj",
        activation="mlp.activation_fn",
        **_TRANSFORMERS_NORMS,
        **_MLP,
    ),
    # transformers 4, and VideoMAE
    Parts(
        "attention.attention.num_attention_heads",
        qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        proj="attention.output.dense",
        fc1="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        fc2="output.dense",
        **_TRANSFORMERS_NORMS,
    ),
)


def part(block: nn.Module, path: str | tuple[str, ...]) -> Any:
    """What stands at a path of names, or a tuple of it for a tuple of paths."""
    return attrgetter(path)(block) if isinstance(path, str) else tuple(attrgetter(one)(block) for one in path)


def _has(block: nn.Module, path: str) -> bool:
    try:
        part(block, path)
    except AttributeError:
        return False
    return True


def kind_of(block: nn.Module) -> Parts | None:
    """The first kind whose parts the block has all of."""
    paths = ((kind, (path for entry in kind for path in ((entry,) if isinstance(entry, str) else entry))) for kind in KINDS)
    return next((kind for kind, wanted in paths if all(_has(block, path) for path in wanted)), None)


def find_blocks(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, block) for each block, in the order in which the model holds them.

    Raises:
        ValueError: there is none.
    """
    found = [(parent, name, block) for parent in model.modules() for name, block in parent.named_children() if kind_of(block)]
    if not found:
        raise ValueError(f"model must have blocks as of timm or transformers, got {type(model).__name__} with none")
    return found


def qkv_bias(block: nn.Module, layers: tuple[nn.Linear, ...]) -> Tensor:  # [3 C]
    biases: list[Tensor] = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    # VideoMAE up to transformers 4 keeps the biases of queries and values beside the layers
    holder = getattr(getattr(block, "attention", None), "attention", None)
    for at, name in ((0, "q_bias"), (2, "v_bias")):
        if getattr(holder, name, None) is not None:
            biases[at] = getattr(holder, name)
    return torch.cat(biases)


# parts that a block may have: nothing is done where it has none
_OPTIONAL = {
    "query_norm": ("attn.q_norm",),
    "key_norm": ("attn.k_norm",),
    "attention_dropout": ("attn.attn_drop", "attention.attention.dropout"),
    "dropout1": ("attn.proj_drop", "attention.output.dropout"),
    "hidden_dropout": ("mlp.drop1",),
    "dropout2": ("mlp.drop2", "output.dropout"),
    "scale1": ("ls1",),
    "scale2": ("ls2",),
    "path1": ("drop_path1", "drop_path"),
    "path2": ("drop_path2", "drop_path"),
}


def _are_plain(get: dict[str, Any]) -> bool:
    """Whether the norms and layers are what they are called, and no more: a subclass may be, but nobody knows for how long."""
    layers, activation = (*get["qkv"], get["proj"], get["fc1"], get["fc2"]), get["activation"]
    exact = activation is nn.functional.gelu or type(activation).__name__ == "GELUActivation"
    exact = exact or (type(activation) is nn.GELU and activation.approximate == "none")
    # timm's is a subclass, which chooses a quicker norm where there is one
    norms = (get["norm1"], get["norm2"])
    affine = all(isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None for norm in norms)
    return exact and affine and all(type(layer) is nn.Linear for layer in layers)


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0.0


class OpenBlock:
    """A pre-norm block in its two halves. Holds the block's own layers: training it trains the block."""

    def __init__(self, block: nn.Module) -> None:
        kind = kind_of(block)
        if kind is None:
            raise ValueError(f"block must have the parts of a block of timm or transformers, got {type(block).__name__}")
        self.block, self.gives_tuple = block, False
        self.get: dict[str, Any] = {name: part(block, path) for name, path in kind._asdict().items()}
        for name, paths in _OPTIONAL.items():
            self.get[name] = next((part(block, path) for path in paths if _has(block, path)), nn.Identity())
        self._plain = _are_plain(self.get)
        names = ("norm1", "proj", "norm2", "fc1", "activation", "fc2")
        self._leaves = [leaf for leaf in (*self.get["qkv"], *map(self.get.__getitem__, names)) if isinstance(leaf, nn.Module)]
        # the block's two layers under our names; nothing is drawn for those that they replace
        with torch.device("meta"):
            self._mlp = Mlp(1, 1)
        self._mlp.fc1, self._mlp.fc2 = self.get["fc1"], self.get["fc2"]
        self._try()

    def fused(self, x: Tensor) -> bool:
        """Whether norms and layers run as one, which is quicker where nothing learns. What others have put in their layers (adapters,
        hooks, dropout at work) is called as it is.
        """
        hooked = any(leaf._forward_hooks or leaf._forward_pre_hooks for leaf in self._leaves)
        return self._plain and gathers(x) and not hooked and not _drops(self.get["hidden_dropout"])

    def attention(self, x: Tensor, kv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [B, N, C], [B, N] float32
        """(x plus what its tokens attend to, the keys [B, H, N, D]). ``kv_bias`` is added to the logits of each key."""
        get = self.get
        query, key, value = self._project(x)
        query, key = get["query_norm"](query), get["key_norm"](key)
        dropout = get["attention_dropout"]
        p = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        out = attend(query, key, value, kv_bias=kv_bias, dropout_p=p)
        proj = get["proj"]
        out = fused_linear(out, proj.weight, proj.bias) if self.fused(x) else proj(out)
        return x + get["path1"](get["scale1"](get["dropout1"](out))), key

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, N, C] -> three times [B, H, N, D], views
        layers, norm = self.get["qkv"], self.get["norm1"]
        fused = self.fused(x)
        if len(layers) == 1:
            [layer] = layers
            rows = list((fused_linear(x, layer.weight, layer.bias, norm) if fused else layer(norm(x))).chunk(3, -1))
        else:
            pairs = list(zip(layers, qkv_bias(self.block, layers).chunk(3), strict=True))
            if fused:
                rows = [fused_linear(x, layer.weight, bias, norm) for layer, bias in pairs]
            else:
                x = norm(x)
                rows = [layer(x) if layer.bias is not None else layer(x) + bias for layer, bias in pairs]
        query, key, value = (one.unflatten(-1, (self.get["heads"], -1)).transpose(1, 2) for one in rows)
        return query, key, value

    def mlp(self, x: Tensor) -> Tensor:  # [B, N, C]
        get = self.get
        if self.fused(x):
            out = fused_mlp(x, self._mlp, get["norm2"])
        else:
            out = get["fc2"](get["hidden_dropout"](get["activation"](get["fc1"](get["norm2"](x)))))
        return x + get["path2"](get["scale2"](get["dropout2"](out)))

    @torch.no_grad()
    def _try(self) -> None:
        """What the names of the parts do not say (another scale, parallel branches, a grid of tokens) shows in the numbers."""
        weight = self.get["proj"].weight
        x = torch.randn(2, 5, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
        name, modes = type(self.block).__name__, [(module, module.training) for module in self.block.modules()]
        self.block.eval()
        try:
            want = self.block(x)
            got = self.mlp(self.attention(x)[0])
        except TypeError as error:
            raise ValueError(f"{name} must be called with its tokens alone: {error}") from None
        except RuntimeError as error:
            # a bias for one number of tokens, a gated MLP
            raise ValueError(f"{name} must be a block of norm, attention, norm and MLP, for any number of tokens: {error}") from None
        finally:
            for module, training in modes:
                module.training = training
        self.gives_tuple = isinstance(want, tuple)
        want = want[0] if isinstance(want, tuple) else want
        limit = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
        if got.shape != want.shape or not (got - want).norm() <= limit * want.norm():
            raise ValueError(f"{name} must be a block of norm, attention, norm and MLP: with its own weights it computes something else")


class Attachment(Generic[State]):
    """A model some of whose blocks run ``step`` instead of their own forward, until ``detach``. Its modules and their names stay.

    What one block hands to the next beside the tokens lives here for the time of one forward, from the first of these blocks to the last;
    ``last`` is what the latest forward ended with. So one forward runs at a time, and a block is not computed again in its backward pass
    (torch.utils.checkpoint): that is refused.
    """

    last: State | None = None

    def __init__(self, model: nn.Module, first: int = 0) -> None:
        """All blocks from ``first`` on."""
        found = [block for _, _, block in find_blocks(model)]
        if not 0 <= first < len(found):
            raise ValueError(f"layers must be of the model's {len(found)} blocks, counted from 0, got {first}")
        if any("forward" in block.__dict__ for block in found):
            raise ValueError("model must not have anything attached yet: detach it first")
        self.model, self.first = model, first
        self.blocks = [OpenBlock(block) for block in found[first:]]
        self._state: State | None = None
        self._next = 0
        for at, block in enumerate(self.blocks):
            # an attribute of the instance: the class, the names and the state dict stay what they were
            block.block.__dict__["forward"] = partial(self._forward, at)

    def step(self, at: int, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """What the block at ``at`` (counted from ``first``) does. The first one gets no state."""
        raise NotImplementedError

    def finish(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """After the last block: what the model gets, and what ``last`` will be."""
        return x, state

    def _forward(self, at: int, x: Tensor, *masks: Any, **options: Any) -> Any:
        if any(isinstance(given, Tensor) for given in (*masks, *options.values())):
            raise NotImplementedError("a block that merges tokens takes no mask: every token sees every other")
        if at not in (0, self._next):
            raise RuntimeError(f"block {self.first + at} must run after block {self.first + at - 1}, once in a forward")
        x, state = self.step(at, x, self._state if at > 0 else None)
        if at + 1 < len(self.blocks):
            self._state, self._next = state, at + 1
        else:
            self._state, self._next = None, 0
            x, self.last = self.finish(x, state)
        return (x,) if self.blocks[at].gives_tuple else x

    def detach(self) -> None:
        """The model is as it was before."""
        for block in self.blocks:
            block.block.__dict__.pop("forward", None)
        self._state, self._next = None, 0

    def __enter__(self: Attached) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


Attached = TypeVar("Attached", bound=Attachment[Any])


def leading_tokens(model: nn.Module, class_token: bool | None, distill_token: bool | None) -> tuple[bool, bool]:
    """(class token, distillation token): as given, or by the names of the model's parameters.

    Raises:
        ValueError: there are other tokens before the patches, or a distillation token without a class token.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    has_class = "cls_token" in names if class_token is None else class_token
    has_distill = bool(names & {"dist_token", "distillation_token"}) if distill_token is None else distill_token
    if has_distill and not has_class:
        raise ValueError("distill_token must come with class_token, got it alone")
    prefix = getattr(model, "num_prefix_tokens", None)
    if class_token is None and isinstance(prefix, int) and prefix != has_class + has_distill:
        raise ValueError(f"model must have no tokens before its patches but class and distillation tokens, got {prefix}")
    return has_class, has_distill
