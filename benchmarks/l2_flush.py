"""Clocks for the benchmarks: warm or cold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from environment import cache_bytes

from epsanet_fused.utils import timing

# A millisecond: an eager step has up to a hundred kernels to launch.
WAIT_CYCLES = 2_000_000


@dataclass(frozen=True)
class ColdClock:
    """Fills the last-level cache with something else before each call, outside the timing.

    It does so by a copy, which leaves half the cache to be written back, as a steady stream of such
    calls would: reading alone would give the call's own writes away for free, writing alone would
    charge it for more than its own.

    A card is then kept waiting until the host has queued all of the call: in the middle of a
    network the host is ahead, and what is timed is the device. (Warm timings show a slow host.)
    """

    clock: timing.Clock
    source: torch.Tensor
    target: torch.Tensor
    single: bool = True

    @property
    def name(self) -> str:
        return f"{self.clock.name}, cold{', queued' if self.source.is_cuda else ''}"

    def measure(self, call: Callable[[], object], calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            self.target.copy_(self.source)
            if self.source.is_cuda:
                torch.cuda._sleep(WAIT_CYCLES)
            total += self.clock.measure(call, 1)
        return total / calls


def make_clock(device: torch.device, cold: bool) -> timing.Clock:
    clock = timing.make_clock(device)
    if not cold:
        return clock
    source = torch.ones(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    return ColdClock(clock, source, torch.empty_like(source))
