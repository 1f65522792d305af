"""Clocks for the benchmarks, with a warm or a cold last-level cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from epsanet_fused.utils import timing
from harness.machine import cache_bytes


@dataclass(frozen=True)
class ColdClock:
    """A clock for the CPU that runs ``before`` before each call, untimed."""

    clock: timing.Clock
    before: Callable[[], object]
    single: bool = True

    @property
    def name(self) -> str:
        return f"{self.clock.name}, cold"

    def measure(self, call: Callable[[], object], calls: int) -> float:
        """Return the mean milliseconds of one call."""
        total = 0.0
        for _ in range(calls):
            self.before()
            total += self.clock.measure(call, 1)
        return total / calls


def make_clock(device: torch.device, cold: bool) -> timing.Clock:
    """Return the device's clock; if ``cold``, it fills the cache with other data before each call.

    The fill is a copy and is not timed. Afterwards half of the cache must be written back, as in a
    steady stream of such calls. A fill that only reads would make the call's own writes free; a
    fill that only writes would charge the call for writes that are not its own.

    A GPU then waits until the host has queued all kernels of the call, so that device time alone is
    measured: in the middle of a network the host runs ahead of the device. A slow host shows in the
    warm timings.
    """
    if not cold:
        return timing.make_clock(device)
    source = torch.ones(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fill() -> None:
        target.copy_(source)

    if device.type == "cuda":
        return timing.QueuedClock("device events, queued, cold", single=True, before=fill)
    return ColdClock(timing.make_clock(device), fill)
