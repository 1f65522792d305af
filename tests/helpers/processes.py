"""Run scripts, recipes and the code in README as users do."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
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


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
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


ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs where timm, torchvision and onnx are installed; the rest runs everywhere.
_NEEDS_MORE = re.compile(r"integrations|onnx")


def python_blocks(page: Path, needs_more: bool) -> list[str]:
    """The Python blocks of a page that need more than this package, or those that don't."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return [block for block in blocks if bool(_NEEDS_MORE.search(block)) is needs_more]


def commands(page: Path, program: str) -> list[list[str]]:
    """The command lines of a page, indented by four, that start with this program."""
    lines = re.findall(rf"^    ({re.escape(program)} .*)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]
