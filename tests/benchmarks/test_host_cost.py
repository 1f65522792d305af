"""Test host_cost.py as users run it."""

from __future__ import annotations

from helpers.processes import rows_of, script


def test_it_times_a_call_and_both_modules(tmp_path):
    done = script("host_cost.py", "--out", tmp_path, "--seconds", "0.01", "--batch", "1")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "host_cost.csv")
    assert [row["variant"] for row in rows] == ["FusedPSAModule"] + 4 * ["official", "own SEs"]
    assert all(float(row["ms_p50"]) > 0 for row in rows)
