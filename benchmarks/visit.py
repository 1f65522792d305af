"""Run the checks and measurements on a GPU: three parts of at most nine minutes each.

    python benchmarks/visit.py --part 1 --out out    # checks, then the tail and the convolutions
    python benchmarks/visit.py --part 2 --out out    # networks and modules beside torch.compile
    python benchmarks/visit.py --part 3 --out out    # counters, and data for the tables of defaults

Rows are appended to out/results.csv as soon as they are measured; out/log.txt has what the steps
print. Each step is a process group with its own time: a crash or a hang of one does not end the
others, and loses no row. Part 1 writes the convolution plans that part 2 reads. Nothing is
installed or built, and no setting of the GPU is changed. The exit status is 0 if every check passed
and no result was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from harness.options import open_results, positive_float
from harness.results import format_table
from harness.visit_plan import PARTS, ROOT, Step, groups

from epsanet_fused.backends.compiled import load_library

CUDA_BIN = "/usr/local/cuda/bin"
SKIPPED = 77  # exit status of a step that cannot run on this machine
# The time that a process needs to start and, after its own deadline, to end.
GRACE_SECONDS = 15.0
INTERRUPT_SECONDS = 12.0
OUT_OF_TIME = "OUT OF TIME"


class Planned(NamedTuple):
    """A step, and the seconds at which it begins and ends at the latest."""

    step: Step
    begin: float
    end: float


class Outcome(NamedTuple):
    """The end of a step: its status, how long it ran, and its last line."""

    step: Step
    status: str
    seconds: float
    note: str


def schedule(steps: Sequence[Step], seconds: float | None) -> list[list[Planned]]:
    """Give each group its seconds, or its share of ``seconds``, one after another."""
    in_groups = groups(steps)
    lengths = [max(step.seconds for step in group) for group in in_groups]
    scale = seconds / sum(lengths) if seconds and steps else 1.0
    planned, begin = [], 0.0
    for group, length in zip(in_groups, lengths, strict=True):
        planned.append([Planned(step, begin, begin + scale * length) for step in group])
        begin += scale * length
    return planned


def command_of(step: Step, args: argparse.Namespace, scratch: str, seconds: float) -> list[str]:
    """Return the command line of a step for this visit."""
    names = {"OUT": str(args.out), "PLANS": str(args.plans), "SCRATCH": scratch}
    command = [names.get(part, part) for part in step.command]
    if args.rehearse:
        command += (step.small or "").split()
    if step.has_deadline:
        command += ["--seconds", f"{max(1.0, seconds - min(GRACE_SECONDS, seconds / 4)):.0f}"]
    return command


def start(step: Step, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a step in a process group of its own. Its log begins with its command."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    if step.beside:  # each would take all cores
        env |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
    with log.open("wb") as out:
        out.write(f"\n===== {step.name}: {' '.join(command)}\n".encode())
        out.flush()
        return subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, env=env, start_new_session=True
        )


def stop(steps: Sequence[Step], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the process groups. After SIGINT pytest prints what failed, unless it hangs."""
    pairs = zip(steps, processes, strict=True)
    tests = [process for step, process in pairs if step.is_test and process.poll() is None]
    for process in tests:
        os.killpg(process.pid, signal.SIGINT)
    wait(tests, time.perf_counter() + INTERRUPT_SECONDS)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # also what an ended step has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(processes: Sequence[subprocess.Popen[bytes]], until: float) -> list[float]:
    """Wait until all have ended or the time is over; return when each one was last seen running."""
    seen = [time.perf_counter()] * len(processes)
    while time.perf_counter() < until and any(process.poll() is None for process in processes):
        time.sleep(0.1)
        now = time.perf_counter()
        seen = [now if p.poll() is None else t for p, t in zip(processes, seen, strict=True)]
    return seen


def run_group(group: Sequence[Planned], args: argparse.Namespace, left: float) -> list[Outcome]:
    """Run the steps of a group beside each other; log.txt gets one after the other."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = [planned.step for planned in group]
        logs = [Path(folder, step.name) for step in steps]
        commands = [command_of(step, args, folder, left) for step in steps]
        processes = [start(*item) for item in zip(steps, commands, logs, strict=True)]
        try:
            ended = wait(processes, began + max(1.0, left))
            in_time = [process.poll() is not None for process in processes]
        finally:
            stop(steps, processes)
            with (args.out / "log.txt").open("ab") as out:
                out.writelines(log.read_bytes() for log in logs)
        codes = [p.returncode if ok else None for p, ok in zip(processes, in_time, strict=True)]
        return [
            Outcome(step, status_of(code), at - began, last_line(log))
            for step, code, at, log in zip(steps, codes, ended, logs, strict=True)
        ]


def status_of(code: int | None) -> str:
    """Name an exit status; None is that of a step that was stopped."""
    return {None: OUT_OF_TIME, 0: "passed", SKIPPED: "skipped"}.get(code, f"FAILED ({code})")


def last_line(log: Path) -> str:
    """Return the last line that is not empty, shortened."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].rpartition("\r")[2].strip()[:80] if lines else ""


def run(args: argparse.Namespace) -> int:
    """Run the parts one after another and print how each step ended; return the exit status."""
    open_results(args)
    if 2 in args.part and 1 not in args.part and not args.plans.exists():
        print(f"There is no {args.plans}: each convolution is measured first. See --plans")
    outcomes: list[Outcome] = []
    for part in args.part:
        steps, missing = runnable(part, args)
        outcomes += missing
        began = time.perf_counter()
        for group in schedule(steps, args.seconds):
            left = group[0].end - (time.perf_counter() - began)
            names = ", ".join(planned.step.name for planned in group)
            print(f"part {part}, until {group[0].end:.0f} s: {names}", flush=True)
            outcomes += run_group(group, args, left)
    cells = [(o.step.name, o.status, f"{o.seconds:.0f}", o.note) for o in outcomes]
    print(format_table([("step", "ended", "s", "last line"), *cells], left=4))
    failed = [o.step.name for o in outcomes if is_failure(o)]
    print(f"FAILED: {', '.join(failed)}; see {args.out}/log.txt" if failed else "All passed")
    return 1 if failed else 0


def is_failure(outcome: Outcome) -> bool:
    """Tell whether the visit fails: a measurement may end early, but no check may."""
    if outcome.step.may_fail or outcome.status in ("passed", "skipped"):
        return False
    return not (outcome.step.has_deadline and outcome.status == OUT_OF_TIME)


def runnable(part: int, args: argparse.Namespace) -> tuple[list[Step], list[Outcome]]:
    """Return the steps of a part that can run here, and the others with the reasons."""
    steps, missing = [], []
    for step in PARTS[part]():
        if args.steps and step.name not in args.steps:
            continue
        if args.rehearse and step.small is None:
            missing.append(Outcome(step, "skipped", 0, "it needs a GPU"))
        elif step.needs and shutil.which(step.needs) is None:
            missing.append(Outcome(step, "skipped", 0, f"{step.needs} isn't on PATH"))
        else:
            steps.append(step)
    return steps, missing


def print_plan(args: argparse.Namespace) -> None:
    """Print when each step begins and ends at the latest, and its command."""
    cells = [("part", "begin", "end", "step", "command")]
    for part in args.part:
        steps, missing = runnable(part, args)
        for begin, end, step in (
            (p.begin, p.end, p.step) for group in schedule(steps, args.seconds) for p in group
        ):
            command = " ".join(command_of(step, args, "SCRATCH", end - begin))
            cells.append((str(part), f"{begin:.0f}", f"{end:.0f}", step.name, command))
        cells += [(str(part), "", "", outcome.step.name, outcome.note) for outcome in missing]
    print(format_table(cells, left=5))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    parts = tuple(PARTS)
    add("--part", type=int, choices=parts, nargs="+", default=parts, help="(default: 1 2 3)")
    names = [step.name for steps in PARTS.values() for step in steps()]
    add("--steps", nargs="+", choices=names, metavar="STEP", help="only these; see --dry-run")
    seconds_help = "for each part; the steps share them (default: their own, 520 together)"
    add("--seconds", type=positive_float, help=seconds_help)
    add("--out", type=Path, default=Path("out"), help="folder of the results (default: out)")
    plans_help = "the plans that part 1 writes and part 2 reads (default: plans.json in --out)"
    add("--plans", type=Path, metavar="FILE", help=plans_help)
    add("--dry-run", action="store_true", help="print the plan and stop")
    rehearse_help = "the same steps at small sizes on the CPU, without those that need a GPU"
    add("--rehearse", action="store_true", help=rehearse_help)
    args = parser.parse_args(argv)
    args.append = True  # to the results of other parts
    args.out = args.out.resolve()
    args.plans = (args.plans or args.out / "plans.json").resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # ncu and compute-sanitizer are often installed there without being on PATH.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), CUDA_BIN))
    if args.dry_run:
        print_plan(args)
        return 0
    if not args.rehearse:
        if not torch.cuda.is_available():
            print("visit.py: PyTorch finds no GPU here; see --rehearse", file=sys.stderr)
            return 2
        if not load_library().cuda_archs:
            print("The library has no CUDA kernels: they are neither tested nor timed.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stops the steps
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
