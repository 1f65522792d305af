"""Format the summary of a run: our best provider beside the best of each alternative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baselines import baseline_of
from report import ResultRow, align

HEAD = (
    "step",
    "case",
    "eager",
    "compiled",
    "ours",
    "",
    "vs eager",
    "vs compiled",
    "% of copy",
    "ResNet-50",
)
# Providers that the summary leaves out: they are references, not alternatives.
LEFT_OUT = ("copy", "cleaned", "apart", "reference")


def summary(tables: Mapping[str, Sequence[ResultRow]]) -> str:
    """Format a line for each float16 case of each step: milliseconds and our speed-up.

    Of the tail's many cases only those of batch 128 with a cold cache are shown. The result is ""
    if there is no case.
    """
    lines = [line for step, rows in tables.items() for line in _lines(step, rows)]
    return align([HEAD, *lines], left=2) if lines else ""


def _lines(step: str, rows: Sequence[ResultRow]) -> list[tuple[str, ...]]:
    cases: dict[str, list[ResultRow]] = {}
    for row in rows:
        is_tail = row["scope"] in ("tail", "norm")
        small = is_tail and (row["batch"] != "128" or row["cache"] != "cold")
        if row["dtype"] == "float16" and row["ms_p50"] != "" and not small:
            memory_format = f" {row['layout']}" if is_tail else ""
            case = f"{row['mode']} {row['stage']} x {row['batch']}{memory_format}"
            cases.setdefault(case, []).append(row)
    return [(step, case, *_cells(found)) for case, found in cases.items()]


def _cells(rows: Sequence[ResultRow]) -> tuple[str, ...]:
    best: dict[str, ResultRow] = {}
    for row in rows:
        group = group_of(str(row["provider"]))
        if group not in best or _ms(row) < _ms(best[group]):
            best[group] = row
    ms = {group: f"{_ms(row):.4f}" for group, row in best.items()}
    ours = best.get("ours")
    speedup = {
        group: f"{_ms(best[group]) / _ms(ours):.2f}x"
        for group in ("eager", "compiled")
        if ours is not None and group in best
    }
    percent = "" if ours is None or ours["percent_of_copy"] == "" else ours["percent_of_copy"]
    return (
        ms.get("eager", ""),
        ms.get("compiled", ""),
        ms.get("ours", ""),
        "" if ours is None else str(ours["provider"]),
        speedup.get("eager", ""),
        speedup.get("compiled", ""),
        "" if percent == "" else f"{float(str(percent)):.1f}",
        ms.get("resnet50", ""),
    )


def group_of(provider: str) -> str:
    """Return "eager", "compiled", "ours", a baseline's name, or "left out"."""
    if baseline := baseline_of(provider):
        return baseline
    if provider in LEFT_OUT:
        return "left out"
    if provider.startswith("eager"):
        return provider
    return "compiled" if provider.startswith("compile") else "ours"


def _ms(row: ResultRow) -> float:
    return float(str(row["ms_p50"]))
