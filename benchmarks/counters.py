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
import csv
import itertools
import os
import re
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
from options import DTYPES, SKIPPED, add_shared, parse_shared, positive_int
from providers import PROVIDERS
from report import MACHINE, align, write_csv

import epsanet_fused as ef
from epsanet_fused.backends.registry import VARIANTS

MODES = {"inference": "forward", "backward": "backward"}
LIMITS = ("blocks", "registers", "shared_mem", "warps")
STALLS = (
    "long_scoreboard", "lg_throttle", "barrier", "wait", "short_scoreboard", "mio_throttle",
    "math_pipe_throttle", "membar", "drain", "not_selected",
)  # fmt: skip
READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
OF_PEAK = ".pct_of_peak_sustained_elapsed"
DURATION = "gpu__time_duration.sum"
L2_HITS = "lts__t_sector_hit_rate.pct"
SM = f"sm__throughput.avg{OF_PEAK}"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
MAX_OCCUPANCY = "sm__maximum_warps_per_active_cycle_pct"
REGISTERS, WAVES = "launch__registers_per_thread", "launch__waves_per_multiprocessor"
OCCUPANCY_LIMIT = "launch__occupancy_limit_"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# To bytes and microseconds. Base units are requested, but their names differ between versions.
UNITS = {
    **{"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    **{"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6},
}
COLUMNS = (
    "provider", "mode", "stage", "layout", "batch", "dtype", "launch", "kernel", "grid", "block",
    "us", "dram_read_bytes", "dram_write_bytes", "dram_over_n", "dram_percent", "l2_hit_percent",
    "passes", "sm_percent", "occupancy_percent", "max_occupancy_percent", "blocks_per_sm",
    "limited_by", "registers", "waves", "stall", "stall_percent", *MACHINE,
)  # fmt: skip
# The metric of each column that holds one.
METRICS = {
    "us": DURATION,
    "dram_read_bytes": READ,
    "dram_write_bytes": WRITE,
    "l2_hit_percent": L2_HITS,
    "sm_percent": SM,
    "occupancy_percent": OCCUPANCY,
    "max_occupancy_percent": MAX_OCCUPANCY,
    "registers": REGISTERS,
    "waves": WAVES,
}
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
# A kernel that the package does not launch: it separates the cases in ncu's output.
MARKER = "spin_kernel"


class Run(NamedTuple):
    """One run of ncu."""

    cache_control: str
    metrics: tuple[str, ...]


TRAFFIC = Run("none", (DURATION, READ, WRITE, READ + OF_PEAK, WRITE + OF_PEAK, L2_HITS))
REST = Run(
    "all",
    (
        *(SM, OCCUPANCY, MAX_OCCUPANCY, REGISTERS, WAVES),
        *(OCCUPANCY_LIMIT + name for name in LIMITS),
        *(STALL.format(name) for name in STALLS),
    ),
)


class Case(NamedTuple):
    """One forward or backward to profile."""

    provider: str
    mode: str
    stage: str
    memory_format: str


class Kernel(NamedTuple):
    """One profiled launch, with the values of its metrics in bytes, microseconds or as they are."""

    name: str
    grid: str
    block: str
    passes: int | None
    values: dict[str, float]


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
            finally:  # the profiled process would go on without ncu
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        print(printed, file=sys.stderr)
        return printed + (log.read_text() if log.exists() else "")


def parse_raw(text: str) -> list[Kernel]:
    """Parse ``ncu --csv --page raw``: a line of names, a line of units, a line for each kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    passes = re.findall(r"^==PROF== Profiling .* (\d+) pass", text, re.M)
    units, *rows = list(csv.DictReader(lines)) or [{}]
    if len(passes) != len(rows):
        passes = [None] * len(rows)
    return [
        Kernel(
            row["Kernel Name"],
            row["Grid Size"],
            row["Block Size"],
            n and int(n),
            parse_values(row, units),
        )
        for row, n in zip(rows, passes, strict=True)
    ]


def parse_values(row: Mapping[str, str], units: Mapping[str, str]) -> dict[str, float]:
    """Parse the metrics that have a value, such as "1,234.5"; "n/a" is left out."""
    found = {}
    for name in (*TRAFFIC.metrics, *REST.metrics):
        text = row.get(name, "").replace(",", "")
        if re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", text):
            found[name] = float(text) * UNITS.get(units[name], 1.0)
    return found


def by_case(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Group the kernels that follow each marker."""
    cases: list[list[Kernel]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            cases.append([])
        elif cases:
            cases[-1].append(kernel)
    return cases


def merge_runs(traffic: Sequence[Kernel], rest: Sequence[Kernel]) -> list[list[Kernel]]:
    """Group the kernels by case, with the values of both runs if these saw the same kernels."""
    if [kernel.name for kernel in traffic] != [kernel.name for kernel in rest]:
        return by_case(traffic)
    both = zip(traffic, rest, strict=True)
    return by_case([first._replace(values=first.values | last.values) for first, last in both])


def kernel_columns(kernel: Kernel, n: int) -> dict[str, object]:
    """Return the columns of one kernel; "" where a value is missing. ``n`` is N in bytes."""
    values = kernel.values
    row: dict[str, object] = {
        "kernel": kernel.name,
        "grid": kernel.grid,
        "block": kernel.block,
        "passes": "" if kernel.passes is None else kernel.passes,
    }
    row |= {column: values.get(name, "") for column, name in METRICS.items()}
    if READ in values and WRITE in values:
        row["dram_over_n"] = (values[READ] + values[WRITE]) / n
    if READ + OF_PEAK in values and WRITE + OF_PEAK in values:
        row["dram_percent"] = values[READ + OF_PEAK] + values[WRITE + OF_PEAK]
    limits = {k: values[OCCUPANCY_LIMIT + k] for k in LIMITS if OCCUPANCY_LIMIT + k in values}
    if limits:
        lowest = min(limits.values())
        row["blocks_per_sm"] = lowest
        row["limited_by"] = " ".join(k for k, limit in limits.items() if limit == lowest)
    stalls = {k: values[STALL.format(k)] for k in STALLS if STALL.format(k) in values}
    if sum(stalls.values()) > 0:
        row["stall"] = max(stalls, key=stalls.__getitem__)
        row["stall_percent"] = 100 * max(stalls.values()) / sum(stalls.values())
    return row


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
    providers = ["triton", *VARIANTS]
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
