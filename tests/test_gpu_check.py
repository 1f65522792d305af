"""gpu_check.py: without a card, what can be checked without one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from scripts import BENCHMARKS, rows_of, script

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
                 "conv-cost", "module", "network-training"):  # fmt: skip
        assert f"\n{step} (up to " in f"\n{done.stdout}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sanitizer", [None, "/opt/compute-sanitizer"])
def test_every_planned_command_parses(sanitizer, tmp_path, bench, monkeypatch):
    gpu_plan = bench("gpu_plan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = gpu_plan.plan(tmp_path, sanitizer)
    assert len({step.name for step in steps}) == len(steps)
    parsed = 0
    for step in steps:
        for name in ("bench_psa", "conv_cost"):
            if (path := str(BENCHMARKS / f"{name}.py")) in step.command:
                command = gpu_plan.with_deadline(step, 60)
                args = bench(name).parse(command[command.index(path) + 1 :])
                assert args.device.type == "cuda" and args.seconds == 50
                parsed += 1
    assert parsed == (11 if sanitizer is None else 13)
    assert all(gpu_plan.allotment(steps, i, 515) > 0 for i in range(len(steps)))


def test_time_that_a_step_leaves_goes_to_later_ones(bench):
    gpu_plan = bench("gpu_plan")
    steps = [gpu_plan.Step(name, (), weight, False) for name, weight in
             (("a", 10), ("b", 20), ("c", 70))]  # fmt: skip
    assert gpu_plan.allotment(steps, 0, 500) == pytest.approx(50)
    assert gpu_plan.allotment(steps, 1, 500) == pytest.approx(500 * 20 / 90)
    assert gpu_plan.allotment(steps, 2, 123) == pytest.approx(123)
    assert gpu_plan.allotment(steps, 2, -3) == 0


def test_a_hanging_step_is_killed_with_its_children_and_the_log_is_kept(tmp_path, bench):
    gpu_check, gpu_plan = bench("gpu_check"), bench("gpu_plan")
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"print('child', p.pid, flush=True)\np.wait()"
    )
    log = tmp_path / "log.txt"
    step = gpu_plan.Step("hangs", (sys.executable, "-c", parent), 1, False)
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


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_steps_that_fail_or_pass_are_told_apart(tmp_path, bench):
    gpu_check, gpu_plan = bench("gpu_check"), bench("gpu_plan")
    ends = {
        code: gpu_check.execute(
            gpu_plan.Step("tests", (sys.executable, "-c", f"raise SystemExit({code})"), 1, False),
            30,
            tmp_path / "log.txt",
        )
        for code in (0, 5, 1)
    }
    assert [outcome.status for outcome in ends.values()] == ["passed", "FAILED", "FAILED"]
    assert ends[5].note == "no GPU test was found"
    rows = [{"provider": "fused"}]
    assert gpu_check.everything_passed([ends[0]], rows)
    assert not gpu_check.everything_passed([ends[0], ends[1]], rows)
    assert not gpu_check.everything_passed([ends[0]], []), "no measurement is no success"


def test_results_of_all_steps_are_collected_but_not_a_sanitizers(tmp_path, bench):
    gpu_check, report = bench("gpu_check"), bench("report")
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    out.mkdir()
    empty = dict.fromkeys(report.COLUMNS, "")
    measured = {
        "scope": "tail", "mode": "inference", "stage": "S1", "cache": "cold", "batch": "128",
        "dtype": "float16", "layout": "nchw", "backend": "triton", "ms_p20": 0.01,
        "ms_p50": 0.0125, "ms_p80": 0.02, "speedup": 4.0, "percent_of_copy": 87.5, "device": "GPU",
    }  # fmt: skip
    for folder, provider in (("tail-forward", "fused"), ("module", "eager"), ("memcheck", "bad")):
        (scratch / folder).mkdir(parents=True)
        row = empty | measured | {"provider": provider}
        report.write_csv(scratch / folder / "bench_psa.csv", [row])
    (scratch / "env.json").write_text("{}")
    rows = gpu_check.collect(scratch, out)
    assert {row["provider"] for row in rows} == {"fused", "eager"}
    assert rows_of(out / "results.csv") == rows
    assert {file.name for file in out.iterdir()} == {"results.csv", "env.json"}
    table = gpu_check.summary([gpu_check.Outcome("tests", "passed", 12.3, "")], rows)
    assert "0.0125     4.00x      87.50" in table
    assert "tests  passed" in table


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
    passed = gpu_check.outcome(gpu_plan.Step("tests", (), 1, False), 0, 1.0)
    rows = [{"provider": "fused"}]
    for name, own_deadline, harmless in (
        ("module", True, True),
        ("memcheck", True, False),
        ("tests", False, False),
    ):
        killed = gpu_check.outcome(gpu_plan.Step(name, (), 1, own_deadline), None, 1.0)
        assert gpu_check.everything_passed([passed, killed], rows) == harmless, name
