"""The steps of gpu_check.py, and the division of its time among them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from baselines import BASELINES

from epsanet_fused.backends.compiled import load_library
from epsanet_fused.backends.registry import PATHS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Starting, collecting and plotting take the rest of nine minutes.
TOTAL_SECONDS = 515.0
# The time that a process needs to start and, after its own deadline, to end.
GRACE_SECONDS = 15.0
SANITIZERS = ("memcheck", "racecheck")
BACKENDS = " ".join(("triton", *PATHS))
LARGE = "two_to_the_31"  # these tests need most of the GPU's memory
PLANNED = "planned planned-triton planned-compile"
# When the time is over, the last ones are skipped: max-autotune takes the longest to compile.
OURS_FIRST = (
    "eager fused fused-graph compile-reduce-overhead compile eager-graph compile-max-autotune"
)
BOTH_FORMATS = "--memory-format nchw channels_last"
HALF_BEST = "--memory-format best --dtype float16"


# The whole check takes three commands of at most nine minutes each: the parts.
PARTS: dict[int, tuple[str, ...]] = {
    1: (
        *("environment", "large-tests", "tests", "memcheck", "network-inference-warm-up"),
        *("network-training-warm-up", "network-batch-1-warm-up", "tail-forward", "tail-backward"),
        "plan-cost",
    ),
    2: (
        *("environment", "network-inference", "network-training", "network-inference-nchw"),
        *("network-training-nchw", "network-batch-1", "module"),
    ),
    3: (
        *("environment", "counters", "tail-compiled", "tune", "norm-training"),
        *("tail-forward-dtypes", "tail-backward-dtypes", "racecheck"),
    ),
}


class Step(NamedTuple):
    """One process to run."""

    name: str
    command: tuple[str, ...]
    weight: float  # its share of the remaining time, relative to that of other steps
    kind: str  # "check"; "measurement", which may end early; "warm-up", which may fail
    own_deadline: bool = False  # it takes --seconds and keeps its results when it stops
    concurrent: bool = False  # nothing in it is timed: neighbours may run at the same time
    needs: str = ""  # a program that must be on PATH


def plan(scratch: Path, names: Sequence[str] | None = None) -> tuple[list[Step], dict[str, str]]:
    """Return the steps to run: the checks first, then the measurements, the most useful first.

    Args:
        scratch: the folder for the files of the steps.
        names: only these steps; None takes all but those that run only when named.

    Returns:
        The steps, and the reason for each step that cannot run here.

    Raises:
        ValueError: for a name that no step has.
    """
    describe = (sys.executable, str(HERE / "environment.py"), str(scratch / "env.json"))
    compiled = compiled_steps(scratch)
    memcheck, racecheck = sanitizer_steps(scratch)
    plans = "--batch 128 1 --use inference training"
    steps = [
        *build_steps(),
        Step("environment", describe, 10, "check"),
        tests_step(scratch, "large-tests", LARGE)._replace(weight=45, concurrent=False),
        tests_step(scratch, "tests", f"not ({LARGE})"),
        memcheck,
        *(warm_up(step) for step in compiled),
        *tail_steps(scratch),
        measurement(scratch, "plan-cost", 160, "plan_cost.py", plans),
        *compiled,
        norm_step(scratch),
        *wide_tail_steps(scratch),
        racecheck._replace(concurrent=False, weight=60),
    ]
    chosen = steps
    if names is not None:
        known = {step.name: step for step in (*steps, *extra_steps(scratch))}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
        wanted = {"build", *names}  # every step needs the library
        chosen = [step for step in known.values() if step.name in wanted]
    tools = {s.name: s.needs for s in chosen if s.needs and shutil.which(s.needs) is None}
    missing = {name: f"{tool} isn't on PATH" for name, tool in tools.items()}
    return [step for step in chosen if step.name not in missing], missing


def tests_step(scratch: Path, name: str, which: str) -> Step:
    """Run the GPU tests that ``pytest -k`` selects, with xdist and pytest-timeout if installed."""
    command = (sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "--tb=short")
    # pytest-benchmark warns beside xdist, and a warning is an error.
    command += ("-p", "no:cacheprovider", "-p", "no:benchmark", "-k", which)
    command += (f"--junitxml={scratch / f'{name}.xml'}",)
    if which == LARGE:
        return Step(name, command, 145, "check")
    if importlib.util.find_spec("xdist"):  # compiling kernels takes most of the time
        workers = max(1, min(10, (os.cpu_count() or 1) - 4))
        command += ("-v", "-n", str(workers), "--dist", "loadgroup")
    if importlib.util.find_spec("pytest_timeout"):
        command += ("--timeout", "100")
    return Step(name, command, 145, "check", concurrent=True)


def build_steps() -> list[Step]:
    """Compile the library in place, unless it exists with CUDA kernels."""
    if load_library().cuda_archs:
        return []
    command = (sys.executable, str(ROOT / "setup.py"), "build_ext", "--inplace")
    return [Step("build", ("env", "EPSANET_FUSED_BUILD=cuda", *command), 90, "check")]


def measurement(scratch: Path, name: str, weight: float, script: str, options: str = "") -> Step:
    """Run a benchmark that takes --seconds and writes to a folder with the step's name."""
    command = (sys.executable, str(HERE / script), "--device", "cuda", *options.split())
    command += ("--out", str(scratch / name))
    return Step(name, command, weight, "measurement", own_deadline=True)


def psa(scratch: Path, name: str, weight: float, scope: str, mode: str, options: str) -> Step:
    """Run bench_psa.py for one scope and for one or several modes."""
    fixed = f"--no-plot --input randn --scope {scope} --mode {mode}"
    return measurement(scratch, name, weight, "bench_psa.py", f"{fixed} {options}")


def tail_steps(scratch: Path, dtypes: str = "float16", batches: str = "128 1 32 256") -> list[Step]:
    """Time the tail by every backend at every size and memory format."""
    options = f"{BOTH_FORMATS} --cache cold warm --batch {batches} --dtype {dtypes}"
    options += f" --providers eager cleaned {BACKENDS}"
    return [
        psa(scratch, "tail-forward", 70, "tail", "inference", options),
        psa(scratch, "tail-backward", 70, "tail", "backward", options),
    ]


def wide_tail_steps(scratch: Path) -> list[Step]:
    """Time the tail in the other dtypes, at the largest stages' usual batch."""
    steps = tail_steps(scratch, "bfloat16 float32", "128")
    names = ("tail-forward-dtypes", "tail-backward-dtypes")
    return [
        step._replace(name=name, weight=30, command=(*step.command[:-1], str(scratch / name)))
        for step, name in zip(steps, names, strict=True)
    ]


def norm_step(scratch: Path) -> Step:
    """Time psa_tail_norm beside its parts in training: the data for NORM_TABLE."""
    options = f"{BOTH_FORMATS} --cache cold --batch 128 32 --dtype float16 float32"
    options += " --providers eager apart fused"
    return psa(scratch, "norm-training", 35, "norm", "training", options)


def sanitizer_steps(scratch: Path) -> list[Step]:
    """Run one forward and backward of small shapes under memcheck and racecheck.

    PyTorch's caching allocator is off: inside one of its pools every address is valid.
    """
    # These steps have no deadline of their own: it would make them skip cases.
    options = f"{BOTH_FORMATS} --batch 2 --stages S4 --dtype float16 --reps 1 --seconds 1000"
    options += f" --providers {BACKENDS}"
    tool = "compute-sanitizer"
    # Libraries ask the driver for functions that it lacks: those API errors are not ours.
    prefix = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool)
    checks = ("--error-exitcode=9", "--report-api-errors=no")
    steps = [psa(scratch, name, 100, "tail", "training", options) for name in SANITIZERS]
    return [
        step._replace(
            command=(*prefix, f"--tool={step.name}", *checks, *step.command),
            kind="check",
            own_deadline=False,
            concurrent=True,
            needs=tool,
        )
        for step in steps
    ]


def warm_up(step: Step) -> Step:
    """Compile the step's cases while the checks run."""
    script, other = str(HERE / "bench_psa.py"), str(HERE / "warm_up.py")
    command = tuple(other if part == script else part for part in step.command)
    name = f"{step.name}-warm-up"
    return step._replace(name=name, command=command, weight=150, kind="warm-up", concurrent=True)


def compiled_steps(scratch: Path) -> list[Step]:
    """Time ours beside eager and torch.compile, each in its faster memory format.

    Training is in mixed precision. The most important providers come first: when a step's time is
    over, the remaining ones are skipped.
    """
    half = "--dtype float16 --one-by-one --memory-format"
    ours = f"{half} channels_last --batch 128 --providers eager"
    theirs = f"{half} nchw --batch 128 --providers eager"
    plans = f"--plan-file {scratch / 'plan-cost' / 'plans.json'}"
    inference = (
        "optimized optimized-graph resnet50:eager resnet50:optimized-graph compile"
        " resnet50:compile fused fused-graph eager-graph"
    )
    training = "fused triton cuda planned planned-triton resnet50:eager compile resnet50:compile"
    single = (
        "optimized-graph eager-graph compile-reduce-overhead resnet50:eager-graph"
        " resnet50:optimized-graph optimized fused cuda"
    )
    module = f"{HALF_BEST} --batch 1 --one-by-one --providers {OURS_FIRST} cuda triton"
    tail = f"--dtype float16 --batch 128 --cache cold --stages S1 S2 --providers {OURS_FIRST}"
    return [
        psa(
            scratch, "network-inference", 150, "network", "inference", f"{plans} {ours} {inference}"
        ),
        psa(scratch, "network-training", 120, "network", "training", f"{plans} {ours} {training}"),
        psa(
            scratch, "network-inference-nchw", 40, "network", "inference", f"{theirs} fused compile"
        ),
        psa(scratch, "network-training-nchw", 40, "network", "training", f"{theirs} fused compile"),
        psa(
            scratch,
            "network-batch-1",
            100,
            "network",
            "inference",
            f"{plans} {half} channels_last --batch 1 --providers eager {single}",
        ),
        psa(scratch, "module", 60, "module", "inference", module),
        psa(scratch, "tail-compiled", 60, "tail", "inference training", tail),
    ]


def extra_steps(scratch: Path) -> list[Step]:
    """Return the steps that run only when named: those of special use, and slow compilations."""
    block = f"{HALF_BEST} --batch 128 1 32 --providers {OURS_FIRST} cleaned fused-compile"
    small = f"{HALF_BEST} --batch 1 32 --providers eager"
    providers = ("eager", "compile-reduce-overhead", "compile")
    baselines = " ".join(f"{baseline}:{name}" for baseline in BASELINES for name in providers)
    autotuned = f"{HALF_BEST} --batch 128 --providers eager compile-max-autotune compile fused"
    small_inference = f"{small} optimized-graph compile-reduce-overhead eager-graph fused"
    small_training = f"{small} fused compile-reduce-overhead {PLANNED}"
    autotuned_inference = f"{autotuned} optimized-graph resnet50:compile-max-autotune"
    autotuned_training = f"{autotuned} planned-triton resnet50:compile-max-autotune"
    return [
        measurement(scratch, "tune", 150, "tune_triton.py"),
        measurement(scratch, "counters", 100, "counters.py", "--stages S1 S2 S4")._replace(
            needs="ncu"
        ),
        psa(scratch, "block-inference", 60, "block", "inference", f"{block} optimized-graph"),
        psa(scratch, "block-training", 60, "block", "training", f"{block} {PLANNED}"),
        psa(
            scratch,
            "small-inference",
            200,
            "network",
            "inference",
            f"{small_inference} {baselines}",
        ),
        psa(scratch, "small-training", 200, "network", "training", f"{small_training} {baselines}"),
        psa(scratch, "autotuned-inference", 200, "network", "inference", autotuned_inference),
        psa(scratch, "autotuned-training", 200, "network", "training", autotuned_training),
    ]


def groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Group neighbouring steps that may run at the same time. The order stays."""
    found: list[list[Step]] = []
    for step in steps:
        if step.concurrent and found and found[-1][0].concurrent:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def allotment(groups: Sequence[Sequence[Step]], index: int, left: float) -> float:
    """Return a group's share of the remaining seconds. Unused time goes to later groups."""
    weights = [max(step.weight for step in group) for group in groups[index:]]
    return max(0.0, left) * weights[0] / sum(weights)


def with_deadline(step: Step, seconds: float) -> tuple[str, ...]:
    """Return the command, with --seconds if the step has a deadline of its own."""
    if not step.own_deadline:
        return step.command
    grace = min(GRACE_SECONDS, seconds / 4)
    return (*step.command, "--seconds", f"{max(1.0, seconds - grace):.0f}")


def describe_plan(
    steps: Sequence[Step], missing: Mapping[str, str], left: float = TOTAL_SECONDS
) -> Iterator[str]:
    """Yield a line for each step: its limit, and its command or the reason why it is skipped."""
    in_groups = groups(steps)
    for i, group in enumerate(in_groups):
        seconds = allotment(in_groups, i, left)
        left -= seconds
        for k, step in enumerate(group):
            limit = f"up to {seconds:.0f} s{', at the same time' if k else ''}"
            yield f"{step.name} ({limit}): {' '.join(with_deadline(step, seconds))}"
    for name, reason in missing.items():
        yield f"skipped: {name}, as {reason}"
