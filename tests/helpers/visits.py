"""Kill a rehearsed visit to a GPU at a given moment, and check that its file has every row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from harness.results import COLUMNS, Results, read_rows
from helpers.processes import BENCHMARKS

# The steps of each part that write rows.
STEPS = {
    1: "tail-forward tail-backward plan-cost",
    2: "network-inference network-training network-batch-1 module",
    3: "tail-compiled norm-training tail-forward-dtypes tail-backward-dtypes",
}


def kill_after(part: int, rows: int, seconds: float, out: Path) -> int:
    """Start a part, and kill all of its processes some seconds after it has written some rows.

    Returns:
        The number of rows in the file.

    Raises:
        AssertionError: if a row that was in the file is not there any more, or one is not valid.
    """
    token = uuid.uuid4().hex
    command = [sys.executable, str(BENCHMARKS / "visit.py"), "--rehearse", "--out", str(out)]
    command += ["--part", str(part), "--seconds", "300", "--steps", *STEPS[part].split()]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "VISIT_TOKEN": token}
    path = out / "results.csv"
    visit = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while visit.poll() is None and not (path.exists() and len(read_rows(path)) >= rows):
            time.sleep(0.02)
        end = time.monotonic() + seconds
        seen = path.read_bytes()
        while time.monotonic() < end:
            seen = path.read_bytes()
            time.sleep(0.001)
    finally:
        kill_marked(token)
        visit.wait()
    found = path.read_bytes()
    assert found.startswith(seen), "a row that was written is lost"
    kept = read_rows(path)
    for row in kept:
        assert tuple(row) == COLUMNS and None not in row.values(), row
        timed = row["ms_p50"] != ""
        assert float(row["ms_p50"]) > 0 if timed else row["note"], row
    again = Results(path, append=True)  # drops a line that is not complete, and nothing else
    again.add({"note": "after"})
    assert read_rows(path)[:-1] == kept
    return len(kept)


def kill_marked(token: str) -> None:
    """Kill all processes that inherited the environment variable, until there are none."""
    while marked := marked_processes(token):
        for pid in marked:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked_processes(token: str) -> list[int]:
    """Return the processes that have VISIT_TOKEN=token in their environment and haven't ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended meanwhile, or is another user's
            continue
        if f"VISIT_TOKEN={token}".encode() in environment and state != "Z":
            found.append(int(folder.name))
    return found
