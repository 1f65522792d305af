"""From the timings of tails to rows for epsanet_fused/backends/cuda_table.py; decide.py has the
rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import STAGES
from load_results import Card, Row, Time, by_key, time_of, together
from report import align

MODES = ("inference", "backward")
KEEPS = "triton"  # what runs where no row of the table covers a problem
# What each backend comes to: the first of these that doesn't refuse the problem. "cuda:one_pass"
# itself is no choice: it refuses branches of a measured size, too, if they aren't dense.
RUNS = {
    KEEPS: ("triton",),
    "cuda": ("cuda:one_pass", "cuda:two_pass"),
    "cuda:two_pass": ("cuda:two_pass",),
}
PROVIDERS = {provider for runs in RUNS.values() for provider in runs}
KEY = ("layout", "dtype", "stage", "batch", "mode", "cache", "provider")


class Kind(NamedTuple):
    """Tails that differ in their size only."""

    layout: str
    dtype: str


class Size(NamedTuple):
    sample_bytes: int  # of all branches together
    batch: int


class Times(NamedTuple):
    """What a backend takes for a tail; a training step is forward and backward."""

    forward: Time
    step: Time

    def beat(self, other: Times) -> bool:
        """Whether one of the two is shorter, and the other one not longer, beyond ties."""
        pairs = list(zip(self, other, strict=True))
        shorter = any(mine.beats(its) for mine, its in pairs)
        return shorter and not any(its.beats(mine) for mine, its in pairs)


class Choice(NamedTuple):
    """The backend for one tail, or for several; against the next best, at its worst."""

    backend: str
    forward: float  # how many times as fast
    step: float
    rows: int  # of the CSV


class Range(NamedTuple):
    """Neighbouring tails for which one backend was chosen; both ends are inclusive."""

    sample_bytes: tuple[int, int]
    batch: tuple[int, int]
    choice: Choice


Grid = dict[Kind, dict[Size, Choice | None]]


def grid(rows: Iterable[Row], card: Card, path: Path) -> Grid:
    """A choice for every tail that was measured; None where there is nothing to choose from.

    Raises:
        ValueError: if a tail was measured twice.
    """
    tails = (
        row
        for row in rows
        if row["scope"] == "tail" and row["mode"] in MODES and row["provider"] in PROVIDERS
    )
    points: dict[tuple[Kind, Size], dict[tuple[str, str], Row]] = {}
    for (layout, dtype, stage, batch, *_), row in by_key(tails, KEY, path).items():
        size = Size(sample_bytes(stage, dtype), int(batch))
        point = points.setdefault((Kind(layout, dtype), size), {})
        if row["cache"] == cache(row["mode"], size, card):
            point[row["mode"], row["provider"]] = row
    found: Grid = {}
    for (kind, size), point in sorted(points.items()):
        found.setdefault(kind, {})[size] = choose(point)
    return found


def sample_bytes(stage: str, dtype: str) -> int:
    channels, size = STAGES[stage]
    return channels * size * size * getattr(torch, dtype).itemsize


def cache(mode: str, size: Size, card: Card) -> str:
    """The cache as a network leaves it to the tail.

    The convolutions have just written the branches: they are in L2 where they and the output fit.
    Until the backward the rest of the network has been through it.
    """
    fits = 2 * math.prod(size) <= card.l2_bytes
    return "warm" if mode == "inference" and fits else "cold"


def choose(point: Mapping[tuple[str, str], Row]) -> Choice | None:
    """What the rules come to for one tail, of its rows by mode and provider."""
    times: dict[str, Times] = {}
    for backend in RUNS:
        forward, backward = (time_in(point, mode, backend) for mode in MODES)
        if forward and backward:
            times[backend] = Times(forward, together([forward, backward]))
    if times.get("cuda:two_pass") == times.get("cuda"):  # one pass refuses it
        times.pop("cuda:two_pass", None)
    if KEEPS not in times or len(times) == 1:
        return None
    best = KEEPS
    for name in times:
        if times[name].beat(times[KEEPS]) and (best == KEEPS or times[name].beat(times[best])):
            best = name
    others = [times[name] for name in times if name != best]
    forward, step = (min(other[i].p50 for other in others) / times[best][i].p50 for i in range(2))
    return Choice(best, forward, step, len(point))


def time_in(point: Mapping[tuple[str, str], Row], mode: str, backend: str) -> Time | None:
    """The backend's time in this mode, or None if there is none or a result was wrong."""
    for provider in RUNS[backend]:
        row = point.get((mode, provider))
        if row is None or row["ok"] == "False":
            return None
        if time := time_of(row):
            return time
    return None


def ranges(choices: Mapping[Size, Choice | None]) -> Iterator[Range]:
    """Rectangles that hold every choice but KEEPS, and nothing else that was measured.

    Runs of batches with one choice, put together where neighbouring samples have the same run.
    """
    samples, batches = (sorted(set(axis)) for axis in zip(*choices, strict=True))
    chosen = {size: c for size, c in choices.items() if c and c.backend != KEEPS}
    backends = {size: choice.backend for size, choice in chosen.items()}
    found = {}
    for sample in samples:
        runs = stretches(batches, [backends.get(Size(sample, batch)) for batch in batches])
        found[sample] = [run for run in runs if run[0]]
    for run in dict.fromkeys(itertools.chain(*found.values())):
        for there, stretch in stretches(samples, [run in found[sample] for sample in samples]):
            if there:
                held = [chosen[Size(*size)] for size in itertools.product(stretch, run[1])]
                sizes, batch = closed(samples, stretch), closed(batches, run[1])
                yield Range(sizes, batch, at_worst(held))


def stretches(axis: Sequence[int], values: Sequence[Any]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Each value with the neighbours on the axis that share it."""
    pairs = zip(values, axis, strict=True)
    for value, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield value, tuple(place for _, place in group)


def closed(axis: Sequence[int], stretch: Sequence[int]) -> tuple[int, int]:
    """From the first to the last of a stretch of the axis, and half of the way, geometrically, to
    its neighbours there."""
    first, last = axis.index(stretch[0]), axis.index(stretch[-1])
    low = math.isqrt(axis[first - 1] * axis[first]) + 1 if first else axis[0]
    high = math.isqrt(axis[last] * axis[last + 1]) if last + 1 < len(axis) else axis[-1]
    return low, high


def at_worst(choices: Sequence[Choice]) -> Choice:
    """Several choices of one backend as one."""
    backends, forward, step, rows = zip(*choices, strict=True)
    return Choice(backends[0], min(forward), min(step), sum(rows))


def source(found: Grid, card: Card) -> list[str]:
    """The lines to paste into TABLE; layouts that come to the same share a row."""
    shared: dict[tuple[object, ...], dict[str, Choice]] = {}
    for kind, choices in found.items():
        for sizes, batches, choice in ranges(choices):
            key = (kind.dtype, sizes, batches, choice.backend)
            shared.setdefault(key, {})[kind.layout] = choice
    lines = []
    for (dtype, sizes, batches, backend), layouts in shared.items():
        channels_last = "channels_last" in layouts if len(layouts) == 1 else None
        _, forward, step, rows = at_worst(list(layouts.values()))
        margins = (
            f"forward {forward:.2f}x, step {step:.2f}x as fast as the next best, by {rows} rows"
        )
        lines += [
            f"    # {card.name}: {margins}",
            f"    TailRule({card.arch}, {channels_last}, torch.{dtype}, {_pair(sizes)}, "
            f'{_pair(batches)}, "{backend}"),',
        ]
    return lines


def _pair(ends: tuple[int, int]) -> str:
    return "({:_}, {:_})".format(*ends)


def overview(found: Grid) -> str:
    """The choices as a table, a line for each layout, dtype and size of a sample."""
    batches = sorted({size.batch for choices in found.values() for size in choices})
    lines = [("layout", "dtype", "sample bytes", *(f"batch {batch}" for batch in batches))]
    for kind, choices in found.items():
        for sample in sorted({size.sample_bytes for size in choices}):
            cells = (_cell(choices, Size(sample, batch)) for batch in batches)
            lines.append((*kind, f"{sample:_}", *cells))
    return align(lines, left=2, by=0)


def _cell(choices: Mapping[Size, Choice | None], size: Size) -> str:
    if size not in choices:
        return ""
    choice = choices[size]
    return f"{choice.backend} {choice.forward:.2f}x {choice.step:.2f}x" if choice else "?"
