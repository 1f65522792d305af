"""Test the CSV file that the benchmarks write row by row, and the tables."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from harness import results
from harness.results import COLUMNS, Results, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from epsanet_fused.utils.timing import Timing


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results.csv"


def test_every_row_is_in_the_file_as_soon_as_it_is_added(path):
    file = Results(path)
    assert read_rows(path) == []
    for i in range(3):
        file.add({"provider": f"p{i}", "ms_p50": 0.5, "ok": True})
        rows = read_rows(path)
        assert [row["provider"] for row in rows] == [f"p{k}" for k in range(i + 1)]
        assert tuple(rows[i]) == COLUMNS
        assert rows[i]["ms_p50"] == "0.5" and rows[i]["ok"] == "True" and rows[i]["note"] == ""


def test_append_keeps_the_rows_and_drops_an_unfinished_last_line(path):
    Results(path).add({"provider": "first"})
    with path.open("a") as file:
        file.write("tail,inference,S")
    appended = Results(path, append=True)
    appended.add({"provider": "second"})
    assert [row["provider"] for row in read_rows(path)] == ["first", "second"]
    assert [row["provider"] for row in appended.rows] == ["second"], "of this process"


def test_append_begins_a_file_that_does_not_exist(path):
    Results(path, append=True).add({"provider": "first"})
    assert [row["provider"] for row in read_rows(path)] == ["first"]


def test_file_is_begun_anew_without_append(path):
    Results(path).add({"provider": "old"})
    Results(path).add({"provider": "new"})
    assert [row["provider"] for row in read_rows(path)] == ["new"]


def test_file_with_other_columns_is_not_appended_to(path):
    path.write_text("stage,ms\nS1,3\n")
    with pytest.raises(ValueError, match="has other columns"):
        Results(path, append=True)
    assert path.read_text() == "stage,ms\nS1,3\n"


def test_unknown_column_is_refused_and_nothing_written(path):
    file = Results(path)
    with pytest.raises(ValueError, match=r"\['gbps'\]"):
        file.add({"provider": "eager", "gbps": 3})
    assert read_rows(path) == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_note_with_newlines_stays_one_line(path, end):
    file = Results(path)
    file.add(results.failure(RuntimeError(f'one{end}two, "three"')))
    file.add({"provider": "next"})
    assert len(path.read_bytes().splitlines()) == 3
    failed, after = read_rows(path)
    assert failed["note"].split() == ["RuntimeError:", "one", "two,", '"three"']
    assert failed["ok"] == "False"
    assert after["provider"] == "next"


NOTES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(deadline=None, max_examples=20)
@given(notes=st.lists(NOTES, max_size=3))
def test_file_cut_at_any_byte_holds_the_first_rows(notes):
    """A process that is killed, or a full disk, may leave any part of the last line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.csv")
        file = Results(path)
        for i, note in enumerate(notes):
            file.add({"provider": f"p{i}", "note": note})
        whole, content = read_rows(path), path.read_bytes()
        header = content.index(b"\n")
        assert [row["provider"] for row in whole] == [f"p{i}" for i in range(len(notes))]
        for size in (0, header // 2, *range(header, len(content) + 1)):
            path.write_bytes(content[:size])
            assert read_rows(path) == whole[: max(0, content[:size].count(b"\n") - 1)]


def test_timing_columns_are_per_call_and_against_the_first():
    first, second = Timing(3, 4, 5, 3.5, 4.5, 9), Timing(1, 2, 3, 1.5, 2.5, 9)
    columns = results.timing_columns(second, first, calls=2)
    assert columns == {
        "ms_p20": 0.5, "ms_p50": 1, "ms_p80": 1.5, "ms_low": 0.75, "ms_high": 1.25,
        "speedup": 2, "tie": False, "samples": 9,
    }  # fmt: skip
    assert results.timing_columns(second, second)["tie"] is False, "the first is no tie of itself"
    assert results.timing_columns(Timing(3, 4, 5, 3, 4, 9), first)["tie"] is True
    assert not {"speedup", "tie"} & results.timing_columns(second).keys()


def test_table_names_the_point_as_far_as_it_varies(path):
    file = Results(path)
    timed = {"case": "S1", "dtype": "float32", "ms_p20": 1, "ms_p50": 2, "ms_p80": 3, "speedup": 2}
    file.add(timed | {"mode": "inference", "provider": "fused", "tie": True})
    file.add({"case": "S1", "dtype": "float32", "mode": "training", "provider": "fused"})
    table = results.results_table(file.rows).splitlines()
    _, first, second = (line for line in table if not line.startswith("-"))
    assert first.split() == ["inference", "fused", "2.000", "[1.000,", "3.000]", "2.00x", "tie"]
    assert second.split() == ["training", "fused", "not", "timed"]
