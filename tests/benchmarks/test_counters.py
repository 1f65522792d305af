"""Test how counters.py parses ncu's output, and what it does where it cannot measure."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
# The first cases of S4, where N = 6,422,528 bytes: one without a launch, one of two, one of one.
TRAFFIC = f"""==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Profiling "sum_gate_kernel" - 1: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4711
{HEAD},"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","","","","","","","","byte","byte","nsecond"
"0",{PROCESS},"spin_kernel",{STREAM},"(1, 1, 1)","(1, 1, 1)",{GPU},"0","0","1,024"
"1",{PROCESS},"spin_kernel",{STREAM},"(1, 1, 1)","(1, 1, 1)",{GPU},"0","0","1,024"
"2",{PROCESS},"sum_kernel",{STREAM},"(512, 1, 1)","(2, 1, 1)",{GPU},"6,422,528","0","8,192.5"
"3",{PROCESS},"recalibrate_kernel",{STREAM},"(8, 1, 1)","(14, 1, 1)",{GPU},"0","12,845,056","2"
"4",{PROCESS},"spin_kernel",{STREAM},"(1, 1, 1)","(1, 1, 1)",{GPU},"0","0","1,024"
"5",{PROCESS},"sum_kernel",{STREAM},"(512, 1, 1)","(2, 1, 1)",{GPU},"n/a","0","4,096"
"""
# What an ncu that writes SAMPLE for the stage S4 does; its arguments are those of the real one.
FAKE = """#!{python}
import os, sys, time
from pathlib import Path
here = Path(__file__).parent
(here / "arguments").write_text(" ".join(sys.argv[1:]))
if sys.argv[-1] == "S4":
    log = sys.argv[sys.argv.index("--log-file") + 1]
    Path(log).write_text((here / "sample").read_text())
    print("what the process prints")
elif sys.argv[-1] == "S1":
    sys.exit("crashed")
elif os.fork() == 0:
    (here / "pid").write_text(str(os.getpid()))
time.sleep(0 if sys.argv[-1] == "S4" else 60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[[str, str], int]:
    """Run counters.py with a fake ncu, which writes a text for S4, crashes for S1, hangs for S2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(counters.machine, "describe", lambda device: {"device": "some GPU"})
    ncu = tmp_path / "ncu"
    ncu.write_text(FAKE.format(python=sys.executable))
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(text: str, options: str) -> int:
        (tmp_path / "sample").write_text(text)
        fixed = ["--device", "cuda", "--out", str(tmp_path / "out")]
        return counters.run(counters.parse([*fixed, *options.split()]))

    return run


def test_every_kernel_is_a_row_with_its_bytes_over_n(run, tmp_path, capsys):
    assert run(TRAFFIC, "--stages S4") == 0
    rows = rows_of(tmp_path / "out" / "counters.csv")
    assert list(rows[0]) == [*counters.COLUMNS, "device"]
    (_, second), (_, third) = counters.calls_of("S4", counters.PROFILED)[1:3]
    assert [(row["kernel"], row["launch"], row["mode"]) for row in rows] == [
        ("sum_kernel", "0", second.mode),
        ("recalibrate_kernel", "1", second.mode),
        ("sum_kernel", "0", third.mode),
    ]
    first, other, missing = rows
    assert float(first["gpu__time_duration.sum"]) == 8192.5
    assert (float(first["dram_over_n"]), float(other["dram_over_n"])) == (1, 2)
    assert (missing["dram__bytes_read.sum"], missing["dram_over_n"]) == ("", "")
    assert (first["grid"], first["block"]) == ("(2, 1, 1)", "(512, 1, 1)")
    assert (first["provider"], first["case"], first["device"]) == (
        *("cuda:one_pass", "S4"), "some GPU",
    )  # fmt: skip
    assert "recalibrate_kernel" in capsys.readouterr().out
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("--clock-control none --cache-control none --profile-from-start")


def test_metrics_of_two_runs_share_a_file(run, tmp_path):
    assert run(TRAFFIC, "--stages S4") == 0
    stalls = TRAFFIC.replace("gpu__time_duration.sum", counters.OCCUPANCY)
    for name in ("dram__bytes_read.sum", "dram__bytes_write.sum"):
        stalls = stalls.replace(name, f"unknown {name}")
    assert run(stalls, "--stages S4 --metrics stalls --append") == 0
    rows = rows_of(tmp_path / "out" / "counters.csv")
    assert [row["gpu__time_duration.sum"] != "" for row in rows] == [True] * 3 + [False] * 3
    assert [row[counters.OCCUPANCY] != "" for row in rows] == [False] * 3 + [True] * 3
    assert "--cache-control all" in (tmp_path / "arguments").read_text()


def test_rows_of_a_stage_stay_when_the_next_one_dies(run, tmp_path, capsys):
    assert run(TRAFFIC, "--stages S4 S1") == 1
    assert len(rows_of(tmp_path / "out" / "counters.csv")) == 3
    assert "crashed" in capsys.readouterr().out


@pytest.mark.slow
def test_profiled_process_is_killed_at_the_end_of_the_time(run, tmp_path, capsys):
    assert run(TRAFFIC, "--stages S2 --seconds 3") == 0, "a measurement may end early"
    assert "ncu was stopped at the end of --seconds" in capsys.readouterr().out
    pid = int((tmp_path / "pid").read_text())
    while is_running(pid):  # the suite's limit ends this if it doesn't end
        time.sleep(0.1)


def test_without_permission_it_is_skipped(run, capsys):
    assert (
        run("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "--stages S4") == 77
    )
    reason = "the driver allows only administrators to read the counters"
    assert capsys.readouterr().out == f"skipped: {reason}\n"


def test_without_ncu_or_gpu_it_is_skipped(run, tmp_path, capsys):
    assert counters.run(counters.parse(["--device", "cpu", "--out", str(tmp_path / "out")])) == 77
    assert capsys.readouterr().out == "skipped: PyTorch finds no GPU here\n"
    (tmp_path / "ncu").unlink()
    assert run("", "") == 77
    assert capsys.readouterr().out == "skipped: ncu isn't on PATH\n"
    assert not (tmp_path / "out").exists()


def test_marker_precedes_every_case_and_only_the_last_step_is_profiled(monkeypatch):
    happened = []

    @contextmanager
    def profiled() -> Iterator[None]:
        happened.append("[")
        yield
        happened.append("]")

    def prepare(workload: object, case: counters.Case) -> SimpleNamespace:
        if case.mode == "backward":
            raise ValueError("this one can't")  # the error of a kernel that refuses a size
        return SimpleNamespace(step=lambda: happened.append("step"))

    monkeypatch.setattr(torch.cuda.profiler, "profile", profiled)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("marker"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    provider = counters.PROVIDERS["triton"]._replace(prepare=prepare)
    monkeypatch.setitem(counters.PROVIDERS, "triton", provider)
    cases = [case for name, case in counters.calls_of("S4", ["triton"]) if name == "triton"][:2]
    monkeypatch.setattr(counters, "calls_of", lambda *_: [("triton", case) for case in cases])
    counters.launch_all(torch.device("cpu"), "S4", ["triton"])
    assert " ".join(happened) == "[ marker ] step [ step ] [ marker ]"
