"""The calls that every backend is tested with. Builders without a test framework: Triton's interpreter and GPU runs import them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.reference.sparse_attention import example_inputs

Call = dict[str, Any]


class Case(NamedTuple):
    name: str
    inputs: dict[str, Any]  # arguments of example_inputs
    change: Callable[[Call], Call] = lambda call: call  # what else the call has; gets and returns keyword arguments


def build(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Call:
    """Keyword arguments of sparse_attention."""
    call = example_inputs(**case.inputs, dtype=dtype, device=device, seed=seed)
    if call["query"].shape[1] != call["key"].shape[1]:
        call["enable_gqa"] = True
    return case.change(call)


# memory layouts: the same numbers, differently placed


def as_bshd(call: Call) -> Call:
    """Views of [B, N, H, D], as a projection's output is seen."""
    grids = {name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "value")}
    return {**call, **grids}


def as_qkv(call: Call) -> Call:
    """Three slices of one buffer [B, N, 3, H, D]."""
    buffer = torch.stack([call[name].transpose(1, 2) for name in ("query", "key", "value")], dim=2)
    q, k, v = buffer.transpose(1, 3).unbind(2)
    return {**call, "query": q, "key": k, "value": v}


def as_slices(call: Call) -> Call:
    """Every second row, every head but the first, every column but the first eight: gaps in all dimensions, and a storage offset."""

    def spread(x: Tensor) -> Tensor:
        batch, heads, rows, width = x.shape
        buffer = torch.full((batch, heads + 1, 2 * rows, width + 16), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[:, 1:, 1::2, 8 : 8 + width]
        return view.copy_(x)

    return {**call, **{name: spread(call[name]) for name in ("query", "key", "value")}}


def as_expanded(call: Call) -> Call:
    """One sample's keys for the whole batch and one head's queries for all heads, by stride 0."""
    query, key, value = call["query"], call["key"], call["value"]
    return {**call, "query": query[:, :1].expand_as(query), "key": key[:1].expand_as(key), "value": value[:1].expand_as(value)}


def as_columns(call: Call) -> Call:
    """A last dimension that is not dense."""
    return {**call, **{name: call[name].mT.contiguous().mT for name in ("query", "key", "value")}}


# arguments beyond what example_inputs makes


def with_(**arguments: Any) -> Callable[[Call], Call]:
    return lambda call: {**call, **arguments}


def with_mask(kind: str, shape: str = "BHNM", **more: Any) -> Callable[[Call], Call]:
    """A mask over the full grids; a letter in lower case is a size of 1 (shared), a missing letter a missing dimension."""

    def change(call: Call) -> Call:
        query, key = call["query"], call["key"]
        sizes = dict(zip("BHNM", (*query.shape[:3], key.shape[2]), strict=True))
        generator = torch.Generator().manual_seed(7)
        mask = torch.randn([sizes[letter] if letter.isupper() else 1 for letter in shape], generator=generator)
        # the largest mask dtype that the call may have
        mask = mask.double() if query.dtype == torch.float64 else mask
        if kind == "bool":
            mask = mask > -0.5
        elif kind == "minimum":
            # what people write for -inf: a row with nothing else is uniform, as in torch
            lowest = torch.finfo(query.dtype if query.dtype.itemsize < 8 else torch.float32).min
            mask = torch.where(mask > 0.0, 0.0, lowest).to(query.dtype)
        elif kind == "same":
            mask = mask.to(query.dtype)
        elif kind == "infinite":
            mask = mask.masked_fill(mask < -0.5, -torch.inf)
        return {**call, "attn_mask": mask.to(query.device), **more}

    return change


def with_bias(form: str) -> Callable[[Call], Call]:
    """A kv_bias [M], [B, M] or [B, Hkv, M], some keys hidden by it."""

    def change(call: Call) -> Call:
        batch, heads, rows, _ = call["key"].shape
        shape = {"M": (rows,), "BM": (batch, rows), "BHM": (batch, heads, rows), "bM": (1, rows), "BhM": (batch, 1, rows)}[form]
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        bias = bias.masked_fill(bias < -1.0, -torch.inf)
        return {**call, "kv_bias": bias.to(call["query"].device, torch.float64 if call["query"].dtype == torch.float64 else torch.float32)}

    return change


def with_rel_pos(height: int, width: int, form: str = "BHN", rel_dtype: torch.dtype | None = None) -> Callable[[Call], Call]:
    """A rel_pos for keys on such a grid; a letter in lower case is a size of 1 (shared), a missing letter a missing dimension."""

    def change(call: Call) -> Call:
        query = call["query"]
        sizes = dict(zip("BHN", query.shape[:3], strict=True))
        generator = torch.Generator().manual_seed(10)
        leading = [sizes[letter] if letter.isupper() else 1 for letter in form]
        rel = (torch.randn(*leading, cells, generator=generator, dtype=torch.float64) for cells in (height, width))
        dtype = query.dtype if rel_dtype is None or query.dtype == torch.float64 else rel_dtype
        return {**call, "rel_pos": tuple(part.to(query.device, dtype) for part in rel)}

    return change


def with_hidden_cells(call: Call) -> Call:
    """-inf in rel_pos hides a row or a column of keys; one query sees none at all."""
    rel_h, rel_w = (part.masked_fill(part < -1.0, -torch.inf) for part in call["rel_pos"])
    rel_h[:, :, 2] = -torch.inf
    return {**call, "rel_pos": (rel_h, rel_w)}


def with_strided_rel_pos(call: Call) -> Call:
    """Rows with gaps, as slices of one wider result; and a last dimension that is not dense."""
    rel_h, rel_w = call["rel_pos"]
    wide = torch.nn.functional.pad(rel_h.transpose(1, 2), (3, 2), value=torch.nan).transpose(1, 2)
    return {**call, "rel_pos": (wide[..., 3 : 3 + rel_h.shape[-1]], rel_w.mT.contiguous().mT)}


def with_empty_rows(call: Call) -> Call:
    """One sample sees no key, one query row of the other is masked out altogether, and one list is empty."""
    rows, keys = call["query"].shape[2], call["key"].shape[2]
    mask = torch.ones(2, 1, rows, keys, dtype=torch.bool, device=call["query"].device)
    mask[0] = False
    mask[1, :, rows // 2] = False
    q_index = torch.arange(rows, dtype=torch.int32, device=mask.device).repeat(2, call["query"].shape[1], 1)
    q_index[1, -1] = -1
    return {**call, "attn_mask": mask, "q_index": q_index}


def with_scattered_lists(call: Call) -> Call:
    """Lists in any order, as a score would sort them."""

    def shuffle(index: Tensor) -> Tensor:
        order = torch.rand(index.shape, generator=torch.Generator().manual_seed(9)).argsort(-1)
        return index.gather(-1, order.to(index.device))

    return {**call, **{name: shuffle(call[name]) for name in ("q_index", "kv_index")}}


def times(factor: float) -> Callable[[Call], Call]:
    """Logits so large that a careless exponential overflows."""
    return lambda call: {**call, "query": call["query"] * factor}


def both(*changes: Callable[[Call], Call]) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        for one in changes:
            call = one(call)
        return call

    return change


def _sizes(batch: int, heads: int, query_rows: int, key_rows: int, width: int, **more: Any) -> dict[str, Any]:
    return {"batch": batch, "heads": heads, "query_rows": query_rows, "key_rows": key_rows, "width": width, **more}


_SMALL = _sizes(2, 3, 19, 23, 16)
_KEPT = {**_SMALL, "kept": 11, "kv_kept": 13}
_LONG_LISTS = {**_sizes(2, 2, 260, 240, 32), "kept": 180, "kv_kept": 200, "lists": "head"}

# a small call with a list for every head, for tests that need one call and not a sweep
LISTED: dict[str, Any] = {
    "batch": 2,
    "heads": 4,
    "query_rows": 19,
    "key_rows": 23,
    "width": 16,
    "value_width": 24,
    "kept": 11,
    "kv_kept": 13,
    "lists": "head",
}

CASES = (
    # shapes
    Case("one row", _sizes(1, 1, 1, 1, 8)),
    Case("square", _sizes(2, 3, 17, 17, 16)),
    Case("few queries", _sizes(2, 2, 3, 130, 16)),
    Case("few keys", _sizes(2, 2, 130, 3, 16)),
    Case("several blocks", _sizes(1, 2, 200, 300, 32)),
    Case("one head, many rows", _sizes(1, 1, 390, 150, 8)),
    Case("many heads", _sizes(1, 37, 9, 9, 8)),
    *(Case(f"sequence of {rows}", _sizes(5, 3, rows, rows, 16)) for rows in (2, 7, 8, 15, 16, 31, 32, 33)),
    # head widths
    *(
        Case(f"widths {d} and {dv}", _sizes(1, 2, 21, 37, d, value_width=dv))
        for d, dv in (
            (8, 8),
            (8, 16),
            (24, 40),
            (32, 8),
            (40, 24),
            (64, 64),
            (72, 104),
            (96, 128),
            (128, 128),
            (160, 256),
            (248, 8),
            (256, 256),
        )
    ),
    # lists
    Case("query list", {**_SMALL, "kept": 11}),
    Case("key list", {**_SMALL, "kv_kept": 13}),
    *(Case(f"lists per {lists}", {**_KEPT, "lists": lists}) for lists in ("shared", "sample", "head")),
    *(Case(f"empty slots in lists per {lists}", {**_KEPT, "lists": lists, "empty": 0.4}) for lists in ("shared", "sample", "head")),
    Case("long ragged lists", {**_LONG_LISTS, "empty": 0.3}),
    Case("lists out of order", {**_KEPT, "lists": "head", "empty": 0.2}, with_scattered_lists),
    Case("64-bit lists", _KEPT, lambda call: {**call, "q_index": call["q_index"].long(), "kv_index": call["kv_index"].long()}),
    Case(
        "more slots than rows",
        {**_SMALL},
        lambda call: {**call, "kv_index": torch.nn.functional.pad(torch.arange(23), (4, 40), value=-1).to(call["key"].device)},
    ),
    Case("one slot", {**_SMALL, "kept": 1, "kv_kept": 1, "lists": "head"}),
    Case("empty rows", {**_SMALL}, with_empty_rows),
    # heads
    Case("grouped heads", {**_KEPT, "heads": 6, "kv_heads": 2, "lists": "head", "empty": 0.2, "bias": True}),
    Case("one key head", {**_KEPT, "heads": 4, "kv_heads": 1, "lists": "sample"}),
    Case("grouped short sequences", _sizes(3, 4, 8, 8, 16, kv_heads=2)),
    # bias
    *(Case(f"bias {form}", {**_SMALL, "heads": 4, "kv_heads": 2}, with_bias(form)) for form in ("M", "BM", "BHM", "bM", "BhM")),
    Case("bias and lists", {**_KEPT, "lists": "head", "empty": 0.3}, with_bias("BHM")),
    Case("bias over several blocks", _sizes(1, 2, 70, 300, 16), with_bias("BM")),
    # masks and causality
    *(
        Case(f"{kind} mask {shape}", _SMALL, with_mask(kind, shape))
        for kind, shape in (
            ("bool", "BHNM"),
            ("bool", "NM"),
            ("bool", "BhnM"),
            ("float", "bHNM"),
            ("same", "BhNm"),
            ("infinite", "BHNM"),
            ("infinite", "M"),
        )
    ),
    Case("mask and lists", {**_KEPT, "lists": "head", "empty": 0.3}, with_mask("bool")),
    Case("float mask and lists", {**_KEPT, "lists": "sample", "empty": 0.3}, with_mask("infinite", "BhNM")),
    Case("mask of the type's minimum", _SMALL, with_mask("minimum", "bhNM")),
    Case("causal", _SMALL, with_(is_causal=True)),
    Case("causal, more queries", _sizes(2, 2, 90, 40, 16), with_(is_causal=True)),
    Case("causal, several blocks", _sizes(1, 2, 150, 150, 32), with_(is_causal=True)),
    Case("causal short sequence", _sizes(3, 2, 16, 16, 16), with_(is_causal=True)),
    Case("causal with lists", {**_KEPT, "lists": "head", "empty": 0.3}, with_(is_causal=True)),
    Case("causal with lists out of order", {**_KEPT, "lists": "head", "empty": 0.2}, both(with_scattered_lists, with_(is_causal=True))),
    Case("causal, mask, lists, bias", {**_KEPT, "lists": "head", "empty": 0.2, "bias": True}, with_mask("bool", "BhNM", is_causal=True)),
    # positions on a grid of keys
    Case("positions", {**_SMALL, "key_rows": 24}, with_rel_pos(4, 6)),
    # no grids of one row: a term that all logits of a query share has no gradient, only its rounding
    Case("positions in two rows", {**_SMALL, "key_rows": 24}, with_rel_pos(2, 12)),
    Case("positions in two columns", {**_SMALL, "key_rows": 24}, with_rel_pos(12, 2)),
    Case("positions of float32", {**_SMALL, "key_rows": 24}, with_rel_pos(4, 6, "BHN", torch.float32)),
    *(Case(f"positions {form}", {**_SMALL, "key_rows": 24}, with_rel_pos(6, 4, form)) for form in ("bHN", "BhN", "HN", "N")),
    Case("positions in a window", _sizes(2, 2, 196, 196, 32), with_rel_pos(14, 14)),
    Case("positions over several blocks", _sizes(1, 2, 150, 300, 16), with_rel_pos(12, 25)),
    Case("positions of a short sequence", _sizes(5, 3, 16, 16, 16), with_rel_pos(4, 4)),
    Case("positions of few keys", _sizes(2, 2, 130, 4, 16), with_rel_pos(2, 2)),
    Case("positions and lists", {**_KEPT, "key_rows": 24, "lists": "head", "empty": 0.3}, with_rel_pos(4, 6)),
    Case(
        "positions and lists out of order",
        {**_KEPT, "key_rows": 24, "lists": "head", "empty": 0.2},
        both(with_scattered_lists, with_rel_pos(6, 4)),
    ),
    Case("positions and long ragged lists", {**_LONG_LISTS, "empty": 0.3}, with_rel_pos(15, 16)),
    Case("positions, grouped heads, bias", {**_KEPT, "key_rows": 24, "heads": 6, "kv_heads": 2, "bias": True}, with_rel_pos(4, 6)),
    Case("positions, mask, causal, lists", {**_KEPT, "key_rows": 24}, both(with_rel_pos(4, 6), with_mask("bool", "BhNM", is_causal=True))),
    Case("positions and float mask", {**_SMALL, "key_rows": 24}, both(with_rel_pos(4, 6), with_mask("infinite", "BHNM"))),
    Case("hidden positions", {**_SMALL, "key_rows": 24}, both(with_rel_pos(4, 6), with_hidden_cells)),
    Case("strided positions", {**_SMALL, "key_rows": 24}, both(with_rel_pos(4, 6), with_strided_rel_pos)),
    Case("positions, zero scale", {**_SMALL, "key_rows": 24}, both(with_rel_pos(4, 6), with_(scale=0.0))),
    # scale and magnitude
    Case("scale", _SMALL, with_(scale=0.7)),
    Case("negative scale", {**_SMALL, "bias": True}, with_(scale=-0.3)),
    Case("zero scale", _SMALL, with_(scale=0.0)),
    Case("large logits", _sizes(2, 2, 40, 90, 16), times(60.0)),
    # memory
    *(
        Case(f"{name} layout", {**_sizes(2, 3, 19, 19, 16), **more}, change)
        for name, change in (
            ("BSHD", as_bshd),
            ("one buffer", as_qkv),
            ("sliced", as_slices),
            ("expanded", as_expanded),
            ("column", as_columns),
        )
        for more in ({}, {"kept": 11, "kv_kept": 13, "lists": "head", "empty": 0.2})
    ),
)
