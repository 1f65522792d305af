"""Read the GPU's hardware counters for the tail's kernels, by Nsight Compute (ncu).

    python benchmarks/counters.py --out out

This runs itself under ncu once for each stage and appends to OUT/counters.csv: a row for each
kernel of a forward and a backward. ``dram_over_n`` is the traffic over N, the bytes of the output
(the minimum is 2 forward, 3 backward). Before each case the cache is filled with other data; for
--metrics stalls ncu empties it before each kernel. ncu by hand:

    ncu --clock-control none --cache-control none --profile-from-start off --csv --page raw \\
        --metrics dram__bytes_read.sum python benchmarks/counters.py --profiled --stages S1

The exit status is 77 without ncu, without a GPU, or if only administrators may read the counters.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import pandas
import torch
from harness import machine, options
from harness.cases import MEMORY_FORMATS, STAGES, Case, Source
from harness.providers import PROVIDERS

import epsanet_fused as ef
from epsanet_fused.backends.registry import PATHS

BATCH = 128
PROFILED = ("triton", *PATHS)
STOPPED = "ncu was stopped at the end of --seconds"
SKIPPED = 77  # the exit status where nothing can be measured
READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
PEAK = ".pct_of_peak_sustained_elapsed"
STALLS = "long_scoreboard lg_throttle barrier wait short_scoreboard mio_throttle membar drain"
STALLS += " math_pipe_throttle not_selected"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
LAUNCH = "registers_per_thread waves_per_multiprocessor occupancy_limit_registers"
METRICS = {
    "traffic": [
        *("gpu__time_duration.sum", READ, WRITE, READ + PEAK, WRITE + PEAK),
        "lts__t_sector_hit_rate.pct",
    ],
    "stalls": [
        *(f"sm__throughput.avg{PEAK}", OCCUPANCY, "sm__maximum_warps_per_active_cycle_pct"),
        *map("launch__{}".format, LAUNCH.split()),
        *map(STALL.format, STALLS.split()),
    ],
}
NAMES = {"Kernel Name": "kernel", "Grid Size": "grid", "Block Size": "block"}
POINT = ["provider", "mode", "case", "memory_format", "batch", "dtype", "launch", "kernel"]
COLUMNS = [*POINT, "grid", "block", *METRICS["traffic"], *METRICS["stalls"], "dram_over_n"]


def calls_of(stage: str, providers: Sequence[str]) -> list[tuple[str, Case]]:
    """Return the provider and the case of each profiled call, in their order."""
    points = [(mode, f) for f in MEMORY_FORMATS for mode in ("inference", "backward")]
    cases = [Case("tail", mode, stage, BATCH, "float16", f) for mode, f in points]
    return [(name, case) for case in cases for name in providers]


def launch_all(device: torch.device, stage: str, providers: Sequence[str]) -> int:
    """Launch each case after a marker, with the profiler on. This is the process under ncu."""
    full = torch.ones(2 * machine.cache_bytes(device), dtype=torch.uint8, device=device)
    for name, case in calls_of(stage, providers):
        profiled(lambda: torch.cuda._sleep(1))  # the marker
        try:
            with torch.set_grad_enabled(case.mode != "inference"), ef.use_backend(name):
                step = PROVIDERS[name].prepare(Source(device, "randn").workload(case), case).step
                step()
                full.clone()  # fills the cache
                profiled(step)
        except (RuntimeError, ValueError) as error:  # a kernel may refuse the size: go on
            print(f"{name} {' '.join(map(str, case))}: {error}")
    return 0


def profiled(call: Callable[[], object]) -> None:
    """Run a call with the profiler on."""
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        call()
        torch.cuda.synchronize()


def profile(args: argparse.Namespace, stage: str, seconds: float) -> str:
    """Run this script under ncu and return what both wrote."""
    log, cache = args.out / "ncu.csv", "none" if args.metrics == "traffic" else "all"
    ncu = f"ncu --clock-control none --cache-control {cache} --profile-from-start off --csv"
    ncu += " --target-processes application-only --page raw --print-units base"
    ncu += f" --print-kernel-base function --metrics {','.join(METRICS[args.metrics])} --log-file"
    command = [*ncu.split(), str(log), sys.executable, __file__, "--profiled"]
    command += ["--providers", *args.providers, "--stages", stage]
    log.unlink(missing_ok=True)
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"LC_ALL": "C"},  # other locales may write decimal commas
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:  # ncu writes at its end
            return STOPPED
        finally:
            with suppress(ProcessLookupError):  # the profiled process would go on without ncu
                os.killpg(process.pid, signal.SIGKILL)
    print(printed, file=sys.stderr)  # for example, which kernel refuses the size
    return printed + (log.read_text() if log.exists() else "")


def parse_raw(text: str, stage: str, providers: Sequence[str]) -> pandas.DataFrame:
    """Parse ncu's lines of names, of units and of each kernel; add the cases of the kernels."""
    lines = [line for line in text.splitlines() if line.startswith('"')] or [",".join(NAMES)]
    table = pandas.read_csv(io.StringIO("\n".join(lines)), skiprows=[1], thousands=",")
    marker = table["Kernel Name"].astype(str).str.contains("spin_kernel")  # of torch.cuda._sleep
    number = marker.cumsum()[~marker] - 1
    calls = calls_of(stage, providers)
    about = pandas.DataFrame([{"provider": name} | case._asdict() for name, case in calls])
    rows = table[~marker].rename(columns=NAMES).join(about, on=number).reindex(columns=COLUMNS)
    rows["launch"] = number.groupby(number).cumcount()
    size = BATCH * math.prod(STAGES[stage]) * torch.float16.itemsize
    return rows.assign(dram_over_n=(rows[READ] + rows[WRITE]) / size)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stages", choices=STAGES, nargs="+", default=["S1", "S4"], help="(default: S1 S4)")
    providers_help = f"(default: {' '.join(PROFILED)})"
    add("--providers", choices=PROFILED, nargs="+", default=PROFILED, help=providers_help)
    add("--metrics", choices=METRICS, default="traffic", help="(default: traffic)")
    add("--profiled", action="store_true", help=argparse.SUPPRESS)
    options.add_shared(parser, 120.0)
    return options.parse_shared(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Profile one stage after another and write its rows; return the exit status."""
    if args.profiled:
        return launch_all(args.device, args.stages[0], args.providers)
    has_ncu = shutil.which("ncu") is not None
    if not has_ncu or args.device.type != "cuda":
        print("skipped:", "PyTorch finds no GPU here" if has_ncu else "ncu isn't on PATH")
        return SKIPPED
    deadline, path, status = time.perf_counter() + args.seconds, args.out / "counters.csv", 0
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.append:
        path.unlink(missing_ok=True)
    for stage in args.stages:
        text = profile(args, stage, deadline - time.perf_counter())
        if "ERR_NVGPUCTRPERM" in text:
            print("skipped: the driver allows only administrators to read the counters")
            return SKIPPED
        rows = parse_raw(text, stage, args.providers).assign(**machine.describe(args.device))
        if rows.empty:
            print(text)
            status = status or int(text != STOPPED)
            continue
        rows.to_csv(path, mode="a", header=not path.exists(), index=False)
        print(rows[[*POINT, "dram_over_n"]].to_string(index=False))
    return status


if __name__ == "__main__":
    sys.exit(run(parse()))
