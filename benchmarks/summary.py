"""The short table of what a run came to: ours beside everyone else, each by his best provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baselines import baseline_of
from report import Row, align

HEAD = ("step", "case", "eager", "compiled", "ours", "", "vs eager", "vs compiled", "% of copy",
        "ResNet-50")  # fmt: skip
# Neither ours nor a peer: yardsticks, and the tail in cleaned PyTorch.
ASIDE = ("copy", "cleaned", "apart", "reference")


def summary(tables: Mapping[str, Sequence[Row]]) -> str:
    """A line for each float16 case of each step: milliseconds, and how much faster ours is.

    Of the tail, whose grid is large, only batch 128 from a cold cache. "" where there are none.
    """
    lines = [line for step, rows in tables.items() for line in _lines(step, rows)]
    return align([HEAD, *lines], left=2) if lines else ""


def _lines(step: str, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        is_tail = row["scope"] in ("tail", "norm")
        small = is_tail and (row["batch"] != "128" or row["cache"] != "cold")
        if row["dtype"] == "float16" and row["ms_p50"] != "" and not small:
            layout = f" {row['layout']}" if is_tail else ""
            case = f"{row['mode']} {row['stage']} x {row['batch']}{layout}"
            cases.setdefault(case, []).append(row)
    return [(step, case, *_cells(found)) for case, found in cases.items()]


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    best: dict[str, Row] = {}
    for row in rows:
        whose = whose_is(str(row["provider"]))
        if whose not in best or _ms(row) < _ms(best[whose]):
            best[whose] = row
    ms = {whose: f"{_ms(row):.4f}" for whose, row in best.items()}
    ours = best.get("ours")
    faster = {
        whose: f"{_ms(best[whose]) / _ms(ours):.2f}x"
        for whose in ("eager", "compiled")
        if ours is not None and whose in best
    }
    percent = "" if ours is None or ours["percent_of_copy"] == "" else ours["percent_of_copy"]
    return (
        ms.get("eager", ""),
        ms.get("compiled", ""),
        ms.get("ours", ""),
        "" if ours is None else str(ours["provider"]),
        faster.get("eager", ""),
        faster.get("compiled", ""),
        "" if percent == "" else f"{float(str(percent)):.1f}",
        ms.get("resnet50", ""),
    )


def whose_is(provider: str) -> str:
    """eager, compiled, ours or a baseline's name; "aside" for what isn't compared."""
    if baseline := baseline_of(provider):
        return baseline
    if provider in ASIDE:
        return "aside"
    if provider.startswith("eager"):
        return provider
    return "compiled" if provider.startswith("compile") else "ours"


def _ms(row: Row) -> float:
    return float(str(row["ms_p50"]))
