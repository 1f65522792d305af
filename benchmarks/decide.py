"""Turn the CSV files of a run on a GPU into entries for the package's tables of defaults.

    python benchmarks/decide.py out        # the folder that gpu_check.py has written

Reads results.csv and conv_cost.csv from the folder, or the one of them that exists, and env.json
for the GPU's architecture and L2 size. Prints the entries; you paste them into the tables by hand
and commit the CSV files with them.

Two times tie where their spreads, p20 to p80, overlap. (The column ``tie`` compares the medians
more finely; a table must not depend on the last percent.)

CUDA_TABLE in backends/defaults.py, from the rows of scope ``tail``:

- The same backend runs forward and backward. Two times count: the forward, which is all of
  inference, and the training step, which is forward and backward added up. A backend replaces
  triton if one of the two is shorter and the other one is not longer, both beyond a tie.
  ``cuda:two_pass`` replaces ``cuda`` by the same rule.
- ``cuda`` is timed by its variants: one pass, or two passes where one pass refuses. A row never
  names ``cuda:one_pass``, which raises an error for branches that are not dense.
- The forward counts with a warm cache if branches and output fit into L2, because the convolutions
  have just written the branches; otherwise cold. The backward counts cold, because the rest of the
  network runs before it. Without env.json both count cold.
- A row's ranges end at measured values. Between measured sizes, or batches, two ranges meet at the
  geometric mean. Triton stays where there is no row, and where a tail was not timed in both modes
  by triton and by another backend: a ``?`` in the overview.
- A speed-up is the one over the next best backend at the row's worst point, for the forward and for
  the step. The overview also has triton's: where one of the two is far below 1 and the other is
  not, a table for each mode would help.

NORM_TABLE in backends/defaults.py, from the rows of scope ``norm``: the fused operator is entered
if it is nowhere slower than tail, norm and ReLU by themselves, and faster somewhere, beyond a tie.
It must have been timed at all four stages in both memory formats.

The defaults of the conv plan, from conv_cost.csv with cuDNN autotuned: for each convolution the
merge with the shortest time in the forward, and in training (forward, dgrad and wgrad added up),
unless it ties with as_is; its speed-up over as_is; and the memory format in which the four
convolutions of a stage together are faster, each with its own merge.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tail_table
from inputs import MEMORY_FORMATS, STAGES
from load_results import Gpu, Time, add_up, by_key, read_gpu, read_rows, time_of
from report import CsvRow, align

from epsanet_fused.nn.psa import CONV_KERNELS

TIMES = ("ms_p20", "ms_p50", "ms_p80", "device")
RESULTS = ("scope", *tail_table.KEY, "backend", "ok", "cuda", *TIMES)
POINT = ("stage", "batch", "dtype", "layout", "cache")
MERGE = ("dtype", "layout", "stage", "kernel", "merge", "pass")
CONV_COSTS = (*MERGE, "merged_groups", "batch", "cudnn_benchmark", *TIMES)
# The passes of a convolution in each use.
USES = {"inference": ("forward",), "training": ("forward", "dgrad", "wgrad")}


def tail_decision(rows: Sequence[CsvRow], gpu: Gpu, path: Path) -> list[str]:
    """Return an overview of the backends of all tails, and the rows for CUDA_TABLE."""
    choices = tail_table.grid(rows, gpu, path)
    if not choices:
        return ["nothing decided: no row is of a tail by triton or by a variant of cuda"]
    lines = [tail_table.overview(choices), ""]
    if gpu.arch is None:
        lines += ["Without an env.json the rows are for any GPU, and all times count cold.", ""]
    return lines + (tail_table.source(choices, gpu) or ["No row: triton runs everything."])


def norm_decision(rows: Sequence[CsvRow], path: Path) -> list[str]:
    """Return the entry for NORM_TABLE, or every reason against it."""
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
    unreached = [p for p in itertools.product(STAGES, MEMORY_FORMATS) if p not in reached]
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


class ConvUse(NamedTuple):
    """One branch convolution in inference or in training."""

    use: str
    dtype: str
    stage: str
    memory_format: str
    kernel: str


class Merge(NamedTuple):
    """A convolution's fastest merge and its speed-up over the convolution as it is."""

    name: str
    groups: str
    time: Time
    speedup: float

    def __str__(self) -> str:
        if self.name == "as_is":
            return self.name
        return f"{self.name} ({self.groups}) {self.speedup:.2f}x"


def conv_decision(rows: Sequence[CsvRow], path: Path) -> list[str]:
    """Return the merges for the conv plan, and the faster memory format of each stage."""
    rows = [row for row in rows if row["cudnn_benchmark"] == "True" and time_of(row)]
    if not rows:
        return ["nothing decided: no row has a time with cuDNN autotuned"]
    chosen = best_merges(rows, path)
    kinds = sorted({conv[:4] for conv in chosen})
    merges = [("use", "dtype", "stage", "memory format", *(f"kernel {k}" for k in CONV_KERNELS))]
    for kind in kinds:
        found = (chosen.get(ConvUse(*kind, str(k)), "") for k in CONV_KERNELS)
        merges.append((*kind, *map(str, found)))
    formats = [("use", "dtype", "stage", "faster memory format of the four together")]
    stages = sorted({kind[:3] for kind in kinds})
    formats += [(*stage, faster_memory_format(chosen, *stage)) for stage in stages]
    batches = sorted({int(row["batch"]) for row in rows})
    return [
        f"batch {', '.join(map(str, batches))}; merge (groups after it), speed-up over as_is",
        align(merges, left=len(merges[0]), by=0),
        "",
        align(formats, left=len(formats[0]), by=0),
    ]


def best_merges(rows: Sequence[CsvRow], path: Path) -> dict[ConvUse, Merge]:
    """Return the fastest merge of each convolution, in each use in which as_is was timed."""
    times: dict[tuple[str, ...], dict[str, dict[str, Time]]] = {}
    groups: dict[tuple[str, ...], str] = {}
    for key, row in by_key(rows, MERGE, path).items():
        dtype, memory_format, stage, kernel, merge, kind = key
        conv = (dtype, stage, memory_format, kernel)
        if time := time_of(row):
            times.setdefault(conv, {}).setdefault(merge, {})[kind] = time
            groups[(*conv, merge)] = row["merged_groups"]
    chosen = {}
    for (use, kinds), (conv, merges) in itertools.product(USES.items(), times.items()):
        totals = {
            merge: add_up(found[kind] for kind in kinds)
            for merge, found in merges.items()
            if found.keys() >= set(kinds)
        }
        if "as_is" not in totals:
            continue
        best = min(totals, key=lambda merge: totals[merge].p50)
        if not totals[best].beats(totals["as_is"]):
            best = "as_is"
        speedup = totals["as_is"].p50 / totals[best].p50
        chosen[ConvUse(use, *conv)] = Merge(best, groups[(*conv, best)], totals[best], speedup)
    return chosen


def faster_memory_format(chosen: Mapping[ConvUse, Merge], use: str, dtype: str, stage: str) -> str:
    """Compare a stage's four convolutions together, each with its merge; "" if one is missing."""
    totals = {}
    for memory_format in MEMORY_FORMATS:
        convs = [ConvUse(use, dtype, stage, memory_format, str(kernel)) for kernel in CONV_KERNELS]
        if any(conv not in chosen for conv in convs):
            return ""
        totals[memory_format] = add_up(chosen[conv].time for conv in convs)
    faster, slower = sorted(totals, key=lambda name: totals[name].p50)
    if not totals[faster].beats(totals[slower]):
        return "tie"
    return f"{faster} {totals[slower].p50 / totals[faster].p50:.2f}x"


def decide(folder: Path) -> list[str]:
    """Return the decisions for all CSV files of a folder, as lines of text.

    Raises:
        ValueError: if there is no file, one lacks a column, or they are of several GPUs.
    """
    results, conv_cost = folder / "results.csv", folder / "conv_cost.csv"
    rows = read_rows(results, RESULTS) if results.exists() else []
    costs = read_rows(conv_cost, CONV_COSTS) if conv_cost.exists() else []
    if not rows and not costs:
        raise ValueError(f"{folder}: holds neither results.csv nor conv_cost.csv")
    gpu = read_gpu(folder, (row["device"] for row in (*rows, *costs)))
    lines = [f"{gpu.name}, by {folder}"]
    if rows:
        lines += ["", "== CUDA_TABLE", *tail_decision(rows, gpu, results)]
        lines += ["", "== NORM_TABLE", *norm_decision(rows, results)]
    if costs:
        lines += ["", "== the conv plan with cuDNN autotuned", *conv_decision(costs, conv_cost)]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="the folder that gpu_check.py wrote")
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
