"""What comes out: rows to a CSV and to a table. Nothing here measures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from epsanet_fused.utils.atomic_write import write_atomically

Row = Mapping[str, object]

COLUMNS = (
    "scope", "mode", "stage", "batch", "dtype", "layout", "cache", "input", "provider", "backend",
    "ms_p20", "ms_p50", "ms_p80", "samples", "clock", "speedup", "tie", "necessary_bytes", "gbps",
    "copy_gbps", "percent_of_copy", "peak_extra_bytes", "max_error", "error_bound", "ok", "note",
    "device", "driver", "python", "torch", "triton", "cuda", "cudnn", "epsanet_fused", "threads",
)  # fmt: skip
AXES = ("mode", "batch", "dtype", "layout", "cache")


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def label(row: Row, varying: Sequence[str]) -> str:
    """A case in words: its stage, and what of its settings varies in this run."""
    names = [str(row["stage"]), *(f"{axis}={row[axis]}" for axis in varying if axis != "mode")]
    return " ".join([*names, *(str(row["mode"]) for axis in varying if axis == "mode")])


def varying_axes(rows: Sequence[Row]) -> list[str]:
    return [axis for axis in AXES if len({str(row[axis]) for row in rows}) > 1]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one per case and provider."""
    varying = varying_axes(rows)
    others = [axis for axis in varying if axis != "layout"]
    # Where each provider has chosen its layout, that doesn't make another case.
    chosen = len({(label(row, others), row["provider"]) for row in rows}) == len(rows)
    cells = [
        ("case", "provider", "runs", "ms p50", "[p20, p80]", "vs eager", "peak MB", "max error",
         "bound"),
    ]  # fmt: skip
    for row in rows:
        name, *rest = _cells(row, label(row, others if chosen else varying))
        if chosen and "layout" in varying:
            rest[0] += f", {row['layout']}"
        cells.append((name, *rest))
    return align(cells, left=3, by=0)


def align(cells: Sequence[Sequence[str]], left: int, by: int | None = None) -> str:
    """Columns of equal width, the first ``left`` flush left, under a heading; a rule wherever
    column ``by`` changes."""
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


def _cells(row: Row, case: str) -> tuple[str, ...]:
    head = (case, str(row["provider"]), str(row["backend"]))
    check = (_number(row["max_error"], "{:.1e}"), _number(row["error_bound"], "{:.1e}"))
    if row["ms_p50"] == "":
        return (*head, "not timed", "", "", "", *check)
    peak = row["peak_extra_bytes"]
    return (
        *head,
        _number(row["ms_p50"], "{:.3f}"),
        f"[{_number(row['ms_p20'], '{:.3f}')}, {_number(row['ms_p80'], '{:.3f}')}]",
        _number(row["speedup"], "{:.2f}x") + (" tie" if row["tie"] in (True, "True") else ""),
        "" if peak == "" else _number(float(str(peak)) / 1e6, "{:.2f}"),
        *check,
    )


def _number(value: object, form: str) -> str:
    return "" if value == "" else form.format(float(str(value)))
