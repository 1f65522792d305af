"""The steps of a visit to a GPU: three parts of at most nine minutes.

A step's seconds are its share of its part. The most important steps come first, and what compiles
or optimizes comes last within a step (``bench_psa.py --pairs``).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from epsanet_fused.backends.registry import PATHS

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
PART_SECONDS = 520.0  # a part is over before nine minutes, its start and end included
BACKENDS = " ".join(("triton", *PATHS))
LARGE = "two_to_the_31"  # these tests need most of the GPU's memory
HALF = "--dtype float16"
BOTH = "--memory-format nchw channels_last"
TAIL = f"{BOTH} --cache cold warm --providers eager cleaned {BACKENDS}"
NETWORK = f"--scope network {HALF} --pairs --memory-format"
# The same steps at small sizes on the CPU: see visit.py --rehearse.
SMALL = "--device cpu --dtype float32 --reps 2"
SMALL_TAIL, SMALL_NETWORK = f"{SMALL} --stages S4 --batch 2", f"{SMALL} --shape 2 3 64 64"


class Step(NamedTuple):
    """One process to run."""

    name: str
    seconds: float
    command: tuple[str, ...]
    small: str | None = None  # the arguments that make it small; None: it needs a GPU
    beside: bool = False  # nothing in it is timed: it runs beside its neighbours
    has_deadline: bool = False  # it takes --seconds, and stops by itself
    may_fail: bool = False  # its failure is reported, and fails nothing
    is_test: bool = False  # at the end of its time it is asked to end, and prints what failed
    needs: str = ""  # a program that must be on PATH


def bench(name: str, seconds: float, options: str, small: str | None = SMALL_TAIL) -> Step:
    """Measure by bench_psa.py."""
    command = f"bench_psa.py --no-plot --input randn {options}"
    return script(name, seconds, command, small)


def script(name: str, seconds: float, command: str, small: str | None = None) -> Step:
    """Run a script of this folder, which appends to results.csv."""
    program, *options = command.split()
    arguments = (str(BENCHMARKS / program), "--out", "OUT", "--append", *options)
    return Step(name, seconds, (sys.executable, *arguments), small, has_deadline=True)


def compiling(step: Step, seconds: float) -> Step:
    """Compile the step's kernels beside the tests, so that the step itself does not."""
    command = ("nice", *step.command, "--prepare-only")
    return step._replace(
        name=f"{step.name}-compile", seconds=seconds, command=command, beside=True, may_fail=True
    )


def tests(name: str, seconds: float, which: str, workers: bool) -> Step:
    """Run the GPU tests that ``pytest -k`` selects."""
    # pytest-benchmark warns beside xdist, and a warning is an error.
    options = ["-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short", "-q"]
    if workers and importlib.util.find_spec("xdist"):  # compiling kernels takes most of the time
        options += ["-n", str(max(1, min(10, (os.cpu_count() or 1) - 4))), "--dist", "loadgroup"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "100"]
    command = (sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), *options, "-k", which)
    return Step(name, seconds, command, small="", beside=workers, is_test=True)


def sanitizer(tool: str, seconds: float) -> Step:
    """Run one forward and backward of small shapes under compute-sanitizer.

    PyTorch's caching allocator is off: inside one of its pools every address is valid.
    """
    options = f"--mode training --batch 2 --stages S4 --reps 1 {HALF} {BOTH} --seconds 1000"
    step = bench(tool, seconds, f"{options} --providers {BACKENDS}", small=None)
    # Libraries ask the driver for functions that it lacks: those API errors are not ours.
    prefix = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool={tool}"
    prefix += " --error-exitcode=9 --report-api-errors=no"
    command = (*prefix.split(), *step.command)
    command = tuple("SCRATCH" if part == "OUT" else part for part in command)
    return step._replace(command=command, needs="compute-sanitizer", has_deadline=False)


def part_1() -> list[Step]:
    """Check that all is right, then time the tail and the convolutions."""
    forward = bench("tail-forward", 60, f"{HALF} --batch 128 1 32 256 {TAIL}")
    backward = bench("tail-backward", 60, f"{HALF} --mode backward --batch 128 1 32 256 {TAIL}")
    plans = "plan_cost.py --batch 128 1 --mode inference training --plan-file PLANS"
    small_plans = "--device cpu --dtype float32 --batch 2 --image-size 64"
    return [
        Step("self-check", 25, (sys.executable, "-m", "epsanet_fused"), ""),
        Step("environment", 15, ("nvidia-smi", "-q"), needs="nvidia-smi"),
        tests("large-tests", 55, LARGE, workers=False),
        tests("tests", 150, f"not ({LARGE})", workers=True),
        sanitizer("memcheck", 150)._replace(beside=True),
        compiling(forward, 150),
        compiling(backward, 150),
        *(compiling(step, 150) for step in part_2() if step.name in COMPILED_EARLY),
        forward,
        backward,
        script("plan-cost", 150, plans, small_plans),
    ]


# The steps whose compilation takes minutes.
COMPILED_EARLY = ("network-inference", "network-training", "network-batch-1", "module")


def part_2() -> list[Step]:
    """Time the network and the module beside what users have."""
    inference = (
        "eager fused fused-graph eager-graph resnet50:eager optimized optimized-graph"
        " resnet50:optimized-graph compile resnet50:compile"
    )
    training = "eager fused triton cuda resnet50:eager planned compile"
    single = (
        "eager fused eager-graph resnet50:eager-graph optimized optimized-graph"
        " resnet50:optimized-graph compile-reduce-overhead"
    )
    module = "eager fused fused-graph eager-graph cuda triton compile compile-reduce-overhead"
    network, large = (
        f"--plan-file PLANS {NETWORK}",
        "channels_last --shape 128 3 224 224 --providers",
    )
    few = "nchw --shape 128 3 224 224 --providers eager fused compile"
    steps = [
        ("network-inference", 145, f"{network} {large} {inference}"),
        ("network-training", 125, f"{network} {large} {training} --mode training"),
        (
            "network-batch-1",
            100,
            f"{network} channels_last --shape 1 3 224 224 --providers {single}",
        ),
        ("network-inference-nchw", 40, f"{network} {few}"),
        ("network-training-nchw", 50, f"{network} {few} --mode training"),
    ]
    module = f"--scope module {HALF} --batch 1 --pairs --memory-format best --providers {module}"
    return [*(bench(*step, SMALL_NETWORK) for step in steps), bench("module", 60, module)]


def part_3() -> list[Step]:
    """Measure why, and for the tables of defaults."""
    compiled = "eager fused compile compile-max-autotune"
    tail = f"{HALF} --batch 128 --cache cold --stages S1 --mode inference training"
    wide = f"--dtype bfloat16 float32 --batch 128 {TAIL}"
    norm = f"--scope norm --mode training {BOTH} --cache cold --dtype float16 float32"
    ncu = "counters.py --stages S1 S2 S4 --providers cuda:one_pass --metrics"
    tune = script("tune", 100, "tune_triton.py")
    return [
        # It may not know bulk copies: its word alone fails nothing.
        sanitizer("racecheck", 70)._replace(beside=True, may_fail=True),
        compiling(tune, 70),
        script("counters-traffic", 60, f"{ncu} traffic", "--device cpu"),
        script("counters-stalls", 60, f"{ncu} stalls", "--device cpu"),
        bench("tail-compiled", 90, f"{tail} --pairs --providers {compiled}"),
        tune,
        bench("norm-training", 40, f"{norm} --batch 128 32 --providers eager apart fused"),
        bench("tail-forward-dtypes", 50, wide),
        bench("tail-backward-dtypes", 50, f"{wide} --mode backward"),
    ]


PARTS = {1: part_1, 2: part_2, 3: part_3}


def groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Group neighbouring steps that run beside each other. The order stays."""
    found: list[list[Step]] = []
    for step in steps:
        if step.beside and found and found[-1][0].beside:
            found[-1].append(step)
        else:
            found.append([step])
    return found
