"""Run all checks and benchmarks on a GPU in at most nine minutes and collect the results.

    make gpu-check        # or: PYTHONPATH=. python3 benchmarks/gpu_check.py --out out

Runs the GPU tests, the sanitizers and the benchmarks, writes all results to one folder and prints a
short table. It installs nothing and never changes a setting of the GPU. The exit status is 0 only
if every check passed. Each step is a process group with its own share of the time: a crash or a
hang of one step does not end the others. Some steps only, with another limit:

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
    PARTS,
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
from report import COLUMNS, OUT_OF_TIME, CsvRow, align, read_csv, write_csv
from summary import summary

from epsanet_fused.utils.atomic_write import write_atomically

NO_GPU = 2
CUDA_BIN = "/usr/local/cuda/bin"
# The files of the steps that are copied as they are. The rows of all bench_psa.csv files go to
# results.csv.
FILES = (
    "env.json",
    "plan-cost/plan_cost.csv",
    "plan-cost/plans.json",
    "tune/tune_triton.csv",
    "counters/counters.csv",
)


class Outcome(NamedTuple):
    """The end of a step.

    The status is "passed", "FAILED" or "skipped". A step that was killed at the end of its time is
    "INCOMPLETE" if it is a measurement and "OUT OF TIME" if it is a check.
    """

    name: str
    status: str
    seconds: float
    note: str


def execute(step: Step, seconds: float, log: Path) -> Outcome:
    """Run one step in its own process group and kill the group at the end of its time."""
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
    """Run several steps at the same time. The log holds them one after the other."""
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
    """Send SIGINT and wait: pytest then still writes its report, unless it hangs in the driver."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)  # seconds; pytest with several workers takes 6 to 10


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(step: Step, code: int | None, seconds: float) -> Outcome:
    """Turn an exit status into an outcome. None stands for a step that was killed."""
    name = step.name
    if code is None:
        status = "OUT OF TIME" if step.kind == "check" else "INCOMPLETE"
        return Outcome(name, status, seconds, "killed; its files so far are kept")
    if code in (0, SKIPPED):
        status, note = ("skipped", "see log.txt") if code else ("passed", "")
        return Outcome(name, status, seconds, note)
    notes = {5: "no GPU test was found"} if name == "tests" else {9: "errors found, see log.txt"}
    status = "INCOMPLETE" if step.kind == "warm-up" else "FAILED"
    return Outcome(name, status, seconds, notes.get(code, f"exit status {code}, see log.txt"))


def collect(scratch: Path, out: Path, earlier: Sequence[CsvRow]) -> dict[str, list[CsvRow]]:
    """Copy the files that the steps have written so far to the output folder.

    Args:
        scratch: the folder with a folder for each step.
        out: the output folder.
        earlier: rows of an earlier run; those of steps that did not run again stay.

    Returns:
        The rows of each step of this run.
    """
    tables = {
        path.parent.name: read_csv(path)
        for path in sorted(scratch.glob("*/bench_psa.csv"))
        if path.parent.name not in SANITIZERS  # timings under a sanitizer have no meaning
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
    """Add the numbers of tests, or of rows that were skipped for lack of time, to an outcome."""
    report = scratch / f"{outcome.name}.xml"
    if report.exists():
        try:
            suite = next(ElementTree.parse(report).iter("testsuite"))
        except ElementTree.ParseError:  # it was killed while it wrote
            return outcome
        counts = (f"{suite.get(key, '?')} {key}" for key in ("tests", "failures", "skipped"))
        return outcome._replace(note=", ".join(filter(None, (*counts, outcome.note))))
    rows = [row for path in (scratch / outcome.name).glob("*.csv") for row in read_csv(path)]
    late = sum(row.get("note", "") == OUT_OF_TIME for row in rows)
    if late and outcome.status == "passed":
        return outcome._replace(status="INCOMPLETE", note=f"{late} rows out of time, see log.txt")
    return outcome


def steps_table(outcomes: Sequence[Outcome]) -> str:
    """Format a line for each step."""
    head = ("step", "status", "s", "note")
    lines = [(o.name, o.status, f"{o.seconds:.0f}", o.note) for o in outcomes]
    return align([head, *lines], left=2)


def everything_passed(outcomes: Sequence[Outcome], measured: bool) -> bool:
    """Return whether the run counts as passed.

    Failed steps, wrong results, and killed tests or sanitizers make it fail. Tools that are not
    installed and measurements that ended early do not, unless no measurement has a result.
    """
    harmless = {"passed", "skipped", "INCOMPLETE"}
    no_result = not measured and any(o.status == "INCOMPLETE" for o in outcomes)
    return not no_result and all(o.status in harmless for o in outcomes)


def run(out: Path, scratch: Path, names: Sequence[str] | None, total: float) -> int:
    """Run the steps, collect their files and print the tables; return the exit status."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    results = out / "results.csv"
    earlier = read_csv(results) if results.exists() else []
    steps, missing = plan(scratch, names)
    outcomes = [Outcome(name, "skipped", 0, reason) for name, reason in missing.items()]
    tables: dict[str, list[CsvRow]] = {}
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
        except Exception as error:  # the results are complete without plots
            print(f"no plots: {type(error).__name__}: {error}")
    passed = everything_passed(outcomes, any(tables.values()))
    print(f"{'All checks passed' if passed else 'NOT all checks passed'}; see {out}")
    return 0 if passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    part_help = "the steps of one of the three parts of a whole check"
    parser.add_argument("--part", type=int, choices=tuple(PARTS), help=part_help)
    parser.add_argument("--scratch", type=Path, help="the steps' own files; default: temporary")
    parser.add_argument(
        "--steps", nargs="+", metavar="STEP", help="only these, in the order of the plan"
    )
    seconds_help = f"for all steps together; default {TOTAL_SECONDS:.0f}"
    parser.add_argument("--seconds", type=positive_float, default=TOTAL_SECONDS, help=seconds_help)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    args.steps = args.steps or (PARTS[args.part] if args.part else None)
    # ncu and compute-sanitizer are often installed there without being on PATH.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), CUDA_BIN))
    try:
        steps, missing = plan(Path("SCRATCH"), args.steps)
    except ValueError as error:
        parser.error(f"argument --steps: {error}")
    if args.dry_run:
        print("\n".join(describe_plan(steps, missing, args.seconds)))
        return 0
    if not torch.cuda.is_available():
        print("gpu_check.py: PyTorch finds no GPU here", file=sys.stderr)
        return NO_GPU
    if args.scratch is not None:
        return run(args.out.resolve(), args.scratch.resolve(), args.steps, args.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        return run(args.out.resolve(), Path(scratch), args.steps, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
