"""What the card's own counters say of the tail's kernels, by Nsight Compute's ncu. One CSV.

    python benchmarks/counters.py --out out

Each kernel of one forward and of one backward, at the largest and the smallest stage: the bytes it
moved, in all and over N, the bytes of the tail's output (2 N forward and 3 N backward is the
least); and what it waited for. There are two runs. In the first, which takes one pass over each
kernel, the cache is filled with something else before the first kernel, and then holds what the
kernel before has left in it; in the second, for the rest of the columns, it is emptied before every
pass. ncu is told to leave the clocks as they are; durations
are those of the first run.

The exit status is 77 where nothing can be measured: without ncu, without time, or where the driver
keeps the counters for administrators.
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
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from environment import cache_bytes, describe
from inputs import STAGES, Settings, Source
from options import SKIPPED, add_shared, finish_shared, positive_int
from providers import PROVIDERS
from report import align, write_csv

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
MOST_OCCUPANCY = "sm__maximum_warps_per_active_cycle_pct"
REGISTERS, WAVES = "launch__registers_per_thread", "launch__waves_per_multiprocessor"
OCCUPANCY_LIMIT = "launch__occupancy_limit_"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# The runs: what each is told of caches, and its metrics.
TRAFFIC = ("none", (DURATION, READ, WRITE, READ + OF_PEAK, WRITE + OF_PEAK, L2_HITS))
REST = (
    "all",
    (
        *(SM, OCCUPANCY, MOST_OCCUPANCY, REGISTERS, WAVES),
        *(OCCUPANCY_LIMIT + name for name in LIMITS),
        *(STALL.format(name) for name in STALLS),
    ),
)
# To bytes and microseconds; base units are asked for, but ncu's versions differ in their names.
SCALES = {
    "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "nsecond": 1e-3, "ms": 1e3,
    "msecond": 1e3, "s": 1e6, "second": 1e6,
}  # fmt: skip
COLUMNS = (
    "provider", "mode", "stage", "layout", "batch", "dtype", "launch", "kernel", "grid", "block",
    "us", "dram_read_bytes", "dram_write_bytes", "dram_over_n", "dram_percent", "l2_hit_percent",
    "passes", "sm_percent", "occupancy_percent", "most_occupancy_percent", "blocks_per_sm",
    "limited_by", "registers", "waves", "stall", "stall_percent", "device", "driver", "python",
    "torch", "triton", "cuda", "cudnn", "epsanet_fused", "threads",
)  # fmt: skip
# Nothing of the package's launches it: it separates the cases in what ncu writes.
MARKER = "spin_kernel"


class Case(NamedTuple):
    provider: str
    mode: str
    stage: str
    layout: str


class Kernel(NamedTuple):
    """One profiled launch; values are numbers, in bytes and microseconds where they have a unit."""

    name: str
    grid: str
    block: str
    passes: int | None
    values: dict[str, float]


def plan(args: argparse.Namespace) -> list[Case]:
    points = itertools.product(args.stages, args.layout, args.providers, MODES)
    return [Case(provider, mode, stage, layout) for stage, layout, provider, mode in points]


def launch_all(args: argparse.Namespace) -> None:
    """What ncu watches: after a marker, one profiled launch of each case that can run."""
    source = Source("randn", args.device)
    full = torch.ones(2 * cache_bytes(args.device), dtype=torch.uint8, device=args.device)
    elsewhere = torch.empty_like(full)  # copied to, that the cache may hold nothing else
    for case in plan(args):
        with torch.cuda.profiler.profile():
            torch.cuda._sleep(1)
            torch.cuda.synchronize()
        settings = Settings("tail", case.mode, case.stage, args.batch, args.dtype, case.layout)
        try:
            prepared = PROVIDERS[case.provider].prepare(source.workload(settings), case.mode, None)
            gradients = torch.no_grad() if case.mode == "inference" else nullcontext()
            with ef.use_backend(prepared.choice), gradients:
                for _ in range(2):
                    prepared.step()
                elsewhere.copy_(full)
                torch.cuda.synchronize()
                with torch.cuda.profiler.profile():
                    prepared.step()
                    torch.cuda.synchronize()
        except (
            RuntimeError,
            ValueError,
        ) as error:  # one that refuses the size must not end the rest
            print(f"{' '.join(case)}: {error}", file=sys.stderr)


def command(args: argparse.Namespace, run: tuple[str, Sequence[str]], log: Path) -> list[str]:
    cache, metrics = run
    profiled = [
        sys.executable, __file__, "--profiled", "--device", "cuda", "--batch", str(args.batch),
        "--dtype", args.dtype, "--stages", *args.stages, "--layout", *args.layout,
        "--providers", *args.providers,
    ]  # fmt: skip
    return [
        "ncu", "--clock-control", "none", "--cache-control", cache, "--profile-from-start", "off",
        "--target-processes", "application-only", "--csv", "--page", "raw", "--print-units", "base",
        "--print-kernel-base", "function", "--log-file", str(log), "--metrics", ",".join(metrics),
        *profiled,
    ]  # fmt: skip


def profile(args: argparse.Namespace, run: tuple[str, Sequence[str]], seconds: float) -> str | None:
    """What ncu writes. All of it comes at the end: None if it isn't done by then."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        with subprocess.Popen(
            command(args, run, log), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"LC_ALL": "C"},  # or numbers may have decimal commas
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                said, _ = process.communicate(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                print("ncu found no time to end", file=sys.stderr)
                return None
            finally:  # what it profiles would outlive it
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        print(said, file=sys.stderr)
        return said + (log.read_text() if log.exists() else "")


def parse_raw(text: str) -> list[Kernel]:
    """The kernels in ``ncu --csv --page raw``: names, below them units, then a row for each."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    passes = re.findall(r"^==PROF== Profiling .* (\d+) pass", text, re.M)
    units, *rows = list(csv.DictReader(lines)) or [{}]
    if len(passes) != len(rows):
        passes = [None] * len(rows)
    return [
        Kernel(
            row["Kernel Name"], row["Grid Size"], row["Block Size"], n and int(n),
            numbers(row, units),
        )
        for row, n in zip(rows, passes, strict=True)
    ]  # fmt: skip


def numbers(row: Mapping[str, str], units: Mapping[str, str]) -> dict[str, float]:
    """The metrics that have a value; "1,234.5" is one, "n/a" isn't."""
    found = {}
    for name in (*TRAFFIC[1], *REST[1]):
        text = row.get(name, "").replace(",", "")
        if re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", text):
            found[name] = float(text) * SCALES.get(units[name], 1.0)
    return found


def by_case(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels that follow each marker."""
    cases: list[list[Kernel]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            cases.append([])
        elif cases:
            cases[-1].append(kernel)
    return cases


def joined(traffic: Sequence[Kernel], rest: Sequence[Kernel]) -> list[list[Kernel]]:
    """Case by case the kernels with the values of both runs, if those saw the same kernels."""
    if [kernel.name for kernel in traffic] != [kernel.name for kernel in rest]:
        return by_case(traffic)
    both = zip(traffic, rest, strict=True)
    return by_case([first._replace(values=first.values | last.values) for first, last in both])


def figures(kernel: Kernel, n: int) -> dict[str, object]:
    """The columns that follow from one kernel's values; "" where there is none."""
    values = kernel.values
    row: dict[str, object] = {
        "kernel": kernel.name, "grid": kernel.grid, "block": kernel.block,
        "passes": "" if kernel.passes is None else kernel.passes,
    }  # fmt: skip
    names = {
        "us": DURATION, "dram_read_bytes": READ, "dram_write_bytes": WRITE,
        "l2_hit_percent": L2_HITS, "sm_percent": SM, "occupancy_percent": OCCUPANCY,
        "most_occupancy_percent": MOST_OCCUPANCY, "registers": REGISTERS, "waves": WAVES,
    }  # fmt: skip
    row |= {column: values.get(name, "") for column, name in names.items()}
    if READ in values and WRITE in values:
        row["dram_over_n"] = (values[READ] + values[WRITE]) / n
    if READ + OF_PEAK in values and WRITE + OF_PEAK in values:
        row["dram_percent"] = values[READ + OF_PEAK] + values[WRITE + OF_PEAK]
    limits = {k: values[OCCUPANCY_LIMIT + k] for k in LIMITS if OCCUPANCY_LIMIT + k in values}
    if limits:
        least = min(limits.values())
        row["blocks_per_sm"] = least
        row["limited_by"] = " ".join(k for k, limit in limits.items() if limit == least)
    stalls = {k: values[STALL.format(k)] for k in STALLS if STALL.format(k) in values}
    if sum(stalls.values()) > 0:
        row["stall"] = max(stalls, key=stalls.__getitem__)
        row["stall_percent"] = 100 * max(stalls.values()) / sum(stalls.values())
    return row


def output_bytes(args: argparse.Namespace, stage: str) -> int:
    channels, size = STAGES[stage]
    return args.batch * channels * size * size * getattr(torch, args.dtype).itemsize


def rows_of(args: argparse.Namespace, cases: Sequence[Sequence[Kernel]]) -> list[dict[str, object]]:
    environment = describe(args.device)
    rows = []
    # Where the process under ncu crashed, the cases after it are missing.
    for case, kernels in zip(plan(args), cases, strict=False):
        head = case._asdict() | {"batch": args.batch, "dtype": args.dtype}
        for i, kernel in enumerate(kernels):
            row = head | {"launch": i} | figures(kernel, output_bytes(args, case.stage))
            rows.append(dict.fromkeys(COLUMNS, "") | environment | row)
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A line for each kernel, and for each case of several what they move together."""
    head = ("case", "kernel", "us", "dram / N", "dram %", "L2 hit %", "SM %", "occupancy", "most",
            "registers", "limited by", "stall")  # fmt: skip
    lines = [head]
    names = ("stage", "layout", "mode", "provider")
    for case, found in itertools.groupby(rows, lambda row: tuple(str(row[n]) for n in names)):
        kernels = list(found)
        words = " ".join([*case[:2], MODES[case[2]], case[3]])
        lines += [(words, *_cells(row)) for row in kernels]
        moved = [row["dram_over_n"] for row in kernels]
        if len(kernels) > 1 and "" not in moved:
            times = sum(float(str(row["us"])) for row in kernels)
            together = ("together", f"{times:.1f}", f"{sum(map(float, moved)):.2f}")
            lines.append((words, *together, *[""] * (len(head) - 4)))
    return align(lines, left=2, by=0)


def _cells(row: Mapping[str, object]) -> tuple[str, ...]:
    forms = {
        "us": ".1f", "dram_over_n": ".2f", "dram_percent": ".0f", "l2_hit_percent": ".0f",
        "sm_percent": ".0f", "occupancy_percent": ".0f", "most_occupancy_percent": ".0f",
        "registers": ".0f",
    }  # fmt: skip
    figures = ["" if row[k] == "" else format(row[k], form) for k, form in forms.items()]
    stall = f"{row['stall']} {row['stall_percent']:.0f} %" if row["stall"] else ""
    return str(row["kernel"]), *figures, str(row["limited_by"]), stall


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--stages", choices=tuple(STAGES), nargs="+", default=["S1", "S4"])
    add("--batch", type=positive_int, default=128)
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    add("--layout", choices=("nchw", "channels_last"), nargs="+", default=["nchw", "channels_last"])
    add("--providers", choices=("triton", *VARIANTS), nargs="+", default=["triton", *VARIANTS])
    add("--profiled", action="store_true", help=argparse.SUPPRESS)  # in the process under ncu
    add_shared(parser, 120.0, "for both runs; a run that isn't done by then leaves nothing")
    args = parser.parse_args(argv)
    finish_shared(parser, args)
    return args


def run(args: argparse.Namespace) -> int:
    if shutil.which("ncu") is None:
        print("skipped: ncu isn't on PATH")
        return SKIPPED
    if args.device.type != "cuda":
        print("skipped: PyTorch finds no GPU here")
        return SKIPPED
    deadline = time.perf_counter() + args.seconds
    for name in args.providers:
        if reason := PROVIDERS[name].unavailable(args.device):
            print(f"{name} can't run here: {reason}")
    args.providers = [n for n in args.providers if not PROVIDERS[n].unavailable(args.device)]
    args.out.mkdir(parents=True, exist_ok=True)
    written = profile(args, TRAFFIC, deadline - time.perf_counter())
    if written is None:
        print("skipped: out of time")
        return SKIPPED
    if "ERR_NVGPUCTRPERM" in written:
        print("skipped: the driver keeps the card's counters for administrators")
        return SKIPPED
    kernels = parse_raw(written)
    if not kernels:
        print(f"ncu measured nothing; it wrote:\n{written}", file=sys.stderr)
        return 1
    rest = parse_raw(profile(args, REST, deadline - time.perf_counter()) or "")
    rows = rows_of(args, joined(kernels, rest))
    write_csv(args.out / "counters.csv", rows, COLUMNS)
    print(table(rows))
    measured = len({tuple(row[name] for name in Case._fields) for row in rows})
    print(f"{measured} of {len(plan(args))} cases measured")
    return 0


if __name__ == "__main__":
    arguments = parse()
    sys.exit(launch_all(arguments) if arguments.profiled else run(arguments))
