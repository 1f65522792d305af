"""Test how counters.py parses ncu's output, and its messages where it cannot measure."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import counters
import pytest
import torch
from helpers.processes import is_running, rows_of

PROCESS = '"4711","python3.12","127.0.0.1"'
STREAM, GPU = '"1","7"', '"0","9.0"'
HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream",'
    '"Block Size","Grid Size","Device","CC"'
)
# Two cases of S4 at batch 2 in float16, N = 100352 bytes: one of two launches, one of one.
TRAFFIC = f"""==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Profiling "sum_gate_kernel" - 1: 0%....50%....100% - 1 pass
==PROF== Profiling "recalibrate_kernel" - 2: 0%....50%....100% - 1 pass
==PROF== Profiling "spin_kernel" - 3: 0%....50%....100% - 1 pass
==PROF== Profiling "sum_gate_kernel" - 4: 0%....50%....100% - 2 passes
==PROF== Disconnected from process 4711
{HEAD},"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","","","","","","","","byte","Kbyte","nsecond"
"0",{PROCESS},"spin_kernel",{STREAM},"(1, 1, 1)","(1, 1, 1)",{GPU},"0","0","1,024"
"1",{PROCESS},"sum_gate_kernel",{STREAM},"(512, 1, 1)","(2, 1, 1)",{GPU},"100,352","0","8,192"
"2",{PROCESS},"recalibrate_kernel",{STREAM},"(128, 1, 1)","(14, 1, 1)",{GPU},"0","100.352","2,048"
"3",{PROCESS},"spin_kernel",{STREAM},"(1, 1, 1)","(1, 1, 1)",{GPU},"0","0","1,024"
"4",{PROCESS},"sum_gate_kernel",{STREAM},"(512, 1, 1)","(2, 1, 1)",{GPU},"n/a","0","4,096"
"""
FIRST_CASE = ("spin_kernel", "sum_gate_kernel", "recalibrate_kernel")
NAMES = (*FIRST_CASE, "spin_kernel", "sum_gate_kernel")
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REST = "\n".join(
    [
        f'{HEAD},"launch__registers_per_thread","launch__occupancy_limit_registers",'
        f'"launch__occupancy_limit_warps","{STALLED.format("long_scoreboard")}",'
        f'"{STALLED.format("barrier")}"',
        '"","","","","","","","","","","","register/thread","block","block","inst","inst"',
        *(
            f'"{i}",{PROCESS},"{name}",{STREAM},"","",{GPU},"40","3","4","9.0","3.0"'
            for i, name in enumerate(NAMES)
        ),
    ]
)


def test_without_ncu_it_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.run(counters.parse(["--out", str(tmp_path / "out")])) == 77
    assert capsys.readouterr().out == "skipped: ncu isn't on PATH\n"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run counters.py with an ncu that writes these texts, one in each run."""
    monkeypatch.setattr(counters.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(counters, "describe", lambda device: {"device": "some GPU"})
    available = counters.PROVIDERS["triton"]._replace(unavailable_reason=lambda device: None)
    monkeypatch.setitem(counters.PROVIDERS, "triton", available)

    def run(*texts: str | None) -> int:
        left = list(texts)

        def write(args: object, run: object, log: Path) -> list[str]:
            text = left.pop(0)
            code = "import time; time.sleep(60)"
            if text is not None:
                code = f"open({str(log)!r}, 'w').write({text!r}); print('what the process prints')"
            return [sys.executable, "-c", code]

        monkeypatch.setattr(counters, "command", write)
        options = (
            "--stages S4 --memory-format nchw --providers triton --batch 2 --device cuda --out"
        )
        seconds = ["--seconds", "1" if None in texts else "100"]
        return counters.run(counters.parse([*options.split(), str(tmp_path), *seconds]))

    return run


def test_every_kernel_is_a_row_with_its_bytes_over_n(measure, tmp_path, capsys):
    assert measure(TRAFFIC, REST) == 0
    rows = rows_of(tmp_path / "counters.csv")
    assert [(row["kernel"], row["mode"]) for row in rows] == [
        ("sum_gate_kernel", "inference"),
        ("recalibrate_kernel", "inference"),
        ("sum_gate_kernel", "backward"),
    ]
    first, second, third = rows
    assert (float(first["dram_read_bytes"]), float(first["us"])) == (100352, 8.192)
    assert float(first["dram_over_n"]) == float(second["dram_over_n"]) == 1
    assert (third["dram_read_bytes"], third["dram_over_n"], third["passes"]) == ("", "", "2")
    assert (first["grid"], first["block"]) == ("(2, 1, 1)", "(512, 1, 1)")
    assert (float(first["blocks_per_sm"]), first["limited_by"]) == (3, "registers")
    assert (first["stall"], float(first["stall_percent"])) == ("long_scoreboard", 75)
    assert (first["provider"], first["stage"], first["device"]) == ("triton", "S4", "some GPU")
    printed = capsys.readouterr().out
    assert "S4 nchw forward triton   together            10.2      2.00" in printed
    assert "2 of 2 cases measured" in printed


def test_results_of_the_first_run_stay_without_the_second(measure, tmp_path):
    assert measure(TRAFFIC, "") == 0
    rows = rows_of(tmp_path / "counters.csv")
    assert [row["registers"] for row in rows] == [""] * 3
    assert float(rows[0]["dram_over_n"]) == 1


@pytest.mark.parametrize(
    "text, status",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 77),
        (None, 77),
        ("crashed", 1),
    ],
    ids=["no permission", "no time", "crash"],
)
def test_without_counters_no_file_is_written(measure, text, status, tmp_path):
    assert measure(text) == status
    assert not (tmp_path / "counters.csv").exists()


def test_ncu_does_not_change_the_clocks(monkeypatch):
    args = counters.parse(["--device", "cpu"])
    for run in (counters.TRAFFIC, counters.REST):
        command = counters.command(args, run, Path("log"))
        assert command[:3] == ["ncu", "--clock-control", "none"]
        profiled = command[command.index("--profiled") :]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        again = counters.parse(profiled)
        assert again.profiled and counters.plan(again) == counters.plan(args)


def test_marker_precedes_every_case_and_only_the_last_step_is_profiled(monkeypatch):
    happened = []

    @contextmanager
    def profiled() -> Iterator[None]:
        happened.append("[")
        yield
        happened.append("]")

    def prepare(workload: object, mode: str, autocast: None) -> SimpleNamespace:
        if mode == "backward":
            raise ValueError("this one can't")  # the error of a kernel that refuses a size
        return SimpleNamespace(step=lambda: happened.append("step"), choice="auto")

    monkeypatch.setattr(torch.cuda.profiler, "profile", profiled)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("marker"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    provider = counters.PROVIDERS["triton"]._replace(prepare=prepare)
    monkeypatch.setitem(counters.PROVIDERS, "triton", provider)
    arguments = "--device cpu --stages S4 --memory-format nchw --providers triton --batch 1"
    counters.launch_all(counters.parse(arguments.split()))
    assert " ".join(happened) == "[ marker ] step step [ step ] [ marker ]"


def test_profiled_process_is_killed_at_the_end_of_the_time(tmp_path, monkeypatch):
    write = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    child = f"import os, time; {write}; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(counters, "command", lambda *_: [sys.executable, "-c", parent])
    assert counters.profile(None, counters.TRAFFIC, 3.0) is None
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)
