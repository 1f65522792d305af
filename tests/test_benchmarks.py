"""The benchmarks run as users run them, and their numbers are what they say they are."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
PNG = b"\x89PNG\r\n\x1a\n"
SMI_LINE = "NVIDIA H200, 580.65.06, 143771 MiB, [N/A]\n"


@pytest.fixture
def bench(monkeypatch):
    """Imports a benchmark's module as its sibling scripts do: by its folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A real process that finds no GPU, and in which Triton isn't interpreted."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_sound(rows: list[dict[str, str]]) -> None:
    """Every row is timed, and right where there is something to be right about."""
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        if row["provider"] != "copy":
            assert row["ok"] == "True"
            assert float(row["max_error"]) <= float(row["error_bound"])
            assert int(row["peak_extra_bytes"]) > 0


# bench_psa.py


def test_tail_benchmark_writes_table_csv_and_plot(tmp_path, bench):
    done = script(
        "bench_psa.py", "--out", tmp_path, "--input", "randn", "--stages", "S4", "--batch", "2",
        "--mode", "inference", "training", "backward", "--cache", "warm", "cold", "--reps", "5",
        "--providers", "eager", "cleaned", "fused",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert tuple(rows[0]) == bench("report").COLUMNS
    assert len(rows) == 3 * 2 * 4  # modes x caches x (providers and the copy)
    assert_sound(rows)
    assert {row["backend"] for row in rows if row["provider"] == "fused"} == {"reference"}
    assert "plain PyTorch behind the operator" in done.stdout, "says what 'fused' ran as"
    assert done.stdout.count("S4 cache=cold training") == 4
    assert (tmp_path / "bench_psa.png").read_bytes().startswith(PNG)
    assert {file.name for file in tmp_path.iterdir()} == {"bench_psa.csv", "bench_psa.png"}


def test_necessary_bytes_are_those_of_the_traffic(tmp_path, bench, threads):
    arguments = ["--input", "randn", "--stages", "S4", "--batch", "3", "--reps", "1",
                 "--dtype", "bfloat16", "--mode", "inference", "training", "backward",
                 "--providers", "eager", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    main = bench("bench_psa")
    assert main.run(main.parse(arguments)) == 0
    N = 3 * 512 * 7 * 7 * 2
    found = {(row["mode"], row["provider"]): row for row in rows_of(tmp_path / "bench_psa.csv")}
    for mode, times in (("inference", 2), ("training", 5), ("backward", 3)):
        row = found[mode, "eager"]
        assert int(row["necessary_bytes"]) == times * N
        assert float(row["gbps"]) == pytest.approx(times * N / float(row["ms_p50"]) / 1e6)
        assert int(found[mode, "copy"]["necessary_bytes"]) == 2 * N
        assert float(found[mode, "copy"]["percent_of_copy"]) == pytest.approx(100)


def test_photos_are_the_default_input(tmp_path):
    pytest.importorskip("sklearn")
    done = script("bench_psa.py", "--out", tmp_path, "--stages", "S4", "S3", "--batch", "3",
                  "--reps", "5", "--providers", "eager", "fused")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert_sound(rows)
    assert {row["input"] for row in rows} == {"photos"}


def test_activations_from_photos_are_sane_and_depend_on_the_photo(bench):
    pytest.importorskip("sklearn")
    inputs = bench("inputs")
    source = inputs.Source("photos", torch.device("cpu"))
    for stage, (channels, size) in inputs.STAGES.items():
        settings = inputs.Settings("module", "inference", stage, 3, "float32", "channels_last")
        (x,) = source.workload(settings).inputs
        assert x.shape == (3, channels, size, size)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert 0.1 < x.std() < 10
        assert torch.equal(x[0], x[2]), "the two photographs in turn"
        assert not torch.allclose(x[0], x[1])


@pytest.mark.parametrize("scope, stages", [("module", ["S4"]), ("network", ["all"])])
def test_module_and_network_scopes(scope, stages, tmp_path, bench, threads):
    main = bench("bench_psa")
    arguments = ["--scope", scope, "--input", "randn", "--stages", "S4", "--batch", "1",
                 "--reps", "1", "--providers", "eager", "fused", "--device", "cpu",
                 "--out", str(tmp_path)]  # fmt: skip
    assert main.run(main.parse(arguments)) == 0
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert_sound(rows)
    assert [row["stage"] for row in rows] == 2 * stages
    assert not any(row["gbps"] for row in rows), "necessary bytes are known of the tail only"


def test_a_wrong_result_is_never_timed(tmp_path, bench, threads, monkeypatch, capsys):
    main, inputs = bench("bench_psa"), bench("inputs")
    right = inputs.OperatorTail.forward
    monkeypatch.setattr(inputs.OperatorTail, "forward", lambda *args: right(*args) * 1.0001)
    arguments = ["--input", "randn", "--stages", "S4", "--batch", "1", "--reps", "1",
                 "--providers", "eager", "fused", "--device", "cpu", "--out",
                 str(tmp_path)]  # fmt: skip
    assert main.run(main.parse(arguments)) == 1
    eager, fused, _ = rows_of(tmp_path / "bench_psa.csv")
    assert eager["ok"] == "True" and eager["ms_p50"]
    assert fused["ok"] == "False" and not fused["ms_p50"]
    assert "FAILED S4" in capsys.readouterr().out


def test_a_provider_that_raises_costs_only_its_own_row(tmp_path, bench, threads, monkeypatch):
    main, inputs = bench("bench_psa"), bench("inputs")

    def broken(*args):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(inputs.OperatorTail, "forward", broken)
    arguments = ["--input", "randn", "--stages", "S4", "--batch", "1", "--reps", "1",
                 "--providers", "fused", "eager", "--device", "cpu", "--out",
                 str(tmp_path)]  # fmt: skip
    assert main.run(main.parse(arguments)) == 1
    fused, eager, _ = rows_of(tmp_path / "bench_psa.csv")
    assert "broken on purpose" in fused["note"]
    assert eager["ms_p50"]


def test_one_wrong_gradient_among_many_is_seen(bench):
    """With convolutions all gradients are judged as one; the smallest must not drown in it."""
    inputs, checks, providers = bench("inputs"), bench("checks"), bench("providers")
    settings = inputs.Settings("module", "training", "S2", 1, "float32", "nchw")
    workload = inputs.Source("randn", torch.device("cpu")).workload(settings)
    judge = checks.Judge(workload, settings)
    results = providers.make_step(workload.fused, workload.inputs, "training", None)()
    assert judge.judge(results).ok
    fc1_bias = next(i for i, g in enumerate(results) if g.shape == (2,))
    results[fc1_bias] = results[fc1_bias] * 1.01
    assert not judge.judge(results).ok


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
        (["--out", __file__], "--out: must be a folder"),
    ],
)
def test_bad_arguments_are_named(arguments, message, bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench("bench_psa").parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_argument_ends_the_process_with_a_message_and_no_traceback(tmp_path):
    done = script("bench_psa.py", "--device", "cuda", "--out", tmp_path / "never")
    assert done.returncode == 2
    assert "argument --device: cuda was asked for, but PyTorch finds no GPU here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "never").exists()


def test_missing_scikit_learn_is_said_with_the_way_out(bench, monkeypatch, capsys):
    main = bench("bench_psa")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    with pytest.raises(SystemExit):
        main.parse([])
    assert "scikit-learn, which isn't installed" in (message := capsys.readouterr().err)
    assert "--input randn" in message
    assert main.parse(["--input", "randn"]).input == "randn"


def test_compile_without_a_compiler_is_skipped_with_the_reason(bench, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = bench("providers").PROVIDERS["compile"].unavailable(torch.device("cpu"))
    assert reason == "torch.compile needs a C++ compiler, and there is no no-such-compiler"


def test_every_backend_of_the_package_is_a_provider(bench):
    import epsanet_fused as ef

    assert set(ef.backends()) - {"reference"} <= set(bench("providers").PROVIDERS)


# What it is made of


def test_cpu_peak_memory_counts_what_is_held_at_one_time(bench):
    peak = bench("memory").peak_extra_bytes
    a, b = torch.ones(1000, 250), torch.ones(1000, 250)  # 1 MB each
    cpu = torch.device("cpu")

    def cat_and_a_temporary():
        doubled = torch.cat([a, b]) * 2  # the concatenation and the product: 4 MB, of which 2 stay
        return doubled + 1  # and the sum: 4 MB

    # Python's numbers pass through tensors of a few bytes.
    assert peak(cat_and_a_temporary, cpu) == pytest.approx(4e6, abs=100)
    assert peak(lambda: torch.cat([a, b]), cpu) == pytest.approx(2e6, abs=100)
    assert peak(lambda: a.add_(1), cpu) == pytest.approx(0, abs=100)


def test_interleaving_gives_every_variant_the_same_share(bench):
    timing = bench("timing")
    from contextlib import nullcontext

    class Counting:
        name = "counting"

        def __init__(self):
            self.order = []

        def measure(self, call, calls):
            self.order.append(call())
            return 5.0 if call() == "slow" else 3.0

    clock = Counting()
    variants = {name: timing.Variant(lambda name=name: name, nullcontext) for name in
                ("slow", "fast")}  # fmt: skip
    timings = timing.interleave(variants, clock, reps=7, seconds=60)
    assert clock.order[-14:] == ["slow", "fast"] * 7
    assert timings["slow"] == timing.Timing(5.0, 5.0, 5.0, 5.0, 5.0, samples=7)
    assert not timings["slow"].ties(timings["fast"])
    few = timing.interleave(variants, clock, reps=1000, seconds=0)
    assert few["fast"].samples == timing.FEWEST_SAMPLES, "the budget ends it, but not below that"


def test_medians_within_their_uncertainty_tie(bench):
    summarise = bench("timing").summarise
    noisy = [1.0 + i / 100 for i in range(100)]
    assert summarise(noisy).ties(summarise([x + 0.05 for x in noisy]))
    assert not summarise(noisy).ties(summarise([x + 0.5 for x in noisy]))
    assert summarise(noisy).p50 == pytest.approx(1.495)


def test_cold_clock_refills_the_cache_before_every_call(bench):
    timing = bench("timing")
    source, target = torch.ones(4), torch.zeros(4)
    seen = []
    cold = timing.ColdClock(timing.CpuClock(1), source, target)
    cold.measure(lambda: (seen.append(target.sum().item()), target.zero_()), calls=3)
    assert seen == [4, 4, 4]


def test_files_are_whole_or_absent(bench, tmp_path, monkeypatch):
    report = bench("report")
    path = tmp_path / "file"
    report.write_atomically(path, b"before")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report.write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


# conv_cost.py


def test_conv_cost_runs_and_checks_every_merge(tmp_path, bench):
    done = script("conv_cost.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "conv_cost.csv")
    assert tuple(rows[0]) == bench("conv_cost").COLUMNS
    assert {row["pass"] for row in rows} == {"forward", "dgrad", "wgrad"}
    assert {row["merge"] for row in rows} >= {"as_is", "k16", "dense"}
    for row in rows:
        assert row["ok"] == "True"
        assert float(row["exact_error"]) <= 1e-12
        assert float(row["ms_p50"]) > 0
    assert "8 of 8 settings measured" in done.stdout


def test_conv_cost_records_what_it_had_no_time_for(tmp_path, bench, threads):
    conv_cost = bench("conv_cost")
    arguments = ["--quick", "--seconds", "1e-9", "--device", "cpu", "--out", str(tmp_path)]
    assert conv_cost.run(conv_cost.parse(arguments)) == 0
    rows = rows_of(tmp_path / "conv_cost.csv")
    assert {row["note"] for row in rows} == {"skipped: out of time"}
    assert len(rows) == 8


@pytest.mark.parametrize("groups, merged", [(8, 4), (8, 2), (8, 1), (4, 4), (6, 2)])
def test_merging_groups_changes_no_number(groups, merged, bench):
    conv_cost = bench("conv_cost")
    weight = torch.randn(2 * groups, 3, 5, 5, dtype=torch.float64)
    x = torch.randn(2, 3 * groups, 6, 7, dtype=torch.float64)
    wide = conv_cost.merge_weight(weight, groups, merged)
    assert wide.shape == (2 * groups, 3 * groups // merged, 5, 5)
    expected = torch.nn.functional.conv2d(x, weight, groups=groups)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, wide, groups=merged), expected)
    assert torch.equal(conv_cost.unmerge_weight(wide, groups, merged), weight)


def test_merges_leave_the_asked_outputs_per_group_and_are_named_once(bench):
    merges = bench("conv_cost").merges
    assert merges(16, 16) == {"as_is": 16, "k8": 2, "k16": 1}  # S1's k9
    assert merges(32, 8) == {"as_is": 8, "k8": 4, "k16": 2, "dense": 1}
    assert merges(128, 4) == {"as_is": 4, "dense": 1}
    assert merges(16, 1) == {"as_is": 1}


def test_conv_plan_measures_autotuned_16_bit_first(bench):
    plan = bench("conv_cost").plan(("S1", "S2"), ("float16", "tf32"), cuda=True)
    assert len(plan) == len(set(plan)) == 2 * 2 * 2 * 2 * 4
    assert [conv.benchmark for conv in plan] == [True] * 32 + [False] * 32
    assert {conv.dtype for conv in plan[:16]} == {"float16"}


# gpu_check.py: without a card, what can be checked without one


def test_gpu_check_without_a_gpu_says_so_before_doing_anything(tmp_path):
    done = script("gpu_check.py", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_check_dry_run_prints_the_plan(tmp_path):
    done = script("gpu_check.py", "--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for step in ("environment", "tests", "tail-forward", "tail-backward", "conv-cost", "module",
                 "network-training"):  # fmt: skip
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
            if (path := str(FOLDER / f"{name}.py")) in step.command:
                command = gpu_plan.with_deadline(step, 60)
                args = bench(name).parse(command[command.index(path) + 1 :])
                assert args.device.type == "cuda" and args.seconds == 50
                parsed += 1
    assert parsed == (9 if sanitizer is None else 11)
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
    gpu_check.plots(rows, out)
    assert {file.name for file in out.iterdir()} == {"results.csv", "env.json", "tail.png"}
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
