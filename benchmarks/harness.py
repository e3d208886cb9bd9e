"""One harness for every room: check each contender's result, then time all of them in turn, and only then speak of ratios.

A room supplies data and nothing else: ``CASES``, and ``prepare(case, request) -> Trial`` with inputs bound into contenders, the expected
result and the cost. The contenders of a case run in the same process on the same inputs, one call each per round, so that drift of the
machine falls on all of them alike. A contender whose result is wrong has no time and no ratio.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenops.dispatch import Backend

from .allocator import added_memory, page_faults, touch_pool
from .video import VideoTokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# the project's one rule: ||a - b|| <= tolerance (||b|| + 0.01 sqrt(numel)), b the float64 reference on the same rounded inputs
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3}

WARM_UP = 3  # calls; page faults and lazy initialisation last about that long
FEWEST_ROUNDS = 7
MOST_ROUNDS = 2000
UNSTEADY = 10  # percent of spread, of any contender: goes on for up to EXTENSION times the budget
EXTENSION = 2
SLOW = 4  # a contender this many times slower than the fastest takes part in correspondingly fewer rounds

Results = tuple[Tensor, ...]


class Case(Protocol):
    """What the harness and the CLI need to know of a room's case. Rooms use NamedTuples with more fields."""

    @property
    def name(self) -> str: ...  # shape and kind, in the letters of the docs: "B8-N1569-K392"
    @property
    def dtype(self) -> str: ...  # a key of DTYPES
    @property
    def direction(self) -> str: ...  # "fwd" | "fwd+bwd"
    @property
    def quick(self) -> bool: ...  # belongs to the quick preset


def case_id(case: Case) -> str:
    return f"{case.name}-{case.dtype}-{case.direction}"


class Request(NamedTuple):
    """What the user asked for, beyond the case."""

    device: str = "cpu"
    backends: tuple[str, ...] = ()  # empty: what the package itself chooses
    video: Callable[[int], VideoTokens] | None = None  # called with the number of clips
    slow_peers: bool = False  # also those that need tens of seconds to get ready
    film: Callable[[], Tensor] | None = None  # frames of the video, [F, SIDE, SIDE, 3] uint8

    def clips(self, count: int) -> VideoTokens:
        if self.video is None:
            raise ValueError("this case needs a video, got none")
        return self.video(count)

    def frames(self) -> Tensor:
        if self.film is None:
            raise ValueError("this case needs a video, got none")
        return self.film()


class Cost(NamedTuple):
    """What the case needs at least, whoever computes it."""

    flops: int
    bytes: int


class Dense(NamedTuple):
    """Peers that save no operations, and how many they take: what a saving of ours is a saving of."""

    peers: tuple[str, ...]
    flops: int


class Contender(NamedTuple):
    name: str
    run: Callable[[], Results]  # the timed call
    objections: Sequence[str] = ()  # why it cannot take part; empty means it can
    ours: bool = False
    canonical: Callable[[Results], Results] = lambda results: results  # to the layout of Trial.expected; not timed
    threads: int | None = None  # instead of the run's own number
    note: str = ""  # what a reader must know to judge the time


class Trial(NamedTuple):
    """A case made ready to run."""

    contenders: Sequence[Contender]
    expected: Callable[[], Results]  # the float64 reference
    names: Sequence[str]  # of the results: "out", "grad query", ...
    cost: Cost
    backends: Mapping[str, Sequence[str]]  # of the package, in order of preference: name -> objections to this case
    remark: str | Callable[[], str] = ""  # what the input is like, where that decides the result; called after the timing
    memory: bool = False  # report the memory of a call too
    dense: Dense | None = None  # report how much of the operations saved the clock shows


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        quartiles = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64))
        return cls(*quartiles.tolist())

    @property
    def percent(self) -> float:
        """Half the interquartile range, in percent of the median."""
        return 50 * (self.high - self.low) / self.median


class Outcome(NamedTuple):
    """What became of one contender in one case."""

    name: str
    ours: bool
    status: str  # "ok" | "wrong" | "failed" | "not run"
    reasons: Sequence[str]  # why not "ok"
    note: str
    error: float | None = None  # worst error of all results, as a fraction of what the tolerance allows
    seconds: Spread | None = None
    rounds: int = 0
    memory: int | None = None  # bytes, see the clock's ``memory``
    faster_than: dict[str, Spread] | None = None  # ours only: peer -> (ratio of medians, quartiles of the ratios round by round)


class Measurement(NamedTuple):
    outcomes: list[Outcome]
    page_faults: int | None  # per timed call, all contenders together


class CpuClock:
    """Wall-clock time and resident memory."""

    conditions = "wall clock, caches as the previous contender left them"

    def time(self, call: Callable[[], object]) -> float:
        start = time.perf_counter_ns()
        results = call()
        seconds = (time.perf_counter_ns() - start) * 1e-9
        # freed outside the timed span
        del results
        return seconds

    def memory(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call adds at its peak, its results and every library's scratch space included; None where the system cannot say."""
        return added_memory(call)


class CudaClock:
    """Time between two events on the device, with the L2 cache flushed before each call."""

    conditions = "device events, L2 flushed before every call"

    def __init__(self, device: torch.device) -> None:
        # Far more than the cache: filling it keeps the device busy for a third of a millisecond, in which the host enqueues the call. With
        # less of a lead short kernels would time the host.
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 30)
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)
        self.device = device

    def time(self, call: Callable[[], object]) -> float:
        # of this device, which need not be the current one
        stream = torch.cuda.current_stream(self.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record(stream)
        call()
        end.record(stream)
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3

    def memory(self, call: Callable[[], object]) -> int | None:
        """Bytes of tensors that a call adds at its peak, its results included."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before


Clock = CpuClock | CudaClock


def use_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
        # the pool is rebuilt by the first parallel call; that must not be a timed one
        torch.zeros(1 << 20).add_(1)


def clock_for(device: str) -> Clock:
    return CudaClock(torch.device(device)) if torch.device(device).type == "cuda" else CpuClock()


def seeded(seed: int, *shape: int) -> Tensor:
    """Normal float32 numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def variants(case: Any, quick: Sequence[str], full: Sequence[str] = ()) -> Iterator[Any]:
    """A case in several dtypes and directions, each as "fp32 fwd"; those of ``quick`` are in both presets."""
    for kinds, in_quick in ((quick, True), (full, False)):
        for kind in kinds:
            dtype, direction = kind.split()
            yield case._replace(dtype=dtype, direction=direction, quick=in_quick)


def contenders_of_ours(
    request: Request, run: Callable[[str | None], Callable[[], Results]], serve: Callable[[str | None], Backend]
) -> Iterator[Contender]:
    """The package as it chooses, or by each backend that the user asked for. ``run`` makes the timed call, ``serve`` says who serves it."""
    for backend in request.backends or (None,):
        name = "tokenops" if backend is None else f"tokenops {backend}"
        objections, note = [], ""
        try:
            note = f"backend {serve(backend).name}"
        except NotImplementedError as refusal:
            objections = [line.strip() for line in str(refusal).splitlines()[1:]]
        yield Contender(name, run(backend), objections, ours=True, note=note)


def bind(
    call: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], grads: Tensor | Sequence[Tensor], differentiate: bool
) -> Callable[[], Results]:
    """The timed call: forward, or forward and the gradients of ``inputs`` where the results' gradients are ``grads``."""

    def as_tuple(out: Tensor | Sequence[Tensor]) -> Results:
        return (out,) if isinstance(out, Tensor) else tuple(out)

    if not differentiate:
        return lambda: as_tuple(call(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward_backward() -> Results:
        out = as_tuple(call(*leaves))
        return (*(part.detach() for part in out), *torch.autograd.grad(out, leaves, grads))

    return forward_backward


def compiled_peer(
    request: Request,
    call: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    canonical: Callable[[Results], Results] = lambda results: results,
    *,
    grads: Tensor | Sequence[Tensor] = (),
    differentiate: bool = False,
) -> Contender:
    """The peer "torch" through torch.compile."""
    if not request.slow_peers:
        return Contender("torch, compiled", lambda: (), objections=["compiling takes tens of seconds: use --preset full"])
    torch._dynamo.reset()
    compiled = torch.compile(call, dynamic=False)
    return Contender(
        "torch, compiled", bind(compiled, inputs, grads, differentiate), canonical=canonical, note="the usual formulation by torch.compile"
    )


def error_fraction(result: Tensor, expected: Tensor, dtype: str) -> float:
    """The error as a fraction of the tolerance: above 1 is wrong. NaN and infinity count as infinitely wrong, unless expected."""
    if result.shape != expected.shape:
        return float("inf")
    difference = result.double() - expected.double()
    # equal infinities (lse of an empty row) are no error
    difference = torch.where(result == expected, 0, difference)
    allowed = TOLERANCE[dtype] * (expected.double().nan_to_num(posinf=0, neginf=0).norm() + 0.01 * expected.numel() ** 0.5)
    if expected.numel() == 0:
        return 0.0
    fraction = (difference.norm() / allowed).item()
    return fraction if fraction == fraction else float("inf")


def measure(trial: Trial, dtype: str, clock: Clock, seconds: float, threads: int) -> Measurement:
    """Checks every contender against the expected result, then times those that are right, for about ``seconds`` in all."""
    expected = trial.expected()
    outcomes = {}
    racing = []
    for contender in trial.contenders:
        outcome = _check(contender, trial.names, expected, dtype, threads)
        outcomes[contender.name] = outcome
        if outcome.status == "ok":
            racing.append(contender)
    del expected
    if trial.memory:
        for contender in racing:
            use_threads(contender.threads or threads)
            outcomes[contender.name] = outcomes[contender.name]._replace(memory=clock.memory(contender.run))
        # measuring gave the pages back
        touch_pool()
    samples, page_faults = _race(racing, clock, seconds, threads)
    for contender in racing:
        taken = [sample for sample in samples[contender.name] if sample is not None]
        outcomes[contender.name] = outcomes[contender.name]._replace(seconds=Spread.of(taken), rounds=len(taken))
    for contender in racing:
        if contender.ours:
            ratios = {peer.name: _ratio(samples[peer.name], samples[contender.name]) for peer in racing if not peer.ours}
            outcomes[contender.name] = outcomes[contender.name]._replace(faster_than=ratios)
    return Measurement(list(outcomes.values()), page_faults)


def _check(contender: Contender, names: Sequence[str], expected: Results, dtype: str, threads: int) -> Outcome:
    outcome = Outcome(contender.name, contender.ours, "ok", (), contender.note)
    if contender.objections:
        return outcome._replace(status="not run", reasons=tuple(contender.objections))
    try:
        use_threads(contender.threads or threads)
        results = contender.canonical(contender.run())
    # whatever one contender raises must not end the run of the others; the table shows it
    except Exception as error:
        return outcome._replace(status="failed", reasons=(f"{type(error).__name__}: {error}".strip(),))
    if len(results) != len(expected):
        return outcome._replace(status="wrong", reasons=(f"{len(results)} results instead of {len(expected)}",))
    fractions = {name: error_fraction(ours, right, dtype) for name, ours, right in zip(names, results, expected, strict=True)}
    wrong = [f"{name}: {fraction:.3g} x the tolerance" for name, fraction in fractions.items() if not fraction <= 1]
    if wrong:
        return outcome._replace(status="wrong", reasons=tuple(wrong), error=max(fractions.values()))
    return outcome._replace(error=max(fractions.values()))


def _race(contenders: Sequence[Contender], clock: Clock, seconds: float, threads: int) -> tuple[dict[str, list[float | None]], int | None]:
    """Round-robin; every round starts one contender further on, so that none always follows the same one."""
    samples: dict[str, list[float | None]] = {contender.name: [] for contender in contenders}
    if not contenders:
        return samples, None

    def call(contender: Contender) -> float:
        use_threads(contender.threads or threads)
        return clock.time(contender.run)

    typical = {contender.name: min(call(contender) for _ in range(WARM_UP)) for contender in contenders}
    fastest = min(typical.values())
    # a slow one sits out rounds, but not so many that the fewest rounds outlast the budget
    longest = max(1, int(seconds / (len(contenders) * FEWEST_ROUNDS * fastest)))
    stride = {name: min(longest, max(1, int(usual / (SLOW * fastest)))) for name, usual in typical.items()}
    budget = seconds
    gc.collect()
    spent, rounds, calls, faults = 0.0, 0, 0, page_faults()
    gc.disable()
    try:
        while rounds < MOST_ROUNDS and (rounds < FEWEST_ROUNDS * max(stride.values()) or spent < budget):
            for place in range(len(contenders)):
                contender = contenders[(rounds + place) % len(contenders)]
                taking_part = rounds % stride[contender.name] == 0
                sample = call(contender) if taking_part else None
                samples[contender.name].append(sample)
                spent += sample or 0
                calls += taking_part
            rounds += 1
            if budget <= spent < EXTENSION * seconds and _unsteady(samples):
                # something else ran on the machine: more rounds let the median settle
                budget = spent + seconds
    finally:
        gc.enable()
        use_threads(threads)
    after = page_faults()
    return samples, None if faults is None or after is None else (after - faults) // calls


def _unsteady(samples: Mapping[str, Sequence[float | None]]) -> bool:
    return any(Spread.of([sample for sample in taken if sample is not None]).percent > UNSTEADY for taken in samples.values())


def _ratio(peer: Sequence[float | None], ours: Sequence[float | None]) -> Spread:
    """How many times longer the peer takes: ratio of the medians over the rounds of both, and the quartiles of the rounds' ratios."""
    pairs = [(theirs, mine) for theirs, mine in zip(peer, ours, strict=True) if theirs is not None and mine is not None]
    by_round = Spread.of([theirs / mine for theirs, mine in pairs])
    theirs, mine = (Spread.of(samples) for samples in zip(*pairs, strict=True))
    return Spread(theirs.median / mine.median, by_round.low, by_round.high)
