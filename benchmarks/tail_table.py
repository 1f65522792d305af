"""Choose the fastest backend of each tail, as rows for epsanet_fused/backends/defaults.py.

decide.py states the rules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import STAGES
from load_results import Gpu, Time, add_up, by_key, time_of
from report import CsvRow, align

MODES = ("inference", "backward")
DEFAULT = "triton"  # the backend of a problem that no row of the table covers
# The providers that time each backend: it runs the first that does not refuse the problem.
# "cuda:one_pass" itself is not a choice, because it refuses branches that are not dense.
RUNS = {
    DEFAULT: ("triton",),
    "cuda": ("cuda:one_pass", "cuda:two_pass"),
    "cuda:two_pass": ("cuda:two_pass",),
}
PROVIDERS = {provider for runs in RUNS.values() for provider in runs}
KEY = ("layout", "dtype", "stage", "batch", "mode", "cache", "provider")


class TailKind(NamedTuple):
    """Tails that differ only in their size."""

    memory_format: str
    dtype: str


class TailSize(NamedTuple):
    """The size of a tail."""

    sample_bytes: int  # of all branches together
    batch: int


class Times(NamedTuple):
    """A backend's times for a tail. The step of training is forward and backward."""

    forward: Time
    step: Time

    def beat(self, other: Times) -> bool:
        """Return whether one of the two times is shorter and the other one is not longer."""
        pairs = list(zip(self, other, strict=True))
        shorter = any(mine.beats(its) for mine, its in pairs)
        return shorter and not any(its.beats(mine) for mine, its in pairs)


class Choice(NamedTuple):
    """The backend of one tail or of several, with its speed-up over the next best backend.

    For several tails it is the smallest speed-up.
    """

    backend: str
    forward: float
    step: float
    rows: int  # the number of CSV rows that were compared


class Range(NamedTuple):
    """Neighbouring tails with the same backend. Both ends are included."""

    sample_bytes: tuple[int, int]
    batch: tuple[int, int]
    choice: Choice


Grid = dict[TailKind, dict[TailSize, Choice | None]]


def grid(rows: Iterable[CsvRow], gpu: Gpu, path: Path) -> Grid:
    """Choose a backend for every measured tail; None if there is nothing to compare.

    Raises:
        ValueError: if a tail was measured twice.
    """
    tails = (
        row
        for row in rows
        if row["scope"] == "tail" and row["mode"] in MODES and row["provider"] in PROVIDERS
    )
    points: dict[tuple[TailKind, TailSize], dict[tuple[str, str], CsvRow]] = {}
    for (memory_format, dtype, stage, batch, *_), row in by_key(tails, KEY, path).items():
        size = TailSize(sample_bytes(stage, dtype), int(batch))
        point = points.setdefault((TailKind(memory_format, dtype), size), {})
        if row["cache"] == cache(row["mode"], size, gpu):
            point[row["mode"], row["provider"]] = row
    found: Grid = {}
    for (kind, size), point in sorted(points.items()):
        found.setdefault(kind, {})[size] = choose(point)
    return found


def sample_bytes(stage: str, dtype: str) -> int:
    """Return the bytes of all branches of one sample."""
    channels, size = STAGES[stage]
    return channels * size * size * getattr(torch, dtype).itemsize


def cache(mode: str, size: TailSize, gpu: Gpu) -> str:
    """Return which cache state the tail has in a network: "warm" or "cold".

    Forward, the convolutions have just written the branches: these are in L2 if they fit there
    together with the output. Before the backward, the rest of the network has replaced them.
    """
    fits = 2 * math.prod(size) <= gpu.l2_bytes
    return "warm" if mode == "inference" and fits else "cold"


def choose(point: Mapping[tuple[str, str], CsvRow]) -> Choice | None:
    """Choose the backend of one tail from its rows by mode and provider."""
    times: dict[str, Times] = {}
    for backend in RUNS:
        forward, backward = (time_in(point, mode, backend) for mode in MODES)
        if forward and backward:
            times[backend] = Times(forward, add_up([forward, backward]))
    if times.get("cuda:two_pass") == times.get("cuda"):  # one_pass refused it
        times.pop("cuda:two_pass", None)
    if DEFAULT not in times or len(times) == 1:
        return None
    best = DEFAULT
    for name in times:
        if times[name].beat(times[DEFAULT]) and (best == DEFAULT or times[name].beat(times[best])):
            best = name
    others = [times[name] for name in times if name != best]
    forward, step = (min(other[i].p50 for other in others) / times[best][i].p50 for i in range(2))
    return Choice(best, forward, step, len(point))


def time_in(point: Mapping[tuple[str, str], CsvRow], mode: str, backend: str) -> Time | None:
    """Return the backend's time in this mode, or None if it was not timed or was wrong."""
    for provider in RUNS[backend]:
        row = point.get((mode, provider))
        if row is None or row["ok"] == "False":
            return None
        if time := time_of(row):
            return time
    return None


def ranges(choices: Mapping[TailSize, Choice | None]) -> Iterator[Range]:
    """Cover every choice but DEFAULT by ranges that hold no other measured tail.

    Runs of batches with the same choice are merged over neighbouring sample sizes with the same
    run.
    """
    samples, batches = (sorted(set(axis)) for axis in zip(*choices, strict=True))
    chosen = {size: c for size, c in choices.items() if c and c.backend != DEFAULT}
    backends = {size: choice.backend for size, choice in chosen.items()}
    found = {}
    for sample in samples:
        runs = stretches(batches, [backends.get(TailSize(sample, batch)) for batch in batches])
        found[sample] = [run for run in runs if run[0]]
    for run in dict.fromkeys(itertools.chain(*found.values())):
        for there, stretch in stretches(samples, [run in found[sample] for sample in samples]):
            if there:
                held = [chosen[TailSize(*size)] for size in itertools.product(stretch, run[1])]
                sizes, batch = closed(samples, stretch), closed(batches, run[1])
                yield Range(sizes, batch, at_worst(held))


def stretches(axis: Sequence[int], values: Sequence[Any]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Group neighbours on the axis that have the same value: (value, places on the axis)."""
    pairs = zip(values, axis, strict=True)
    for value, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield value, tuple(place for _, place in group)


def closed(axis: Sequence[int], stretch: Sequence[int]) -> tuple[int, int]:
    """Return the ends of a stretch of the axis, extended to the geometric means with neighbours.

    At the ends of the axis it is not extended.
    """
    first, last = axis.index(stretch[0]), axis.index(stretch[-1])
    low = math.isqrt(axis[first - 1] * axis[first]) + 1 if first else axis[0]
    high = math.isqrt(axis[last] * axis[last + 1]) if last + 1 < len(axis) else axis[-1]
    return low, high


def at_worst(choices: Sequence[Choice]) -> Choice:
    """Merge several choices of one backend into one, with the smallest speed-ups."""
    backends, forward, step, rows = zip(*choices, strict=True)
    return Choice(backends[0], min(forward), min(step), sum(rows))


def source(found: Grid, gpu: Gpu) -> list[str]:
    """Return the lines to paste into CUDA_TABLE. Equal rows of both memory formats are merged."""
    shared: dict[tuple[object, ...], dict[str, Choice]] = {}
    for kind, choices in found.items():
        for sizes, batches, choice in ranges(choices):
            key = (kind.dtype, sizes, batches, choice.backend)
            shared.setdefault(key, {})[kind.memory_format] = choice
    lines = []
    for (dtype, sizes, batches, backend), by_format in shared.items():
        channels_last = "channels_last" in by_format if len(by_format) == 1 else None
        _, forward, step, rows = at_worst(list(by_format.values()))
        margins = (
            f"forward {forward:.2f}x, step {step:.2f}x as fast as the next best, by {rows} rows"
        )
        lines += [
            f"    # {gpu.name}: {margins}",
            f"    TailRule({gpu.arch}, {channels_last}, torch.{dtype}, {_pair(sizes)}, "
            f'{_pair(batches)}, "{backend}"),',
        ]
    return lines


def _pair(ends: tuple[int, int]) -> str:
    return "({:_}, {:_})".format(*ends)


def overview(found: Grid) -> str:
    """Format the choices as a table: a line for each memory format, dtype and sample size."""
    batches = sorted({size.batch for choices in found.values() for size in choices})
    lines = [("memory format", "dtype", "sample bytes", *(f"batch {batch}" for batch in batches))]
    for kind, choices in found.items():
        for sample in sorted({size.sample_bytes for size in choices}):
            cells = (_cell(choices, TailSize(sample, batch)) for batch in batches)
            lines.append((*kind, f"{sample:_}", *cells))
    return align(lines, left=2, by=0)


def _cell(choices: Mapping[TailSize, Choice | None], size: TailSize) -> str:
    if size not in choices:
        return ""
    choice = choices[size]
    return f"{choice.backend} {choice.forward:.2f}x {choice.step:.2f}x" if choice else "?"
