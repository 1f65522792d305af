"""The one CSV format of all benchmarks, and the one function that prints tables.

A file has a row for each measurement. A row is appended with one write the moment it is measured,
so that a process that is killed loses none.

Columns:

- ``scope, mode, case, batch, dtype, memory_format, cache, input``: the point. ``case`` is a stage
  (S1 to S4), a shape C x H x W, with kernels and groups if they are not the usual ones; a
  convolution; or a network, which is "all" for EPSANet-50 and ResNet-50 at 224x224.
- ``provider, backend``: which code ran.
- ``ms_p20, ms_p50, ms_p80, samples, clock``: milliseconds per call. ``ms_low`` to ``ms_high`` holds
  the true median with 95 % confidence.
- ``speedup, tie``: against the first provider, timed in the same turns.
- ``necessary_bytes``: the traffic that any implementation of the tail needs.
- ``peak_extra_bytes``: the memory of one call.
- ``max_error, error_bound, ok, note``: the check against float64.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from epsanet_fused.utils.atomic_write import write_atomically
from epsanet_fused.utils.timing import Timing
from harness.machine import MACHINE

ResultRow = Mapping[str, object]  # one measurement, by column
POINT = ("scope", "mode", "case", "batch", "dtype", "memory_format", "cache", "input")
COLUMNS = (
    *POINT, "provider", "backend", "ms_p20", "ms_p50", "ms_p80", "ms_low", "ms_high", "samples",
    "clock", "speedup", "tie", "necessary_bytes", "peak_extra_bytes", "max_error", "error_bound",
    "ok", "note", *MACHINE,
)  # fmt: skip
OUT_OF_TIME = "skipped: out of time"  # the note of a row that was not measured
WRONG = "WRONG: the error is over its bound, so it isn't timed"


class Results:
    """Appends rows to a CSV file.

    Args:
        path: the file.
        append: keep the rows that the file holds; else begin an empty file.

    Raises:
        OSError: if the file can't be written.
        ValueError: if it has other columns.
    """

    def __init__(self, path: Path, append: bool = False) -> None:
        head = _line(COLUMNS)
        if append and path.exists():
            found = path.read_bytes()
            if not found.startswith(head):
                raise ValueError(f"{path} has other columns than this version writes")
            if not found.endswith(b"\n"):  # a line that a killed process left unfinished
                write_atomically(path, found[: found.rindex(b"\n") + 1])
        else:
            write_atomically(path, head)
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.rows: list[dict[str, object]] = []  # of this process

    def add(self, row: ResultRow) -> None:
        """Append a row; columns that it lacks are empty.

        Raises:
            OSError: if there is no space for it.
            ValueError: for an unknown column.
        """
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"row must have the columns of results.py, got {sorted(unknown)}")
        full = dict.fromkeys(COLUMNS, "") | dict(row)
        line = _line(list(full.values()))
        if os.write(self._handle, line) < len(line):
            raise OSError(f"{self.path}: no space left for a row")
        self.rows.append(full)


def _line(values: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        [" ".join(str(value).splitlines()) for value in values]
    )
    return text.getvalue().encode()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file without an unfinished last line; every value is a string."""
    complete = path.read_bytes().rpartition(b"\n")[0].decode()
    return list(csv.DictReader(io.StringIO(complete)))


def failure(error: Exception) -> dict[str, object]:
    """Return the columns of a row whose measurement raised an error."""
    return {"ok": False, "note": f"{type(error).__name__}: {error}"[:300]}


def timing_columns(
    timing: Timing, first: Timing | None = None, calls: int = 1
) -> dict[str, object]:
    """Return the columns of a timing of ``calls`` calls, and of its ratio to the first one."""
    values = {f"ms_{name}": getattr(timing, name) / calls for name in ("p20", "p50", "p80")}
    values |= {"ms_low": timing.low / calls, "ms_high": timing.high / calls}
    values = {name: float(f"{value:.6g}") for name, value in values.items()}
    if first is not None:
        values |= {"speedup": first.p50 / timing.p50}
        values |= {"tie": timing is not first and timing.ties(first)}
    return values | {"samples": timing.samples}


def format_table(cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format rows of cells, the heading first, in columns of equal width.

    A rule separates the rows with one first cell from those with another.

    Args:
        cells: the heading and the rows.
        left: the number of columns that are flush left; the others are flush right.
    """
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    grouped = len({row[0] for row in cells}) < len(cells)
    lines: list[str] = []
    for i, row in enumerate(cells):
        if i == 1 or (i > 1 and grouped and row[0] != cells[i - 1][0]):
            lines.append(rule)
        parts = [
            cell.ljust(w) if k < left else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def results_table(rows: Sequence[ResultRow]) -> str:
    """Format a line for each row: the point, as far as it varies, and the result."""
    varying = [axis for axis in POINT if len({str(row[axis]) for row in rows}) > 1]
    head = "case provider runs ms_p50 [p20,_p80] speed-up peak_MB max_error bound"
    cells = [[name.replace("_", " ") for name in head.split()]]
    for row in rows:
        point = " ".join(str(row[axis]) for axis in varying) or str(row["case"])
        tie = " tie" if str(row["tie"]) == "True" else ""
        timed = ["not timed", "", ""]
        if row["ms_p50"] != "":
            between = f"[{_number(row['ms_p20'], '.3f')}, {_number(row['ms_p80'], '.3f')}]"
            speedup = _number(row["speedup"], ".2f")
            timed = [_number(row["ms_p50"], ".3f"), between, speedup and f"{speedup}x{tie}"]
        peak = row["peak_extra_bytes"]
        cells.append([
            *(point, str(row["provider"]), str(row["backend"]), *timed),
            "" if peak == "" else f"{float(str(peak)) / 1e6:.2f}",
            *(_number(row[name], ".1e") for name in ("max_error", "error_bound")),
        ])  # fmt: skip
    return format_table(cells, left=3)


def _number(value: object, form: str) -> str:
    return "" if value == "" else format(float(str(value)), form)
