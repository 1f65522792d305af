"""Test bench_psa.py as users run it, and the numbers that it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bench_psa
import pytest
import torch
from harness import cases, providers
from harness.results import COLUMNS, OUT_OF_TIME, read_rows
from helpers.processes import BENCHMARKS, PNG, one_thread_environment, script

from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.utils import timing

Rows = list[dict[str, str]]
Run = Callable[[str], tuple[int, Rows]]


@pytest.fixture
def run_bench(tmp_path, threads) -> Run:
    """Run bench_psa.py on the CPU without plots: return the exit status and the rows."""

    def run(options: str) -> tuple[int, Rows]:
        fixed = ["--device", "cpu", "--no-plot", "--out", str(tmp_path)]
        status = bench_psa.main([*options.split(), *fixed])
        return status, read_rows(tmp_path / "results.csv")

    return run


@pytest.fixture
def quick_search(monkeypatch):
    """End the searches of optimize_for_inference and plan_convs at once."""
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)


def assert_valid(rows: Rows) -> None:
    """Check that every row is timed and, but for the copy, right."""
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["ms_low"]) <= float(row["ms_p50"]) <= float(row["ms_high"])
        if row["provider"] != "copy":
            assert row["ok"] == "True"
            assert float(row["max_error"]) <= float(row["error_bound"])
            assert int(row["peak_extra_bytes"]) > 0


def test_tail_benchmark_writes_table_csv_and_plots(tmp_path):
    options = "--input randn --stages S4 --batch 2 --mode inference training --reps 1"
    options += " --cache warm cold --providers eager fused"
    done = script("bench_psa.py", "--out", tmp_path, *options.split())
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 2 * 3  # modes x caches x (providers and the copy)
    assert_valid(rows)
    assert {row["backend"] for row in rows if row["provider"] == "fused"} == {"cpu"}
    assert "plain PyTorch behind the operator" not in done.stdout
    assert done.stdout.count("training cold") == 3
    written = {path.name for path in tmp_path.iterdir()}
    assert set(done.stdout.splitlines()[-1].partition(f"{tmp_path}: ")[2].split(", ")) == written
    pictures = written - {"results.csv"}
    assert pictures and all((tmp_path / name).read_bytes().startswith(PNG) for name in pictures)


def test_necessary_bytes_are_multiples_of_the_output(run_bench):
    status, rows = run_bench(
        "--input randn --stages S4 --batch 3 --reps 1 --dtype bfloat16 --providers eager"
        " --mode inference training backward"
    )
    assert status == 0
    N = 3 * 512 * 7 * 7 * 2
    found = {(row["mode"], row["provider"]): row for row in rows}
    for mode, times in (("inference", 2), ("training", 5), ("backward", 3)):
        assert int(found[mode, "eager"]["necessary_bytes"]) == times * N
        assert int(found[mode, "copy"]["necessary_bytes"]) == 2 * N


def test_photos_are_the_default_input(run_bench):
    pytest.importorskip("sklearn")
    status, rows = run_bench("--stages S4 S3 --batch 3 --reps 5 --providers eager fused")
    assert status == 0
    assert_valid(rows)
    assert {row["input"] for row in rows} == {"photos"}


def test_module_scope(run_bench):
    status, rows = run_bench(
        "--input randn --scope module --stages S4 --batch 1 --reps 1 --providers eager fused"
    )
    assert status == 0
    assert_valid(rows)
    assert [(row["case"], row["provider"]) for row in rows] == [("S4", "eager"), ("S4", "fused")]
    assert not any(row["necessary_bytes"] for row in rows), "defined for the tail only"


def test_norm_scope_times_the_operator_beside_its_parts(run_bench):
    names = ["eager", "apart", "fused"]
    assert set(names) <= set(providers.defaults(torch.device("cpu"), "norm", ["training"]))
    status, rows = run_bench(
        "--input randn --scope norm --stages S4 --batch 2 --reps 5 --providers eager apart fused"
    )
    assert status == 0
    assert_valid(rows)
    assert {row["mode"] for row in rows} == {"training"}
    peak = {row["provider"]: int(row["peak_extra_bytes"]) for row in rows}
    assert peak["fused"] < peak["apart"] / 2


@pytest.mark.slow
def test_planned_module_is_timed_in_its_faster_memory_format(run_bench, quick_search):
    names = "eager fused planned"
    status, rows = run_bench(
        f"--input randn --scope module --mode training --stages S4 --batch 2 --memory-format best"
        f" --reps 1 --providers {names}"
    )
    assert status == 0
    assert [row["provider"] for row in rows] == names.split()
    assert {row["memory_format"] for row in rows} <= set(cases.MEMORY_FORMATS)
    assert_valid(rows)


@pytest.mark.slow
def test_network_scope_times_each_provider_in_its_faster_memory_format(
    run_bench, quick_search, monkeypatch
):
    monkeypatch.setattr(timing, "MIN_SAMPLES", 1)
    names = "eager fused optimized resnet50:eager resnet50:optimized"
    status, rows = run_bench(
        f"--scope network --shape 1 3 64 64 --memory-format best --reps 1 --seconds 1000"
        f" --providers {names}"
    )
    assert status == 0
    assert [row["provider"] for row in rows] == names.split()
    assert {row["memory_format"] for row in rows} <= set(cases.MEMORY_FORMATS)
    assert {(row["case"], row["batch"]) for row in rows} == {("3x64x64", "1")}
    assert_valid(rows)


@pytest.mark.parametrize("scope", ["tail", "module"])
def test_own_size_kernels_and_groups(scope, run_bench):
    status, rows = run_bench(
        f"--scope {scope} --shape 2 64 9 7 --groups 1 2 4 8 --kernels 3 5 7 9 --reps 1"
        f" --providers eager fused"
    )
    assert status == 0
    assert_valid(rows)
    points = {(row["case"], row["batch"], row["input"]) for row in rows}
    assert points == {("64x9x7 kernels 3-5-7-9 groups 1-2-4-8", "2", "randn")}
    if scope == "tail":
        assert int(rows[0]["necessary_bytes"]) == 2 * (2 * 64 * 9 * 7 * 4)


def test_groups_must_fit_the_stages_that_are_timed(run_bench):
    options = "--groups 1 4 8 32 --batch 1 --reps 1 --providers eager fused --stages"
    status, rows = run_bench(f"{options} S4 S2")
    assert status == 0
    assert_valid(rows)
    with pytest.raises(SystemExit):
        run_bench(f"{options} S4 S1")


SMALL_NETWORK = """
from torch import nn
import epsanet_fused as ef

def small():
    layers = [nn.Conv2d(4, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), ef.PSAModule(64, 64)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.mark.slow
def test_own_network_is_found_in_the_working_folder(tmp_path):
    (tmp_path / "my_networks.py").write_text(SMALL_NETWORK)
    options = "--model my_networks:small --shape 2 4 16 20 --mode inference training --reps 1"
    options += " --providers eager fused --no-plot"
    command = [sys.executable, str(BENCHMARKS / "bench_psa.py"), *options.split()]
    env = one_thread_environment()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out" / "results.csv")
    assert_valid(rows)
    found = [(row["mode"], row["provider"]) for row in rows]
    assert found == [(m, p) for m in ("inference", "training") for p in ("eager", "fused")]
    points = {(row["scope"], row["case"], row["batch"], row["input"]) for row in rows}
    assert points == {("network", "my_networks:small 4x16x20", "2", "randn")}


def test_wrong_result_in_one_of_two_memory_formats_fails(run_bench, monkeypatch):
    convolve = cases.ef.FusedPSAModule.convolve

    def wrong(module, x):
        last = x.is_contiguous(memory_format=torch.channels_last)
        return [y * (1.5 if last else 1) for y in convolve(module, x)]

    monkeypatch.setattr(cases.ef.FusedPSAModule, "convolve", wrong)
    status, rows = run_bench(
        "--input randn --scope module --stages S4 --batch 1 --reps 1 --memory-format best"
        " --providers eager fused"
    )
    assert status == 1
    found = {(row["provider"], row["memory_format"]): row for row in rows}
    assert found["fused", "channels_last"]["ok"] == "False"
    assert not found["fused", "channels_last"]["ms_p50"]
    assert found["fused", "nchw"]["ok"] == "True" and found["fused", "nchw"]["ms_p50"]


@pytest.mark.parametrize("pairs", ["", "--pairs"])
def test_wrong_result_is_never_timed(pairs, run_bench, monkeypatch, capsys):
    right = cases.FusedTail.forward
    monkeypatch.setattr(cases.FusedTail, "forward", lambda *args: right(*args) * 1.0001)
    status, rows = run_bench(
        f"--input randn --stages S4 --batch 1 --reps 1 --providers eager fused {pairs}"
    )
    assert status == 1
    eager, fused = (row for row in rows if row["provider"] != "copy")
    assert eager["ok"] == "True" and eager["ms_p50"]
    assert fused["ok"] == "False" and not fused["ms_p50"]
    assert re.search("^FAILED inference S4 1 float32 fused: WRONG", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("pairs", ["", "--pairs"])
def test_provider_that_raises_does_not_end_the_others(pairs, run_bench, monkeypatch):
    def broken(*args):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(cases.FusedTail, "forward", broken)
    status, rows = run_bench(
        f"--input randn --stages S4 --batch 1 --reps 1 --providers fused eager {pairs}"
    )
    assert status == 1
    fused, eager = (row for row in rows if row["provider"] != "copy")
    assert "broken on purpose" in fused["note"] and not fused["ms_p50"]
    assert eager["ms_p50"] and eager["ok"] == "True"
    assert not eager["speedup"], "there is no time of the first"


@pytest.mark.parametrize("pairs", ["", "--pairs"])
def test_cases_without_time_are_recorded_as_skipped(pairs, run_bench):
    status, rows = run_bench(
        f"--input randn --stages S4 S3 --batch 1 --reps 1 --seconds 0.0001"
        f" --providers eager fused {pairs}"
    )
    assert status == 0
    late = [(r["case"], r["provider"]) for r in rows if r["note"] == OUT_OF_TIME]
    assert late == [("S4", "fused"), ("S3", "all")]
    assert [r["provider"] for r in rows if r["ms_p50"] and r["provider"] != "copy"] == ["eager"]


def test_pairs_are_timed_by_cost_and_each_against_the_first(run_bench, monkeypatch):
    table = providers.PROVIDERS
    monkeypatch.setitem(table, "eager", table["eager"]._replace(cost=providers.AUTOTUNES))
    monkeypatch.setitem(table, "cleaned", table["cleaned"]._replace(cost=providers.COMPILES))
    status, rows = run_bench(
        "--input randn --stages S4 --batch 2 --reps 5 --pairs --providers eager cleaned fused"
    )
    assert status == 0
    assert_valid(rows)
    assert [row["provider"] for row in rows] == ["eager", "copy", "fused", "cleaned"]
    first = float(rows[0]["ms_p50"])
    assert float(rows[0]["speedup"]) == 1 and rows[0]["tie"] == "False"
    for row in rows[2:]:  # the first is timed again in each pair
        assert 1 / 3 < float(row["speedup"]) / (first / float(row["ms_p50"])) < 3


@pytest.mark.slow
def test_killed_process_has_written_every_pair_that_was_timed(tmp_path):
    """The last provider compiles, with a compiler that never ends, when the process is killed."""
    compiler, started = tmp_path / "compiler", tmp_path / "started"
    compiler.write_text(f"#!/bin/sh\ntouch {started}\nexec sleep infinity\n")
    compiler.chmod(0o755)
    options = "--input randn --stages S4 --batch 1 --reps 1 --pairs --device cpu"
    options += f" --providers eager compile fused --out {tmp_path}"
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(compiler)}
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "bench_psa.py"), *options.split()],
            env=one_thread_environment() | caches,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
        )
    try:
        while not started.exists():
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "results.csv").read_bytes().endswith(b"\n")
    rows = read_rows(tmp_path / "results.csv")
    assert [row["provider"] for row in rows] == ["eager", "copy", "fused"]
    assert_valid(rows)


def test_append_keeps_the_rows_of_earlier_runs(run_bench):
    options = "--input randn --stages S4 --batch 1 --reps 1 --providers"
    run_bench(f"{options} eager")
    _, rows = run_bench(f"{options} fused --append")
    assert [row["provider"] for row in rows] == ["eager", "copy", "fused", "copy"]
    _, rows = run_bench(f"{options} fused")
    assert [row["provider"] for row in rows] == ["fused", "copy"]


def test_prepare_only_writes_no_rows(run_bench, capsys):
    options = "--input randn --stages S4 --batch 1 2 --providers eager fused --prepare-only"
    assert run_bench(options) == (0, [])
    lines = capsys.readouterr().out.splitlines()
    points = [f"tail inference S4 {b} float32 nchw {p}" for b in (1, 2) for p in ("eager", "fused")]
    assert [line.partition(": ")[0] for line in lines] == points
    assert all(re.fullmatch(r".*: \d+ s", line) for line in lines)


def test_prepare_only_keeps_the_rows_of_earlier_runs(run_bench):
    options = "--input randn --stages S4 --batch 1 --reps 1 --providers eager"
    _, rows = run_bench(options)
    assert run_bench(f"{options} --prepare-only") == (0, rows)


def test_trace_is_written_for_each_provider(run_bench, tmp_path):
    status, _ = run_bench(
        "--input randn --stages S4 --batch 1 --reps 1 --trace --providers eager fused"
    )
    assert status == 0
    found = {path.name.split("-")[1]: path for path in tmp_path.glob("trace-*.json")}
    assert sorted(found) == ["eager", "fused"]
    for name, path in found.items():
        events = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
        ours = any(event.startswith("epsanet_fused::") for event in events)
        assert ours == (name == "fused")
        assert ("aten::conv2d" in events) == (name == "eager")


def test_list_providers_prints_each_with_the_reason_why_not(tmp_path, threads, capsys):
    out = tmp_path / "never"
    assert bench_psa.main(["--list-providers", "--device", "cpu", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(providers.PROVIDERS)
    for line, (name, provider) in zip(lines, providers.PROVIDERS.items(), strict=True):
        assert line.startswith(f"{name}: {provider.about} (")
        reason = provider.unavailable_reason(torch.device("cpu"))
        assert line.endswith(f"[not here: {reason}]" if reason else ")")
    assert "CUDA graphs don't exist on cpu" in "\n".join(lines)
    assert not out.exists()


def test_list_cases_prints_them_in_the_order_in_which_they_are_timed(tmp_path, threads, capsys):
    options = "--list-cases --device cpu --mode training inference --dtype bfloat16 float32"
    options += " --batch 4 1 --memory-format channels_last nchw --stages S4 S1"
    assert bench_psa.main([*options.split(), "--out", str(tmp_path / "never")]) == 0
    expected = [
        f"tail {mode} {case} {batch} {dtype} {memory_format}"
        for mode in ("training", "inference")
        for dtype in ("bfloat16", "float32")
        for batch in (4, 1)
        for memory_format in ("channels_last", "nchw")
        for case in ("S4", "S1")
    ]
    assert capsys.readouterr().out.splitlines() == expected
    assert not (tmp_path / "never").exists()


def test_help_explains_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_psa.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for group in ("what is computed", "your own size", "which code runs", "how it is measured"):
        assert f"\n{group}" in text
    without = {"shape", "model"}  # nothing takes their place
    for action in bench_psa.make_parser()._actions:
        assert action.help and action.option_strings[0] in text
        if action.nargs != 0 and action.dest not in without:
            assert "default: " in action.help, action.dest


def test_every_command_of_the_description_is_accepted(threads, monkeypatch, tmp_path, capsys):
    commands = re.findall(r"^    python benchmarks/bench_psa.py(.*)$", bench_psa.__doc__, re.M)
    assert len(commands) >= 5
    monkeypatch.chdir(tmp_path)
    for command in commands:
        arguments = shlex.split(command, comments=True)
        if "compare" not in arguments and "--model" not in arguments:
            assert bench_psa.main([*arguments, "--list-cases", "--device", "cpu"]) == 0


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], out: Path) -> str:
    """Return the one line on stderr with which the arguments are refused. No folder is made."""
    with pytest.raises(SystemExit) as stopped:
        bench_psa.main([*arguments, "--out", str(out)])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    # Usage, and the progress bar of a network that is fused, are no errors.
    (line,) = [s for s in captured.err.splitlines() if re.search("argument|rror|Traceback", s)]
    assert not captured.out
    assert not out.is_dir()
    return line


NETWORK = "--scope network"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--batch 0", "--batch: must be a whole number of at least 1, got '0'"),
        ("--batch 8 x", "--batch: must be a whole number of at least 1, got 'x'"),
        ("--reps 0", "--reps: must be a whole number of at least 1, got '0'"),
        ("--threads 1.5", "--threads: must be a whole number of at least 1, got '1.5'"),
        ("--seconds -1", "--seconds: must be a positive number, got '-1'"),
        ("--seconds nan", "--seconds: must be a positive number, got 'nan'"),
        ("--stages S5", "--stages: invalid choice: 'S5'"),
        ("--dtype float8", "--dtype: invalid choice: 'float8'"),
        ("--providers magic", "--providers: must be of eager, cleaned, "),
        ("--providers magic", "resnet50:eager, "),
        ("--providers magic", ", got 'magic'"),
        ("--providers apart", "--providers: apart is for --scope norm"),
        (f"{NETWORK} --mode training --providers optimized", "--providers: optimized is for"),
        (f"{NETWORK} --mode backward", "--mode: backward by itself"),
        ("--scope norm --mode inference", "--mode: --scope norm is for training"),
        ("--scope tail --memory-format best", "--memory-format: best is for"),
        (f"{NETWORK} --stages S1", "--stages: can't be combined with --scope network"),
        ("--stages S1 --shape 1 64 9 9", "--stages: can't be combined with --shape"),
        ("--shape 1 64 9", "--shape: expected 4 arguments"),
        ("--shape 1 64 9 0", "--shape: must be a whole number of at least 1, got '0'"),
        ("--shape 1 100 9 9", "--shape, --kernels, --groups: PSAModule: inplans=100"),
        ("--groups 1 4 8 3", "--shape, --kernels, --groups: PSAModule: inplans=64"),
        ("--kernels 2 3 5 7", "--shape, --kernels, --groups: PSAModule: conv_kernels must be odd"),
        (f"{NETWORK} --shape 1 4 64 64", "--shape: C must be 3 for EPSANet-50, got 4"),
        (f"{NETWORK} --groups 1 2 4 8", "--kernels, --groups: are for --scope tail"),
        (f"{NETWORK} --kernels 1 3 5 7", "--kernels, --groups: are for --scope tail"),
        ("--shape 1 64 9 9 --input photos", "--input: photos are for the stages"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path, threads, capsys):
    line = refusal(capsys, ["--device", "cpu", *arguments.split()], tmp_path / "never")
    assert "error: argument --" in line and message in line


MODELS = """
from torch import nn

number = 3

def no_module():
    return 3

def no_psa():
    return nn.Sequential(nn.Conv2d(3, 8, 1))

def broken():
    raise KeyError("on purpose")
"""


@pytest.mark.parametrize(
    "model, message",
    [
        ("wrong_networks", "must be MODULE:FUNCTION"),
        (":small", "ValueError: Empty module name"),
        ("no_such_file:small", "ModuleNotFoundError: No module named 'no_such_file'"),
        ("wrong_networks:small", "AttributeError: module 'wrong_networks' has no attribute"),
        ("wrong_networks:number", "must be MODULE:FUNCTION"),
        ("wrong_networks:no_module", "wrong_networks:no_module, which returns a int"),
        ("wrong_networks:no_psa", "wrong_networks:no_psa: "),
        ("wrong_networks:broken", "KeyError: 'on purpose'"),
    ],
)
def test_bad_models_are_named(model, message, tmp_path, threads, monkeypatch, capsys):
    (tmp_path / "wrong_networks.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ["--device", "cpu", "--model", model]
    line = refusal(capsys, arguments, tmp_path / "never")
    assert "error: argument --model: " in line and message in line


@pytest.mark.parametrize(
    "options, message",
    [
        ("--scope tail", "--model: is for --scope network, got tail"),
        ("--providers resnet50:eager", "--providers: resnet50:eager isn't for --model"),
        ("--input photos", "--input: photos are for the stages"),
    ],
)
def test_what_does_not_fit_an_own_model_is_named(
    options, message, tmp_path, threads, monkeypatch, capsys
):
    (tmp_path / "right_networks.py").write_text(SMALL_NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ["--device", "cpu", "--model", "right_networks:small", *options.split()]
    assert message in refusal(capsys, arguments, tmp_path / "never")


def test_folder_that_cannot_be_written_is_named(tmp_path, threads, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    arguments = ["--device", "cpu", "--input", "randn"]
    for out in (file, file / "below"):
        assert f"argument --out: must be a folder that can be written, got {out}: " in refusal(
            capsys, arguments, out
        )
    assert file.read_text() == "kept"


def test_file_with_other_columns_is_not_appended_to(tmp_path, threads, capsys):
    (tmp_path / "results.csv").write_text("stage,ms\nS1,3\n")
    with pytest.raises(SystemExit) as stopped:
        bench_psa.main(["--device", "cpu", "--input", "randn", "--append", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("argument --out: ") and "other columns" in line
    assert (tmp_path / "results.csv").read_text() == "stage,ms\nS1,3\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a test of machines without a GPU")
def test_missing_gpu_is_named(tmp_path, threads, capsys):
    line = refusal(capsys, ["--device", "cuda"], tmp_path / "never")
    assert "argument --device: cuda was asked for, but PyTorch finds no GPU here" in line


def test_missing_scikit_learn_is_reported_with_the_alternative(monkeypatch, threads, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    with pytest.raises(SystemExit):
        bench_psa.parse(["--input", "photos"])
    assert "--input: photos needs scikit-learn, which isn't installed" in capsys.readouterr().err
    assert bench_psa.parse([]).input == "randn"
    message = capsys.readouterr().err
    assert "scikit-learn" in message and "--input randn" in message
    assert bench_psa.parse(["--input", "randn"]).input == "randn"
    assert not capsys.readouterr().err
