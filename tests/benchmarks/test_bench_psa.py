"""Test bench_psa.py as users run it, and the numbers that it writes."""

from __future__ import annotations

import importlib.util

import bench_psa
import inputs
import providers
import pytest
import report
import torch
from helpers.processes import PNG, rows_of, script

from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.utils import timing


@pytest.fixture
def run_bench(tmp_path, threads):
    """Run bench_psa.py on noise on the CPU: return the exit status and the rows."""

    def run(options: str) -> tuple[int, list[dict[str, str]]]:
        fixed = ["--input", "randn", "--device", "cpu", "--out", str(tmp_path)]
        status = bench_psa.run(bench_psa.parse([*options.split(), *fixed]))
        return status, rows_of(tmp_path / "bench_psa.csv")

    return run


@pytest.fixture
def quick_search(monkeypatch):
    """End the searches of optimize_for_inference and plan_convs at once."""
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)


def assert_valid(rows: list[dict[str, str]]) -> None:
    """Check that every row is timed and, but for the copy, right."""
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        if row["provider"] != "copy":
            assert row["ok"] == "True"
            assert float(row["max_error"]) <= float(row["error_bound"])
            assert int(row["peak_extra_bytes"]) > 0


def test_tail_benchmark_writes_table_csv_and_plot(tmp_path):
    options = "--input randn --stages S4 --batch 2 --mode inference training backward --reps 5"
    options += " --cache warm cold --providers eager cleaned fused"
    done = script("bench_psa.py", "--out", tmp_path, *options.split())
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert tuple(rows[0]) == report.COLUMNS
    assert len(rows) == 3 * 2 * 4  # modes x caches x (providers and the copy)
    assert_valid(rows)
    assert {row["backend"] for row in rows if row["provider"] == "fused"} == {"cpu"}
    assert "plain PyTorch behind the operator" not in done.stdout
    assert done.stdout.count("S4 cache=cold training") == 4
    assert (tmp_path / "bench_psa.png").read_bytes().startswith(PNG)
    assert {file.name for file in tmp_path.iterdir()} == {"bench_psa.csv", "bench_psa.png"}


def test_necessary_bytes_are_multiples_of_the_output(run_bench):
    status, rows = run_bench(
        "--stages S4 --batch 3 --reps 1 --dtype bfloat16 --mode inference training backward"
        " --providers eager"
    )
    assert status == 0
    N = 3 * 512 * 7 * 7 * 2
    found = {(row["mode"], row["provider"]): row for row in rows}
    for mode, times in (("inference", 2), ("training", 5), ("backward", 3)):
        row = found[mode, "eager"]
        assert int(row["necessary_bytes"]) == times * N
        assert float(row["gbps"]) == pytest.approx(times * N / float(row["ms_p50"]) / 1e6)
        assert int(found[mode, "copy"]["necessary_bytes"]) == 2 * N
        assert float(found[mode, "copy"]["percent_of_copy"]) == pytest.approx(100)


def test_photos_are_the_default_input(tmp_path):
    pytest.importorskip("sklearn")
    options = "--stages S4 S3 --batch 3 --reps 5 --providers eager fused"
    done = script("bench_psa.py", "--out", tmp_path, *options.split())
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert_valid(rows)
    assert {row["input"] for row in rows} == {"photos"}


@pytest.mark.parametrize(
    "scope, stages",
    [
        ("module", ["S4"]),
        ("block", ["S4"]),
        pytest.param("network", ["all"], marks=pytest.mark.slow),
    ],
)
def test_module_block_and_network_scopes(scope, stages, run_bench):
    status, rows = run_bench(
        f"--scope {scope} --stages S4 --batch 1 --reps 1 --providers eager fused"
    )
    assert status == 0
    assert_valid(rows)
    assert [row["stage"] for row in rows] == 2 * stages
    assert not any(row["gbps"] for row in rows), "necessary bytes are defined for the tail only"


@pytest.mark.slow
@pytest.mark.parametrize("mode, ours", [("inference", "optimized"), ("training", "planned")])
def test_block_is_timed_by_eager_fused_and_our_fastest(mode, ours, run_bench, quick_search):
    status, rows = run_bench(
        f"--scope block --mode {mode} --stages S4 --batch 1 --memory-format best --reps 1"
        f" --providers eager fused {ours}"
    )
    assert status == 0
    assert [row["provider"] for row in rows] == ["eager", "fused", ours]
    assert_valid(rows)


def test_wrong_result_in_one_of_two_memory_formats_fails(run_bench, monkeypatch):
    convolve = inputs.ef.FusedPSAModule.convolve

    def wrong(module, x):
        last = x.is_contiguous(memory_format=torch.channels_last)
        return [y * (1.5 if last else 1) for y in convolve(module, x)]

    monkeypatch.setattr(inputs.ef.FusedPSAModule, "convolve", wrong)
    status, rows = run_bench(
        "--scope module --stages S4 --batch 1 --reps 1 --memory-format best --no-plot"
        " --providers eager fused"
    )
    assert status == 1
    found = {(row["provider"], row["layout"]): row["ok"] for row in rows}
    assert found["fused", "channels_last"] == "False"
    assert found["fused", "nchw"] == "True"


def test_cases_without_time_are_recorded_as_skipped(run_bench):
    status, rows = run_bench(
        "--stages S4 S3 --batch 1 --reps 1 --seconds 0.0001 --no-plot --providers eager fused"
    )
    assert status == 0
    late = [(r["stage"], r["provider"]) for r in rows if r["note"] == "skipped: out of time"]
    assert late == [("S4", "fused"), ("S3", "all")]
    assert [r["provider"] for r in rows if r["ms_p50"]] == ["eager", "copy"]


def test_wrong_result_is_never_timed(run_bench, monkeypatch, capsys):
    right = inputs.OperatorTail.forward
    monkeypatch.setattr(inputs.OperatorTail, "forward", lambda *args: right(*args) * 1.0001)
    status, rows = run_bench("--stages S4 --batch 1 --reps 1 --providers eager fused")
    assert status == 1
    eager, fused, _ = rows
    assert eager["ok"] == "True" and eager["ms_p50"]
    assert fused["ok"] == "False" and not fused["ms_p50"]
    assert "FAILED S4" in capsys.readouterr().out


def test_provider_that_raises_does_not_end_the_others(run_bench, monkeypatch):
    def broken(*args):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(inputs.OperatorTail, "forward", broken)
    status, rows = run_bench("--stages S4 --batch 1 --reps 1 --providers fused eager")
    assert status == 1
    fused, eager, _ = rows
    assert "broken on purpose" in fused["note"]
    assert eager["ms_p50"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch: must be a whole number of at least 1, got '0'"),
        (["--batch", "8", "x"], "--batch: must be a whole number of at least 1, got 'x'"),
        (["--seconds", "-1"], "--seconds: must be a positive number, got '-1'"),
        (["--seconds", "nan"], "--seconds: must be a positive number, got 'nan'"),
        (["--stages", "S5"], "--stages: invalid choice: 'S5'"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--providers", "magic"], "--providers: invalid choice: 'magic'"),
        (["--scope", "network", "--mode", "backward"], "--mode: backward by itself"),
        (["--scope", "norm", "--mode", "inference"], "--mode: --scope norm is for training"),
        (["--scope", "tail", "--memory-format", "best"], "--memory-format: best is for"),
        (["--out", __file__], "--out: must be a folder"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_psa.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_argument_ends_the_process_with_a_message_and_no_traceback(tmp_path):
    done = script("bench_psa.py", "--device", "cuda", "--out", tmp_path / "never")
    assert done.returncode == 2
    assert "argument --device: cuda was asked for, but PyTorch finds no GPU here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "never").exists()


def test_missing_scikit_learn_is_reported_with_the_alternative(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    with pytest.raises(SystemExit):
        bench_psa.parse([])
    assert "scikit-learn, which isn't installed" in (message := capsys.readouterr().err)
    assert "--input randn" in message
    assert bench_psa.parse(["--input", "randn"]).input == "randn"


def test_norm_scope_times_the_operator_beside_its_parts(run_bench):
    names = ["eager", "apart", "fused"]
    assert set(names) <= set(providers.defaults(torch.device("cpu"), "norm"))
    with torch.enable_grad():
        status, rows = run_bench(
            "--scope norm --mode training --stages S4 --batch 2 --reps 5"
            " --providers eager apart fused"
        )
    assert status == 0
    assert_valid(rows)
    peak = {row["provider"]: int(row["peak_extra_bytes"]) for row in rows}
    assert peak["fused"] < peak["apart"] / 2


@pytest.mark.slow
def test_network_scope_times_each_provider_in_its_faster_memory_format(
    run_bench, quick_search, monkeypatch
):
    monkeypatch.setattr(timing, "MIN_SAMPLES", 1)
    monkeypatch.setattr(inputs, "IMAGE_SIZE", 64)
    names = "eager optimized resnet50:eager resnet50:optimized seresnet50:eager"
    status, rows = run_bench(
        f"--scope network --batch 1 --memory-format best --reps 1 --seconds 1000"
        f" --providers {names}"
    )
    assert status == 0
    assert [row["provider"] for row in rows] == names.split()
    assert {row["layout"] for row in rows} <= {"nchw", "channels_last"}
    assert_valid(rows)
