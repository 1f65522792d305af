"""From the CSVs of a visit to a card to the tables that decide.

    python benchmarks/decide.py out        # the folder that gpu_check.py has written

Reads results.csv and conv_cost.csv there, or the one of them that there is, and env.json for the
card's architecture and L2; prints what they come to. Nothing is written: what goes into a table is
pasted by hand, with the CSVs put where the table says.

A tie is where the spreads of two timings, p20 to p80, overlap. (The columns `tie` tell medians
apart that are closer; a table shouldn't turn on the last percent.)

`backends/cuda_table.py`, by the timings of scope tail:

- One backend runs forward and backward, so two times count: the forward, which is all of inference,
  and the training step, forward and backward added up. A backend replaces triton where one of the
  two is shorter beyond a tie and the other isn't longer beyond a tie: nobody loses by a row, and
  there is nothing to weigh. `cuda:two_pass` replaces `cuda` in the same way.
- `cuda` is timed by its parts: one pass, or where that refuses, two. A row never asks for
  `cuda:one_pass`, which would raise an error for branches that aren't dense.
- The forward counts warm where branches and output fit into L2, as the convolutions have just
  written the branches, else cold; the backward counts cold, as all the rest of the network comes
  between. Without env.json both count cold.
- A row's ranges end with what was measured. Between measured sizes, or batches, they meet at the
  geometric mean. Where no row is, triton stays; so it does where a tail wasn't timed in both modes
  by triton and by another, a `?` in the overview.
- A margin is against the next best, the forward's and the step's each by itself, at the row's worst
  point. The overview has triton's margins, too: where one of them is far below 1 and the other
  isn't, a table for each mode would pay.

`backends/norm_table.py`, by the timings of scope norm: the operator goes in if it is nowhere slower
than the three apart beyond a tie, and somewhere faster, having been timed at all four stages in
both memory formats.

The conv plan's defaults, by conv_cost.csv with cuDNN autotuned: for each convolution the merge with
the least time in the forward, and in training (forward, dgrad and wgrad added up), unless it ties
with as_is; how much faster than as_is it is; and by which layout the four of a stage take less time
together, each by its own merge.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tail_table
from inputs import LAYOUTS, STAGES
from load_results import Card, Row, Time, by_key, read_card, read_rows, time_of, together
from report import align

from epsanet_fused.nn.psa import CONV_KERNELS

TIMES = ("ms_p20", "ms_p50", "ms_p80", "device")
RESULTS = ("scope", *tail_table.KEY, "backend", "ok", "cuda", *TIMES)
POINT = ("stage", "batch", "dtype", "layout", "cache")
MERGE = ("dtype", "layout", "stage", "kernel", "merge", "pass")
CONV_COSTS = (*MERGE, "merged_groups", "batch", "cudnn_benchmark", *TIMES)
# The passes that each use of a convolution takes.
USES = {"inference": ("forward",), "training": ("forward", "dgrad", "wgrad")}


def tail_decision(rows: Sequence[Row], card: Card, path: Path) -> list[str]:
    """What each measured tail comes to, and the rows for cuda_table.py that say so."""
    choices = tail_table.grid(rows, card, path)
    if not choices:
        return ["nothing decided: no row is of a tail by triton or by a variant of cuda"]
    lines = [tail_table.overview(choices), ""]
    if card.arch is None:
        lines += ["Without an env.json the rows are for any card, and all counts cold.", ""]
    return lines + (tail_table.source(choices, card) or ["No row: triton runs everything."])


def norm_decision(rows: Sequence[Row], path: Path) -> list[str]:
    """The entry for norm_table.py, or all that speaks against one."""
    rows = [row for row in rows if row["scope"] == "norm"]
    if not rows:
        return ["nothing decided: no row is of scope norm"]
    found = by_key(rows, (*POINT, "provider"), path)
    times: dict[tuple[str, ...], tuple[Time, Time]] = {}
    against, backends = [], set()
    for point in dict.fromkeys(key[:-1] for key in found):
        fused, apart = (found.get((*point, name)) for name in ("fused", "apart"))
        if fused and apart and (ours := time_of(fused)) and (theirs := time_of(apart)):
            times[point] = (ours, theirs)
            backends.add(fused["backend"])
        else:
            against.append(f"{' '.join(point)}: not timed, or wrong")
    reached = {(point[0], point[3]) for point in times}
    unreached = [p for p in itertools.product(STAGES, LAYOUTS) if p not in reached]
    against += [f"{' '.join(point)}: not reached" for point in unreached]
    against += [_compared(p, *pair) for p, pair in times.items() if pair[1].beats(pair[0])]
    if len(backends) > 1:
        against.append(f"by more than one backend: {', '.join(sorted(backends))}")
    ties = [_compared(p, *pair) for p, pair in times.items() if not pair[0].beats(pair[1])]
    if not against and len(ties) == len(times):
        against.append("a tie everywhere")
    if against:
        return ["left out:", *against]
    worst = min(apart.p50 / ours.p50 for ours, apart in times.values())
    device_type = "cuda" if rows[0]["cuda"] else "cpu"
    return [
        f"{worst:.2f}x as fast as the three apart, or more, by {2 * len(times)} rows",
        *(f"{tie}, a tie" for tie in ties),
        f'    "{device_type}": "{backends.pop()}",',
    ]


def _compared(point: Sequence[str], ours: Time, apart: Time) -> str:
    return f"{' '.join(point)}: {apart.p50 / ours.p50:.2f}x as fast as the three apart"


class Conv(NamedTuple):
    """One branch convolution, put to one use."""

    use: str
    dtype: str
    stage: str
    layout: str
    kernel: str


class Merge(NamedTuple):
    """What it is to be executed as, and how much faster than as it is."""

    name: str
    groups: str
    time: Time
    speedup: float

    def __str__(self) -> str:
        if self.name == "as_is":
            return self.name
        return f"{self.name} ({self.groups}) {self.speedup:.2f}x"


def conv_decision(rows: Sequence[Row], path: Path) -> list[str]:
    """The merges for the conv plan, and the layout for each stage."""
    rows = [row for row in rows if row["cudnn_benchmark"] == "True" and time_of(row)]
    if not rows:
        return ["nothing decided: no row has a time with cuDNN autotuned"]
    chosen = best_merges(rows, path)
    kinds = sorted({conv[:4] for conv in chosen})
    merges = [("use", "dtype", "stage", "layout", *(f"kernel {k}" for k in CONV_KERNELS))]
    for kind in kinds:
        found = (chosen.get(Conv(*kind, str(k)), "") for k in CONV_KERNELS)
        merges.append((*kind, *map(str, found)))
    layouts = [("use", "dtype", "stage", "faster layout of the four together")]
    layouts += [(*kind, faster_layout(chosen, *kind)) for kind in sorted({k[:3] for k in kinds})]
    batches = sorted({int(row["batch"]) for row in rows})
    return [
        f"batch {', '.join(map(str, batches))}; merge (groups left), how much faster than as_is",
        align(merges, left=len(merges[0]), by=0),
        "",
        align(layouts, left=len(layouts[0]), by=0),
    ]


def best_merges(rows: Sequence[Row], path: Path) -> dict[Conv, Merge]:
    """The fastest merge of each convolution that was timed as it is, in each use."""
    times: dict[tuple[str, ...], dict[str, dict[str, Time]]] = {}
    groups: dict[tuple[str, ...], str] = {}
    for key, row in by_key(rows, MERGE, path).items():
        dtype, layout, stage, kernel, merge, kind = key
        conv = (dtype, stage, layout, kernel)
        if time := time_of(row):
            times.setdefault(conv, {}).setdefault(merge, {})[kind] = time
            groups[(*conv, merge)] = row["merged_groups"]
    chosen = {}
    for (use, kinds), (conv, merges) in itertools.product(USES.items(), times.items()):
        whole = {
            merge: together(found[kind] for kind in kinds)
            for merge, found in merges.items()
            if found.keys() >= set(kinds)
        }
        if "as_is" not in whole:
            continue
        best = min(whole, key=lambda merge: whole[merge].p50)
        if not whole[best].beats(whole["as_is"]):
            best = "as_is"
        speedup = whole["as_is"].p50 / whole[best].p50
        chosen[Conv(use, *conv)] = Merge(best, groups[(*conv, best)], whole[best], speedup)
    return chosen


def faster_layout(chosen: Mapping[Conv, Merge], use: str, dtype: str, stage: str) -> str:
    """By the four convolutions of a stage together, each as it was chosen; "" if one is missing."""
    totals = {}
    for layout in LAYOUTS:
        convs = [Conv(use, dtype, stage, layout, str(kernel)) for kernel in CONV_KERNELS]
        if any(conv not in chosen for conv in convs):
            return ""
        totals[layout] = together(chosen[conv].time for conv in convs)
    faster, slower = sorted(totals, key=lambda layout: totals[layout].p50)
    if not totals[faster].beats(totals[slower]):
        return "tie"
    return f"{faster} {totals[slower].p50 / totals[faster].p50:.2f}x"


def decide(folder: Path) -> list[str]:
    """All that the folder's CSVs come to, as lines.

    Raises:
        ValueError: if there are none, one lacks a column, or they are of more than one card.
    """
    results, conv_cost = folder / "results.csv", folder / "conv_cost.csv"
    rows = read_rows(results, RESULTS) if results.exists() else []
    costs = read_rows(conv_cost, CONV_COSTS) if conv_cost.exists() else []
    if not rows and not costs:
        raise ValueError(f"{folder}: holds neither results.csv nor conv_cost.csv")
    card = read_card(folder, (row["device"] for row in (*rows, *costs)))
    lines = [f"{card.name}, by {folder}"]
    if rows:
        lines += ["", "== backends/cuda_table.py", *tail_decision(rows, card, results)]
        lines += ["", "== backends/norm_table.py", *norm_decision(rows, results)]
    if costs:
        lines += ["", "== the conv plan with cuDNN autotuned", *conv_decision(costs, conv_cost)]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="the folder that gpu_check.py has written")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"argument results: must be a folder, but {args.results} is none")
    try:
        lines = decide(args.results)
    except ValueError as error:
        parser.error(f"argument results: {error}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
