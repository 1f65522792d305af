"""Test the plan of gpu_check.py."""

from __future__ import annotations

import os

import bench_psa
import counters
import gpu_plan
import plan_cost
import pytest
import summary
import torch
import tune_triton
from helpers.processes import BENCHMARKS


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Put all programs that steps need on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_every_planned_command_parses(tmp_path, tools, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    extra = [step.name for step in gpu_plan.extra_steps(tmp_path)]
    steps, missing = gpu_plan.plan(tmp_path)
    named, none_missing = gpu_plan.plan(tmp_path, extra)
    assert not missing and not none_missing
    assert [step.name for step in named] == extra
    assert len({step.name for step in (*steps, *named)}) == len([*steps, *named])
    parsers = {
        "warm_up": bench_psa,
        "bench_psa": bench_psa,
        "plan_cost": plan_cost,
        "tune_triton": tune_triton,
        "counters": counters,
    }
    parsed = set()
    for step in (*steps, *named):
        for name, parser in parsers.items():
            if (path := str(BENCHMARKS / f"{name}.py")) in step.command:
                command = gpu_plan.with_deadline(step, 50 + gpu_plan.GRACE_SECONDS)
                args = parser.parse(command[command.index(path) + 1 :])
                assert args.device.type == "cuda"
                assert args.seconds == (50 if step.own_deadline else 1000)
                parsed.add(step.name)
    assert {s.name for s in (*steps, *named) if s.own_deadline} == parsed - {*gpu_plan.SANITIZERS}


def test_step_without_its_program_is_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    steps, missing = gpu_plan.plan(tmp_path, ["tests", "memcheck", "counters"])
    assert [step.name for step in steps] == ["tests"]
    assert missing == {
        "memcheck": "compute-sanitizer isn't on PATH",
        "counters": "ncu isn't on PATH",
    }


def test_only_steps_that_are_not_timed_run_at_the_same_time(tmp_path, tools):
    together = [group for group in gpu_plan.groups(gpu_plan.plan(tmp_path)[0]) if len(group) > 1]
    assert len(together) == 1
    assert {step.kind for step in together[0]} == {"check", "warm-up"}
    assert {"tests", "memcheck"} < {step.name for step in together[0]}


def test_unused_time_goes_to_later_steps():
    names = (("a", 10), ("b", 20), ("c", 70))
    groups = [[gpu_plan.Step(name, (), weight, "check")] for name, weight in names]
    groups[1].append(gpu_plan.Step("beside b", (), 5, "check"))
    assert gpu_plan.allotment(groups, 0, 500) == pytest.approx(50)
    assert gpu_plan.allotment(groups, 1, 500) == pytest.approx(500 * 20 / 90)
    assert gpu_plan.allotment(groups, 2, 123) == pytest.approx(123)
    assert gpu_plan.allotment(groups, 2, -3) == 0


@pytest.mark.parametrize("part", gpu_plan.PARTS)
def test_each_part_names_steps_of_the_plan(part, tmp_path, tools):
    steps, missing = gpu_plan.plan(tmp_path, gpu_plan.PARTS[part])
    assert {step.name for step in steps} == set(gpu_plan.PARTS[part]) and not missing


def test_ours_is_timed_before_slow_compilations(tmp_path):
    for step in gpu_plan.compiled_steps(tmp_path):
        providers = step.command[step.command.index("--providers") + 1 :]
        kinds = [summary.group_of(name) for name in providers]
        assert kinds.index("ours") < kinds.index("compiled"), step.name
