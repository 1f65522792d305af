"""Run benchmarks and recipes as users do, and read what they write and what the documents show."""

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

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
RECIPES = ROOT / "recipes"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a PNG file
Argument = str | Path | int | float
# Code that needs timm, torchvision or onnx, which only the integrations' environment has.
_NEEDS_MORE = re.compile(r"integrations|onnx")


def _environment_without_gpu() -> dict[str, str]:
    """Return an environment in which no GPU is visible and Triton's interpreter is off."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    return env


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script of benchmarks/ in a process without a GPU."""
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    env = _environment_without_gpu()
    return subprocess.run(command, capture_output=True, text=True, env=env)


def one_thread_environment() -> dict[str, str]:
    """Return an environment without a GPU and with one thread, whose sums are reproducible."""
    return _environment_without_gpu() | {"OMP_NUM_THREADS": "1"}


def recipe_command(name: str, *arguments: Argument, processes: int = 1) -> list[str]:
    """Return the command line of a recipe; torchrun starts several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = [sys.executable, *(launcher if processes > 1 else [])]
    return [*start, str(RECIPES / name), *map(str, arguments)]


def run_recipe(
    name: str, *arguments: Argument, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run a script of recipes/ to its end, on one thread without a GPU."""
    return subprocess.run(
        recipe_command(name, *arguments, processes=processes),
        capture_output=True,
        text=True,
        env=one_thread_environment(),
        check=False,
    )


def interrupt_recipe(
    number: signal.Signals, progress: str, name: str, *arguments: Argument, errors: Path
) -> tuple[int, str]:
    """Run a recipe and send it a signal as soon as its stderr matches a pattern.

    SIGINT goes to the DataLoader workers, too, as Ctrl-C does.

    Args:
        progress: the regular expression to wait for.
        errors: the file that stderr is written to.

    Returns:
        Exit status and stderr.
    """
    command = recipe_command(name, *arguments)
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command, stderr=file, env=one_thread_environment(), start_new_session=True
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


def is_running(pid: int) -> bool:
    """Return whether a process exists and hasn't ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def reproducible_rows(folder: Path) -> list[dict[str, str]]:
    """Read the rows of a run's log.csv without the speed."""
    return [
        {k: v for k, v in r.items() if k != "images_per_s"} for r in rows_of(folder / "log.csv")
    ]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU, tensors and plain values only."""
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_training_state(
    found: Path, expected: Path, rtol: float = 0, atol: float = 0
) -> None:
    """Check that two checkpoints hold the same model and optimizer, by default bit by bit."""
    a, b = load_checkpoint(found), load_checkpoint(expected)
    for part in ("state_dict", "raw_state_dict"):
        assert (part in a) == (part in b)
        if part in b:
            torch.testing.assert_close(dict(a[part]), dict(b[part]), rtol=rtol, atol=atol)
    momenta = (dict(c["optimizer"]["state"]) for c in (a, b))
    torch.testing.assert_close(*momenta, rtol=rtol, atol=atol)


def python_blocks(page: Path, needs_more: bool) -> list[str]:
    """Return a page's Python blocks that need timm, torchvision or onnx, or those that don't."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return [block for block in blocks if bool(_NEEDS_MORE.search(block)) is needs_more]


def commands(page: Path, program: str) -> list[list[str]]:
    """Return a page's command lines, indented by four, that start with this program."""
    lines = re.findall(rf"^    ({re.escape(program)} .*)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]
