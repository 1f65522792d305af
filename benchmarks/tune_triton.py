"""Times other entries of the Triton kernels' table, each against the one there is. One CSV.

    python benchmarks/tune_triton.py --out out

backends/triton/config.py says how the kernels are cut into programs. For each of its entries a few
others are tried, at the sizes that it serves: what is timed is the launch of just that kernel, and
of the gate with the sums. A time below 1 in the last table is that of a faster entry. From batch 2
on the last-level cache is emptied before each launch, as by bench_psa.py's --cache cold; a batch of
one stays in it. Launches are captured in CUDA graphs, so that the host's time is no part of them.

Candidates compile in as many processes as there are cores, in the order in which they are timed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial

import torch
import triton
from aot_compile import compilers, launches
from environment import describe
from inputs import STAGES
from l2_flush import make_clock
from options import add_shared, finish_shared, positive_int
from report import align, write_csv
from torch import Tensor
from triton.runtime.errors import TritonError
from tune_cases import (
    KINDS,
    LAYOUTS,
    PRESENT,
    Candidate,
    Case,
    applied,
    compile_ahead,
    distinct,
    plan,
    prepare,
    trials,
)

from epsanet_fused.backends.triton import unavailable_reason
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Clock, Timing, Variant, interleave

COLUMNS = (
    "setting", "present", "candidate", "kind", "stage", "batch", "dtype", "layout", "cache",
    "kernels", "ms_p20", "ms_p50", "ms_p80", "samples", "clock", "ratio", "tie", "registers",
    "spills", "difference", "ok", "note", "device", "driver", "python", "torch", "triton", "cuda",
    "cudnn", "epsanet_fused", "threads",
)  # fmt: skip
REPS = 40
MOST_CANDIDATES = 12  # of one entry, for one case
MOST_SECONDS = 1.0  # for one case
# So many warm launches make one graph: a replay costs the host more than one of them the device.
WARM_LAUNCHES = 20
# How far results may be from those of the present cut, of the largest: sums are reordered.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
Run = Callable[[], Sequence[Tensor]]
Row = dict[str, object]


class Tuner:
    """Times one case after another and keeps the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device: torch.device = args.device
        self.reps: int = args.reps
        self.most: int = args.most
        caches = ("warm", "cold") if self.device.type == "cuda" else ("warm",)
        self.clocks: dict[str, Clock] = {c: make_clock(self.device, c == "cold") for c in caches}
        self.environment = describe(self.device)
        self.rows: list[Row] = []

    def measure(self, case: Case, seconds: float) -> None:
        """All candidates interleaved with the table as it is; equal cuts are timed once."""
        tried = trials(case, self.most)
        cuts = distinct(tried)
        present = tried[0][1]
        run = prepare(case, self.device)
        expected = [result.clone() for result in totals(case, run())]
        checks = {cut: check(case, run, candidate, expected) for cut, candidate in cuts.items()}
        if checks[present]["ok"] is not True:
            raise RuntimeError(f"the present: {checks[present]['note'] or 'not run'}")
        warm = case.batch == 1 or self.device.type != "cuda"
        repeats = WARM_LAUNCHES if warm and self.device.type == "cuda" else 1
        variants = {
            cut: self._variant(run, candidate, repeats)
            for cut, candidate in cuts.items()
            if checks[cut]["ok"] is True
        }
        clock = self.clocks["warm" if warm else "cold"]
        timings = interleave(variants, clock, self.reps, seconds)
        settings = {"cache": "warm" if warm else "cold", "clock": clock.name}
        for candidate, cut in tried:
            row = self._head(case, candidate) | settings | checks[cut]
            if cut in timings:
                row |= figures(timings[cut], timings[present], repeats)
            self.rows.append(row)

    def note(self, case: Case, note: str, ok: bool | str) -> None:
        self.rows.append(self._head(case, PRESENT) | {"note": note, "ok": ok})

    def _head(self, case: Case, candidate: Candidate) -> Row:
        return dict.fromkeys(COLUMNS, "") | self.environment | case._asdict() | {
            "setting": candidate.setting, "present": candidate.present,
            "candidate": candidate.name,
        }  # fmt: skip

    def _variant(self, run: Run, candidate: Candidate, repeats: int) -> Variant:
        if self.device.type != "cuda":
            return Variant(run, partial(applied, candidate))
        graph = torch.cuda.CUDAGraph()
        with applied(candidate), torch.cuda.graph(graph):
            for _ in range(repeats):
                run()
        return Variant(graph.replay)


def check(case: Case, run: Run, candidate: Candidate, expected: Sequence[Tensor]) -> Row:
    """Launch it, and say what it was and how far its results are from those expected."""
    try:
        with applied(candidate), launches() as launched:
            for result in run():
                result.fill_(math.nan)
            results = totals(case, run())
    except (RuntimeError, TritonError) as error:  # too many registers, for one
        return {"ok": "", "note": f"can't run: {type(error).__name__}: {error}"[:300]}
    differences = [
        ((r - e).abs().max() / e.abs().max().clamp(min=torch.finfo(e.dtype).tiny)).item()
        for r, e in zip(results, expected, strict=True)
    ]
    row: Row = {"difference": max(differences), "ok": True}
    if not all(d <= ROUNDING[r.dtype] for d, r in zip(differences, results, strict=True)):
        row |= {"ok": False, "note": "WRONG: so it isn't timed"}
    if launched:  # the first is the one that streams
        kernel = launched[0][1]
        names = "+".join(dict.fromkeys(name for name, _ in launched))
        row |= {"kernels": names, "registers": kernel.n_regs, "spills": kernel.n_spills}
    return row


def totals(case: Case, results: Sequence[Tensor]) -> Sequence[Tensor]:
    """What doesn't depend on the cut: of sums over splits, (B, splits, S, C), their sums."""
    return [r.sum(1) for r in results] if case.kind == "gradient_sums" else results


def figures(timing: Timing, present: Timing, launches: int) -> Row:
    """The columns that follow from a timing of so many launches."""
    return {
        "ms_p20": timing.p20 / launches, "ms_p50": timing.p50 / launches,
        "ms_p80": timing.p80 / launches, "samples": timing.samples,
        "ratio": timing.p50 / present.p50, "tie": timing.ties(present),
    }  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """For every entry of the table what did best, by the geometric mean over all its cases."""
    settings: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["setting"] != PRESENT.setting:
            settings.setdefault(str(row["setting"]), {}).setdefault(
                str(row["candidate"]), []
            ).append(row)
    head = ("entry", "present", "best", "cases", "time", "worst", "at", "faster", "slower")
    lines = []
    for setting, found in settings.items():
        able = {name: tried for name, tried in found.items() if all(r["ratio"] for r in tried)}
        best = min(able, key=lambda name: mean_ratio(able[name]), default="")
        present = str(next(iter(found.values()))[0]["present"])
        lines.append((setting, present, *_verdict(best, able.get(best, []))))
    return align([head, *lines], left=3)


def _verdict(best: str, rows: Sequence[Row]) -> tuple[str, ...]:
    apart = [float(str(row["ratio"])) for row in rows if not row["tie"]]
    if min(apart, default=1.0) >= 1 or mean_ratio(rows) >= 1:
        return "the present", "", "", "", "", "", ""
    worst = max(rows, key=lambda row: float(str(row["ratio"])))
    where = f"{worst['kind']} {worst['stage']} {worst['batch']} {worst['layout']}"
    faster, slower = sum(r < 1 for r in apart), sum(r > 1 for r in apart)
    return (
        best, str(len(rows)), f"{mean_ratio(rows):.3f}", f"{worst['ratio']:.3f}", where,
        str(faster), str(slower) if slower else "nowhere",
    )  # fmt: skip


def mean_ratio(rows: Sequence[Row]) -> float:
    return math.exp(sum(math.log(float(str(row["ratio"]))) for row in rows) / len(rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--stages", choices=tuple(STAGES), nargs="+", default=list(STAGES))
    add("--batch", type=positive_int, nargs="+", default=[128, 1, 32])
    add("--dtype", choices=("float32", "float16", "bfloat16"), nargs="+", default=["float16"])
    add("--layout", choices=tuple(LAYOUTS), nargs="+", default=list(LAYOUTS))
    add("--kinds", choices=tuple(KINDS), nargs="+", default=list(KINDS), help="the launches")
    add("--quick", action="store_true", help=argparse.SUPPRESS)  # interpreted, to see it work
    add_shared(parser, 150.0, "what isn't reached by then is recorded as skipped")
    args = parser.parse_args(argv)
    finish_shared(parser, args)
    if args.device.type != "cuda" and not args.quick:
        parser.error("argument --device: the time of interpreted kernels says nothing of a card's")
    args.reps, args.most = (1, 2) if args.quick else (REPS, MOST_CANDIDATES)
    return args


def run(args: argparse.Namespace) -> int:
    if reason := unavailable_reason(args.device.type):
        print(f"tune_triton.py: the triton backend can't run here: {reason}", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + args.seconds
    cases = plan(args.kinds, args.stages, args.batch, args.dtype, args.layout)
    args.out.mkdir(parents=True, exist_ok=True)
    tuner = Tuner(args)
    with compiling(cases, args.device, args.most) as compiled:
        for i, case in progress(cases, "case", lambda case: " ".join(map(str, case))):
            wait(compiled[i], timeout=max(0.0, deadline - time.perf_counter()))
            left = deadline - time.perf_counter()
            try:
                if left > 0:
                    tuner.measure(case, min(MOST_SECONDS, left / (len(cases) - i)))
                else:
                    tuner.note(case, "skipped: out of time", "")
            except (RuntimeError, TritonError) as error:  # must not end the rest
                tuner.note(case, f"{type(error).__name__}: {error}"[:300], False)
            if i % 16 == 0 or i + 1 == len(cases):
                write_csv(args.out / "tune_triton.csv", tuner.rows, COLUMNS)
    print(summary(tuner.rows))
    skipped = sum(str(row["note"]).startswith("skipped") for row in tuner.rows)
    print(f"{len(cases) - skipped} of {len(cases)} cases measured within --seconds")
    if args.device.type != "cuda":
        print("These are times of interpreted kernels: they say nothing of a card's")
    return 1 if any(row["ok"] is False for row in tuner.rows) else 0


@contextmanager
def compiling(
    cases: Sequence[Case], device: torch.device, most: int
) -> Iterator[list[list[Future[None]]]]:
    """Meanwhile each case's candidates compile, in the order of the cases; interpreted, none."""
    if device.type != "cuda":
        yield [[] for _ in cases]
        return
    pool = compilers(triton.runtime.driver.active.get_current_target())
    try:
        wanted = [distinct(trials(case, most)).values() for case in cases]
        yield [
            [pool.submit(compile_ahead, case, candidate) for candidate in candidates]
            for case, candidates in zip(cases, wanted, strict=True)
        ]
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(run(parse()))
