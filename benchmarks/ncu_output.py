"""The metrics that counters.py reads by Nsight Compute (ncu), and the parser of ncu's output."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
# The kernel of torch.cuda._sleep, which the package does not use: it separates the cases in ncu's
# output.
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


class Kernel(NamedTuple):
    """One profiled launch, with the values of its metrics in bytes, microseconds or as they are."""

    name: str
    grid: str
    block: str
    passes: int | None
    values: dict[str, float]


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
