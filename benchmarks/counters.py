"""Read the GPU's hardware counters for the tail's kernels, by Nsight Compute (ncu): a CSV file.

    python benchmarks/counters.py --out out

Profiles each kernel of one forward and of one backward, at the largest and the smallest stage. The
columns are the bytes that the kernel moved, also in units of N, the bytes of the tail's output (the
minimum is 2 N forward and 3 N backward), and what the kernel waited for. There are two runs:

- The first one measures durations and traffic in one pass per kernel. The cache is filled with
  other data before the first kernel of a case; later kernels find what the one before left there.
- The second one measures the remaining columns. The cache is emptied before each pass.

ncu does not change the clocks. The exit status is 77 where nothing can be measured: without ncu,
without enough time, or if the driver allows only administrators to read the counters.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from environment import cache_bytes, describe
from inputs import MEMORY_FORMATS, STAGES, Settings, Source
from ncu_output import REST, TRAFFIC, Kernel, Run, kernel_columns, merge_runs, parse_raw
from options import DTYPES, SKIPPED, add_shared, parse_shared, positive_int
from providers import PROVIDERS
from report import MACHINE, align, write_csv

import epsanet_fused as ef
from epsanet_fused.backends.registry import PATHS

MODES = {"inference": "forward", "backward": "backward"}
COLUMNS = (
    "provider", "mode", "stage", "layout", "batch", "dtype", "launch", "kernel", "grid", "block",
    "us", "dram_read_bytes", "dram_write_bytes", "dram_over_n", "dram_percent", "l2_hit_percent",
    "passes", "sm_percent", "occupancy_percent", "max_occupancy_percent", "blocks_per_sm",
    "limited_by", "registers", "waves", "stall", "stall_percent", *MACHINE,
)  # fmt: skip
# The columns of the printed table that hold numbers, with their headings and formats.
SHOWN = {
    "us": ("us", ".1f"),
    "dram_over_n": ("dram / N", ".2f"),
    "dram_percent": ("dram %", ".0f"),
    "l2_hit_percent": ("L2 hit %", ".0f"),
    "sm_percent": ("SM %", ".0f"),
    "occupancy_percent": ("occupancy", ".0f"),
    "max_occupancy_percent": ("max", ".0f"),
    "registers": ("registers", ".0f"),
}


class Case(NamedTuple):
    """One forward or backward to profile."""

    provider: str
    mode: str
    stage: str
    memory_format: str


def plan(args: argparse.Namespace) -> list[Case]:
    """Return all cases in the order in which they are profiled."""
    points = itertools.product(args.stages, args.memory_format, args.providers, MODES)
    return [Case(provider, mode, stage, name) for stage, name, provider, mode in points]


def launch_all(args: argparse.Namespace) -> None:
    """Launch each case after a marker, with the profiler on. This is the process under ncu."""
    source = Source("randn", args.device)
    # A copy between these two fills the cache.
    full = torch.ones(2 * cache_bytes(args.device), dtype=torch.uint8, device=args.device)
    elsewhere = torch.empty_like(full)
    for case in plan(args):
        with torch.cuda.profiler.profile():
            torch.cuda._sleep(1)
            torch.cuda.synchronize()
        try:
            _launch(case, args, source, lambda: elsewhere.copy_(full))
        except (RuntimeError, ValueError) as error:  # a kernel may refuse the size: go on
            print(f"{' '.join(case)}: {error}", file=sys.stderr)


def _launch(
    case: Case, args: argparse.Namespace, source: Source, fill_cache: Callable[[], object]
) -> None:
    """Run a case twice to warm up and once with the profiler on."""
    settings = Settings("tail", case.mode, case.stage, args.batch, args.dtype, case.memory_format)
    prepared = PROVIDERS[case.provider].prepare(source.workload(settings), case.mode, None)
    gradients = torch.no_grad() if case.mode == "inference" else nullcontext()
    with ef.use_backend(prepared.choice), gradients:
        for _ in range(2):
            prepared.step()
        fill_cache()
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            prepared.step()
            torch.cuda.synchronize()


def command(args: argparse.Namespace, run: Run, log: Path) -> list[str]:
    """Return the command that runs this script under ncu."""
    options = f"--profiled --device cuda --batch {args.batch} --dtype {args.dtype}"
    options += f" --stages {' '.join(args.stages)}"
    options += f" --memory-format {' '.join(args.memory_format)}"
    options += f" --providers {' '.join(args.providers)}"
    ncu = f"ncu --clock-control none --cache-control {run.cache_control} --profile-from-start off"
    ncu += " --target-processes application-only --csv --page raw --print-units base"
    ncu += f" --print-kernel-base function --metrics {','.join(run.metrics)} --log-file"
    return [*ncu.split(), str(log), sys.executable, __file__, *options.split()]


def profile(args: argparse.Namespace, run: Run, seconds: float) -> str | None:
    """Run ncu and return its output, or None if it does not end in time: it writes at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        with subprocess.Popen(
            command(args, run, log),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"LC_ALL": "C"},  # other locales may write decimal commas
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                print("ncu was stopped at the end of its time", file=sys.stderr)
                return None
            finally:
                _kill_group(process.pid)  # the profiled process would go on without ncu
        print(printed, file=sys.stderr)
        return printed + (log.read_text() if log.exists() else "")


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def output_bytes(args: argparse.Namespace, stage: str) -> int:
    """Return N: the bytes of the tail's output."""
    channels, size = STAGES[stage]
    return args.batch * channels * size * size * getattr(torch, args.dtype).itemsize


def rows_of(args: argparse.Namespace, cases: Sequence[Sequence[Kernel]]) -> list[dict[str, object]]:
    """Return a row for each kernel of each case."""
    environment = describe(args.device)
    rows = []
    # If the process under ncu crashed, the cases after the crash are missing.
    for case, kernels in zip(plan(args), cases, strict=False):
        about = {"provider": case.provider, "mode": case.mode, "stage": case.stage}
        about |= {"layout": case.memory_format, "batch": args.batch, "dtype": args.dtype}
        for i, kernel in enumerate(kernels):
            row = about | {"launch": i} | kernel_columns(kernel, output_bytes(args, case.stage))
            rows.append(dict.fromkeys(COLUMNS, "") | environment | row)
    return rows


def case_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """Return the case of a row: stage, memory format, mode, provider."""
    return tuple(str(row[name]) for name in ("stage", "layout", "mode", "provider"))


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Format a line for each kernel and, for a case with several, a line with their sum."""
    numbers = tuple(heading for heading, _ in SHOWN.values())
    head = ("case", "kernel", *numbers, "limited by", "stall")
    lines = [head]
    for case, found in itertools.groupby(rows, case_of):
        kernels = list(found)
        words = " ".join([*case[:2], MODES[case[2]], case[3]])
        lines += [(words, *_cells(row)) for row in kernels]
        moved = [row["dram_over_n"] for row in kernels]
        if len(kernels) > 1 and "" not in moved:
            times = sum(float(str(row["us"])) for row in kernels)
            total = ("together", f"{times:.1f}", f"{sum(map(float, moved)):.2f}")
            lines.append((words, *total, *[""] * (len(head) - 4)))
    return align(lines, left=2, by=0)


def _cells(row: Mapping[str, object]) -> tuple[str, ...]:
    numbers = ["" if row[k] == "" else format(row[k], form) for k, (_, form) in SHOWN.items()]
    stall = f"{row['stall']} {row['stall_percent']:.0f} %" if row["stall"] else ""
    return str(row["kernel"]), *numbers, str(row["limited_by"]), stall


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    formats = list(MEMORY_FORMATS)
    providers = ["triton", *PATHS]
    add("--stages", choices=tuple(STAGES), nargs="+", default=["S1", "S4"])
    add("--batch", type=positive_int, default=128)
    add("--dtype", choices=DTYPES, default="float16")
    add("--memory-format", choices=formats, nargs="+", default=formats)
    add("--providers", choices=providers, nargs="+", default=providers)
    add("--profiled", action="store_true", help=argparse.SUPPRESS)  # in the process under ncu
    add_shared(parser, 120.0, "for both runs; a run that does not end by then has no results")
    return parse_shared(parser, argv)


def skip(reason: str) -> int:
    """Print why nothing can be measured and return the exit status."""
    print(f"skipped: {reason}")
    return SKIPPED


def run(args: argparse.Namespace) -> int:
    """Profile all cases, write the CSV file and print the table; return the exit status."""
    if shutil.which("ncu") is None:
        return skip("ncu isn't on PATH")
    if args.device.type != "cuda":
        return skip("PyTorch finds no GPU here")
    deadline = time.perf_counter() + args.seconds
    reasons = {name: PROVIDERS[name].unavailable_reason(args.device) for name in args.providers}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} can't run here: {reason}")
    args.providers = [name for name, reason in reasons.items() if not reason]
    args.out.mkdir(parents=True, exist_ok=True)
    written = profile(args, TRAFFIC, deadline - time.perf_counter())
    if written is None:
        return skip("out of time")
    if "ERR_NVGPUCTRPERM" in written:
        return skip("the driver allows only administrators to read the counters")
    kernels = parse_raw(written)
    if not kernels:
        print(f"ncu measured nothing; it wrote:\n{written}", file=sys.stderr)
        return 1
    rest = parse_raw(profile(args, REST, deadline - time.perf_counter()) or "")
    rows = rows_of(args, merge_runs(kernels, rest))
    write_csv(args.out / "counters.csv", rows, COLUMNS)
    print(table(rows))
    print(f"{len(set(map(case_of, rows)))} of {len(plan(args))} cases measured")
    return 0


if __name__ == "__main__":
    arguments = parse()
    sys.exit(launch_all(arguments) if arguments.profiled else run(arguments))
