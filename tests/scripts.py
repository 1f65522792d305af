"""Running the benchmarks' scripts as users do."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PNG = b"\x89PNG\r\n\x1a\n"


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A real process that finds no GPU, and in which Triton isn't interpreted."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it hasn't ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
