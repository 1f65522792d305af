"""Test the clock that empties the cache before each call."""

from __future__ import annotations

import torch
from harness.clock import ColdClock, make_clock
from harness.machine import cache_bytes

from epsanet_fused.utils import timing

CPU = torch.device("cpu")


def test_cold_clock_refills_the_cache_before_every_call():
    source, target = torch.ones(4), torch.zeros(4)
    seen = []
    cold = ColdClock(timing.CpuClock(1), source, target)
    cold.measure(lambda: (seen.append(target.sum().item()), target.zero_()), calls=3)
    assert seen == [4, 4, 4]


def test_cold_clock_measures_each_call_by_itself_and_fills_more_than_the_cache():
    cold = make_clock(CPU, cold=True)
    assert cold.single
    assert cold.source.nbytes == cold.target.nbytes == 2 * cache_bytes(CPU)
    assert cold.name == f"{make_clock(CPU, cold=False).name}, cold"
