"""What gpu_check.py runs, and how it shares out the time."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from baselines import BASELINES

from epsanet_fused.backends.compiled import library
from epsanet_fused.backends.registry import VARIANTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# With what starting, collecting and plotting take, nine minutes.
TOTAL_SECONDS = 515.0
# What a process needs before its own clock starts, and after its deadline to end by itself.
GRACE_SECONDS = 15.0
SANITIZERS = ("memcheck", "racecheck")
BACKENDS = ("triton", *VARIANTS)
PLANNED = ("planned", "planned-triton", "planned-compile")
# Who is left out when time is over comes last: max-autotune takes the longest to compile.
OURS_FIRST = (
    "eager", "fused", "fused-graph", "compile-reduce-overhead", "compile", "eager-graph",
    "compile-max-autotune",
)  # fmt: skip


class Step(NamedTuple):
    """One process: its command, and its weight when the time that is left is shared out."""

    name: str
    command: tuple[str, ...]
    weight: float
    kind: str  # "check"; "measurement", which may end early; "warm-up", which may even fail
    own_deadline: bool = False  # takes --seconds, and keeps what it has done by then
    beside: bool = False  # nothing in it is timed, so its neighbours may run at the same time
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
    card = (sys.executable, str(HERE / "environment.py"), str(scratch / "env.json"))
    compiled = compiled_steps(scratch)
    steps = [
        Step("environment", card, 15, "check"),
        *build_steps(),
        tests_step(scratch),
        *sanitizer_steps(scratch),
        *(warm_up(step) for step in compiled),
        *tail_steps(scratch),
        norm_step(scratch),
        *compiled,
        measured(scratch, "conv-cost", 35, "conv_cost.py"),
    ]
    chosen = steps
    if names is not None:
        known = {step.name: step for step in (*steps, *extra_steps(scratch))}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
        wanted = {"build", *names}  # nothing is to be measured without the library
        chosen = [step for step in known.values() if step.name in wanted]
    tools = {s.name: s.needs for s in chosen if s.needs and shutil.which(s.needs) is None}
    missing = {name: f"{tool} isn't on PATH" for name, tool in tools.items()}
    return [step for step in chosen if step.name not in missing], missing


def tests_step(scratch: Path) -> Step:
    command = (sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "--tb=short")
    command += ("-p", "no:cacheprovider", f"--junitxml={scratch / 'gpu-tests.xml'}")
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        workers = max(1, min(10, (os.cpu_count() or 1) - 4))
        command += ("-v", "-n", str(workers), "--dist", "loadgroup")
    if importlib.util.find_spec("pytest_timeout"):
        command += ("--timeout", "100")
    return Step("tests", command, 145, "check", beside=True)


def build_steps() -> list[Step]:
    """Compile the library in place, unless there is one with CUDA already."""
    if library().cuda_archs:
        return []
    command = (sys.executable, str(ROOT / "setup.py"), "build_ext", "--inplace")
    return [Step("build", ("env", "EPSANET_FUSED_BUILD=cuda", *command), 90, "check")]


def measured(scratch: Path, name: str, weight: float, script: str, *options: str) -> Step:
    command = (sys.executable, str(HERE / script), "--device", "cuda", *options)
    command += ("--out", str(scratch / name))
    return Step(name, command, weight, "measurement", own_deadline=True)


def psa(scratch: Path, name: str, weight: float, scope: str, mode: str, *options: str) -> Step:
    what = ("--no-plot", "--input", "randn", "--scope", scope, "--mode", *mode.split())
    return measured(scratch, name, weight, "bench_psa.py", *what, *options)


def tail_steps(scratch: Path) -> list[Step]:
    """Every backend at every size, layout and dtype."""
    grid = (
        "--cache", "cold", "warm", "--batch", "128", "1", "32", "256",
        "--layout", "nchw", "channels_last", "--dtype", "float16", "bfloat16", "float32",
        "--providers", "eager", "cleaned", *BACKENDS, "fused-graph",
    )  # fmt: skip
    return [
        psa(scratch, "tail-forward", 45, "tail", "inference", *grid),
        psa(scratch, "tail-backward", 45, "tail", "backward", *grid),
    ]


def norm_step(scratch: Path) -> Step:
    """The operator of training against its parts: what backends/norm_table.py is to be filled by.

    Whatever "auto" takes for it: forward and backward at all sizes, in both layouts.
    """
    options = (
        "--cache", "cold", "--batch", "128", "32", "--layout", "nchw", "channels_last",
        "--dtype", "float16", "float32", "--providers", "eager", "apart", "fused",
    )  # fmt: skip
    return psa(scratch, "norm-training", 35, "norm", "training", *options)


def sanitizer_steps(scratch: Path) -> list[Step]:
    """memcheck and racecheck over one forward and backward of small shapes.

    Without PyTorch's caching allocator: inside one of its pools any address is a valid one.
    """
    small = (
        "--batch", "2", "--stages", "S4", "--dtype", "float16", "--reps", "1",
        "--layout", "nchw", "channels_last", "--providers", *BACKENDS,
    )  # fmt: skip
    tool = "compute-sanitizer"
    uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool)
    # One that ended by itself would have left out what it found no time for.
    steps = (
        psa(scratch, name, 100, "tail", "training", *small, "--seconds", "1000")
        for name in SANITIZERS
    )
    return [
        step._replace(
            own_deadline=False,
            # Libraries ask the driver for functions that it hasn't got: no error of ours.
            command=(
                *uncached,
                f"--tool={step.name}",
                "--error-exitcode=9",
                "--report-api-errors=no",
                *step.command,
            ),
            kind="check",
            beside=True,
            needs=tool,
        )
        for step in steps
    ]


def warm_up(step: Step) -> Step:
    """Have compiled what the step will run, while the checks run."""
    command = [str(HERE / "warm_up.py") if part.endswith("bench_psa.py") else part
               for part in step.command]  # fmt: skip
    name = f"{step.name}-warm-up"
    return step._replace(name=name, command=tuple(command), weight=150, kind="warm-up", beside=True)


def compiled_steps(scratch: Path) -> list[Step]:
    """What users get against what torch.compile gives them, everyone in his better layout.

    In mixed precision where they train. The providers come in the order of their weight: when a
    step's time is over, the last of them are left out.
    """
    half = ("--dtype", "float16", "--batch", "128", "--providers")
    best = ("--layout", "best", *half)
    inference = (
        "eager", "optimized-graph", "resnet50:eager", "compile-reduce-overhead",
        "resnet50:compile-reduce-overhead", "compile", "optimized", "resnet50:optimized-graph",
        "fused", "fused-graph", "eager-graph",
    )  # fmt: skip
    training = (
        "eager", "planned-triton", "compile", "resnet50:eager", "fused", "resnet50:compile",
        "triton", "planned-compile", "fused-compile",
    )  # fmt: skip
    module = ("--layout", "best", "--dtype", "float16", "--batch", "1", "128")
    return [
        psa(scratch, "module", 35, "module", "inference training", *module, "--providers",
            *OURS_FIRST, "fused-compile"),
        psa(scratch, "network-inference", 110, "network", "inference", *best, *inference),
        psa(scratch, "network-training", 80, "network", "training", *best, *training),
        psa(scratch, "tail-compiled", 40, "tail", "inference training", *half, *OURS_FIRST,
            "--cache", "cold", "--stages", "S1", "S2"),
    ]  # fmt: skip


def extra_steps(scratch: Path) -> list[Step]:
    """What runs only when named: Triton's table, hardware counters, what takes long to compile."""
    sizes = ("--layout", "best", "--dtype", "float16", "--batch", "128", "1", "32", "--providers")
    block = (*sizes, *OURS_FIRST, "cleaned", "fused-compile")
    small = ("--layout", "best", "--dtype", "float16", "--batch", "1", "32", "--providers")
    baselines = [f"{baseline}:{name}" for baseline in BASELINES
              for name in ("eager", "compile-reduce-overhead", "compile")]  # fmt: skip
    autotuned = ("--layout", "best", "--dtype", "float16", "--batch", "128",
                 "--providers", "eager", "compile-max-autotune", "compile", "fused")  # fmt: skip
    return [
        measured(scratch, "tune", 150, "tune_triton.py"),
        measured(scratch, "counters", 100, "counters.py")._replace(needs="ncu"),
        psa(scratch, "block-inference", 60, "block", "inference", *block, "optimized-graph"),
        psa(scratch, "block-training", 60, "block", "training", *block, *PLANNED),
        psa(scratch, "small-inference", 200, "network", "inference", *small, "eager",
            "optimized-graph", "compile-reduce-overhead", "eager-graph", "fused", *baselines),
        psa(scratch, "small-training", 200, "network", "training", *small, "eager", "fused",
            "compile-reduce-overhead", *PLANNED, *baselines),
        psa(scratch, "autotuned-inference", 200, "network", "inference", *autotuned,
            "optimized-graph", "resnet50:compile-max-autotune"),
        psa(scratch, "autotuned-training", 200, "network", "training", *autotuned,
            "planned-triton", "resnet50:compile-max-autotune"),
    ]  # fmt: skip


def groups(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in the order they come, those that may run at the same time together."""
    found: list[list[Step]] = []
    for step in steps:
        if step.beside and found and found[-1][0].beside:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def allotment(groups: Sequence[Sequence[Step]], index: int, left: float) -> float:
    """The group's share of the seconds left: what earlier ones didn't use goes to later ones."""
    weights = [max(step.weight for step in group) for group in groups[index:]]
    return max(0.0, left) * weights[0] / sum(weights)


def with_deadline(step: Step, seconds: float) -> tuple[str, ...]:
    """The command, told when to stop if it is one that can be told."""
    if not step.own_deadline:
        return step.command
    grace = min(GRACE_SECONDS, seconds / 4)
    return (*step.command, "--seconds", f"{max(1.0, seconds - grace):.0f}")


def describe_plan(
    steps: Sequence[Step], missing: Mapping[str, str], left: float = TOTAL_SECONDS
) -> Iterator[str]:
    in_groups = groups(steps)
    for i, group in enumerate(in_groups):
        seconds = allotment(in_groups, i, left)
        left -= seconds
        for k, step in enumerate(group):
            limit = f"up to {seconds:.0f} s{', at the same time' if k else ''}"
            yield f"{step.name} ({limit}): {' '.join(with_deadline(step, seconds))}"
    for name, reason in missing.items():
        yield f"skipped: {name}, as {reason}"
