"""recipes/digits.py trains both networks to the same losses, and reports runs that differ."""

from __future__ import annotations

import subprocess
from pathlib import Path

import digits
import pytest
from helpers.processes import PNG, recipe_command, rows_of


def run_digits(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    command = recipe_command("digits.py", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def short(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run of two epochs over a few images, and its folder."""
    out = tmp_path_factory.mktemp("digits")
    return run_digits("--out", out, "--epochs", 2, "--images", 192, "--min-accuracy", 0), out


@pytest.mark.slow
@pytest.mark.xdist_group("digits")
def test_plain_and_fused_learn_the_same(short) -> None:
    done, out = short
    assert done.returncode == 0, done.stderr
    assert "the two runs agree" in done.stdout
    rows = rows_of(out / "digits.csv")
    assert len(rows) == 2 * (192 // 64)
    for row in rows:
        assert float(row["plain_loss"]) == pytest.approx(float(row["fused_loss"]), abs=1e-9)
    assert float(rows[-1]["plain_loss"]) < float(rows[0]["plain_loss"])


@pytest.mark.slow
@pytest.mark.xdist_group("digits")
def test_progress_table_and_plot(short) -> None:
    done, out = short
    assert "plain" in done.stderr
    assert "fused" in done.stderr
    columns = ["epoch", "plain", "fused", "difference", "plain", "fused"]
    assert done.stdout.splitlines()[1].split() == columns
    assert (out / "digits.png").read_bytes().startswith(PNG)
    assert {path.name for path in out.iterdir()} == {"digits.csv", "digits.png"}


@pytest.mark.slow
def test_low_accuracy_is_a_failure(tmp_path: Path) -> None:
    done = run_digits("--out", tmp_path, "--epochs", 1, "--images", 64)
    assert done.returncode == 1
    assert "not above 95.00%" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be an integer of 1 to 1000, got '0'"),
        (["--images", "5000"], "argument --images: must be an integer of 64 to 1347"),
        (["--min-accuracy", "95"], "argument --min-accuracy: must be a number of 0 to below 1"),
        (["--device", "abacus"], "argument --device: can't use 'abacus' here"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_runs_that_differ_are_a_failure() -> None:
    same = digits.Curve([1.0, 0.5], [0.97], 1.0)
    assert digits.find_failures(same, same, 0.95) == []
    other = same._replace(losses=[1.0, 0.5 + 2e-6])
    assert "the losses differ by 2.0e-06" in digits.find_failures(same, other, 0.95)[0]
    assert digits.find_failures(same, same._replace(losses=[1.0, float("nan")]), 0.95)
