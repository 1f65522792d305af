"""The benchmarks run as users run them, and their numbers are what they say they are."""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch
from helpers.processes import PNG, rows_of, script

from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.utils import timing
from epsanet_fused.utils.atomic_write import write_atomically


def assert_sound(rows: list[dict[str, str]]) -> None:
    """Every row is timed, and right where there is something to be right about."""
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        if row["provider"] != "copy":
            assert row["ok"] == "True"
            assert float(row["max_error"]) <= float(row["error_bound"])
            assert int(row["peak_extra_bytes"]) > 0


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
    assert {row["backend"] for row in rows if row["provider"] == "fused"} == {"cpu"}
    assert "plain PyTorch behind the operator" not in done.stdout
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


@pytest.mark.parametrize(
    "scope, stages", [("module", ["S4"]), ("block", ["S4"]), ("network", ["all"])]
)
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_block_is_timed_with_all_that_runs_it(mode, tmp_path, bench, threads, monkeypatch):
    """Ours as it is, optimized and with merged groups, each in its better layout."""
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)
    main = bench("bench_psa")
    ours = {"inference": ["optimized"], "training": ["planned"]}[mode]
    arguments = ["--scope", "block", "--mode", mode, "--input", "randn", "--stages", "S4",
                 "--batch", "1", "--layout", "best", "--device", "cpu", "--out", str(tmp_path),
                 "--reps", "1", "--providers", "eager", "fused", *ours]  # fmt: skip
    assert main.run(main.parse(arguments)) == 0
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert [row["provider"] for row in rows] == ["eager", "fused", *ours]
    assert_sound(rows)


def test_of_two_layouts_a_wrong_one_is_told(tmp_path, bench, threads, monkeypatch):
    main, inputs = bench("bench_psa"), bench("inputs")
    convolve = inputs.ef.FusedPSAModule.convolve

    def wrong(module, x):
        last = x.is_contiguous(memory_format=torch.channels_last)
        return [y * (1.5 if last else 1) for y in convolve(module, x)]

    monkeypatch.setattr(inputs.ef.FusedPSAModule, "convolve", wrong)
    arguments = ["--scope", "module", "--input", "randn", "--stages", "S4", "--batch", "1",
                 "--reps", "1", "--layout", "best", "--providers", "eager", "fused", "--device",
                 "cpu", "--no-plot", "--out", str(tmp_path)]  # fmt: skip
    assert main.run(main.parse(arguments)) == 1
    found = {(r["provider"], r["layout"]): r["ok"] for r in rows_of(tmp_path / "bench_psa.csv")}
    assert found["fused", "channels_last"] == "False"
    assert found["fused", "nchw"] == "True"


def test_what_there_was_no_time_for_is_told(tmp_path, bench, threads):
    main = bench("bench_psa")
    arguments = ["--input", "randn", "--stages", "S4", "S3", "--batch", "1", "--reps", "1",
                 "--seconds", "0.0001", "--providers", "eager", "fused", "--device", "cpu",
                 "--no-plot", "--out", str(tmp_path)]  # fmt: skip
    assert main.run(main.parse(arguments)) == 0
    rows = rows_of(tmp_path / "bench_psa.csv")
    late = [(r["stage"], r["provider"]) for r in rows if r["note"] == "skipped: out of time"]
    assert late == [("S4", "fused"), ("S3", "all")]
    assert [r["provider"] for r in rows if r["ms_p50"]] == ["eager", "copy"]


@pytest.mark.parametrize("rival, parameters", [("resnet50", 25557032), ("seresnet50", 28088024)])
def test_rivals_are_the_published_networks(rival, parameters, bench):
    network = bench("rivals").RIVALS[rival]()
    assert sum(p.numel() for p in network.parameters()) == parameters


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

    assert set(ef.list_backends()) - {"reference"} <= set(bench("providers").PROVIDERS)


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


def test_interleaving_gives_every_variant_the_same_share():
    class Counting:
        name = "counting"
        single = False

        def __init__(self):
            self.order = []

        def measure(self, call, calls):
            self.order.append(call())
            return 5.0 if call() == "slow" else 3.0

    clock = Counting()
    variants = {name: timing.Variant(lambda name=name: name) for name in ("slow", "fast")}
    timings = timing.interleave(variants, clock, reps=7, seconds=60)
    turns = [tuple(clock.order[-14:][i : i + 2]) for i in range(0, 14, 2)]
    assert set(turns) == {("slow", "fast"), ("fast", "slow")}, "each in every turn, in any order"
    assert timings["slow"] == timing.Timing(5.0, 5.0, 5.0, 5.0, 5.0, samples=7)
    assert not timings["slow"].ties(timings["fast"])
    few = timing.interleave(variants, clock, reps=1000, seconds=0)
    assert few["fast"].samples == timing.FEWEST_SAMPLES, "the budget ends it, but not below that"


def test_medians_within_their_uncertainty_tie():
    summarise = timing.summarise
    noisy = [1.0 + i / 100 for i in range(100)]
    assert summarise(noisy).ties(summarise([x + 0.05 for x in noisy]))
    assert not summarise(noisy).ties(summarise([x + 0.5 for x in noisy]))
    assert summarise(noisy).p50 == pytest.approx(1.495)


def test_cold_clock_refills_the_cache_before_every_call(bench):
    source, target = torch.ones(4), torch.zeros(4)
    seen = []
    cold = bench("cold").ColdClock(timing.CpuClock(1), source, target)
    cold.measure(lambda: (seen.append(target.sum().item()), target.zero_()), calls=3)
    assert seen == [4, 4, 4]


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


def test_norm_scope_times_the_operator_against_its_parts(tmp_path, bench, threads):
    bench_psa = bench("bench_psa")
    names = ["eager", "apart", "fused"]
    assert set(names) <= set(bench("providers").defaults(torch.device("cpu"), "norm"))
    arguments = ["--scope", "norm", "--mode", "training", "--stages", "S4", "--batch", "2",
                 "--reps", "5", "--device", "cpu", "--out", str(tmp_path), "--input", "randn",
                 "--providers", *names]  # fmt: skip
    with torch.enable_grad():
        assert bench_psa.run(bench_psa.parse(arguments)) == 0
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert_sound(rows)
    peak = {row["provider"]: int(row["peak_extra_bytes"]) for row in rows}
    assert peak["fused"] < peak["apart"] / 2
    with pytest.raises(SystemExit):
        bench_psa.parse(["--scope", "norm", "--mode", "inference"])


@pytest.mark.slow
def test_network_scope_takes_everyones_best_layout(tmp_path, bench, threads, monkeypatch):
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST_SAMPLES", 1)
    monkeypatch.setattr(bench("inputs"), "IMAGE_SIZE", 64)
    bench_psa = bench("bench_psa")
    providers = ["eager", "optimized", "resnet50:eager", "resnet50:optimized", "seresnet50:eager"]
    arguments = ["--scope", "network", "--batch", "1", "--layout", "best", "--reps", "1",
                 "--input", "randn", "--device", "cpu", "--out", str(tmp_path),
                 "--providers", *providers]  # fmt: skip
    assert bench_psa.run(bench_psa.parse(arguments)) == 0
    rows = rows_of(tmp_path / "bench_psa.csv")
    assert [row["provider"] for row in rows] == providers
    assert {row["layout"] for row in rows} <= {"nchw", "channels_last"}
    assert_sound(rows)
    with pytest.raises(SystemExit):
        bench_psa.parse(["--scope", "tail", "--layout", "best"])
