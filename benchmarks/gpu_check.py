"""Everything worth knowing from a few minutes on a card, in one folder, with one command.

    make gpu-check        # or: PYTHONPATH=. python3 benchmarks/gpu_check.py --out out

Runs the GPU tests, the benchmarks and the sanitizers with what the machine has, in at most nine
minutes, and ends with a short table; the exit status is 0 only if every check passed. Each step is
a process group of its own with its own share of the time, so that a crash or a hang costs that step
and not the rest. It never changes a setting of the card. With more time, or less:

    python3 benchmarks/gpu_check.py --steps tests tail-forward --seconds 120
    python3 benchmarks/gpu_check.py --steps tune counters      # these run only when named
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from gpu_plan import (
    ROOT,
    SANITIZERS,
    TOTAL_SECONDS,
    Step,
    allotment,
    describe_plan,
    groups,
    plan,
    with_deadline,
)
from options import SKIPPED, positive_float
from plots import draw_all
from report import COLUMNS, align, read_csv, write_csv
from summary import summary

from epsanet_fused.utils.atomic_write import write_atomically

NO_GPU = 2
CUDA_BIN = "/usr/local/cuda/bin"
# What steps write beside bench_psa.csv, which all come into results.csv. With that, log.txt and
# plots.pdf these are at most eight files.
FILES = ("env.json", "gpu-tests.xml", "conv-cost/conv_cost.csv", "tune/tune_triton.csv",
         "counters/counters.csv")  # fmt: skip


Row = dict[str, str]


class Outcome(NamedTuple):
    """How a step ended: "passed", "FAILED", "skipped"; or, killed at the end of its time,
    "INCOMPLETE" for a measurement and "OUT OF TIME" for a check."""

    name: str
    status: str
    seconds: float
    note: str


def execute(step: Step, seconds: float, log: Path) -> Outcome:
    """Run one step in a process group of its own; at the end of its time the group is killed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    command = with_deadline(step, seconds)
    with log.open("a") as out:
        print(f"\n===== {step.name} ({seconds:.0f} s): {' '.join(command)}", file=out, flush=True)
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            interrupt(process)
        finally:
            kill_group(process)
    return outcome(step, code, time.perf_counter() - began)


def execute_together(steps: Sequence[Step], seconds: float, log: Path) -> list[Outcome]:
    """Run some steps at the same time; the log has one after the other."""
    if len(steps) == 1:
        return [execute(steps[0], seconds, log)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(steps)) as pool:
        logs = [Path(folder, step.name) for step in steps]
        outcomes = pool.map(lambda step, log: execute(step, seconds, log), steps, logs)
        found = list(outcomes)
        with log.open("a") as out:
            out.writelines(part.read_text(errors="replace") for part in logs)
    return found


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C: upon it pytest still writes its report, unless it hangs in the driver."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)  # with several workers it takes 6 to 10


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(step: Step, code: int | None, seconds: float) -> Outcome:
    """What an exit status means; None stands for a step that had to be killed."""
    name = step.name
    if code is None:
        status = "OUT OF TIME" if step.kind == "check" else "INCOMPLETE"
        return Outcome(name, status, seconds, "killed; what it had written is kept")
    if code in (0, SKIPPED):
        status, note = ("skipped", "see log.txt") if code else ("passed", "")
        return Outcome(name, status, seconds, note)
    notes = {5: "no GPU test was found"} if name == "tests" else {9: "errors found, see log.txt"}
    status = "INCOMPLETE" if step.kind == "warm-up" else "FAILED"
    return Outcome(name, status, seconds, notes.get(code, f"exit status {code}, see log.txt"))


def collect(scratch: Path, out: Path, earlier: Sequence[Row]) -> dict[str, list[Row]]:
    """Bring what the steps have written so far into the one folder; the rows of each step.

    What an earlier run has left there of other steps stays.
    """
    tables = {
        path.parent.name: read_csv(path)
        for path in sorted(scratch.glob("*/bench_psa.csv"))
        if path.parent.name not in SANITIZERS  # whose timings say nothing
    }
    rows = [row for row in earlier if row["step"] not in tables]
    rows += [{"step": step, **row} for step, found in tables.items() for row in found]
    if rows:
        write_csv(out / "results.csv", rows, ("step", *COLUMNS))
    for name in FILES:
        source = scratch / name
        if source.exists():
            write_atomically(out / source.name, source.read_bytes())
    return tables


def with_counts(outcome: Outcome, scratch: Path) -> Outcome:
    """The outcome with what only the step's files tell: what was skipped or left out."""
    report = scratch / "gpu-tests.xml"
    if outcome.name == "tests" and report.exists():
        try:
            suite = next(ElementTree.parse(report).iter("testsuite"))
        except ElementTree.ParseError:  # killed while it wrote
            return outcome
        counts = (f"{suite.get(key, '?')} {key}" for key in ("tests", "failures", "skipped"))
        return outcome._replace(note=", ".join(filter(None, (*counts, outcome.note))))
    rows = [row for path in (scratch / outcome.name).glob("*.csv") for row in read_csv(path)]
    late = sum(row.get("note", "") == "skipped: out of time" for row in rows)
    if late and outcome.status == "passed":
        return outcome._replace(status="INCOMPLETE", note=f"{late} rows out of time, see log.txt")
    return outcome


def steps_table(outcomes: Sequence[Outcome]) -> str:
    head = ("step", "status", "s", "note")
    return align(
        [head, *((o.name, o.status, f"{o.seconds:.0f}", o.note) for o in outcomes)], left=2
    )


def everything_passed(outcomes: Sequence[Outcome], measured: bool) -> bool:
    """Failed steps and wrong results count, and tests or sanitizers that were killed.

    A tool that isn't installed doesn't, nor a measurement that found no time: the table says so.
    But where all measurements came to nothing, something is wrong.
    """
    harmless = {"passed", "skipped", "INCOMPLETE"}
    nothing = not measured and any(o.status == "INCOMPLETE" for o in outcomes)
    return not nothing and all(o.status in harmless for o in outcomes)


def run(out: Path, scratch: Path, names: Sequence[str] | None, total: float) -> int:
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    results = out / "results.csv"
    earlier = read_csv(results) if results.exists() else []
    steps, missing = plan(scratch, names)
    outcomes = [Outcome(name, "skipped", 0, reason) for name, reason in missing.items()]
    tables: dict[str, list[Row]] = {}
    in_groups = groups(steps)
    for i, group in enumerate(in_groups):
        seconds = allotment(in_groups, i, total - (time.perf_counter() - began))
        names_here = ", ".join(step.name for step in group)
        print(f"[{i + 1}/{len(in_groups)}] {names_here}: up to {seconds:.0f} s", flush=True)
        ended = execute_together(group, seconds, log)
        tables = collect(scratch, out, earlier)
        outcomes += (with_counts(outcome, scratch) for outcome in ended)
    print(text := f"{summary(tables)}\n\n{steps_table(outcomes)}".lstrip())
    with log.open("a") as file:
        print(f"\n{text}", file=file)
    if results.exists():
        try:
            draw_all(out / "plots.pdf", read_csv(results))
        except Exception as error:  # the measurements are what counts
            print(f"no plots: {type(error).__name__}: {error}")
    passed = everything_passed(outcomes, any(tables.values()))
    print(f"{'All checks passed' if passed else 'NOT all checks passed'}; see {out}")
    return 0 if passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument(
        "--steps", nargs="+", metavar="STEP", help="these only, in the plan's order"
    )
    parser.add_argument("--seconds", type=positive_float, default=TOTAL_SECONDS,
                        help=f"for all steps together; default {TOTAL_SECONDS:.0f}")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    # Where ncu and compute-sanitizer are, if they aren't on PATH.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), CUDA_BIN))
    try:
        steps, missing = plan(Path("SCRATCH"), args.steps)
    except ValueError as error:
        parser.error(f"argument --steps: {error}")
    if args.dry_run:
        print("\n".join(describe_plan(steps, missing, args.seconds)))
        return 0
    if not torch.cuda.is_available():
        print(
            "gpu_check.py: PyTorch finds no GPU here, so there is nothing to check",
            file=sys.stderr,
        )
        return NO_GPU
    with tempfile.TemporaryDirectory() as scratch:
        return run(args.out.resolve(), Path(scratch), args.steps, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
