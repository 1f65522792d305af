"""Timing: variants interleaved in one process, medians with p20 and p80.

Interleaving gives every variant the same share of whatever else the machine does: a slow second
then spoils one sample of each, which a median forgets. The order changes from turn to turn, and
each sample begins with a call that isn't timed: what ran before leaves caches and the memory
allocator in a state that has cost its successor a quarter more.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

FEWEST_SAMPLES = 5
# Long enough that the clock's resolution and the price of reading it are far below a percent.
SAMPLE_SECONDS = 2e-3
MOST_CALLS = 200

Key = TypeVar("Key")


class Timing(NamedTuple):
    """Milliseconds per call over a number of samples; low to high is where the median may lie."""

    p20: float
    p50: float
    p80: float
    low: float
    high: float
    samples: int

    def ties(self, other: Timing) -> bool:
        """Whether the two medians can't be told apart."""
        return self.low <= other.high and other.low <= self.high


class Variant(NamedTuple):
    """One of the things to compare: what to call, and a context to be in, outside the timing."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


class Clock(Protocol):
    """Measures milliseconds per call of a function called ``calls`` times in a row."""

    name: str
    single: bool  # whether each call is measured by itself, never several in a row

    def measure(self, call: Callable[[], object], calls: int) -> float: ...


@dataclass(frozen=True)
class CpuClock:
    """Process CPU time for one thread, which no neighbour disturbs; wall time for more."""

    threads: int
    single: bool = False

    @property
    def name(self) -> str:
        return "process CPU time" if self.threads == 1 else "wall time"

    def measure(self, call: Callable[[], object], calls: int) -> float:
        now = time.process_time if self.threads == 1 else time.perf_counter
        start = now()
        for _ in range(calls):
            call()
        return (now() - start) / calls * 1e3


@dataclass(frozen=True)
class CudaClock:
    """Device events around the calls. A host that is slower than the device shows, as it should."""

    name: str = "device events"
    single: bool = False

    def measure(self, call: Callable[[], object], calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls


def make_clock(device: torch.device) -> Clock:
    """The clock that times what runs on this device."""
    return CudaClock() if device.type == "cuda" else CpuClock(torch.get_num_threads())


def interleave(
    variants: Mapping[Key, Variant], clock: Clock, reps: int, seconds: float
) -> dict[Key, Timing]:
    """Time all variants in turns, ``reps`` samples each, or as many as fit into ``seconds``."""
    calls = {name: _calls_per_sample(v, clock) for name, v in variants.items()}
    samples: dict[Key, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds
    order, shuffled = list(variants.items()), random.Random(0)
    for turn in range(reps):
        if turn >= FEWEST_SAMPLES and time.perf_counter() > deadline:
            break
        shuffled.shuffle(order)
        for name, variant in order:
            with variant.context():
                variant.call()
                samples[name].append(clock.measure(variant.call, calls[name]))
    return {name: summarise(values) for name, values in samples.items()}


def _calls_per_sample(variant: Variant, clock: Clock) -> int:
    """Warm the variant up, and say how many calls make a sample of sufficient length."""
    with variant.context():
        for _ in range(2):
            variant.call()
        ms = clock.measure(variant.call, 1)
    if clock.single:
        return 1
    return max(1, min(MOST_CALLS, round(SAMPLE_SECONDS * 1e3 / max(ms, 1e-6))))


def summarise(milliseconds: list[float]) -> Timing:
    # Of n samples, those within sqrt(n) ranks of the middle hold the true median at 95 %.
    margin = min(0.5, len(milliseconds) ** -0.5)
    at = torch.tensor([0.2, 0.5, 0.8, 0.5 - margin, 0.5 + margin], dtype=torch.float64)
    quantiles = torch.tensor(milliseconds, dtype=torch.float64).quantile(at)
    return Timing(*quantiles.tolist(), samples=len(milliseconds))
