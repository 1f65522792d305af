"""gpu_check.py: without a card, what can be checked without one."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
from helpers.processes import BENCHMARKS, is_running, rows_of, script

SMI_LINE = "NVIDIA H200, 580.65.06, 143771 MiB, [N/A]\n"


def test_gpu_check_without_a_gpu_says_so_before_doing_anything(tmp_path):
    done = script("gpu_check.py", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_check_dry_run_prints_the_plan(tmp_path):
    done = script("gpu_check.py", "--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for step in ("environment", "tests", "tail-forward", "tail-backward", "norm-training",
                 "conv-cost", "module", "network-inference", "network-training"):  # fmt: skip
        assert f"\n{step} (up to " in f"\n{done.stdout}"
    assert "block-training" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_steps_can_be_chosen(tmp_path):
    done = script("gpu_check.py", "--dry-run", "--seconds", "100", "--steps", "block-training",
                  "environment", "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    environment, block = done.stdout.splitlines()
    assert environment.startswith("environment (up to 20 s)")
    assert block.startswith("block-training (up to 80 s)")
    done = script("gpu_check.py", "--dry-run", "--steps", "tests", "magic")
    assert done.returncode == 2
    assert "argument --steps: must be of environment, " in done.stderr
    assert "got 'magic'" in done.stderr


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A machine with all the programs that steps can't do without."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_every_planned_command_parses(tmp_path, bench, tools, monkeypatch):
    gpu_plan = bench("gpu_plan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    extra = [step.name for step in gpu_plan.extra_steps(tmp_path)]
    steps, missing = gpu_plan.plan(tmp_path)
    named, none_missing = gpu_plan.plan(tmp_path, extra)
    assert not missing and not none_missing
    assert [step.name for step in named] == extra
    assert len({step.name for step in (*steps, *named)}) == len([*steps, *named])
    parsers = {"warm_up": "bench_psa", "bench_psa": "bench_psa", "conv_cost": "conv_cost",
               "tune_triton": "tune_triton", "counters": "counters"}  # fmt: skip
    parsed = set()
    for step in (*steps, *named):
        for name, parser in parsers.items():
            if (path := str(BENCHMARKS / f"{name}.py")) in step.command:
                command = gpu_plan.with_deadline(step, 50 + gpu_plan.GRACE_SECONDS)
                args = bench(parser).parse(command[command.index(path) + 1 :])
                assert args.device.type == "cuda"
                assert args.seconds == (50 if step.own_deadline else 1000)
                parsed.add(step.name)
    assert {s.name for s in (*steps, *named) if s.own_deadline} == parsed - {*gpu_plan.SANITIZERS}


def test_what_lacks_its_program_is_skipped_with_the_reason(tmp_path, bench, monkeypatch):
    gpu_plan = bench("gpu_plan")
    monkeypatch.setenv("PATH", str(tmp_path))
    steps, missing = gpu_plan.plan(tmp_path, ["tests", "memcheck", "counters"])
    assert [step.name for step in steps] == ["tests"]
    assert missing == {"memcheck": "compute-sanitizer isn't on PATH",
                       "counters": "ncu isn't on PATH"}  # fmt: skip


def test_only_what_is_not_timed_runs_beside_something(tmp_path, bench, tools):
    gpu_plan = bench("gpu_plan")
    together = [group for group in gpu_plan.groups(gpu_plan.plan(tmp_path)[0]) if len(group) > 1]
    assert len(together) == 1
    assert {step.kind for step in together[0]} == {"check", "warm-up"}
    assert {"tests", "memcheck", "racecheck"} < {step.name for step in together[0]}


def test_time_that_a_step_leaves_goes_to_later_ones(bench):
    gpu_plan = bench("gpu_plan")
    names = (("a", 10), ("b", 20), ("c", 70))
    groups = [[gpu_plan.Step(name, (), weight, "check")] for name, weight in names]
    groups[1].append(gpu_plan.Step("beside b", (), 5, "check"))
    assert gpu_plan.allotment(groups, 0, 500) == pytest.approx(50)
    assert gpu_plan.allotment(groups, 1, 500) == pytest.approx(500 * 20 / 90)
    assert gpu_plan.allotment(groups, 2, 123) == pytest.approx(123)
    assert gpu_plan.allotment(groups, 2, -3) == 0


def test_steps_beside_each_other_run_at_the_same_time(tmp_path, bench):
    gpu_check, gpu_plan = bench("gpu_check"), bench("gpu_plan")
    wait = (
        "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\n"
        "mine.touch()\nwhile not other.exists(): time.sleep(0.05)\nprint('saw', other.name)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = {"a": (sys.executable, "-c", wait, a, b), "b": (sys.executable, "-c", wait, b, a)}
    steps = [gpu_plan.Step(name, command, 1, "check") for name, command in commands.items()]
    log = tmp_path / "log.txt"
    outcomes = gpu_check.execute_together(steps, 60, log)
    assert [(o.name, o.status) for o in outcomes] == [("a", "passed"), ("b", "passed")]
    text = log.read_text()
    assert 0 < text.index("===== a") < text.index("saw b") < text.index("===== b")


def test_a_hanging_step_is_killed_with_its_children_and_the_log_is_kept(tmp_path, bench):
    gpu_check, gpu_plan = bench("gpu_check"), bench("gpu_plan")
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"print('child', p.pid, flush=True)\np.wait()"
    )
    log = tmp_path / "log.txt"
    step = gpu_plan.Step("hangs", (sys.executable, "-c", parent), 1, "check")
    began = time.perf_counter()
    outcome = gpu_check.execute(step, 1.5, log)
    assert time.perf_counter() - began < 20
    assert outcome.status == "OUT OF TIME"
    pid = int(log.read_text().split("child ")[1].split()[0])
    for _ in range(50):
        if not is_running(pid):
            break
        time.sleep(0.1)
    assert not is_running(pid)


def test_steps_that_fail_or_pass_are_told_apart(tmp_path, bench):
    gpu_check, gpu_plan = bench("gpu_check"), bench("gpu_plan")

    def end(code: int, kind: str):
        command = (sys.executable, "-c", f"raise SystemExit({code})")
        step = gpu_plan.Step("tests", command, 1, kind)
        return gpu_check.execute(step, 30, tmp_path / "log.txt")

    passed, no_tests, failed = (end(code, "check") for code in (0, 5, 1))
    statuses = [outcome.status for outcome in (passed, no_tests, failed)]
    assert statuses == ["passed", "FAILED", "FAILED"]
    assert no_tests.note == "no GPU test was found"
    assert gpu_check.everything_passed([passed], measured=True)
    assert not gpu_check.everything_passed([passed, no_tests], measured=True)
    assert not gpu_check.everything_passed([passed, end(1, "measurement")], measured=True)
    assert gpu_check.everything_passed([passed, end(1, "warm-up")], measured=True)
    skipped = end(77, "measurement")
    assert skipped.status == "skipped"
    assert gpu_check.everything_passed([passed, skipped], measured=True)


def test_results_of_all_steps_are_collected_but_not_a_sanitizers(tmp_path, bench):
    gpu_check, report = bench("gpu_check"), bench("report")
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    out.mkdir()
    empty = dict.fromkeys(report.COLUMNS, "")
    measured = {
        "scope": "tail", "mode": "inference", "stage": "S1", "cache": "cold", "batch": "128",
        "dtype": "float16", "layout": "nchw", "backend": "triton", "ms_p20": 0.01,
        "ms_p50": 0.0125, "ms_p80": 0.02, "percent_of_copy": 87.5, "device": "GPU",
    }  # fmt: skip
    peers = [empty | measured | {"provider": provider, "ms_p50": ms} for provider, ms in
             (("eager", 0.05), ("compile", 0.04), ("compile-max-autotune", 0.03))]  # fmt: skip
    for folder, provider in (("tail-forward", "fused"), ("module", "cuda"), ("memcheck", "bad")):
        (scratch / folder).mkdir(parents=True)
        row = empty | measured | {"provider": provider}
        report.write_csv(scratch / folder / "bench_psa.csv", [*peers, row])
    (scratch / "env.json").write_text("{}")
    earlier = [{"step": step} | dict.fromkeys(report.COLUMNS, "") for step in ("norm", "module")]
    tables = gpu_check.collect(scratch, out, earlier)
    assert list(tables) == ["module", "tail-forward"]
    rows = rows_of(out / "results.csv")
    assert rows[0] == earlier[0], "of a step that wasn't run again"
    assert [row["step"] for row in rows] == ["norm"] + 4 * ["module"] + 4 * ["tail-forward"]
    assert [r["ms_p50"] for r in rows[1:5]] == [r["ms_p50"] for r in tables["module"]]
    assert {file.name for file in out.iterdir()} == {"results.csv", "env.json"}
    *_, line = gpu_check.summary(tables).splitlines()
    assert line.split() == ["tail-forward", "inference", "S1", "x", "128", "nchw", "0.0500",
                            "0.0300", "0.0125", "fused", "4.00x", "2.40x", "87.5"]  # fmt: skip
    table = gpu_check.steps_table([gpu_check.Outcome("tests", "passed", 12.3, "")])
    assert "tests  passed" in table


def test_nothing_measured_leaves_the_results_alone(tmp_path, bench):
    assert bench("gpu_check").collect(tmp_path / "scratch", tmp_path, []) == {}
    assert not (tmp_path / "results.csv").exists()


def test_what_was_left_out_shows_in_the_table(tmp_path, bench):
    gpu_check, report = bench("gpu_check"), bench("report")
    rows = [dict.fromkeys(report.COLUMNS, "") | {"note": note}
            for note in ("", "skipped: out of time", "skipped: out of time")]  # fmt: skip
    for step, found in (("module", rows), ("block", rows[:1])):
        (tmp_path / step).mkdir()
        report.write_csv(tmp_path / step / "bench_psa.csv", found)
    suite = '<testsuites><testsuite tests="9" failures="0" skipped="2"/></testsuites>'
    (tmp_path / "gpu-tests.xml").write_text(suite)
    ends = {
        name: gpu_check.with_counts(gpu_check.Outcome(name, "passed", 1.0, ""), tmp_path)
        for name in ("module", "block", "tests")
    }
    assert ends["module"][1:] == ("INCOMPLETE", 1.0, "2 rows out of time, see log.txt")
    assert ends["block"][1:] == ("passed", 1.0, "")
    assert ends["tests"][1:] == ("passed", 1.0, "9 tests, 0 failures, 2 skipped")
    (tmp_path / "gpu-tests.xml").write_text(suite[:30])
    killed = gpu_check.Outcome("tests", "OUT OF TIME", 1.0, "killed")
    assert gpu_check.with_counts(killed, tmp_path) == killed


def test_ours_is_timed_before_what_takes_long_to_compile(tmp_path, bench):
    gpu_plan = bench("gpu_plan")
    for step in gpu_plan.compiled_steps(tmp_path):
        providers = step.command[step.command.index("--providers") + 1 :]
        kinds = [bench("summary").whose_is(name) for name in providers]
        assert kinds.index("ours") < kinds.index("compiled"), step.name


def test_smi_answers_are_parsed_by_field(bench):
    environment = bench("environment")
    fields = ("name", "driver_version", "memory.total", "mig.mode.current")
    found = environment.parse_smi(SMI_LINE * 2, fields)
    assert found == {"name": "NVIDIA H200", "driver_version": "580.65.06",
                     "memory.total": "143771 MiB", "mig.mode.current": "[N/A]"}  # fmt: skip
    assert environment.parse_smi("", fields) == {}
    assert environment.parse_smi("Field is not a valid field to query.\n", fields) == {}


def test_smi_is_only_ever_queried(bench, monkeypatch, tmp_path):
    """An nvidia-smi that refuses the joint query is asked field by field, and never to set."""
    asked = tmp_path / "asked"
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\ncase "$1" in *,*) exit 2;; '
        f'--query-gpu=name) echo "A card";; *) exit 2;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert bench("environment").query_smi() == {"name": "A card"}
    for line in asked.read_text().splitlines():
        query, form = line.split()
        assert query.startswith("--query-gpu=") and form == "--format=csv,noheader"


def test_a_measurement_that_found_no_time_is_no_failed_check(bench):
    gpu_check, gpu_plan = bench("gpu_check"), bench("gpu_plan")
    killed = {
        kind: gpu_check.outcome(gpu_plan.Step("a step", (), 1, kind), None, 1.0)
        for kind in ("measurement", "warm-up", "check")
    }
    passes = {kind: gpu_check.everything_passed([end], True) for kind, end in killed.items()}
    assert passes == {"measurement": True, "warm-up": True, "check": False}
    assert not gpu_check.everything_passed([killed["measurement"]], measured=False), (
        "no measurement is no success"
    )
