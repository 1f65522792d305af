"""Time variants of a call, interleaved in one process; report medians with p20 and p80.

Interleaving exposes all variants to the same load of the machine: a slow second spoils one sample
of each, which the median ignores. The order changes from turn to turn, and each sample begins with
an untimed call: the state in which the previous variant leaves caches and the memory allocator was
seen to cost a quarter more time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

MIN_SAMPLES = 5
# The clock's resolution and the cost of reading it are far below a percent of this.
SAMPLE_SECONDS = 2e-3
MAX_CALLS = 200
# No clock rate of a GPU is higher, so that a wait is at least as long as asked for.
CYCLES_PER_MS = 2_000_000
MIN_HOST_MS = 0.01
MAX_WAIT_MS = 1000.0  # a host that is this slow waits for the device within the call

Key = TypeVar("Key")


class Timing(NamedTuple):
    """Milliseconds per call; the true median lies between low and high with 95 % confidence."""

    p20: float
    p50: float
    p80: float
    low: float
    high: float
    samples: int

    def ties(self, other: Timing) -> bool:
        """Tell whether the medians can't be distinguished."""
        return self.low <= other.high and other.low <= self.high


class Variant(NamedTuple):
    """A call to time, and a context that is entered outside the timing."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


class Clock(Protocol):
    """A way to measure time."""

    @property
    def name(self) -> str:
        """The quantity that is measured, for reports."""

    @property
    def single(self) -> bool:
        """True if each call is measured by itself, never several in a row."""

    def measure(self, call: Callable[[], object], calls: int) -> float:
        """Call ``call`` ``calls`` times in a row and return the milliseconds per call."""


@dataclass(frozen=True)
class CpuClock:
    """Process CPU time for one thread, as other processes disturb it less; wall time for more."""

    threads: int
    single: bool = False

    @property
    def name(self) -> str:
        """The quantity that is measured: CPU or wall time."""
        return "process CPU time" if self.threads == 1 else "wall time"

    def measure(self, call: Callable[[], object], calls: int) -> float:
        """Return the milliseconds per call."""
        now = time.process_time if self.threads == 1 else time.perf_counter
        start = now()
        for _ in range(calls):
            call()
        return (now() - start) / calls * 1e3


@dataclass(frozen=True)
class CudaClock:
    """Time between device events around the calls; it includes waiting for a slower host."""

    name: str = "device events"
    single: bool = False

    def measure(self, call: Callable[[], object], calls: int) -> float:
        """Return the milliseconds per call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / calls


@dataclass
class QueuedClock:
    """Device time alone: the device waits until the host has queued all kernels of the calls.

    So runs a network whose host is ahead of its device, or a CUDA graph. ``before`` runs untimed
    before each attempt, for example to empty a cache.
    """

    name: str = "device events, queued"
    single: bool = False
    # The host's time for one call, in milliseconds: at first a guess.
    host_ms: float = 0.2
    before: Callable[[], object] | None = None

    def measure(self, call: Callable[[], object], calls: int) -> float:
        """Return the milliseconds per call."""
        while True:
            if self.before is not None:
                self.before()
            wait_ms = 1.5 * self.host_ms * calls
            torch.cuda._sleep(int(wait_ms * CYCLES_PER_MS))
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            end.record()
            queued_ms = (time.perf_counter() - began) * 1e3
            end.synchronize()
            self.host_ms = max(queued_ms / calls, MIN_HOST_MS)
            if queued_ms <= wait_ms or wait_ms > MAX_WAIT_MS:
                milliseconds: float = start.elapsed_time(end)
                return milliseconds / calls


def make_clock(device: torch.device, queued: bool = False) -> Clock:
    """Return the clock for calls that run on this device.

    Args:
        device: of the calls' tensors.
        queued: on a CUDA device, leave out the host's time.
    """
    if device.type != "cuda":
        return CpuClock(torch.get_num_threads())
    return QueuedClock() if queued else CudaClock()


def interleave(
    variants: Mapping[Key, Variant], clock: Clock, reps: int, seconds: float
) -> dict[Key, Timing]:
    """Time all variants in turns.

    Args:
        variants: by name.
        clock: measures each sample.
        reps: the number of samples of each variant.
        seconds: the time after which to stop earlier, but not before MIN_SAMPLES samples.

    Returns:
        The timing of each variant.
    """
    calls = {name: _calls_per_sample(v, clock) for name, v in variants.items()}
    samples: dict[Key, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds
    order, shuffled = list(variants.items()), random.Random(0)
    for turn in range(reps):
        if turn >= MIN_SAMPLES and time.perf_counter() > deadline:
            break
        shuffled.shuffle(order)
        for name, variant in order:
            with variant.context():
                variant.call()
                samples[name].append(clock.measure(variant.call, calls[name]))
    return {name: summarise(values) for name, values in samples.items()}


def _calls_per_sample(variant: Variant, clock: Clock) -> int:
    """Warm the variant up, and return how many calls a sample of SAMPLE_SECONDS takes."""
    with variant.context():
        for _ in range(2):
            variant.call()
        ms = clock.measure(variant.call, 1)
    if clock.single:
        return 1
    return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS * 1e3 / max(ms, 1e-6))))


def summarise(milliseconds: list[float]) -> Timing:
    """Return the quantiles of these samples, and the confidence interval of their median."""
    # The samples within sqrt(n) ranks of the middle contain the true median at 95 %.
    margin = min(0.5, len(milliseconds) ** -0.5)
    at = torch.tensor([0.2, 0.5, 0.8, 0.5 - margin, 0.5 + margin], dtype=torch.float64)
    quantiles = torch.tensor(milliseconds, dtype=torch.float64).quantile(at)
    p20, p50, p80, low, high = quantiles.tolist()
    return Timing(p20, p50, p80, low, high, samples=len(milliseconds))
