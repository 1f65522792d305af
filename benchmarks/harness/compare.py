"""Compare two CSV files: what got faster, slower or tied."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from epsanet_fused.utils.timing import Timing
from harness.results import POINT, format_table, read_rows

KEY = (*POINT, "provider")
VERDICTS = ("faster", "slower", "tied")
CONDITIONS = ("device", "threads", "clock")
TIMES = ("ms_p20", "ms_p50", "ms_p80", "ms_low", "ms_high", "samples")


def compare(before: Path, after: Path, margin: float) -> tuple[str, dict[str, int]]:
    """Compare the rows that both files have.

    Args:
        before: a CSV file of the benchmarks.
        after: another one.
        margin: the relative difference between two runs of the same code.

    Returns:
        A table with a line for each row of both, and the number of each verdict. A row is a tie if
        the confidence intervals of the medians overlap, or if the medians differ by no more than
        ``margin``.

    Raises:
        ValueError: if a file is none of the benchmarks, or they have no row in common.
    """
    rows = read(before), read(after)
    first, second = timings_of(before, rows[0]), timings_of(after, rows[1])
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(f"{before} and {after} have no timed row in common")
    varying = [i for i in range(len(KEY)) if len({key[i] for key in shared}) > 1]
    cells, counts = [("case", "before ms", "after ms", "after / before", "")], {}
    for key in shared:
        a, b = first[key], second[key]
        ratio = b.p50 / a.p50
        tie = a.ties(b) or abs(ratio - 1) <= margin
        verdict = "tied" if tie else "faster" if ratio < 1 else "slower"
        counts[verdict] = counts.get(verdict, 0) + 1
        name = " ".join(key[i] for i in varying) or key[-1]
        cells.append((name, f"{a.p50:.4g}", f"{b.p50:.4g}", f"{ratio:.3f}", verdict))
    lines = [format_table(cells)]
    for column in CONDITIONS:
        a, b = (" and ".join(sorted({row[column] for row in each})) for each in rows)
        if a != b:
            lines.append(f"The files differ in {column}, so this compares no code: {a}; {b}")
    return "\n".join(lines), counts


def read(path: Path) -> list[dict[str, str]]:
    """Read the timed rows of a file.

    Raises:
        ValueError: if it lacks a column.
    """
    try:
        rows = read_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: must be a CSV file of the benchmarks: {error}") from error
    for row in rows:
        if missing := [name for name in (*KEY, *TIMES, *CONDITIONS) if row.get(name) is None]:
            raise ValueError(f"{path}: must be a CSV file of the benchmarks, lacks {missing[0]}")
    return [row for row in rows if row["ms_p50"] != ""]


def timings_of(path: Path, rows: list[dict[str, str]]) -> dict[tuple[str, ...], Timing]:
    """Return the timings of a file by their key; of two rows with one key, the later one.

    Raises:
        ValueError: if a time is no number.
    """
    found: dict[tuple[str, ...], Timing] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        try:
            found[key] = Timing(*(float(row[name]) for name in TIMES[:-1]), int(row["samples"]))
        except ValueError as error:
            raise ValueError(f"{path}: must be a CSV file of the benchmarks: {error}") from error
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_psa.py compare", description=__doc__)
    parser.add_argument("before", type=Path, help="a CSV file")
    parser.add_argument("after", type=Path, help="a CSV file")
    margin_help = "percent by which two runs of the same code differ (default: 3)"
    parser.add_argument("--margin", type=float, default=3.0, help=margin_help)
    args = parser.parse_args(argv)
    if not 0 <= args.margin < 100:
        parser.error(f"argument --margin: must be at least 0 and below 100, got {args.margin}")
    try:
        table, counts = compare(args.before, args.after, args.margin / 100)
    except ValueError as error:
        parser.error(str(error))
    print(table)
    print(", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS))
    return 0
