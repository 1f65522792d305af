"""Test gpu_check.py without a GPU."""

from __future__ import annotations

import sys
import time

import gpu_check
import gpu_plan
import report
from helpers.processes import is_running, rows_of, script


def test_without_a_gpu_it_stops_before_it_writes(tmp_path):
    done = script("gpu_check.py", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_plan(tmp_path):
    done = script("gpu_check.py", "--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    steps = "environment tests tail-forward tail-backward norm-training plan-cost module"
    steps += " network-inference network-training"
    for step in steps.split():
        assert f"\n{step} (up to " in f"\n{done.stdout}"
    assert "block-training" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_steps_can_be_chosen(tmp_path):
    options = "--dry-run --seconds 100 --steps block-training environment --out"
    done = script("gpu_check.py", *options.split(), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    environment, block = done.stdout.splitlines()
    assert environment.startswith("environment (up to 14 s)")
    assert block.startswith("block-training (up to 86 s)")
    done = script("gpu_check.py", "--dry-run", "--steps", "tests", "magic")
    assert done.returncode == 2
    assert "argument --steps: must be of environment, " in done.stderr
    assert "got 'magic'" in done.stderr


def test_concurrent_steps_run_at_the_same_time(tmp_path):
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


def test_hanging_step_is_killed_with_its_children_and_the_log_is_kept(tmp_path):
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


def test_exit_status_decides_whether_a_step_passed(tmp_path):
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


def test_results_of_all_steps_but_the_sanitizers_are_collected(tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    out.mkdir()
    empty = dict.fromkeys(report.COLUMNS, "")
    measured = {
        "scope": "tail", "mode": "inference", "stage": "S1", "cache": "cold", "batch": "128",
        "dtype": "float16", "layout": "nchw", "backend": "triton", "ms_p20": 0.01,
        "ms_p50": 0.0125, "ms_p80": 0.02, "percent_of_copy": 87.5, "device": "GPU",
    }  # fmt: skip
    times = {"eager": 0.05, "compile": 0.04, "compile-max-autotune": 0.03}
    others = [empty | measured | {"provider": name, "ms_p50": ms} for name, ms in times.items()]
    for folder, provider in (("tail-forward", "fused"), ("module", "cuda"), ("memcheck", "bad")):
        (scratch / folder).mkdir(parents=True)
        row = empty | measured | {"provider": provider}
        report.write_csv(scratch / folder / "bench_psa.csv", [*others, row])
    (scratch / "env.json").write_text("{}")
    earlier = [{"step": step} | dict.fromkeys(report.COLUMNS, "") for step in ("norm", "module")]
    tables = gpu_check.collect(scratch, out, earlier)
    assert list(tables) == ["module", "tail-forward"]
    rows = rows_of(out / "results.csv")
    assert rows[0] == earlier[0], "the row of a step that did not run again"
    assert [row["step"] for row in rows] == ["norm"] + 4 * ["module"] + 4 * ["tail-forward"]
    assert [r["ms_p50"] for r in rows[1:5]] == [r["ms_p50"] for r in tables["module"]]
    assert {file.name for file in out.iterdir()} == {"results.csv", "env.json"}
    *_, line = gpu_check.summary(tables).splitlines()
    expected = "tail-forward inference S1 x 128 nchw 0.0500 0.0300 0.0125 fused 4.00x 2.40x 87.5"
    assert " ".join(line.split()) == expected
    table = gpu_check.steps_table([gpu_check.Outcome("tests", "passed", 12.3, "")])
    assert "tests  passed" in table


def test_run_without_rows_does_not_write_results(tmp_path):
    assert gpu_check.collect(tmp_path / "scratch", tmp_path, []) == {}
    assert not (tmp_path / "results.csv").exists()


def test_skipped_rows_and_tests_are_counted_in_the_table(tmp_path):
    late = "skipped: out of time"
    rows = [dict.fromkeys(report.COLUMNS, "") | {"note": note} for note in ("", late, late)]
    for step, found in (("module", rows), ("block", rows[:1])):
        (tmp_path / step).mkdir()
        report.write_csv(tmp_path / step / "bench_psa.csv", found)
    suite = '<testsuites><testsuite tests="9" failures="0" skipped="2"/></testsuites>'
    (tmp_path / "tests.xml").write_text(suite)
    ends = {
        name: gpu_check.with_counts(gpu_check.Outcome(name, "passed", 1.0, ""), tmp_path)
        for name in ("module", "block", "tests")
    }
    assert ends["module"][1:] == ("INCOMPLETE", 1.0, "2 rows out of time, see log.txt")
    assert ends["block"][1:] == ("passed", 1.0, "")
    assert ends["tests"][1:] == ("passed", 1.0, "9 tests, 0 failures, 2 skipped")
    (tmp_path / "tests.xml").write_text(suite[:30])
    killed = gpu_check.Outcome("tests", "OUT OF TIME", 1.0, "killed")
    assert gpu_check.with_counts(killed, tmp_path) == killed


def test_killed_measurement_is_not_a_failed_check():
    killed = {
        kind: gpu_check.outcome(gpu_plan.Step("a step", (), 1, kind), None, 1.0)
        for kind in ("measurement", "warm-up", "check")
    }
    passes = {kind: gpu_check.everything_passed([end], True) for kind, end in killed.items()}
    assert passes == {"measurement": True, "warm-up": True, "check": False}
    assert not gpu_check.everything_passed([killed["measurement"]], measured=False), (
        "a run without any measurement must not pass"
    )
