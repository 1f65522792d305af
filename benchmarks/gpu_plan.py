"""What gpu_check.py runs, and how it shares out the time."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rivals import RIVALS

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
PLANNED = ("planned", "planned-triton", "planned-compile")
COMPILED = ("eager", "eager-graph", "compile", "compile-reduce-overhead", "compile-max-autotune")


class Step(NamedTuple):
    """One process: its command, and its weight when the time that is left is shared out."""

    name: str
    command: tuple[str, ...]
    weight: float
    own_deadline: bool  # takes --seconds, and keeps what it has measured by then
    needs: str = ""  # a program that it can't do without


def plan(scratch: Path, names: Sequence[str] | None = None) -> tuple[list[Step], dict[str, str]]:
    """What to run: the checks first, then the measurements in the order of their use.

    Args:
        scratch: the folder for what the steps write.
        names: only these steps; None takes all but those that run only when named.

    Returns:
        The steps, and for what can't run here the reason.

    Raises:
        ValueError: for a name that no step has.
    """
    python = sys.executable
    card = (python, str(HERE / "environment.py"), str(scratch / "env.json"))
    steps = [
        Step("environment", card, 15, False),
        *build_steps(),
        tests_step(scratch),
        *tail_steps(scratch),
        norm_step(scratch),
        *sanitizer_steps(scratch),
        measured(scratch, "conv-cost", 70, "conv_cost.py"),
        *network_steps(scratch),
    ]
    extra = extra_steps(scratch)
    known = {step.name: step for step in (*steps, *extra)}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
    chosen = steps if names is None else [step for step in known.values() if step.name in names]
    tools = {
        step.name: step.needs for step in chosen if step.needs and not shutil.which(step.needs)
    }
    missing = {name: f"{tool} isn't on PATH" for name, tool in tools.items()}
    return [step for step in chosen if step.name not in missing], missing


def tests_step(scratch: Path) -> Step:
    command = (sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q")
    command += ("-p", "no:cacheprovider", f"--junitxml={scratch / 'gpu-tests.xml'}")
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        command += ("-n", "4")
    if importlib.util.find_spec("pytest_timeout"):
        command += ("--timeout", "80")
    return Step("tests", command, 170, False)


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


def sanitizer_steps(scratch: Path) -> list[Step]:
    """memcheck and racecheck over one forward and backward of small shapes.

    Without PyTorch's caching allocator: inside one of its pools any address is a valid one.
    """
    small = (
        "--batch", "2", "--stages", "S4", "S3", "--dtype", "float16", "--reps", "1",
        "--layout", "nchw", "channels_last", "--providers", *BACKENDS,
    )  # fmt: skip
    steps = (psa(scratch, tool, 35, "tail", "training", *small) for tool in SANITIZERS)
    tool = "compute-sanitizer"
    uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool)
    return [
        step._replace(
            command=(*uncached, f"--tool={step.name}", "--error-exitcode=9", *step.command),
            needs=tool,
        )
        for step in steps
    ]


def extra_steps(scratch: Path) -> list[Step]:
    """What runs only when named: the sweep of Triton's table, and hardware counters."""
    return [
        measured(scratch, "tune", 150, "tune_triton.py"),
        measured(scratch, "counters", 60, "counters.py")._replace(needs="ncu"),
    ]


def network_steps(scratch: Path) -> list[Step]:
    """What users get, everyone in his better layout; in mixed precision where they train."""
    module = ("--dtype", "float16", "--layout", "best", "--providers", *COMPILED, "cleaned",
              "fused", "fused-compile", "fused-graph")  # fmt: skip
    both = ("--dtype", "float16", "--layout", "best", "--providers", *COMPILED)
    inference = (*both, "cleaned", "fused", "optimized", "optimized-compile", "optimized-graph")
    training = (*both, "fused", "triton", "fused-compile", "fused-graph", *PLANNED)
    rivals = [f"{r}:{p}" for r in RIVALS for p in ("eager", "compile", "compile-reduce-overhead")]
    optimized_rival = ("resnet50:optimized", "resnet50:optimized-graph")
    return [
        psa(scratch, "module", 40, "module", "inference training", *module, "--batch", "1", "128"),
        psa(scratch, "network-inference", 110, "network", "inference", *inference, *rivals,
            *optimized_rival, "--batch", "128", "1", "32"),
        psa(scratch, "network-training", 110, "network", "training", *training, *rivals,
            "--batch", "128", "32", "1"),
        psa(scratch, "block-inference", 30, "block", "inference", *inference, "--batch", "128"),
        psa(scratch, "block-training", 30, "block", "training", *training, "--batch", "128"),
    ]  # fmt: skip


def allotment(steps: Sequence[Step], index: int, left: float) -> float:
    """The step's share of the seconds left: what earlier steps didn't use goes to later ones."""
    return max(0.0, left) * steps[index].weight / sum(step.weight for step in steps[index:])


def with_deadline(step: Step, seconds: float) -> tuple[str, ...]:
    """The command, told when to stop if it is one that can be told."""
    if not step.own_deadline:
        return step.command
    return (*step.command, "--seconds", f"{max(1.0, seconds - GRACE_SECONDS):.0f}")


def describe_plan(
    steps: Sequence[Step], missing: Mapping[str, str], left: float = TOTAL_SECONDS
) -> Iterator[str]:
    for i, step in enumerate(steps):
        seconds = allotment(steps, i, left)
        left -= seconds
        yield f"{step.name} (up to {seconds:.0f} s): {' '.join(with_deadline(step, seconds))}"
    for name, reason in missing.items():
        yield f"skipped: {name}, as {reason}"
