"""Time other entries of the Triton kernels' table, each against the present one: a CSV file.

    python benchmarks/tune_triton.py --out out

backends/triton/config.py determines how the kernels are cut into programs. This tries a few other
values for each entry, at the sizes that use it, and times the launch of that kernel alone; the gate
is timed together with the sums. A time below 1 in the last table is that of a faster entry. From
batch 2 on, the last-level cache is emptied before each launch, as with --cache cold of
bench_psa.py; a batch of one stays in the cache. Launches are captured in CUDA graphs, which leaves
the host's time out.

Other processes compile the kernels meanwhile, one per core, in the order of the timings.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial

import torch
import triton
from aot_compile import compiler_pool, record_launches
from environment import describe
from inputs import MEMORY_FORMATS, STAGES
from l2_flush import make_clock
from options import DTYPES, add_shared, parse_shared, positive_int
from report import MACHINE, OUT_OF_TIME, ResultRow, align, failure, timing_columns, write_csv
from torch import Tensor
from triton.runtime.errors import TritonError
from tune_cases import (
    KINDS,
    PRESENT,
    Case,
    Override,
    applied,
    compile_ahead,
    distinct,
    plan,
    prepare,
    trials,
)

from epsanet_fused.backends.triton import unavailable_reason
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Clock, Variant, interleave

COLUMNS = (
    "setting", "present", "candidate", "kind", "stage", "batch", "dtype", "layout", "cache",
    "kernels", "ms_p20", "ms_p50", "ms_p80", "samples", "clock", "ratio", "tie", "registers",
    "spills", "difference", "ok", "note", *MACHINE,
)  # fmt: skip
REPS = 40
MAX_OVERRIDES = 12  # of one entry, for one case
MAX_SECONDS = 1.0  # for one case
# The launches in one graph with a warm cache: the host's replay takes longer than one launch.
WARM_LAUNCHES = 20
# The largest difference from the present results, relative to the largest of them: another config
# adds in another order.
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
Launch = Callable[[], Sequence[Tensor]]


class Tuner:
    """Times one case after another and collects the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device: torch.device = args.device
        self.reps: int = args.reps
        self.max_overrides: int = args.max_overrides
        caches = ("warm", "cold") if self.device.type == "cuda" else ("warm",)
        self.clocks: dict[str, Clock] = {c: make_clock(self.device, c == "cold") for c in caches}
        self.environment = describe(self.device)
        self.rows: list[dict[str, object]] = []

    def measure_or_skip(self, case: Case, seconds: float) -> None:
        """Measure a case; record it as skipped without time, and as failed after an error."""
        try:
            if seconds > 0:
                self.measure(case, seconds)
            else:
                self._record(case, {"note": OUT_OF_TIME})
        except (RuntimeError, TritonError) as error:
            self._record(case, failure(error))

    def measure(self, case: Case, seconds: float) -> None:
        """Time all overrides interleaved with the present table; equal configs are timed once."""
        tried = trials(case, self.max_overrides)
        configs = distinct(tried)
        present = tried[0][1]
        launch = prepare(case, self.device)
        expected = [result.clone() for result in totals(case, launch())]
        checks = {cfg: check(case, launch, o, expected) for cfg, o in configs.items()}
        if checks[present]["ok"] is not True:
            raise RuntimeError(f"the present table: {checks[present]['note'] or 'not run'}")
        on_gpu = self.device.type == "cuda"
        cache = "cold" if on_gpu and case.batch > 1 else "warm"
        repeats = WARM_LAUNCHES if on_gpu and cache == "warm" else 1
        variants = {
            cfg: self._variant(launch, override, repeats)
            for cfg, override in configs.items()
            if checks[cfg]["ok"] is True
        }
        clock = self.clocks[cache]
        timings = interleave(variants, clock, self.reps, seconds)
        for override, cfg in tried:
            row = self._shared_columns(case, override) | checks[cfg]
            row |= {"cache": cache, "clock": clock.name}
            if cfg in timings:
                timing = timings[cfg]
                row |= timing_columns(timing, repeats)
                row["ratio"] = timing.p50 / timings[present].p50
                row["tie"] = timing.ties(timings[present])
            self.rows.append(row)

    def _record(self, case: Case, columns: Mapping[str, object]) -> None:
        """Record a case without timings."""
        self.rows.append(self._shared_columns(case, PRESENT) | columns)

    def _shared_columns(self, case: Case, override: Override) -> dict[str, object]:
        return (
            dict.fromkeys(COLUMNS, "")
            | self.environment
            | {
                "setting": override.setting,
                "present": override.present,
                "candidate": override.name,
                "kind": case.kind,
                "stage": case.stage,
                "batch": case.batch,
                "dtype": case.dtype,
                "layout": case.memory_format,
            }
        )

    def _variant(self, launch: Launch, override: Override, repeats: int) -> Variant:
        """Capture the launches in a CUDA graph; on a CPU return the launch itself."""
        if self.device.type != "cuda":
            return Variant(launch, partial(applied, override))
        graph = torch.cuda.CUDAGraph()
        with applied(override), torch.cuda.graph(graph):
            for _ in range(repeats):
                launch()
        return Variant(graph.replay)


def check(
    case: Case, launch: Launch, override: Override, expected: Sequence[Tensor]
) -> dict[str, object]:
    """Run a launch and compare its results; return the columns about its kernels and results."""
    try:
        with applied(override), record_launches() as launched:
            for result in launch():
                result.fill_(math.nan)
            results = totals(case, launch())
    except (RuntimeError, TritonError) as error:  # for example, too many registers
        return {"ok": "", "note": f"can't run: {type(error).__name__}: {error}"[:300]}
    differences = [
        ((r - e).abs().max() / e.abs().max().clamp(min=torch.finfo(e.dtype).tiny)).item()
        for r, e in zip(results, expected, strict=True)
    ]
    row: dict[str, object] = {"difference": max(differences), "ok": True}
    if not all(d <= MAX_DIFFERENCE[r.dtype] for d, r in zip(differences, results, strict=True)):
        row |= {"ok": False, "note": "WRONG: so it isn't timed"}
    if launched:  # the first kernel is the one that reads or writes the images
        kernel = launched[0][1]
        names = "+".join(dict.fromkeys(name for name, _ in launched))
        row |= {"kernels": names, "registers": kernel.n_regs, "spills": kernel.n_spills}
    return row


def totals(case: Case, results: Sequence[Tensor]) -> Sequence[Tensor]:
    """Add up partial sums (B, splits, S, C), whose number depends on the config, over splits."""
    return [r.sum(1) for r in results] if case.kind == "gradient_sums" else results


def summary(rows: Sequence[ResultRow]) -> str:
    """Format a line per table entry: the best value by the geometric mean over all its cases."""
    settings: dict[str, dict[str, list[ResultRow]]] = {}
    for row in rows:
        if row["setting"] != PRESENT.setting:
            by_candidate = settings.setdefault(str(row["setting"]), {})
            by_candidate.setdefault(str(row["candidate"]), []).append(row)
    head = ("entry", "present", "best", "cases", "time", "worst", "at", "faster", "slower")
    lines = []
    for setting, found in settings.items():
        timed = {name: tried for name, tried in found.items() if all(r["ratio"] for r in tried)}
        best = min(timed, key=lambda name: mean_ratio(timed[name]), default="")
        present = str(next(iter(found.values()))[0]["present"])
        lines.append((setting, present, *_comparison(best, timed.get(best, []))))
    return align([head, *lines], left=3)


def _comparison(best: str, rows: Sequence[ResultRow]) -> tuple[str, ...]:
    """Return the cells that compare the best value with the present one."""
    ratios = [float(str(row["ratio"])) for row in rows if not row["tie"]]
    if min(ratios, default=1.0) >= 1 or mean_ratio(rows) >= 1:
        return "the present", "", "", "", "", "", ""
    worst = max(rows, key=lambda row: float(str(row["ratio"])))
    where = f"{worst['kind']} {worst['stage']} {worst['batch']} {worst['layout']}"
    faster, slower = sum(r < 1 for r in ratios), sum(r > 1 for r in ratios)
    return (
        best,
        str(len(rows)),
        f"{mean_ratio(rows):.3f}",
        f"{worst['ratio']:.3f}",
        where,
        str(faster),
        str(slower) if slower else "nowhere",
    )


def mean_ratio(rows: Sequence[ResultRow]) -> float:
    """Return the geometric mean of the times relative to the present ones."""
    return math.exp(sum(math.log(float(str(row["ratio"]))) for row in rows) / len(rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    formats, kinds = list(MEMORY_FORMATS), list(KINDS)
    add("--stages", choices=tuple(STAGES), nargs="+", default=list(STAGES))
    add("--batch", type=positive_int, nargs="+", default=[128, 1, 32])
    add("--dtype", choices=DTYPES, nargs="+", default=["float16"])
    add("--memory-format", choices=formats, nargs="+", default=formats)
    add("--kinds", choices=kinds, nargs="+", default=kinds, help="the launches")
    add("--quick", action="store_true", help=argparse.SUPPRESS)  # a test with interpreted kernels
    add_shared(parser, 150.0, "cases not begun by then are recorded as skipped")
    args = parse_shared(parser, argv)
    if args.device.type != "cuda" and not args.quick:
        parser.error("argument --device: the time of interpreted kernels says nothing about a GPU")
    args.reps, args.max_overrides = (1, 2) if args.quick else (REPS, MAX_OVERRIDES)
    return args


def run(args: argparse.Namespace) -> int:
    """Measure every case, write the CSV file and print the summary; return the exit status."""
    if reason := unavailable_reason(args.device.type):
        print(f"tune_triton.py: the triton backend can't run here: {reason}", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + args.seconds
    cases = plan(args.kinds, args.stages, args.batch, args.dtype, args.memory_format)
    args.out.mkdir(parents=True, exist_ok=True)
    tuner = Tuner(args)
    with compiling(cases, args.device, args.max_overrides) as compiled:
        for i, case in progress(cases, "case", lambda case: " ".join(map(str, case))):
            wait(compiled[i], timeout=max(0.0, deadline - time.perf_counter()))
            left = deadline - time.perf_counter()
            tuner.measure_or_skip(case, min(MAX_SECONDS, left / (len(cases) - i)))
            if i % 16 == 0 or i + 1 == len(cases):
                write_csv(args.out / "tune_triton.csv", tuner.rows, COLUMNS)
    print(summary(tuner.rows))
    skipped = sum(str(row["note"]).startswith("skipped") for row in tuner.rows)
    print(f"{len(cases) - skipped} of {len(cases)} cases measured within --seconds")
    if args.device.type != "cuda":
        print("These are times of interpreted kernels: they say nothing about a GPU")
    return 1 if any(row["ok"] is False for row in tuner.rows) else 0


@contextmanager
def compiling(
    cases: Sequence[Case], device: torch.device, max_overrides: int
) -> Iterator[list[list[Future[None]]]]:
    """Compile the overrides of each case in other processes; nothing if they are interpreted."""
    if device.type != "cuda":
        yield [[] for _ in cases]
        return
    pool = compiler_pool(triton.runtime.driver.active.get_current_target())
    try:
        needed = [distinct(trials(case, max_overrides)).values() for case in cases]
        yield [
            [pool.submit(compile_ahead, case, override) for override in overrides]
            for case, overrides in zip(cases, needed, strict=True)
        ]
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(run(parse()))
