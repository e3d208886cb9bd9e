"""The values that operators take and return. Plain NamedTuples: state is an argument and a result, never hidden."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class TokenIndex(NamedTuple):
    """Which tokens of a grid take part. Accepted wherever an index tensor is."""

    # both names also are methods of tuple, which nobody needs here
    index: Tensor  # type: ignore[assignment]  # [K] | [B, K] | [B, H, K] int32 row ids, -1 = empty slot
    count: Tensor  # type: ignore[assignment]  # [] | [B] | [B, H] int32, how many slots of each list are filled


class Aux(NamedTuple):
    """What attention can report beside its output (``return_aux``). Not differentiable."""

    lse: Tensor | None  # [B, Hq, K] float32, natural log of the softmax denominator; -inf where no key is visible
    row_sq: Tensor | None  # [B, Hq, K] float32, sum over keys of the squared attention probability


class MergePlan(NamedTuple):
    """Where every token goes when tokens are merged. Made by ``match_tokens`` and its like; one plan serves any number of tensors."""

    slot: Tensor  # [1|B, N] int32, output row of each token, -1 = dropped
    count: Tensor  # type: ignore[assignment]  # [1|B] int32, output rows that have members; the rows after them are empty
    n_out: int  # rows of the output
    order: Tensor  # [1|B, N] int32, token ids by output row; in each row the destination first, then the others ascending; -1 at the end
    offsets: Tensor  # [1|B, n_out + 1] int32, row s owns order[offsets[s] : offsets[s + 1]]


class HaltState(NamedTuple):
    """What adaptive computation time carries from layer to layer. N stands for the rows of a packed call too."""

    cum: Tensor  # [B, N] float32, accumulated halting score
    remain: Tensor  # [B, N] float32, weight that is left for the last layer
    active: Tensor  # [B, N] bool, takes part in the next layer
    rho: Tensor  # [B, N] float32, layers taken part in plus the remainder: the ponder cost
    counter: Tensor  # [B, N] float32, layers used
    out: Tensor  # [B, N, C] float32, or [B, C] where only the class token's output is wanted


class PackedTokens(NamedTuple):
    """Rows of several samples, one sample after the other, as varlen attention takes them."""

    tokens: Tensor  # [T, ...], zero behind the last sample
    cu_seqlens: Tensor  # [B + 1] int32, sample b owns rows cu_seqlens[b] : cu_seqlens[b + 1]


class DeltaGate(NamedTuple):
    """Which tokens of a frame changed enough to be sent on, and what they are now."""

    # as in TokenIndex
    index: Tensor  # type: ignore[assignment]  # [B, K] int32 ids of the chosen tokens, -1 = empty slot
    count: Tensor  # type: ignore[assignment]  # [B] int32, how many slots of each list are filled
    values: Tensor  # [B, K, C] the chosen tokens, 0 in empty slots
    delta: Tensor  # [B, K, C] their change since they were last sent, 0 in empty slots
    reference: Tensor  # [B, N, C] every token as it was last sent: what the next frame is compared with
    total: Tensor  # [B, N, C] the residual sum x + skip; x itself where there is no skip


class DeltaState(NamedTuple):
    """What ``delta_attention`` carries from frame to frame. None = not in that mode.

    M key cells: the N tokens, or fewer where keys are pooled. float32 stands for float64 with float64 tokens. Weights are
    2 ** (logit / ln 2 - maximum).
    """

    output: Tensor  # [B, H, N, Dv] float32; exact: sum over keys of weight times value; paper: the result
    value: Tensor  # [B, H, M, Dv] of the last frame
    key: Tensor | None  # exact: [B, H, M, D] of the last frame
    maximum: Tensor | None  # exact: [B, H, N] float32, at most 8 below the largest logit / ln 2 of the row
    total: Tensor | None  # exact: [B, H, N] float32, sum over keys of the weights
    peak: Tensor | None  # exact: [B, H, N] float32, the largest total since the row was last computed afresh, at today's maximum
    turn: Tensor | None  # exact: [] int32, which slice of rows is computed afresh next
    probability: Tensor | None  # paper: [B, H, M, N], row j is column j of the attention matrix as of when cell j was last listed


class WindowState(NamedTuple):
    """What ``delta_window_attention`` carries from frame to frame."""

    output: Tensor  # [B, H, N, Dv] the last result


class AttentionProblem(NamedTuple):
    """One attention call after the door has checked and normalised it: what every backend receives.

    Packed (varlen) calls arrive with B = 1, the packed rows as the grid, and ``cu_seqlens_*``: sequence s then owns the slots
    ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]`` of the query list (of ``q_index`` if given, else of the grid's rows), and the like for keys.
    """

    query: Tensor  # [B, Hq, N, D], last dimension dense, any other strides (0 included)
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, Dv]
    q_index: Tensor | None  # [1|B, 1|Hq, K] int32, rows of the query grid, -1 = empty slot
    kv_index: Tensor | None  # [1|B, 1|Hkv, L] int32, rows of the key grid, -1 = empty slot
    kv_bias: Tensor | None  # [1|B, 1|Hkv, M] float32 (float64 with float64 inputs)
    attn_mask: Tensor | None  # [1|B, 1|Hq, 1|N, 1|M] bool (True = visible) or floating (added to the logits)
    rel_h: Tensor | None  # [B, Hq, N, gh], both or neither: added to the logits of keys in row r // gw of the key grid
    rel_w: Tensor | None  # [B, Hq, N, gw] in column r % gw. r = m, gh gw = M; in a packed call r is the rank in the sequence's list
    is_causal: bool  # m <= n in grid rows; in a packed call by rank within the sequence's list
    scale: float
    dropout_p: float
    dropout_seed: Tensor | None  # [] int64, CPU; given if and only if dropout_p > 0
    cu_seqlens_q: Tensor | None  # [S + 1] int32, both or neither
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None  # upper bounds, hints for a launch grid
    max_seqlen_k: int | None


class AttentionGradients(NamedTuple):
    """Where a backward pass puts its results; None where no gradient is wanted. Uninitialised: every element must be written."""

    query: Tensor | None  # [B, Hq, N, D] in query's dtype, zero in rows that were not computed
    key: Tensor | None  # [B, Hkv, M, D]
    value: Tensor | None  # [B, Hkv, M, Dv]
    kv_bias: Tensor | None  # [B, Hkv, M] in kv_bias's dtype; the door sums it down to kv_bias's own shape
    attn_mask: Tensor | None  # attn_mask's own (broadcastable) shape
    rel_h: Tensor | None  # [B, Hq, N, gh] in rel_h's dtype, zero in rows that were not computed
    rel_w: Tensor | None  # [B, Hq, N, gw]


class Window(NamedTuple):
    """Which candidates a token may match, by place: bounds on (candidate's place - token's place), both ends included."""

    t_low: int
    t_high: int
    reach_y: int  # |difference| at most
    reach_x: int


class PairProblem(NamedTuple):
    """For each row of ``a`` the most similar row of ``b``. Scores are similarity * b_scale; a_scale multiplies the winner's."""

    a: Tensor  # [B, Na, C], last dimension dense, any other strides (0 included)
    b: Tensor  # [B, Nb, C]
    a_mask: Tensor | None  # [1|B, Na] bool, True = takes part
    b_mask: Tensor | None  # [1|B, Nb] bool
    a_scale: Tensor | None  # [1|B, Na] float32
    b_scale: Tensor | None  # [1|B, Nb] float32
    a_place: Tensor | None  # [1|B, Na, 3] int32, (t, y, x); given if and only if window is
    b_place: Tensor | None  # [1|B, Nb, 3] int32
    window: Window | None
    normalize: bool


class MatchProblem(NamedTuple):
    """One call of ``match_tokens`` after the door has turned its scheme into roles. Every backend fills a MergePlan."""

    metric: Tensor  # [B, N, C], last dimension dense
    role: Tensor | None  # [1|B, N] int8, see Role; None: even positions are sources, odd ones destinations, but for the protected
    class_token: bool  # token 0 stays; read only where role is None
    distill_token: bool  # token 1 stays; read only where role is None
    place: Tensor | None  # [1|B, N, 3] int32, (t, y, x); given if and only if window is
    window: Window | None
    source_scale: Tensor | None  # [1|B, N] float32, multiplies a source's best score: which sources go first
    destination_scale: Tensor | None  # [1|B, N] float32, multiplies a candidate's similarity: which destination wins
    r: int | None  # at most so many sources merge, the best first; None: all that have a candidate
    threshold: float | None  # only sources whose score is greater merge
    normalize: bool


class SoftMergeProblem(NamedTuple):
    """One call of ``soft_merge`` after the door has checked and normalised it."""

    x: Tensor  # [B, N, C], last dimension dense, any other strides (0 included)
    metric: Tensor  # [B, N, F]
    meta: Tensor  # [B, M, F]
    temperature: float | Tensor  # or a 0-d tensor on the device of x, which a GPU backend reads there
    mass: Tensor | None  # [1|B, N] float32
    normalize: bool


class SoftMergeGradients(NamedTuple):
    """Where the backward pass of ``soft_merge`` puts its results; None where no gradient is wanted. Every element must be written."""

    x: Tensor | None  # [B, N, C] in x's dtype
    metric: Tensor | None  # [B, N, F]
    meta: Tensor | None  # [B, M, F]
    temperature: Tensor | None  # [B] float32, each sample's part
    mass: Tensor | None  # [B, N] float32; the door sums it down to mass's own shape


class Role(IntEnum):
    """What a token may do in a match. Bits: 1 = may leave, 2 = may receive."""

    STAY = 0
    SOURCE = 1
    DESTINATION = 2
    BOTH = 3  # chains; it may choose itself and stay, unless a window forbids
    DROPPED = 4


class HaltProblem(NamedTuple):
    """One halting step after the door has checked it. A packed call has B = 1, its rows as N, and ``cu_seqlens``."""

    x: Tensor  # [B, N, C], last dimension dense, any other strides
    state: HaltState | None  # before the step; vectors [B, N] of any strides, out [B, N, C] (or [S, C]) of dense rows. None = the first
    cu_seqlens: Tensor | None  # [S + 1] int32, sample s owns rows cu_seqlens[s] : cu_seqlens[s + 1]; without it every sample is a row of B
    scale: float
    center: float
    limit: float  # 1 - eps, to be compared as float32 (float64 with float64 x)
    last: bool
    class_only: bool  # out is [S, C]: the output of each sample's first row


class HaltBackwardProblem(NamedTuple):
    """The backward pass of a halting step. A gradient that is None is zero."""

    x: Tensor  # [B, N, C], last dimension dense, any other strides
    grad_cum: Tensor | None  # [B, N]
    grad_remain: Tensor | None  # [B, N]
    grad_rho: Tensor | None  # [B, N]
    grad_out: Tensor | None  # [B, N, C] or [S, C], last dimension dense
    remain: Tensor | None  # [B, N] before the step; None = the first: 1
    active: Tensor | None  # [B, N] before the step; None = the first: all
    cum: Tensor  # [B, N] after the step
    cu_seqlens: Tensor | None
    scale: float
    center: float
    limit: float
    last: bool
    class_only: bool


class LinearProblem(NamedTuple):
    """One call of ``gathered_linear`` (or, with a second weight, of ``gathered_mlp``) after the door has checked it."""

    x: Tensor  # [B, N, C], last dimension dense, any other strides (0 included)
    index: Tensor  # type: ignore[assignment]  # [1|B, K] int32, rows of x, -1 = empty slot
    weight: Tensor  # [O, C]
    bias: Tensor | None  # [O]
    norm_weight: Tensor | None  # [C], both or neither: the rows are layer-normalised first
    norm_bias: Tensor | None  # [C]
    norm_eps: float
    activation: str  # "none", "gelu", "gelu_tanh", "relu" or "silu"
    weight_2: Tensor | None  # [P, O], the second layer
    bias_2: Tensor | None  # [P]


class LinearGradients(NamedTuple):
    """Where the backward pass puts its results; None where no gradient is wanted. Every element must be written."""

    x: Tensor | None  # [B, N, C] in x's dtype, zero in rows that were not listed
    weight: Tensor | None  # each of these in its argument's own shape and dtype
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight_2: Tensor | None
    bias_2: Tensor | None


class GateProblem(NamedTuple):
    """One call of ``delta_gate`` after the door has checked it. How many tokens it may choose is the length of the result's lists."""

    x: Tensor  # [B, N, C], last dimension dense, any other strides (0 included)
    skip: Tensor | None  # [B, N, C], added to x first
    reference: Tensor | None  # [B, N, C]; None = the first frame: every token is chosen
    norm_weight: Tensor | None  # [C], both or neither: the sum is layer-normalised
    norm_bias: Tensor | None  # [C]
    norm_eps: float
    index: Tensor | None  # type: ignore[assignment]  # [1|B, K] int32, tokens to choose whatever their change; -1 = empty slot
    threshold: float | None  # only tokens whose change is greater
    order: float  # of the norm
    whole: bool  # the new reference is the whole frame, not only what was chosen


class GateBackwardProblem(NamedTuple):
    """The backward pass of a gate. A gradient that is None is zero."""

    x: Tensor  # [B, N, C], or the residual sum where there was one
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float
    index: Tensor  # type: ignore[assignment]  # [B, K] what was chosen
    whole: bool
    first: bool  # there was no reference
    grad_values: Tensor | None  # [B, K, C]
    grad_delta: Tensor | None  # [B, K, C]
    grad_reference: Tensor | None  # [B, N, C]
    grad_total: Tensor | None  # [B, N, C]


class GateGradients(NamedTuple):
    """Where the backward pass of a gate puts its results; None where no gradient is wanted."""

    x: Tensor | None  # [B, N, C]; the same for x and skip
    reference: Tensor | None  # [B, N, C]
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None  # [C]


class DeltaAttentionProblem(NamedTuple):
    """One call of ``delta_attention`` after the door has checked it, pooled its keys and values, and found the cells that changed."""

    query: Tensor  # [B, H, N, D], last dimension dense, any other strides (0 included)
    key: Tensor  # [B, H, M, D]
    value: Tensor  # [B, H, M, Dv]
    rows: Tensor | None  # [1|B, K] int32, tokens changed since the state, -1 = empty slot; None: all
    cells: Tensor | None  # [1|B, J] int32, keys changed since the state; given if and only if rows is, and the same where nothing is pooled
    rel_h: Tensor | None  # [B, H, N, gh], both or neither: added to the logits of row m // gw of the grid of cells
    rel_w: Tensor | None  # [B, H, N, gw], of column m % gw
    scale: float
    guard: float  # these are for mode "exact"
    refresh: int  # each row has its turn at least every so many frames; 0: never
    crossover: float
