"""Times the PSA tail, module or network by every provider: a table, a CSV and a plot.

    python benchmarks/bench_psa.py --out out

Every timing stands beside its largest error against the float64 oracle, and there is none where
that error is too large. ``eager`` is the official formulation. ``copy`` is what the tail's limit is
made of: the time to copy its output once. ``necessary_bytes`` counts what any implementation has to
move, in units of the output's N bytes: 2 N forward (read the branches, write the output), 3 N
backward (read the gradient and the branches, write the branches' gradients), so 5 N in training.
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
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

# The profiler that counts memory would announce each of its starts on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "10")

import torch
from baselines import baseline_of
from checks import Judge
from environment import describe
from inputs import LAYOUTS, STAGES, Settings, Source, Workload
from l2_flush import make_clock
from memory import peak_extra_bytes
from options import add_shared, finish_shared, positive_int
from plots import plot
from providers import PROVIDERS, Prepared, defaults
from report import AXES, COLUMNS, label, table, write_csv

import epsanet_fused as ef
from epsanet_fused.backends.registry import VARIANTS
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Clock, Timing, Variant, interleave

# What each mode has to move, in N: see above.
NECESSARY = {"inference": 2, "training": 5, "backward": 3}
# The most of the time left that a case may spend on making its providers ready.
PREPARING = 0.7


class Judges:
    """One for ours and one for each baseline, made when first asked for."""

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self._workloads = {None: workload, **workload.baselines}
        self._settings = settings
        self._made: dict[str | None, Judge] = {}

    def of(self, baseline: str | None) -> Judge:
        if baseline not in self._made:
            self._made[baseline] = Judge(self._workloads[baseline], self._settings)
        return self._made[baseline]


class Attempt(NamedTuple):
    """A provider's row, and what there is to time if its result is right."""

    row: dict[str, object]
    step: Prepared | None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--scope", choices=("tail", "norm", "module", "block", "network"), default="tail",
        help="norm: the tail and the BatchNorm2d and ReLU after it, in training")  # fmt: skip
    add("--mode", choices=tuple(NECESSARY), nargs="+", default=["inference"],
        help="training is forward and backward; of 16-bit modules in mixed precision")  # fmt: skip
    add("--stages", choices=tuple(STAGES), nargs="+", default=list(STAGES))
    add("--batch", type=positive_int, nargs="+", default=[8])
    add("--dtype", choices=("float32", "float16", "bfloat16"), nargs="+", default=["float32"])
    add("--layout", choices=("nchw", "channels_last", "best"), nargs="+", default=["nchw"],
        help="best: for each provider its faster one, where there are convolutions")  # fmt: skip
    add("--cache", choices=("warm", "cold"), nargs="+", default=["warm"],
        help="cold empties the last-level cache before each call")  # fmt: skip
    add("--providers", choices=tuple(PROVIDERS), nargs="+", help="default: all that can run here")
    add("--threads", type=positive_int, help="CPU threads; default: 1 where the CPU is timed")
    add("--input", choices=("photos", "randn"), default="photos")
    add("--no-plot", action="store_true", help="write the CSV only")
    add("--reps", type=positive_int, default=200, help="most samples of each timing")
    add_shared(parser, 100.0, "no case is begun after so many seconds")
    args = parser.parse_args(argv)
    finish_shared(parser, args)
    if args.scope != "tail" and "backward" in args.mode:
        parser.error("argument --mode: backward by itself is timed for --scope tail only")
    if args.scope == "norm" and args.mode != ["training"]:
        parser.error("argument --mode: --scope norm is for training")
    if args.scope in ("tail", "norm") and "best" in args.layout:
        parser.error("argument --layout: best is for --scope module, block and network")
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
    args.providers = args.providers or defaults(args.device, args.scope)
    return args


def sweep(args: argparse.Namespace) -> list[Settings]:
    """Every point to measure, in the order given; the network has no stages."""
    stages = args.stages if args.scope != "network" else ["all"]
    points = itertools.product(args.mode, args.batch, args.dtype, args.layout, stages)
    return [
        Settings(args.scope, mode, stage, batch, dtype, layout)
        for mode, batch, dtype, layout, stage in points
    ]


def layouts(settings: Settings) -> list[Settings]:
    """The settings in each layout that is to be tried."""
    choices = LAYOUTS if settings.layout == "best" else (settings.layout,)
    return [settings._replace(layout=layout) for layout in choices]


def words(settings: Settings) -> str:
    return " ".join(map(str, settings))


class Bench:
    """Measures one point of the sweep after another and keeps the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: torch.device = args.device
        self.rows: list[dict[str, object]] = []
        self.clocks: dict[str, Clock] = {
            cache: make_clock(self.device, cache == "cold") for cache in args.cache
        }
        self.environment = describe(self.device)
        reasons = {name: PROVIDERS[name].unavailable(self.device) for name in args.providers}
        self.skipped = {name: reason for name, reason in reasons.items() if reason}
        self.names = [name for name in args.providers if name not in self.skipped]
        baselines = dict.fromkeys(filter(None, map(baseline_of, self.names)))
        self.source = Source(args.input, self.device, baselines)

    # Dynamo counts all compilations of one forward together, and gives up silently.
    @torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True)
    def measure(self, settings: Settings, seconds: float, left: float) -> None:
        """Check every provider against the oracle, then time those that passed, interleaved.

        ``seconds`` is this case's share of what is left of the time. Compiling may take more than
        a share, but when most of all that is left is gone, the rest is left out.
        """
        began = time.perf_counter()
        deadline = began + PREPARING * left
        torch._dynamo.reset()  # one case's compilations don't count against the next one's limit
        cases = layouts(settings)
        workloads = [self.source.workload(case) for case in cases]
        judges = Judges(workloads[0], cases[0])  # the truth is the same in any layout
        found: dict[str, Attempt] = {}
        for name in self.names:
            provider = PROVIDERS[name]
            if not provider.fits(settings.scope, settings.mode):
                continue
            if found and time.perf_counter() > deadline:
                row = self.row(settings, name) | {"note": "skipped: out of time"}
                found[name] = Attempt(row, None)
                continue
            tries = list(zip(workloads, cases, strict=True))[: 1 if provider.own_layout else None]
            attempts = [self._try(name, *one, judges) for one in tries]
            found[name] = best = self._faster(attempts)
            self.rows += (one.row for one in attempts if one.row["ok"] is False and one is not best)
        rows = {name: attempt.row for name, attempt in found.items()}
        steps = {name: attempt.step for name, attempt in found.items() if attempt.step is not None}
        workload = workloads[0]
        for name, step in steps.items():
            if step.memory_step is not None:
                with ef.use_backend(step.choice):
                    rows[name]["peak_extra_bytes"] = peak_extra_bytes(step.memory_step, self.device)
        share = max(0.0, seconds - (time.perf_counter() - began)) / len(self.clocks)
        candidates = variants(steps, workload)
        if "copy" in candidates:
            rows["copy"] = self.row(settings, "copy") | {"backend": "pytorch"}
        for cache, clock in self.clocks.items():
            timings = interleave(candidates, clock, self.args.reps, share)
            for name, row in rows.items():
                row = row | {"cache": cache, "clock": clock.name}
                if name in timings:
                    necessary = NECESSARY["inference" if name == "copy" else settings.mode]
                    row |= figures(timings[name], timings, workload.output_bytes, necessary)
                self.rows.append(row)

    def _faster(self, attempts: list[Attempt]) -> Attempt:
        """The one in the layout in which the provider is faster."""
        right = {str(i): one.step for i, one in enumerate(attempts) if one.step is not None}
        if len(right) < 2:
            return attempts[int(next(iter(right), 0))]
        clock = next(iter(self.clocks.values()))
        pair = {key: _variant(step) for key, step in right.items()}
        timings = interleave(pair, clock, reps=5, seconds=0)
        return attempts[int(min(timings, key=lambda key: timings[key].p50))]

    def fail(self, settings: Settings, error: Exception) -> None:
        """A case that came to nothing, such as one that doesn't fit into memory."""
        self.rows.append(self.row(settings, "all") | failure(error))

    def row(self, settings: Settings, provider: str) -> dict[str, object]:
        row: dict[str, object] = dict.fromkeys(COLUMNS, "")
        about = {"provider": provider, "input": self.args.input}
        return row | settings._asdict() | self.environment | about

    def _try(self, name: str, workload: Workload, settings: Settings, judges: Judges) -> Attempt:
        row = self.row(settings, name)
        try:
            step = PROVIDERS[name].prepare(workload, settings.mode, settings.autocast)
            with ef.use_backend(step.choice):
                verdict = judges.of(baseline_of(name)).judge(step.step())
        except Exception as error:  # one broken provider must not take the others along
            # Half a backend may not take every problem, and says so.
            refused = name in VARIANTS and isinstance(error, ValueError)
            return Attempt(row | ({"note": str(error)} if refused else failure(error)), None)
        row |= {"backend": step.backend, **verdict._asdict()}
        if verdict.ok:
            return Attempt(row, step)
        note = "WRONG: the error is over its bound, so it isn't timed"
        return Attempt(row | {"note": note}, None)


def failure(error: Exception) -> dict[str, object]:
    return {"ok": False, "note": f"{type(error).__name__}: {error}"[:300]}


def variants(steps: dict[str, Prepared], workload: Workload) -> dict[str, Variant]:
    """What to time against each other: the providers, and in the tail a copy of its output."""
    found = {name: _variant(step) for name, step in steps.items()}
    if workload.output_bytes is not None:
        joined = torch.cat([x.detach() for x in workload.inputs], 1)
        found["copy"] = Variant(joined.clone, nullcontext)
    return found


def _variant(step: Prepared) -> Variant:
    return Variant(step.step, functools.partial(ef.use_backend, step.choice))


def figures(
    timing: Timing, timings: dict[str, Timing], output_bytes: int | None, necessary: int
) -> dict[str, object]:
    """The columns that follow from the timings of one case."""
    row: dict[str, object] = {
        "ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p80": timing.p80,
        "samples": timing.samples,
    }  # fmt: skip
    if eager := timings.get("eager"):
        row["speedup"] = eager.p50 / timing.p50
        row["tie"] = timing is not eager and timing.ties(eager)
    if output_bytes is not None:
        rate, copy_rate = necessary / timing.p50, 2 / timings["copy"].p50  # in N per ms
        row |= {
            "necessary_bytes": necessary * output_bytes,
            "gbps": rate * output_bytes / 1e6,
            "copy_gbps": copy_rate * output_bytes / 1e6,
            "percent_of_copy": 100 * rate / copy_rate,
        }
    return row


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    if threads := args.threads or (1 if args.device.type == "cpu" else None):
        torch.set_num_threads(threads)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    points = sweep(args)
    for i, settings in progress(points, "case", words):
        left = args.seconds - (time.perf_counter() - began)
        if left <= 0 and i > 0:
            bench.rows.append(bench.row(settings, "all") | {"note": "skipped: out of time"})
            continue
        try:
            with torch.set_grad_enabled(settings.mode != "inference"):
                bench.measure(settings, left / (len(points) - i), left)
        except RuntimeError as error:
            bench.fail(settings, error)
        write_csv(args.out / "bench_psa.csv", bench.rows)  # what there is survives a crash
        gc.collect()
    write_csv(args.out / "bench_psa.csv", bench.rows)
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
    args, env = bench.args, bench.environment
    batches = [f"batch {batch}" for batch in args.batch]
    varied = (args.mode, batches, args.dtype, args.layout)
    fixed = [values[0] for values in varied if len(values) == 1]
    machine = f"{env['device']}, torch {env['torch']}, threads {env['threads']}"
    return f"PSA {args.scope}, {', '.join(fixed)}\n{machine}"


def notes(bench: Bench) -> list[str]:
    """What a reader of the table has to know beside it."""
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
