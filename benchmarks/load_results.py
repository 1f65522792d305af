"""What a visit to a card has left, read back: the CSVs' rows, the card, times to compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from report import read_csv

Row = dict[str, str]


class Time(NamedTuple):
    """Milliseconds of a call, or of several together: the median and the spread from run to run."""

    p20: float
    p50: float
    p80: float

    def beats(self, other: Time) -> bool:
        """Whether it is shorter beyond a tie, which is where the two spreads overlap."""
        return self.p80 < other.p20


class Card(NamedTuple):
    """What ran it; without an env.json beside the CSVs only the name is known."""

    name: str
    arch: int | None = None  # 90 for sm_90
    l2_bytes: int = 0


def time_of(row: Row) -> Time | None:
    """None for a row without one; what gave a wrong result has none."""
    if row["ms_p50"] == "":
        return None
    return Time(float(row["ms_p20"]), float(row["ms_p50"]), float(row["ms_p80"]))


def together(times: Iterable[Time]) -> Time:
    """One after the other."""
    return Time(*map(sum, zip(*times, strict=True)))


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV that has these columns and is of one card.

    Raises:
        ValueError: if it hasn't, or isn't.
    """
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    if missing := [name for name in columns if name not in rows[0]]:
        raise ValueError(f"{path}: has no column {', '.join(missing)}")
    cards = sorted({row["device"] for row in rows})
    if len(cards) > 1:
        raise ValueError(f"{path}: must be of one card, but holds rows of {' and '.join(cards)}")
    return rows


def by_key(rows: Iterable[Row], columns: Sequence[str], path: Path) -> dict[tuple[str, ...], Row]:
    """Each row by what these columns say.

    Raises:
        ValueError: if they say the same of two rows.
    """
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in columns)
        if key in found:
            raise ValueError(f"{path}: holds two rows of {' '.join(key)}")
        found[key] = row
    return found


def read_card(folder: Path, names: Iterable[str]) -> Card:
    """The card that all files in the folder are of.

    Raises:
        ValueError: if they are of more than one.
    """
    path = folder / "env.json"
    environment = json.loads(path.read_text()) if path.exists() else {}
    devices = {*names} | ({environment["device"]} if environment else set())
    if len(devices) > 1:
        raise ValueError(f"{folder}: its files are of {' and '.join(sorted(devices))}")
    if not environment:
        return Card(*devices)
    arch = int(environment["capability"].replace(".", ""))
    return Card(*devices, arch, environment["l2_bytes"])
