"""Test the interleaved timing and its statistics."""

from __future__ import annotations

import time

import pytest
import torch

from epsanet_fused.utils import timing


def test_interleaving_gives_every_variant_the_same_share():
    class Counting:
        name = "counting"
        single = False

        def __init__(self):
            self.order = []

        def measure(self, call, calls):
            self.order.append(call())
            return 5.0 if call() == "slow" else 3.0

    clock = Counting()
    variants = {name: timing.Variant(lambda name=name: name) for name in ("slow", "fast")}
    timings = timing.interleave(variants, clock, reps=7, seconds=60)
    turns = [tuple(clock.order[-14:][i : i + 2]) for i in range(0, 14, 2)]
    assert set(turns) == {("slow", "fast"), ("fast", "slow")}, "each in every turn, in any order"
    assert timings["slow"] == timing.Timing(5.0, 5.0, 5.0, 5.0, 5.0, samples=7)
    assert not timings["slow"].ties(timings["fast"])
    few = timing.interleave(variants, clock, reps=1000, seconds=0)
    assert few["fast"].samples == timing.MIN_SAMPLES, "the budget ends it, but not below that"


def test_medians_within_their_uncertainty_tie():
    summarise = timing.summarise
    noisy = [1.0 + i / 100 for i in range(100)]
    assert summarise(noisy).ties(summarise([x + 0.05 for x in noisy]))
    assert not summarise(noisy).ties(summarise([x + 0.5 for x in noisy]))
    assert summarise(noisy).p50 == pytest.approx(1.495)


def test_the_device_waits_until_a_slow_host_has_queued_the_calls(monkeypatch):
    waits = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            """As on a stream."""

        def synchronize(self):
            """As on a stream."""

        def elapsed_time(self, end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: waits.append(cycles / 2e6))
    fills = []
    clock = timing.QueuedClock(before=lambda: fills.append(len(waits)))
    assert clock.measure(lambda: time.sleep(0.02), 3) == 2.0
    assert fills == list(range(len(waits))), "the cache is filled again before each attempt"
    assert waits[0] < 60, "the guess was too short for this host"
    assert waits[-1] >= 60, "milliseconds: three calls take the host that long"
