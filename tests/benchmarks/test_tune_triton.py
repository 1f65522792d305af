"""Test tune_triton.py with interpreted kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from harness.cases import MEMORY_FORMATS, STAGES, Case
from harness.results import COLUMNS, OUT_OF_TIME, WRONG
from helpers.processes import BENCHMARKS, rows_of

pytest.importorskip("triton")

import tune_triton

from epsanet_fused.backends.triton import common, config, launch

SMALL = Case("tail", "inference", "64x3x3", 1, "float32", "channels_last")


@pytest.mark.slow
def test_every_entry_is_timed_beside_the_present_table(tmp_path):
    options = "--quick --device cpu --batch 1 --memory-format channels_last --dtype float32 --out"
    command = [sys.executable, str(BENCHMARKS / "tune_triton.py"), *options.split(), str(tmp_path)]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["provider"], float(rows[0]["speedup"])) == ("triton", 1)
    names = {row["provider"].partition(":")[0] for row in rows[1:]}
    tables = ("SUM interpreted", "RECALIBRATE interpreted", "FUSED_GATE_BYTES")
    assert names == {f"triton {table}" for table in tables}
    for row in rows:
        assert (row["scope"], row["case"], row["ok"], row["cache"]) == (
            *("tune tail", "64x3x3", "True"), "warm",
        )  # fmt: skip
        assert float(row["max_error"]) <= float(row["error_bound"]) == 1e-4
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])


@pytest.fixture
def run_tune(monkeypatch, tmp_path, threads):
    """Run tune_triton.py with one entry beside the present one: return the status and the rows."""
    other = ("RECALIBRATE", {"interpreted": config.RecalibrateTile(1024, 512, 2)})
    tried = {"triton": ("SUM", config.SUM), "triton other": other}
    monkeypatch.setattr(tune_triton, "entries", lambda case: tried)
    monkeypatch.setattr(tune_triton, "plan", lambda args: [SMALL])

    def run(*options: str) -> tuple[int, list[dict[str, str]]]:
        fixed = ("--quick", "--device", "cpu", "--out", str(tmp_path))
        status = tune_triton.run(tune_triton.parse([*fixed, *options]))
        return status, rows_of(tmp_path / "results.csv")

    return run


@pytest.fixture
def after_recalibrate(monkeypatch):
    """Return a function that sets what happens after the kernel under the other entry only."""

    def patch(happens: object) -> None:
        def recalibrate(args: launch.TailArgs, *rest: object) -> None:
            original(args, *rest)
            if config.RECALIBRATE is not present:
                happens(args)

        original, present = launch.recalibrate, config.RECALIBRATE
        monkeypatch.setattr(launch, "recalibrate", recalibrate)

    return patch


def test_wrong_result_is_reported_and_not_timed(run_tune, after_recalibrate):
    after_recalibrate(lambda args: args.concat[0, 0].fill_(7))
    status, (present, wrong) = run_tune()
    assert status == 1
    assert present["ok"] == "True" and present["ms_p50"]
    assert (wrong["ok"], wrong["ms_p50"], wrong["note"]) == ("False", "", WRONG)


def test_error_of_one_entry_is_a_note_and_the_table_is_restored(run_tune, after_recalibrate):
    def fail(args: object) -> None:
        raise RuntimeError("too many registers")

    before = (config.SUM, config.RECALIBRATE)
    after_recalibrate(fail)
    status, (present, failed) = run_tune()
    assert status == 0
    assert present["ok"] == "True" and present["ms_p50"]
    assert (failed["ok"], failed["note"]) == ("", "RuntimeError: too many registers")
    assert config.SUM is before[0] and config.RECALIBRATE is before[1]


def test_cases_without_time_are_recorded_as_skipped(run_tune):
    status, (row,) = run_tune("--seconds", "1e-9")
    assert (status, row["provider"], row["note"]) == (0, "triton", OUT_OF_TIME)


def test_interpreted_kernels_are_not_timed_by_mistake(capsys):
    with pytest.raises(SystemExit):
        tune_triton.parse(["--device", "cpu"])
    assert "argument --device: the time of interpreted kernels" in capsys.readouterr().err


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize(
    "stage, batch, row", [("S1", 128, "large"), ("S1", 32, "small"), ("S4", 128, "fused_gate")]
)
def test_only_entries_that_change_a_kernel_are_tried(stage, batch, row, memory_format, monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    attributes = ("SUM", "RECALIBRATE", "NORMALIZE", "SPLIT_PROGRAMS", "FUSED_GATE_BYTES")
    before = [getattr(config, name) for name in attributes]
    case = Case("tail", "inference", stage, batch, "float16", memory_format)
    tried = tune_triton.entries(case)
    assert next(iter(tried)) == "triton"
    tables = {name.partition(":")[0] for name in tried}
    assert {f"triton SUM {row}", "triton RECALIBRATE compiled"} <= tables
    assert not any("NORMALIZE" in name or "interpreted" in name for name in tried)
    assert not {f"triton SUM {r}" for r in config.SUM if r != row} & tables
    assert [getattr(config, name) for name in attributes] == before
    norm = tune_triton.entries(case._replace(scope="norm", mode="training"))
    assert any("NORMALIZE" in name for name in norm)
    assert not any("RECALIBRATE" in name for name in norm)


def test_cases_are_in_the_order_of_dtype_batch_and_stage(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cases = tune_triton.plan(tune_triton.parse(["--device", "cuda"]))
    order = [(batch, stage) for batch in (128, 1, 32) for stage in STAGES]
    assert list(dict.fromkeys((case.batch, case.case) for case in cases)) == order
    assert {case.mode for case in cases if case.batch == 1} == {"inference"}
