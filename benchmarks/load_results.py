"""Load the results of a run on a GPU: CSV rows, the GPU's properties, and times to compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from report import CsvRow, read_csv


class Time(NamedTuple):
    """The median and the spread of a time in milliseconds, of one call or of several together."""

    p20: float
    p50: float
    p80: float

    def beats(self, other: Time) -> bool:
        """Return whether this time is shorter and the two spreads do not overlap."""
        return self.p80 < other.p20


class Gpu(NamedTuple):
    """The GPU that was measured. Without an env.json file only its name is known."""

    name: str
    arch: int | None = None  # 90 for sm_90
    l2_bytes: int = 0


def time_of(row: CsvRow) -> Time | None:
    """Return the row's time, or None for a row that was not timed, such as a wrong result."""
    if row["ms_p50"] == "":
        return None
    return Time(float(row["ms_p20"]), float(row["ms_p50"]), float(row["ms_p80"]))


def add_up(times: Iterable[Time]) -> Time:
    """Return the time of several calls one after the other."""
    return Time(*map(sum, zip(*times, strict=True)))


def read_rows(path: Path, columns: Sequence[str]) -> list[CsvRow]:
    """Read a CSV file.

    Raises:
        ValueError: if it has no rows, lacks one of the columns or has rows of several GPUs.
    """
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    if missing := [name for name in columns if name not in rows[0]]:
        raise ValueError(f"{path}: has no column {', '.join(missing)}")
    gpus = sorted({row["device"] for row in rows})
    if len(gpus) > 1:
        raise ValueError(f"{path}: must be of one GPU, but holds rows of {' and '.join(gpus)}")
    return rows


def by_key(
    rows: Iterable[CsvRow], columns: Sequence[str], path: Path
) -> dict[tuple[str, ...], CsvRow]:
    """Return the rows by their values in these columns.

    Raises:
        ValueError: if two rows have the same values.
    """
    found: dict[tuple[str, ...], CsvRow] = {}
    for row in rows:
        key = tuple(row[name] for name in columns)
        if key in found:
            raise ValueError(f"{path}: holds two rows of {' '.join(key)}")
        found[key] = row
    return found


def read_gpu(folder: Path, names: Iterable[str]) -> Gpu:
    """Read the GPU's properties from env.json.

    Args:
        folder: where env.json may be.
        names: the devices that the CSV files name.

    Raises:
        ValueError: if the files are of several GPUs.
    """
    path = folder / "env.json"
    environment = json.loads(path.read_text()) if path.exists() else {}
    devices = {*names} | ({environment["device"]} if environment else set())
    if len(devices) > 1:
        raise ValueError(f"{folder}: its files are of {' and '.join(sorted(devices))}")
    if not environment:
        return Gpu(*devices)
    arch = int(environment["capability"].replace(".", ""))
    return Gpu(*devices, arch, environment["l2_bytes"])
