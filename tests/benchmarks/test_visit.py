"""Test the visit to a GPU without one: its plan, its order, and steps that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_psa
import pytest
import torch
import visit
from harness import providers
from harness.results import Results, read_rows
from harness.visit_plan import COMPILED_EARLY, PART_SECONDS, PARTS, Step, groups
from helpers.processes import BENCHMARKS, is_running
from helpers.visits import kill_after, kill_marked, marked_processes


def steps_of(part: int) -> dict[str, Step]:
    return {step.name: step for step in PARTS[part]()}


def words_after(command: tuple[str, ...], option: str) -> list[str]:
    """Return the values of an option, up to the next option."""
    rest = command[command.index(option) + 1 :]
    ends = [i for i, word in enumerate(rest) if word.startswith("--")]
    return list(rest[: ends[0] if ends else None])


def test_each_part_takes_less_than_nine_minutes():
    for part, make in PARTS.items():
        planned = visit.schedule(make(), None)
        assert planned[-1][0].end <= PART_SECONDS < 540, part
        ends = [group[0].end for group in planned]
        assert ends == sorted(ends) and planned[0][0].begin == 0


def test_the_first_part_checks_first_and_has_time_for_what_matters():
    steps = steps_of(1)
    order = list(steps)
    assert order[:4] == ["self-check", "environment", "large-tests", "tests"]
    assert order[-3:] == ["tail-forward", "tail-backward", "plan-cost"]
    assert steps["self-check"].seconds + steps["environment"].seconds == 40
    assert steps["plan-cost"].seconds == 150
    assert not steps["large-tests"].beside, "they need most of the memory"
    for name in ("large-tests", "tests"):
        assert "no:benchmark" in steps[name].command
    beside = next(group for group in groups(list(steps.values())) if len(group) > 1)
    compiling = [f"{name}-compile" for name in ("tail-forward", "tail-backward", *COMPILED_EARLY)]
    assert {step.name for step in beside} == {"tests", "memcheck", *compiling}
    for name in compiling:
        assert "--prepare-only" in steps[name].command


def test_convolutions_begin_with_the_forward_in_float16():
    command = steps_of(1)["plan-cost"].command
    assert words_after(command, "--mode") == ["inference", "training"]
    assert "--dtype" not in command, "float16 is the default"


def test_tails_go_dtype_by_dtype_and_then_batch_by_batch():
    command = [*steps_of(3)["tail-forward-dtypes"].command, "--batch", "128", "1"]
    options = command[command.index("--no-plot") :]
    cases = bench_psa.sweep(bench_psa.parse([*options, "--device", "cpu"]))
    found = list(dict.fromkeys((case.dtype, case.batch) for case in cases))
    assert found == [(d, b) for d in ("bfloat16", "float32") for b in (128, 1)]


@pytest.mark.parametrize("name", [*COMPILED_EARLY, "network-training-nchw", "module"])
def test_networks_are_timed_in_pairs_and_read_their_plans_from_a_file(name):
    command = steps_of(2)[name].command
    names = words_after(command, "--providers")
    assert "--pairs" in command and names[0] == "eager"
    assert set(names) <= set(providers.PROVIDERS)
    if name != "module":
        assert words_after(command, "--plan-file") == ["PLANS"]


def test_a_race_that_is_reported_fails_nothing(tmp_path):
    step = steps_of(3)["racecheck"]
    assert not visit.is_failure(visit.Outcome(step, "FAILED (9)", 1, ""))
    memcheck = steps_of(1)["memcheck"]
    assert visit.is_failure(visit.Outcome(memcheck, "FAILED (9)", 1, ""))
    assert visit.is_failure(visit.Outcome(memcheck, visit.OUT_OF_TIME, 1, ""))
    tail = steps_of(1)["tail-forward"]
    assert not visit.is_failure(visit.Outcome(tail, visit.OUT_OF_TIME, 1, ""))
    assert visit.is_failure(visit.Outcome(tail, "FAILED (1)", 1, ""))


def test_dry_run_prints_when_each_step_begins_and_ends(tmp_path, capsys):
    assert visit.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for part in PARTS:
        for name in steps_of(part):
            assert f" {name} " in printed, name
    rows = [line.split() for line in printed.splitlines()[2:] if " plan-cost " in line]
    assert [(row[0], int(row[2]) - int(row[1])) for row in rows] == [("1", 150)]
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_stops_before_it_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert visit.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_of_one_part_need_no_other(capsys):
    arguments = ["--dry-run", "--steps", "network-inference", "--seconds", "100"]
    assert visit.main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines[2:]] == [["2", "0", "100", "network-inference"]]


def test_a_second_part_without_plans_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(visit.PARTS, 2, list)
    arguments = ["--part", "2", "--out", str(tmp_path), "--plans", str(tmp_path / "plans.json")]
    assert visit.run(visit.parse(arguments)) == 0
    assert f"There is no {tmp_path}/plans.json" in capsys.readouterr().out
    (tmp_path / "plans.json").write_text("{}")
    assert visit.run(visit.parse(arguments)) == 0
    assert "There is no" not in capsys.readouterr().out


def test_a_later_part_keeps_the_rows_of_the_earlier(tmp_path, monkeypatch):
    monkeypatch.setitem(visit.PARTS, 3, list)
    Results(tmp_path / "results.csv").add({"provider": "eager"})
    assert visit.run(visit.parse(["--part", "3", "--out", str(tmp_path)])) == 0
    assert [row["provider"] for row in read_rows(tmp_path / "results.csv")] == ["eager"]


def test_unknown_steps_are_named(capsys):
    with pytest.raises(SystemExit):
        visit.parse(["--steps", "magic"])
    assert "argument --steps: invalid choice: 'magic'" in capsys.readouterr().err


@pytest.fixture
def run_steps(monkeypatch, tmp_path, capsys):
    """Run some steps as part 1; return the exit status, what was printed, and the log."""

    def run(*steps: Step, seconds: str = "60") -> tuple[int, str, str]:
        monkeypatch.setitem(visit.PARTS, 1, lambda: list(steps))
        arguments = ["--part", "1", "--seconds", seconds, "--out", str(tmp_path)]
        status = visit.run(visit.parse(arguments))
        return status, capsys.readouterr().out, (tmp_path / "log.txt").read_text()

    return run


def python(name: str, code: str, **options: bool) -> Step:
    return Step(name, 10, (sys.executable, "-c", code), **options)


def test_a_step_that_dies_does_not_end_the_others(run_steps):
    dies = python("dies", "import os; print('before', flush=True); os.abort()")
    status, printed, log = run_steps(dies, python("lives", "print('after')"))
    assert status == 1
    assert "FAILED (-6)" in printed and "FAILED: dies" in printed
    assert 0 < log.index("===== dies") < log.index("before") < log.index("after")


def test_steps_beside_each_other_run_at_the_same_time(run_steps, tmp_path):
    wait = (
        "import pathlib, time\n{mine}.touch()\nwhile not {other}.exists(): time.sleep(0.05)\n"
        "print('saw the other')"
    )
    a, b = (f"pathlib.Path({str(tmp_path / name)!r})" for name in "ab")
    status, printed, _ = run_steps(
        python("a", wait.format(mine=a, other=b), beside=True),
        python("b", wait.format(mine=b, other=a), beside=True),
    )
    assert status == 0
    assert printed.count("saw the other") == 2


@pytest.mark.slow
def test_a_step_that_hangs_is_killed_with_its_children(run_steps):
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    parent = (
        f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"print('child', p.pid, flush=True)\np.wait()"
    )
    status, printed, log = run_steps(python("hangs", parent), seconds="3")
    assert status == 1
    assert "OUT OF TIME" in printed
    pid = int(log.split("child ")[1].split()[0])
    while is_running(pid):  # the suite's limit ends this if it doesn't end
        time.sleep(0.1)


def test_a_test_that_is_out_of_time_is_asked_to_end_first(run_steps):
    code = (
        "import time\ntry: time.sleep(600)\n"
        "except KeyboardInterrupt: print('2 failed so far', flush=True)"
    )
    _, printed, _ = run_steps(python("tests", code, is_test=True), seconds="3")
    assert "OUT OF TIME" in printed and "2 failed so far" in printed


@pytest.mark.slow
def test_ending_a_visit_ends_its_steps(tmp_path):
    token = tmp_path.name + str(time.monotonic_ns())
    command = [sys.executable, str(BENCHMARKS / "visit.py"), "--rehearse", "--part", "1"]
    command += ["--steps", "plan-cost", "--out", str(tmp_path)]
    env = os.environ | {"VISIT_TOKEN": token, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        while len(marked_processes(token)) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        assert marked_processes(token) == []
    finally:
        kill_marked(token)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "rows", "seconds"), [(1, 5, 0.3), (2, 2, 1.1), (3, 4, 0.7)])
def test_a_killed_part_loses_no_row(part, rows, seconds, tmp_path: Path):
    """A sample: tests/tools/kill_visits.py kills each part at ten random moments."""
    assert kill_after(part, rows, seconds, tmp_path) >= rows
