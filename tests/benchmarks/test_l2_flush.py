"""Test the clock that empties the cache before each call."""

from __future__ import annotations

import torch
from l2_flush import ColdClock

from epsanet_fused.utils import timing


def test_cold_clock_refills_the_cache_before_every_call():
    source, target = torch.ones(4), torch.zeros(4)
    seen = []
    cold = ColdClock(timing.CpuClock(1), source, target)
    cold.measure(lambda: (seen.append(target.sum().item()), target.zero_()), calls=3)
    assert seen == [4, 4, 4]
