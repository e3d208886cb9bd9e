"""Choosing a backend, and what this machine has."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import REFUSALS, ROOMS
from oracle import problem_of

import tokenops
from tokenops import native
from tokenops.dispatch import Backend, choose, ranked
from tokenops.ops import preference

FIRST = Backend("first", "run first", lambda problem, needs=(): [f"does not like {problem}"] if problem == "b" or needs else [])
SECOND = Backend("second", "run second", lambda problem, needs=(): [])
THIRD = Backend("third", "run third", lambda problem, needs=(): ["is tired", "is old"])


def test_the_first_without_objections_serves() -> None:
    assert choose("op", (FIRST, SECOND, THIRD), None, "a") is FIRST
    assert choose("op", (FIRST, SECOND, THIRD), None, "b") is SECOND
    assert choose("op", (FIRST, SECOND, THIRD), None, "a", needs=("query",)) is SECOND
    assert choose("op", (THIRD, SECOND), "second", "a") is SECOND


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r"op: no backend can serve this call\n  first: does not like b$"):
        choose("op", (FIRST, SECOND), "first", "b")


def test_if_all_object_every_reason_is_listed() -> None:
    with pytest.raises(NotImplementedError, match=r"  first: does not like b\n  third: is tired; is old$"):
        choose("op", (FIRST, THIRD), None, "b")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="op: backend must be one of 'first', 'second', got 'fast'"):
        choose("op", (FIRST, SECOND), "fast", "a")


@pytest.mark.parametrize(("room", "name"), [(room, name) for room in ROOMS for name in REFUSALS[room]])
def test_is_on_here(room: str, name: str) -> None:
    """Not a test of the code but a record: a backend that tests leave out stands here with its reasons."""
    if REFUSALS[room][name]:
        pytest.skip(f"{name}: {'; '.join(REFUSALS[room][name])}")


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_is_always_last_and_never_objects(room: str) -> None:
    backends, _ = ROOMS[room]
    assert backends[-1].name == "reference"
    assert REFUSALS[room]["reference"] == []


needs_library = pytest.mark.skipif(native.CPU_ABSENT is not None, reason=str(native.CPU_ABSENT))


@needs_library
def test_instruction_sets_go_from_worst_to_best() -> None:
    isas = native.cpu_isas()
    order = ["generic", "avx2", "avx512", "avx512_bf16"]
    assert isas[0] == "generic"
    assert list(isas) == [isa for isa in order if isa in isas]


@needs_library
@pytest.mark.parametrize(
    ("level", "wish", "want"),
    [
        ("AVX512", None, "avx512_bf16"),
        ("AVX512", "avx512", "avx512"),
        ("AVX512", "generic", "generic"),
        ("AVX2", None, "avx2"),
        ("AVX2", "avx512", "avx2"),
        ("AVX2", "generic", "generic"),
        ("DEFAULT", None, "generic"),
        ("NO AVX", None, "generic"),
    ],
)
def test_the_instruction_set_is_capped(level: str, wish: str | None, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if want not in native.cpu_isas() or (wish or want) not in native.cpu_isas():
        pytest.skip(f"this processor has {native.cpu_isas()} only")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    if wish is None:
        monkeypatch.delenv("TOKENOPS_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("TOKENOPS_CPU_ISA", wish)
    native.default_cpu_isa.cache_clear()
    try:
        assert native.default_cpu_isa() == want
    finally:
        native.default_cpu_isa.cache_clear()


@needs_library
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CPU_ISA", "sse9")
    native.default_cpu_isa.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"TOKENOPS_CPU_ISA must be one of generic, .*got 'sse9'"):
            native.default_cpu_isa()
    finally:
        native.default_cpu_isa.cache_clear()


def test_without_the_library_everything_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CPU_ABSENT", "C++ library not built")
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    tokenops.sparse_attention(x, x, x).sum().backward()
    with pytest.raises(NotImplementedError, match="cpu: C\\+\\+ library not built"):
        tokenops.sparse_attention(x, x, x, backend="cpu")


def test_a_backend_may_lead() -> None:
    """For some problems a later backend goes before the others, and gives way if it objects."""
    leader = FIRST._replace(name="leader", run="run leader", leads=lambda problem: problem in ("b", "c"))
    assert choose("op", (SECOND, leader), None, "a") is SECOND
    assert choose("op", (SECOND, leader), None, "c") is leader
    assert choose("op", (SECOND, leader), None, "b") is SECOND
    assert choose("op", (SECOND, leader), "second", "c") is SECOND
    assert [backend.name for backend in ranked((SECOND, THIRD, leader), "c")] == ["leader", "second", "third"]


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "first"),
    [
        ((64, 12, 16, 64), torch.float32, (8, 0), "cuda"),
        ((64, 12, 16, 64), torch.bfloat16, (10, 0), "cuda"),
        ((8, 12, 196, 64), torch.bfloat16, (9, 0), "cuda"),
        ((8, 12, 196, 64), torch.float32, (9, 0), "triton"),
        ((8, 12, 196, 64), torch.bfloat16, (10, 0), "triton"),
        ((8, 12, 196, 128), torch.float16, (9, 0), "triton"),
    ],
)
def test_preference_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, capability: tuple[int, int], first: str) -> None:
    problem = problem_of(dict.fromkeys(("query", "key", "value"), torch.empty(shape, dtype=dtype, device="meta")))
    assert preference.rule_for("sparse_attention", capability, (problem,)).backend == first


def test_every_room_has_a_rule_for_all_others() -> None:
    assert preference.RULES.keys() == ROOMS.keys()
    for rules in preference.RULES.values():
        assert rules[-1].holds((8, 0), (None,))
        assert {rule.backend for rule in rules} <= {"cuda", "triton"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda() -> None:
    """In a process of its own: in this one the CUDA kernels are emulated."""
    code = "from tokenops import native; print(native.CUDA_ABSENT, native.CUDA_DEVICE, sep='; ')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "this torch is built without CUDA; cuda\n"
