"""Test tune_triton.py with interpreted kernels."""

from __future__ import annotations

import itertools

import inputs
import pytest
import torch
from helpers.processes import rows_of

pytest.importorskip("triton")

import tune_cases
import tune_triton

from epsanet_fused.backends.triton import config


@pytest.fixture
def run_tune(monkeypatch, tmp_path, threads):
    """Run tune_triton.py on a small stage: return the exit status and the rows."""
    monkeypatch.setitem(inputs.STAGES, "S4", (16, 3))

    def run(*arguments: str) -> tuple[int, list[dict[str, str]]]:
        torch.set_num_threads(1)
        arguments = ("--quick", "--device", "cpu", "--stages", "S4", *arguments)
        status = tune_triton.run(tune_triton.parse([*arguments, "--out", str(tmp_path)]))
        return status, rows_of(tmp_path / "tune_triton.csv")

    return run


def test_every_launch_is_timed_beside_the_present_table(run_tune, capsys):
    before = (dict(config.SUM), dict(config.RECALIBRATE), dict(config.NORMALIZE))
    kinds = ("sum", "recalibrate")
    status, rows = run_tune("--batch", "2", "--memory-format", "channels_last", "--kinds", *kinds)
    assert status == 0
    assert tuple(rows[0]) == tune_triton.COLUMNS
    assert {row["kind"] for row in rows} == set(kinds)
    for row in rows:
        assert row["ok"] == "True"
        assert float(row["difference"]) <= 2e-3
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert row["setting"] != "present" or float(row["ratio"]) == 1
    settings = {"present", "SUM fused_gate", "FUSED_GATE_BYTES", "RECALIBRATE compiled"}
    assert {row["setting"].split(":")[0] for row in rows} == settings
    assert before == (config.SUM, config.RECALIBRATE, config.NORMALIZE)
    printed = capsys.readouterr().out
    assert "2 of 2 cases measured" in printed
    assert "say nothing about a GPU" in printed


def test_wrong_result_is_reported_and_not_timed(run_tune, monkeypatch):
    def wrong_unless_present(t):
        tune_cases.launch.recalibrate(t.args, t.se.attention)
        if config.RECALIBRATE["interpreted"] != before:
            t.concat[0, 0, 0, 0] = 7
        return (t.concat,)

    before = config.RECALIBRATE["interpreted"]
    monkeypatch.setitem(tune_cases.KINDS, "recalibrate", wrong_unless_present)
    status, rows = run_tune("--batch", "1", "--memory-format", "nchw", "--kinds", "recalibrate")
    assert status == 1
    present, *others = rows
    assert present["ok"] == "True" and present["ms_p50"]
    for row in others:
        assert (row["ok"], row["ms_p50"], row["ratio"]) == ("False", "", "")
        assert row["note"].startswith("WRONG")


def test_cases_without_time_are_recorded_as_skipped(run_tune):
    status, rows = run_tune("--batch", "2", "--seconds", "1e-9")
    assert status == 0
    assert len(rows) == 8 * 2
    assert {row["note"] for row in rows} == {"skipped: out of time"}


def test_interpreted_kernels_are_not_timed_by_mistake(capsys):
    with pytest.raises(SystemExit):
        tune_triton.parse(["--device", "cpu"])
    assert "argument --device: the time of interpreted kernels" in capsys.readouterr().err


def test_every_launch_writes_all_tensors_that_it_returns(monkeypatch):
    monkeypatch.setitem(inputs.STAGES, "S4", (16, 3))
    for kind in tune_cases.KINDS:
        case = tune_cases.Case(kind, "S4", 2, "float32", "channels_last")
        launch = tune_cases.prepare(case, torch.device("cpu"))
        for result in launch():
            result.fill_(torch.nan)
        for result in launch():
            assert result.isfinite().all() and result.any(), kind


def test_overrides_change_the_entry_that_the_case_uses(monkeypatch):
    monkeypatch.setattr(tune_cases.common, "INTERPRETED", False)
    rows = {("S1", 128): "large", ("S1", 32): "small", ("S4", 128): "fused_gate"}
    points = itertools.product(tune_cases.KINDS, rows.items(), inputs.MEMORY_FORMATS)
    for kind, ((stage, batch), row), memory_format in points:
        case = tune_cases.Case(kind, stage, batch, "float16", memory_format)
        tried = tune_cases.trials(case, 99)
        assert len(tune_cases.distinct(tried)) > 3
        if kind == "sum":
            assert {o.row for o, _ in tried if o.table == "SUM"} == {row}
        for override, _ in tried[1:]:
            assert override.present != override.name


def test_fused_gate_bytes_moves_the_sums_from_one_launch_to_two(monkeypatch):
    monkeypatch.setattr(tune_cases.common, "INTERPRETED", False)
    tried = tune_cases.trials(tune_cases.Case("sum", "S4", 1, "float16", "nchw"), 99)
    fused = {o.name: cfg.fused_gate for o, cfg in tried if o.table in ("", "FUSED_GATE_BYTES")}
    assert fused == {"": True, "0": False, "65536": True, "262144": True, "524288": True}


def test_summary_names_the_best_mean_and_its_worst_case():
    def row(candidate: str, stage: str, ratio: float | str, tie: bool = False):
        case = {"kind": "sum", "stage": stage, "batch": 1, "layout": "nchw"}
        entry = {"setting": "SPLIT_PROGRAMS", "present": "512", "candidate": candidate}
        return case | entry | {"ratio": ratio, "tie": tie}

    rows = [row("1024", "S1", 0.5), row("1024", "S2", 1.25), row("1024", "S3", 0.99, tie=True)]
    rows += [row("2048", stage, 0.9) for stage in ("S1", "S2", "S3")]
    rows += [row("256", "S1", 0.1), row("256", "S2", ""), row("256", "S3", 0.1)]
    lines = tune_triton.summary(rows).splitlines()
    assert " ".join(lines[2].split()) == "SPLIT_PROGRAMS 512 1024 3 0.852 1.250 sum S2 1 nchw 1 1"
    for slower_or_tied in (row("1024", "S1", 1.5), row("1024", "S1", 0.99, tie=True)):
        (line,) = tune_triton.summary([slower_or_tied]).splitlines()[2:]
        assert line.split() == ["SPLIT_PROGRAMS", "512", "the", "present"]
