"""What gpu_check.py runs, and how it shares out the time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from epsanet_fused.backends import VARIANTS
from epsanet_fused.backends.native import library

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# With what starting, collecting and plotting take, nine minutes.
TOTAL_SECONDS = 515.0
# What a process needs to end by itself and to write its files after its own deadline.
GRACE_SECONDS = 10.0
SANITIZERS = ("memcheck", "racecheck")
BACKENDS = ("triton", *VARIANTS)
COMPILED = ("eager", "eager-graph", "compile", "compile-max-autotune")


class Step(NamedTuple):
    """One process: its command, and its weight when the time that is left is shared out."""

    name: str
    command: tuple[str, ...]
    weight: float
    own_deadline: bool  # takes --seconds, and keeps what it has measured by then


def plan(scratch: Path, sanitizer: str | None) -> list[Step]:
    """What to run: the checks first, then the measurements in the order of their use."""
    python = sys.executable
    tests = (python, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", "-p", "no:cacheprovider")
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        tests += ("-n", "4")
    if importlib.util.find_spec("pytest_timeout"):
        tests += ("--timeout", "80")
    card = (python, str(HERE / "environment.py"), str(scratch / "env.json"))
    return [
        Step("environment", card, 15, False),
        *build_steps(),
        Step("tests", (*tests, f"--junitxml={scratch / 'gpu-tests.xml'}"), 170, False),
        *tail_steps(scratch),
        norm_step(scratch),
        *sanitizer_steps(scratch, sanitizer),
        measured(scratch, "conv-cost", 70, "conv_cost.py"),
        *network_steps(scratch),
    ]


def build_steps() -> list[Step]:
    """Compile the library in place, unless there is one with CUDA already."""
    if library().cuda_archs:
        return []
    command = (sys.executable, str(ROOT / "setup.py"), "build_ext", "--inplace")
    return [Step("build", ("env", "EPSANET_FUSED_BUILD=cuda", *command), 90, False)]


def measured(scratch: Path, name: str, weight: float, script: str, *options: str) -> Step:
    command = (sys.executable, str(HERE / script), "--device", "cuda", *options)
    return Step(name, (*command, "--out", str(scratch / name)), weight, True)


def psa(scratch: Path, name: str, weight: float, scope: str, mode: str, *options: str) -> Step:
    what = ("--input", "randn", "--scope", scope, "--mode", *mode.split())
    return measured(scratch, name, weight, "bench_psa.py", *what, *options)


def tail_steps(scratch: Path) -> list[Step]:
    """Every backend at every size, layout and dtype; then against the compilers at a few."""
    grid = (
        "--cache", "cold", "warm", "--batch", "128", "1", "32", "256",
        "--layout", "nchw", "channels_last", "--dtype", "float16", "bfloat16", "float32",
        "--providers", "eager", "cleaned", *BACKENDS, "fused-graph",
    )  # fmt: skip
    compiled = (
        "--cache", "cold", "--batch", "128", "1", "--dtype", "float16",
        "--stages", "S1", "S4", "S2", "S3", "--providers", "fused", "fused-graph", *COMPILED,
    )  # fmt: skip
    return [
        psa(scratch, "tail-forward", 45, "tail", "inference", *grid),
        psa(scratch, "tail-backward", 45, "tail", "backward", *grid),
        psa(scratch, "tail-compiled", 60, "tail", "inference training", *compiled),
    ]


def norm_step(scratch: Path) -> Step:
    """The operator of training against its parts: what backends/norm_table.py is to be filled by.

    Whatever "auto" takes for it: forward and backward at all sizes, in both layouts.
    """
    options = (
        "--cache", "cold", "--batch", "128", "32", "--layout", "nchw", "channels_last",
        "--dtype", "float16", "float32", "--providers", "eager", "apart", "fused",
    )  # fmt: skip
    return psa(scratch, "norm-training", 30, "norm", "training", *options)


def sanitizer_steps(scratch: Path, sanitizer: str | None) -> list[Step]:
    """memcheck and racecheck over one forward and backward of small shapes.

    Without PyTorch's caching allocator: inside one of its pools any address is a valid one.
    """
    if sanitizer is None:
        return []
    small = (
        "--batch", "2", "--stages", "S4", "S3", "--dtype", "float16", "--reps", "1",
        "--layout", "nchw", "channels_last", "--providers", *BACKENDS,
    )  # fmt: skip
    steps = (psa(scratch, tool, 35, "tail", "training", *small) for tool in SANITIZERS)
    return [
        step._replace(
            command=(
                "env",
                "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
                sanitizer,
                f"--tool={step.name}",
                "--error-exitcode=9",
                *step.command,
            )
        )
        for step in steps
    ]


def network_steps(scratch: Path) -> list[Step]:
    """What users get: the network and the module, in mixed precision where they train."""
    plain = (
        "--dtype", "float16", "--layout", "channels_last", "nchw", "--batch", "128", "1", "32",
        "--providers", "eager", "eager-graph", "fused", "fused-graph",
    )  # fmt: skip
    compiled = (
        "--dtype", "float16", "--batch", "128",
        "--providers", "eager", "compile", "fused", "fused-compile",
    )  # fmt: skip
    module = (
        "--dtype", "float16", "--batch", "1", "128", "32",
        "--providers", "fused", "fused-compile", "fused-graph", *COMPILED,
    )  # fmt: skip
    optimal = (
        "--dtype", "float16", "--layout", "best", "--batch", "128", "1",
        "--providers", "eager", "optimized", "optimized-graph",
        "resnet50:eager", "resnet50:optimized", "resnet50:optimized-graph",
    )  # fmt: skip
    return [
        psa(scratch, "network-optimized", 70, "network", "inference", *optimal),
        psa(scratch, "network-inference", 30, "network", "inference", *plain),
        psa(scratch, "network-training", 35, "network", "training", *plain),
        psa(scratch, "compiled-inference", 70, "network", "inference", *compiled),
        psa(scratch, "compiled-training", 70, "network", "training", *compiled),
        psa(scratch, "module", 40, "module", "inference training", *module),
    ]


def allotment(steps: Sequence[Step], index: int, left: float) -> float:
    """The step's share of the seconds left: what earlier steps didn't use goes to later ones."""
    return max(0.0, left) * steps[index].weight / sum(step.weight for step in steps[index:])


def with_deadline(step: Step, seconds: float) -> tuple[str, ...]:
    """The command, told when to stop if it is one that can be told."""
    if not step.own_deadline:
        return step.command
    return (*step.command, "--seconds", f"{max(1.0, seconds - GRACE_SECONDS):.0f}")


def describe_plan(steps: Sequence[Step], sanitizer: str | None) -> Iterator[str]:
    left = TOTAL_SECONDS
    for i, step in enumerate(steps):
        seconds = allotment(steps, i, left)
        left -= seconds
        yield f"{step.name} (up to {seconds:.0f} s): {' '.join(with_deadline(step, seconds))}"
    if sanitizer is None:
        yield "skipped: memcheck and racecheck, as compute-sanitizer isn't on PATH"
