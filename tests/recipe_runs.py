"""Running the recipes as users do, and comparing what they leave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scripts import rows_of

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
Arguments = "str | Path | int | float"


def command(name: str, *arguments: Arguments, processes: int = 1) -> list[str]:
    """Several processes are started by torchrun, on a port of its own choice."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = [sys.executable, *(launcher if processes > 1 else [])]
    return [*start, str(RECIPES / name), *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread, whose sums come out the same each time; no GPU; Triton isn't interpreted."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env


def recipe(
    name: str, *arguments: Arguments, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *arguments, processes=processes),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )


def stop_in_the_middle(
    number: signal.Signals, progress: str, name: str, *arguments: Arguments, errors: Path
) -> tuple[int, str]:
    """Send a signal once the pattern is in stderr, kept in ``errors``: exit status and stderr.

    SIGINT goes to the workers of the DataLoader, too, as Ctrl-C does.
    """
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command(name, *arguments), stderr=file, env=environment(), start_new_session=True
        )
    deadline = time.monotonic() + 120
    while not re.search(progress, errors.read_text()):
        assert process.poll() is None, f"ended early: {errors.read_text()}"
        assert time.monotonic() < deadline, f"not in time: {errors.read_text()}"
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.wait(timeout=60), errors.read_text()


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def numbers(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log, but for its speed."""
    return [
        {k: v for k, v in r.items() if k != "images_per_s"} for r in rows_of(folder / "log.csv")
    ]


def assert_same_weights(found: Path, expected: Path, rtol: float = 0, atol: float = 0) -> None:
    """All that a checkpoint holds of the model and the optimizer, bit by bit by default."""
    a, b = load(found), load(expected)
    for part in ("state_dict", "raw_state_dict"):
        assert (part in a) == (part in b)
        if part in b:
            torch.testing.assert_close(dict(a[part]), dict(b[part]), rtol=rtol, atol=atol)
    momenta = (dict(c["optimizer"]["state"]) for c in (a, b))
    torch.testing.assert_close(*momenta, rtol=rtol, atol=atol)
