"""Time the PSA tail, module, block or network by every provider: a table, a CSV file and a plot.

    python benchmarks/bench_psa.py --out out

Each timing comes with its largest error against the float64 oracle. A result whose error is over
its bound is not timed. The provider ``eager`` is the official code. ``copy`` copies the tail's
output once, which is the limit of the memory bandwidth. ``necessary_bytes`` is the traffic that any
implementation needs. In units of N, the bytes of the output: 2 N forward (read the branches, write
the output), 3 N backward (read the gradient and the branches, write the branches' gradients), 5 N
in training.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

# Otherwise the profiler that measures memory prints a line on stderr at each start.
os.environ.setdefault("KINETO_LOG_LEVEL", "10")

import torch
from baselines import baseline_of
from checks import NetworkCheckers
from environment import describe
from inputs import MEMORY_FORMATS, STAGES, Settings, Source, Workload
from l2_flush import make_clock
from memory import peak_extra_bytes
from options import DTYPES, add_shared, parse_shared, positive_int
from plots import plot
from providers import MODES, PROVIDERS, SCOPES, defaults
from report import AXES, COLUMNS, OUT_OF_TIME, failure, label, table, timing_columns, write_csv
from steps import Prepared

import epsanet_fused as ef
from epsanet_fused.backends.registry import PATHS
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Clock, Timing, Variant, interleave

# The necessary traffic of each mode, in units of N.
NECESSARY = {"inference": 2, "training": 5, "backward": 3}
# The largest share of the remaining time that one point may spend on preparing its providers.
MAX_PREPARE_SHARE = 0.7
PAIR_SECONDS = 4.0


class Candidate(NamedTuple):
    """A provider's row, and its step if the result is right."""

    row: dict[str, object]
    prepared: Prepared | None


class Point(NamedTuple):
    """One point of the sweep in one memory format."""

    settings: Settings
    workload: Workload


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    norm_help = "norm: the tail with the BatchNorm2d and ReLU after it, in training"
    add("--scope", choices=SCOPES, default="tail", help=norm_help)
    mode_help = "training: forward and backward, of 16-bit modules in mixed precision"
    add("--mode", choices=MODES, nargs="+", default=["inference"], help=mode_help)
    add("--stages", choices=tuple(STAGES), nargs="+", default=list(STAGES))
    add("--batch", type=positive_int, nargs="+", default=[8])
    add("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    formats, format_help = (*MEMORY_FORMATS, "best"), "best: the faster one of each provider"
    add("--memory-format", choices=formats, nargs="+", default=["nchw"], help=format_help)
    cache_help = "cold: empty the last-level cache before each call"
    add("--cache", choices=("warm", "cold"), nargs="+", default=["warm"], help=cache_help)
    add("--providers", choices=tuple(PROVIDERS), nargs="+", help="default: all that can run here")
    add("--threads", type=positive_int, help="CPU threads; default: 1 if the CPU is timed")
    each_help = "time each provider against the first as soon as it is ready; write its rows"
    add("--one-by-one", action="store_true", help=each_help)
    add("--plan-file", type=Path, help="of convolution plans, to read and to extend")
    add("--input", choices=("photos", "randn"), default="photos")
    add("--no-plot", action="store_true", help="write the CSV file only")
    add("--reps", type=positive_int, default=200, help="largest number of samples of a timing")
    add_shared(parser, 100.0, "no point is begun after this time")
    args = parse_shared(parser, argv)
    check_arguments(parser, args)
    args.providers = args.providers or defaults(args.device, args.scope)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse combinations of arguments that cannot be measured."""
    if args.scope != "tail" and "backward" in args.mode:
        parser.error("argument --mode: backward by itself is timed for --scope tail only")
    if args.scope == "norm" and args.mode != ["training"]:
        parser.error("argument --mode: --scope norm is for training")
    if args.scope in ("tail", "norm") and "best" in args.memory_format:
        parser.error("argument --memory-format: best is for --scope module, block and network")
    if args.input == "photos" and importlib.util.find_spec("sklearn") is None:
        parser.error(
            "argument --input: photos needs scikit-learn, which isn't installed; install it, or "
            "use --input randn"
        )
    for name in args.providers or ():
        if not any(PROVIDERS[name].fits(args.scope, mode) for mode in args.mode):
            parser.error(
                f"argument --providers: {name} is for --scope {' '.join(PROVIDERS[name].scopes)} "
                f"and --mode {' '.join(PROVIDERS[name].modes)}"
            )


def sweep(args: argparse.Namespace) -> list[Settings]:
    """Return every point to measure, in the order of the arguments. The network has no stages."""
    stages = args.stages if args.scope != "network" else ["all"]
    points = itertools.product(args.mode, args.batch, args.dtype, args.memory_format, stages)
    return [
        Settings(args.scope, mode, stage, batch, dtype, memory_format)
        for mode, batch, dtype, memory_format, stage in points
    ]


def each_memory_format(settings: Settings) -> list[Settings]:
    """Return the settings in every memory format to try: for "best" in all of them."""
    best = settings.memory_format == "best"
    choices = MEMORY_FORMATS if best else (settings.memory_format,)
    return [settings._replace(memory_format=choice) for choice in choices]


def words(settings: Settings) -> str:
    """Describe a point in one line."""
    return " ".join(map(str, settings))


class Bench:
    """Measures one point of the sweep after another and collects the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: torch.device = args.device
        self.rows: list[dict[str, object]] = []
        self.clocks: dict[str, Clock] = {
            cache: make_clock(self.device, cache == "cold") for cache in args.cache
        }
        self.environment = describe(self.device)
        reasons = {n: PROVIDERS[n].unavailable_reason(self.device) for n in args.providers}
        self.skipped = {name: reason for name, reason in reasons.items() if reason}
        self.names = [name for name in args.providers if name not in self.skipped]
        baselines = dict.fromkeys(filter(None, map(baseline_of, self.names)))
        self.source = Source(args.input, self.device, baselines, args.plan_file)

    # Dynamo counts all compilations of one forward together, and gives up without an error.
    @torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True)
    def measure(self, settings: Settings, seconds: float, left: float) -> None:
        """Check every provider against the oracle, then time those that pass, interleaved.

        Args:
            settings: the point.
            seconds: this point's share of the remaining time.
            left: all of the remaining time. Compiling may take more than the share; when it has
                taken most of ``left``, the remaining providers are skipped.
        """
        began = time.perf_counter()
        # The compilations of earlier points would count against the limit above.
        torch._dynamo.reset()
        points = [Point(s, self.source.workload(s)) for s in each_memory_format(settings)]
        if self.args.one_by_one:
            self._measure_one_by_one(settings, points, began + left)
            return
        candidates = self._prepare_all(settings, points, began + MAX_PREPARE_SHARE * left)
        self._measure_memory(candidates)
        seconds_left = max(0.0, seconds - (time.perf_counter() - began))
        self._time(settings, points[0].workload, candidates, seconds_left)

    def _measure_one_by_one(
        self, settings: Settings, points: Sequence[Point], deadline: float
    ) -> None:
        """Time each provider against the first one, and write its rows before the next is made."""
        checkers = NetworkCheckers(points[0].workload, points[0].settings)
        names = [n for n in self.names if PROVIDERS[n].fits(settings.scope, settings.mode)]
        first: dict[str, Candidate] = {}
        for i, name in enumerate(names):
            if first and time.perf_counter() > deadline:
                self.rows.append(self.row(settings, name) | {"note": OUT_OF_TIME})
                continue
            candidate = self._prepare_best(name, points, checkers)
            self._measure_memory({name: candidate})
            first = first or {name: candidate}
            known = len(self.rows)
            seconds = min(PAIR_SECONDS, max(0.0, deadline - time.perf_counter()))
            self._time(settings, points[0].workload, first | {name: candidate}, seconds)
            if i:  # the first one's rows are those of its own turn
                self.rows[known:] = [r for r in self.rows[known:] if r["provider"] == name]
            self.write()
            del candidate
            gc.collect()

    def write(self) -> None:
        """Write all rows so far."""
        write_csv(self.args.out / "bench_psa.csv", self.rows)

    def _prepare_all(
        self, settings: Settings, points: Sequence[Point], deadline: float
    ) -> dict[str, Candidate]:
        """Prepare and check every provider, each in its faster memory format."""
        checkers = NetworkCheckers(points[0].workload, points[0].settings)
        found: dict[str, Candidate] = {}
        for name in self.names:
            if not PROVIDERS[name].fits(settings.scope, settings.mode):
                continue
            if found and time.perf_counter() > deadline:
                found[name] = Candidate(self.row(settings, name) | {"note": OUT_OF_TIME}, None)
                continue
            found[name] = self._prepare_best(name, points, checkers)
        return found

    def _prepare_best(
        self, name: str, points: Sequence[Point], checkers: NetworkCheckers
    ) -> Candidate:
        """Prepare and check a provider in its faster memory format."""
        tried = points[:1] if PROVIDERS[name].chooses_memory_format else points
        candidates = [self._prepare(name, point, checkers) for point in tried]
        best = self._fastest(candidates)
        self.rows += [c.row for c in candidates if c.row["ok"] is False and c is not best]
        return best

    def _prepare(self, name: str, point: Point, checkers: NetworkCheckers) -> Candidate:
        """Prepare a provider, run it once and compare its result with the expected one."""
        settings, workload = point
        row = self.row(settings, name)
        try:
            prepared = PROVIDERS[name].prepare(workload, settings.mode, settings.autocast)
            with ef.use_backend(prepared.choice):
                accuracy = checkers.of(name).check(prepared.step())
        except Exception as error:  # an error of one provider must not end the others
            # A variant of a backend may refuse a size: that is not a failure.
            refused = name in PATHS and isinstance(error, ValueError)
            return Candidate(row | ({"note": str(error)} if refused else failure(error)), None)
        row |= {"backend": prepared.backend, **accuracy._asdict()}
        if accuracy.ok:
            return Candidate(row, prepared)
        note = "WRONG: the error is over its bound, so it isn't timed"
        return Candidate(row | {"note": note}, None)

    def _fastest(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the fastest candidate; the first one if none has a right result."""
        right = {str(i): c.prepared for i, c in enumerate(candidates) if c.prepared is not None}
        if len(right) < 2:
            return candidates[int(next(iter(right), 0))]
        clock = next(iter(self.clocks.values()))
        variants = {key: make_variant(prepared) for key, prepared in right.items()}
        timings = interleave(variants, clock, reps=5, seconds=0)
        return candidates[int(min(timings, key=lambda key: timings[key].p50))]

    def _measure_memory(self, candidates: Mapping[str, Candidate]) -> None:
        """Add the peak memory of each candidate's step to its row."""
        for row, prepared in candidates.values():
            if prepared is not None and prepared.memory_step is not None:
                with ef.use_backend(prepared.choice):
                    row["peak_extra_bytes"] = peak_extra_bytes(prepared.memory_step, self.device)

    def _time(
        self,
        settings: Settings,
        workload: Workload,
        candidates: Mapping[str, Candidate],
        seconds: float,
    ) -> None:
        """Time the candidates against each other with every clock and collect their rows."""
        rows = {name: candidate.row for name, candidate in candidates.items()}
        variants = {n: make_variant(c.prepared) for n, c in candidates.items() if c.prepared}
        if workload.output_bytes is not None:
            out = torch.cat([x.detach() for x in workload.inputs], 1)
            variants["copy"] = Variant(out.clone, nullcontext)
            rows["copy"] = self.row(settings, "copy") | {"backend": "pytorch"}
        for cache, clock in self.clocks.items():
            share = seconds / len(self.clocks)
            timings = interleave(variants, clock, self.args.reps, share)
            for name, row in rows.items():
                timed = {"cache": cache, "clock": clock.name}
                if name in timings:
                    timed |= result_columns(name, timings, settings.mode, workload.output_bytes)
                self.rows.append(row | timed)

    def fail(self, settings: Settings, error: Exception) -> None:
        """Record a point that failed as a whole, for example for lack of memory."""
        self.rows.append(self.row(settings, "all") | failure(error))

    def row(self, settings: Settings, provider: str) -> dict[str, object]:
        """Return a row without results."""
        row: dict[str, object] = dict.fromkeys(COLUMNS, "")
        about = {"provider": provider, "input": self.args.input}
        return row | settings.columns | self.environment | about


def make_variant(prepared: Prepared) -> Variant:
    """Wrap a step for ``interleave``, which runs it with its backend."""
    return Variant(prepared.step, functools.partial(ef.use_backend, prepared.choice))


def result_columns(
    name: str, timings: Mapping[str, Timing], mode: str, output_bytes: int | None
) -> dict[str, object]:
    """Return a provider's columns: its time, its speed-up over eager and its traffic."""
    timing = timings[name]
    row = timing_columns(timing)
    if eager := timings.get("eager"):
        row["speedup"] = eager.p50 / timing.p50
        row["tie"] = timing is not eager and timing.ties(eager)
    if output_bytes is not None:
        necessary = NECESSARY["inference" if name == "copy" else mode]
        rate, copy_rate = necessary / timing.p50, 2 / timings["copy"].p50  # in N per ms
        row |= {
            "necessary_bytes": necessary * output_bytes,
            "gbps": rate * output_bytes / 1e6,
            "copy_gbps": copy_rate * output_bytes / 1e6,
            "percent_of_copy": 100 * rate / copy_rate,
        }
    return row


def run(args: argparse.Namespace) -> int:
    """Measure every point, write the files and print the table; return the exit status."""
    began = time.perf_counter()
    if threads := args.threads or (1 if args.device.type == "cpu" else None):
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # for all providers alike
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    points = sweep(args)
    for i, settings in progress(points, "case", words):
        left = args.seconds - (time.perf_counter() - began)
        if left <= 0 and i > 0:
            bench.rows.append(bench.row(settings, "all") | {"note": OUT_OF_TIME})
            continue
        try:
            with torch.set_grad_enabled(settings.mode != "inference"):
                bench.measure(settings, left / (len(points) - i), left)
        except RuntimeError as error:
            bench.fail(settings, error)
        bench.write()  # the rows so far survive a crash
        gc.collect()
    bench.write()
    print(table([row for row in bench.rows if row["provider"] != "all"]))
    for line in notes(bench):
        print(line)
    files = "bench_psa.csv"
    if not args.no_plot:
        plotted = plot(args.out / "bench_psa.png", bench.rows, title(bench))
        files += ", bench_psa.png" if plotted else " (no plot: no matplotlib)"
    print(f"{time.perf_counter() - began:.0f} s; written to {args.out}: {files}")
    return 1 if any(row["ok"] is False for row in bench.rows) else 0


def title(bench: Bench) -> str:
    """Return the title of the plot: the settings that do not vary, and the machine."""
    args, env = bench.args, bench.environment
    batches = [f"batch {batch}" for batch in args.batch]
    varied = (args.mode, batches, args.dtype, args.memory_format)
    fixed = [values[0] for values in varied if len(values) == 1]
    machine = f"{env['device']}, torch {env['torch']}, threads {env['threads']}"
    return f"PSA {args.scope}, {', '.join(fixed)}\n{machine}"


def notes(bench: Bench) -> list[str]:
    """Return the lines below the table: the machine, and each provider without a timing."""
    env, device = bench.environment, bench.device
    lines = [
        f"{env['device']}, {env['threads']} thread(s), torch {env['torch']}; "
        f"{' and '.join(clock.name for clock in bench.clocks.values())}; "
        f"input {bench.args.input}; error against the float64 oracle"
    ]
    ran = {str(r["backend"]) for r in bench.rows if r["provider"] == "fused" and r["ok"]}
    if ran == {"reference"}:
        lines.append(
            f"fused: no compiled backend runs on {device.type} here, so it is plain PyTorch "
            f"behind the operator; expect 'cleaned' plus the operator's own cost"
        )
    lines += [f"skipped {name}: {reason}" for name, reason in bench.skipped.items()]
    late = [row for row in bench.rows if str(row["note"]).startswith("skipped")]
    unreached = sum(row["provider"] == "all" for row in late)
    lines += dict.fromkeys(
        f"skipped {label(r, AXES)} {r['provider']}: out of time"
        for r in late
        if r["provider"] != "all"
    )
    wrong = [row for row in bench.rows if row["ok"] is False]
    lines += dict.fromkeys(f"FAILED {label(r, AXES)} {r['provider']}: {r['note']}" for r in wrong)
    if unreached:
        lines.append(f"INCOMPLETE: {unreached} case(s) not begun within --seconds")
    return lines


if __name__ == "__main__":
    sys.exit(run(parse()))
