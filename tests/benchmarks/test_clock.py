"""Test the clock that empties the cache before each call."""

from __future__ import annotations

import torch
from harness.clock import ColdClock, make_clock

from epsanet_fused.utils import timing

CPU = torch.device("cpu")


def test_cold_clock_fills_the_cache_before_every_call():
    target = torch.zeros(4)
    seen = []
    cold = ColdClock(timing.CpuClock(1), lambda: target.fill_(1))
    cold.measure(lambda: (seen.append(target.sum().item()), target.zero_()), calls=3)
    assert seen == [4, 4, 4]


def test_cold_clock_measures_each_call_by_itself():
    cold = make_clock(CPU, cold=True)
    assert cold.single
    assert cold.name == f"{make_clock(CPU, cold=False).name}, cold"
    assert cold.measure(lambda: None, 2) >= 0
