"""Test conv_cost.py, and that merging groups changes no number."""

from __future__ import annotations

import conv_cost
import pytest
import torch
from helpers.processes import rows_of, script

from epsanet_fused.nn.grouped_conv import merge_weight


def test_conv_cost_runs_and_checks_every_merge(tmp_path):
    done = script("conv_cost.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "conv_cost.csv")
    assert tuple(rows[0]) == conv_cost.COLUMNS
    assert {row["pass"] for row in rows} == {"forward", "dgrad", "wgrad"}
    assert {row["merge"] for row in rows} >= {"as_is", "k16", "dense"}
    for row in rows:
        assert row["ok"] == "True"
        assert float(row["exact_error"]) <= 1e-12
        assert float(row["ms_p50"]) > 0
    assert "8 of 8 settings measured" in done.stdout


def test_cases_without_time_are_recorded_as_skipped(tmp_path, threads):
    arguments = ["--quick", "--seconds", "1e-9", "--device", "cpu", "--out", str(tmp_path)]
    assert conv_cost.run(conv_cost.parse(arguments)) == 0
    rows = rows_of(tmp_path / "conv_cost.csv")
    assert {row["note"] for row in rows} == {"skipped: out of time"}
    assert len(rows) == 8


@pytest.mark.parametrize("groups, merged", [(8, 4), (8, 2), (8, 1), (4, 4), (6, 2)])
def test_merging_groups_changes_no_number(groups, merged):
    weight = torch.randn(2 * groups, 3, 5, 5, dtype=torch.float64)
    x = torch.randn(2, 3 * groups, 6, 7, dtype=torch.float64)
    merged_weight = merge_weight(weight, groups, merged)
    assert merged_weight.shape == (2 * groups, 3 * groups // merged, 5, 5)
    expected = torch.nn.functional.conv2d(x, weight, groups=groups)
    found = torch.nn.functional.conv2d(x, merged_weight, groups=merged)
    torch.testing.assert_close(found, expected)
    assert torch.equal(conv_cost.unmerge_weight(merged_weight, groups, merged), weight)


def test_merges_have_the_minimum_of_outputs_per_group_and_are_distinct():
    merges = conv_cost.merges
    assert merges(16, 16) == {"as_is": 16, "k8": 2, "k16": 1}  # S1's k9
    assert merges(32, 8) == {"as_is": 8, "k8": 4, "k16": 2, "dense": 1}
    assert merges(128, 4) == {"as_is": 4, "dense": 1}
    assert merges(16, 1) == {"as_is": 1}


def test_conv_plan_measures_autotuned_16_bit_first():
    plan = conv_cost.plan(("S1", "S2"), ("float16", "tf32"), cuda=True)
    assert len(plan) == len(set(plan)) == 2 * 2 * 2 * 2 * 4
    assert [conv.benchmark for conv in plan] == [True] * 32 + [False] * 32
    assert {conv.dtype for conv in plan[:16]} == {"float16"}
