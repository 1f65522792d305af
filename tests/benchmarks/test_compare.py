"""Test bench_psa.py compare: what got faster, slower or tied."""

from __future__ import annotations

from pathlib import Path

import bench_psa
import pytest
from harness.results import Results


def write(path: Path, rows: dict[str, tuple[float, float]], **point: object) -> Path:
    """Write a row for each provider: its median, and the distance of its confidence bounds."""
    file = Results(path)
    for name, (ms, apart) in rows.items():
        times = {"ms_p20": ms - apart, "ms_p50": ms, "ms_p80": ms + apart, "samples": 9}
        times |= {"ms_low": ms - apart, "ms_high": ms + apart}
        file.add({"scope": "tail", "case": "S1", "provider": name, **times, **point})
    return path


def verdicts(output: str) -> dict[str, str]:
    """Return the verdict of each line of the table by its first word."""
    lines = [line.split() for line in output.splitlines()[2:-1] if not line.startswith("-")]
    return {words[0]: words[-1] for words in lines}


def test_rows_of_both_files_are_faster_slower_or_tied(tmp_path, capsys):
    before = {"eager": (4, 0.1), "cleaned": (2, 0.1), "fused": (1, 0.01), "cpu": (1, 0.1)}
    after = {"eager": (2, 0.1), "cleaned": (4, 0.1), "fused": (1.02, 0.001), "cpu": (1.15, 0.1)}
    a = write(tmp_path / "a.csv", before | {"apart": (1, 0.1)})
    b = write(tmp_path / "b.csv", after | {"compile": (1, 0.1)})
    assert bench_psa.main(["compare", str(a), str(b)]) == 0
    output = capsys.readouterr().out
    assert verdicts(output) == {
        "eager": "faster",
        "cleaned": "slower",
        "fused": "tied",  # by less than the margin
        "cpu": "tied",  # the confidence intervals overlap
    }
    assert "0.500  faster" in output and "2.000  slower" in output
    assert output.splitlines()[-1] == "1 faster, 1 slower, 2 tied"


@pytest.mark.parametrize("margin, verdict", [("0", "slower"), ("1.9", "slower"), ("2.1", "tied")])
def test_margin_is_in_percent(tmp_path, capsys, margin, verdict):
    a = write(tmp_path / "a.csv", {"eager": (2, 0.001), "fused": (1, 0.001)})
    b = write(tmp_path / "b.csv", {"eager": (2, 0.001), "fused": (1.02, 0.001)})
    assert bench_psa.main(["compare", str(a), str(b), "--margin", margin]) == 0
    assert verdicts(capsys.readouterr().out)["fused"] == verdict


def test_rows_without_a_timing_are_left_out(tmp_path, capsys):
    a = write(tmp_path / "a.csv", {"eager": (2, 0.1), "fused": (1, 0.1)})
    b = write(tmp_path / "b.csv", {"eager": (2, 0.1)})
    Results(b, append=True).add({"scope": "tail", "case": "S1", "provider": "fused"})
    assert bench_psa.main(["compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out.endswith("0 faster, 0 slower, 1 tied\n")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line on stderr with which the arguments are refused."""
    with pytest.raises(SystemExit) as stopped:
        bench_psa.main(["compare", *map(str, arguments)])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = [s for s in captured.err.splitlines() if not s.startswith(("usage:", " "))]
    return line


@pytest.mark.parametrize(
    "content",
    [
        b"case,ms\nS1,3\nS2,4\n",
        b"\x89PNG\r\n\x1a\n\xff",
        b'{"traceEvents": [\n' + 200_000 * b"x" + b"\n0]}\n",
        b"scope,mode\n\0\n\n",
    ],
    ids=["other columns", "no text", "a long line", "a null byte"],
)
def test_file_that_is_none_of_the_benchmarks_is_named(content, tmp_path, capsys):
    right, wrong = write(tmp_path / "a.csv", {"eager": (2, 0.1)}), tmp_path / "wrong"
    wrong.write_bytes(content)
    assert f"{wrong}: must be a CSV file of the benchmarks" in refusal(capsys, right, wrong)
    assert f"{wrong}: must be a CSV file of the benchmarks" in refusal(capsys, wrong, right)


def test_missing_file_and_folder_are_named(tmp_path, capsys):
    right = write(tmp_path / "a.csv", {"eager": (2, 0.1)})
    assert f"{tmp_path / 'none'}: must be" in refusal(capsys, right, tmp_path / "none")
    assert f"{tmp_path}: must be" in refusal(capsys, right, tmp_path)


def test_files_without_a_row_in_common_are_refused(tmp_path, capsys):
    a = write(tmp_path / "a.csv", {"eager": (2, 0.1)})
    b = write(tmp_path / "b.csv", {"eager": (2, 0.1)}, case="S2")
    assert f"{a} and {b} have no timed row in common" in refusal(capsys, a, b)


def test_of_two_rows_of_one_key_the_later_counts(tmp_path, capsys):
    a = write(tmp_path / "a.csv", {"eager": (2, 0.1)})
    b = write(tmp_path / "b.csv", {"eager": (9, 0.1)})
    b.write_text(b.read_text() + a.read_text().splitlines(keepends=True)[1])
    assert bench_psa.main(["compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out.endswith("0 faster, 0 slower, 1 tied\n")


@pytest.mark.parametrize("column", ["device", "threads", "clock"])
def test_files_of_different_machines_are_told_apart(column, tmp_path, capsys):
    a = write(tmp_path / "a.csv", {"eager": (2, 0.1)}, **{column: "one"})
    b = write(tmp_path / "b.csv", {"eager": (2, 0.1)}, **{column: "other"})
    assert bench_psa.main(["compare", str(a), str(b)]) == 0
    assert f"The files differ in {column}" in capsys.readouterr().out
    assert bench_psa.main(["compare", str(a), str(a)]) == 0
    assert "differ" not in capsys.readouterr().out


@pytest.mark.parametrize("margin", ["-1", "100", "nan", "wide"])
def test_bad_margin_is_named(margin, tmp_path, capsys):
    a = write(tmp_path / "a.csv", {"eager": (2, 0.1)})
    assert "argument --margin: " in refusal(capsys, a, a, "--margin", margin)
