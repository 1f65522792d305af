"""Write results to a CSV file and format them as a text table. Nothing is measured here."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from epsanet_fused.utils.atomic_write import write_atomically
from epsanet_fused.utils.timing import Timing

ResultRow = Mapping[str, object]  # one measurement, by column
CsvRow = dict[str, str]  # the same as read back from a file

# The columns of every CSV file that describe the machine: see environment.describe.
MACHINE = (
    *("device", "driver", "python", "torch", "triton", "cuda", "cudnn"),
    *("epsanet_fused", "threads"),
)
# The columns of bench_psa.csv. ``layout`` is the memory format.
COLUMNS = (
    "scope", "mode", "stage", "batch", "dtype", "layout", "cache", "input", "provider", "backend",
    "ms_p20", "ms_p50", "ms_p80", "samples", "clock", "speedup", "tie", "necessary_bytes", "gbps",
    "copy_gbps", "percent_of_copy", "peak_extra_bytes", "max_error", "error_bound", "ok", "note",
    *MACHINE,
)  # fmt: skip
AXES = ("mode", "batch", "dtype", "layout", "cache")
HEAD = (
    "case",
    "provider",
    "runs",
    "ms p50",
    "[p20, p80]",
    "vs eager",
    "peak MB",
    "max error",
    "bound",
)
OUT_OF_TIME = "skipped: out of time"  # the note of a row that was not measured


def write_csv(path: Path, rows: Iterable[ResultRow], columns: Sequence[str] = COLUMNS) -> None:
    """Write the rows; a row with a column that is not in ``columns`` is an error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[CsvRow]:
    """Read the rows of a CSV file; every value is a string."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def failure(error: Exception) -> dict[str, object]:
    """Return the columns of a row whose measurement raised an error."""
    return {"ok": False, "note": f"{type(error).__name__}: {error}"[:300]}


def timing_columns(timing: Timing, launches: int = 1) -> dict[str, object]:
    """Return the columns of a timing; of one launch, if it is of several."""
    return {
        "ms_p20": timing.p20 / launches,
        "ms_p50": timing.p50 / launches,
        "ms_p80": timing.p80 / launches,
        "samples": timing.samples,
    }


def label(row: ResultRow, varying: Sequence[str]) -> str:
    """Describe a case by its stage and by the axes that vary in this run."""
    names = [str(row["stage"]), *(f"{axis}={row[axis]}" for axis in varying if axis != "mode")]
    return " ".join([*names, *(str(row["mode"]) for axis in varying if axis == "mode")])


def varying_axes(rows: Sequence[ResultRow]) -> list[str]:
    """Return the axes that have more than one value in these rows."""
    return [axis for axis in AXES if len({str(row[axis]) for row in rows}) > 1]


def table(rows: Sequence[ResultRow]) -> str:
    """Format the rows as text, one line per case and provider."""
    varying = varying_axes(rows)
    others = [axis for axis in varying if axis != "layout"]
    # With --memory-format best, each provider has one memory format: it belongs to the provider,
    # not to the case.
    one_each = len({(label(row, others), row["provider"]) for row in rows}) == len(rows)
    cells = [HEAD]
    for row in rows:
        name, *rest = _cells(row, label(row, others if one_each else varying))
        if one_each and "layout" in varying:
            rest[0] += f", {row['layout']}"
        cells.append((name, *rest))
    return align(cells, left=3, by=0)


def align(cells: Sequence[Sequence[str]], left: int, by: int | None = None) -> str:
    """Format rows of cells, the heading first, in columns of equal width.

    Args:
        cells: the heading and the rows.
        left: the number of columns that are flush left; the others are flush right.
        by: draw a rule wherever this column changes.
    """
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines: list[str] = []
    for i, row in enumerate(cells):
        if i == 1 or (i > 1 and by is not None and row[by] != cells[i - 1][by]):
            lines.append(rule)
        parts = [
            cell.ljust(w) if k < left else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cells(row: ResultRow, case: str) -> tuple[str, ...]:
    head = (case, str(row["provider"]), str(row["backend"]))
    errors = (_number(row["max_error"], "{:.1e}"), _number(row["error_bound"], "{:.1e}"))
    if row["ms_p50"] == "":
        return (*head, "not timed", "", "", "", *errors)
    peak = row["peak_extra_bytes"]
    return (
        *head,
        _number(row["ms_p50"], "{:.3f}"),
        f"[{_number(row['ms_p20'], '{:.3f}')}, {_number(row['ms_p80'], '{:.3f}')}]",
        _number(row["speedup"], "{:.2f}x") + (" tie" if row["tie"] in (True, "True") else ""),
        "" if peak == "" else _number(float(str(peak)) / 1e6, "{:.2f}"),
        *errors,
    )


def _number(value: object, form: str) -> str:
    return "" if value == "" else form.format(float(str(value)))
