"""A resumed run, and a run of two processes, give the same result as one plain run."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.datasets import write_digits
from helpers.processes import (
    assert_same_training_state,
    interrupt_recipe,
    load_checkpoint,
    reproducible_rows,
    rows_of,
    run_recipe,
)

RECIPE = "classification.py"
# Four steps an epoch, with a learning rate at which rounding errors don't grow.
OPTIONS = ("--image-size", 32, "--batch-size", 12, "--lr", 0.003, "--device", "cpu")
EPOCHS = ("--epochs", 3, "--workers", 1)
AVERAGE = ("--ema", 0.5)
IN_EPOCH_2 = r"epoch 2/3: .* 2/4 "


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that is removed after the module: a checkpoint takes 160 or 250 MB."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_digits(folder / "digits", classes=4, train=12, val=3)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, data: Path) -> Path:
    """The folder of a run without interruption."""
    out = folder / "uninterrupted"
    done = run_recipe(RECIPE, data, "--out", out, *OPTIONS, *EPOCHS, *AVERAGE)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def killed(folder: Path, data: Path) -> Path:
    """The folder of a run that SIGKILL ended in its second epoch."""
    out = folder / "killed"
    arguments = (data, "--out", out, *OPTIONS, *EPOCHS, *AVERAGE)
    errors = folder / "killed.txt"
    status, _ = interrupt_recipe(signal.SIGKILL, IN_EPOCH_2, RECIPE, *arguments, errors=errors)
    assert status == -signal.SIGKILL
    assert load_checkpoint(out / "checkpoint.pth.tar")["epoch"] == 1
    return out


def _resume(data: Path, checkpoint: Path, out: Path, *more: object) -> str:
    done = run_recipe(RECIPE, data, "--out", out, "--resume", checkpoint, *OPTIONS, *EPOCHS, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_killed_run_resumes_bit_by_bit(
    uninterrupted: Path, killed: Path, data: Path, folder: Path
) -> None:
    out = folder / "resumed"
    shutil.copytree(killed, out)
    stdout = _resume(data, out / "checkpoint.pth.tar", out, *AVERAGE)
    # No note between the two lines, because nothing differs and nothing is missing.
    assert stdout.startswith(
        f"resuming {out}/checkpoint.pth.tar after epoch 1\nepoch 2: train_loss"
    )
    assert reproducible_rows(out) == reproducible_rows(uninterrupted)
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        assert_same_training_state(out / name, uninterrupted / name)
    shutil.rmtree(out)


def test_an_official_checkpoint_can_be_resumed(
    uninterrupted: Path, killed: Path, data: Path, folder: Path
) -> None:
    ours = load_checkpoint(killed / "checkpoint.pth.tar")
    official = {
        "epoch": 1,
        "arch": "epsanet50",
        "state_dict": {f"module.{k}": v for k, v in ours["raw_state_dict"].items()},
        "best_prec1": torch.tensor(100.0),
        "optimizer": ours["optimizer"],
    }
    path, out = folder / "official.pth.tar", folder / "from_official"
    torch.save(official, path, _use_new_zipfile_serialization=False)
    stdout = _resume(data, path, out)
    assert "it has no log, which begins with epoch 2" in stdout
    assert "it has no options of its training" in stdout
    assert [row["epoch"] for row in rows_of(out / "log.csv")] == ["2", "3"]
    assert [r["train_loss"] for r in reproducible_rows(out)] == [
        r["train_loss"] for r in reproducible_rows(uninterrupted)[1:]
    ]
    found, expected = (load_checkpoint(p / "checkpoint.pth.tar") for p in (out, uninterrupted))
    torch.testing.assert_close(
        dict(found["state_dict"]), dict(expected["raw_state_dict"]), rtol=0, atol=0
    )
    assert found["best_prec1"] == 100.0  # no later epoch exceeds it
    assert not (out / "model_best.pth.tar").exists()


def test_sigterm_ends_the_run_with_advice(uninterrupted: Path, data: Path, folder: Path) -> None:
    out = folder / "stopped"
    arguments = (data, "--out", out, *OPTIONS, *EPOCHS, *AVERAGE)
    errors = folder / "stopped.txt"
    status, stderr = interrupt_recipe(signal.SIGTERM, IN_EPOCH_2, RECIPE, *arguments, errors=errors)
    assert status == 128 + signal.SIGTERM
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == (
        f"classification: stopped by SIGTERM; to go on after epoch 1, add --resume "
        f"{out}/checkpoint.pth.tar"
    )
    assert reproducible_rows(out) == reproducible_rows(uninterrupted)[:1]
    assert load_checkpoint(out / "checkpoint.pth.tar")["epoch"] == 1


def test_ctrl_c_in_the_first_epoch_leaves_no_file(data: Path, folder: Path) -> None:
    out = folder / "interrupted"
    arguments = (data, "--out", out, *OPTIONS, *EPOCHS)
    errors = folder / "interrupted.txt"
    status, stderr = interrupt_recipe(
        signal.SIGINT, "epoch 1/3: .* 1/4 ", RECIPE, *arguments, errors=errors
    )
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "classification: stopped by SIGINT; no epoch was finished"
    assert list(out.iterdir()) == []


def test_two_processes_equal_one_with_two_micro_batches(data: Path, folder: Path) -> None:
    one, two = folder / "one", folder / "two"
    options = (*OPTIONS, *AVERAGE, "--epochs", 2, "--workers", 0)
    done = run_recipe(RECIPE, data, "--out", one, "--accumulate", 2, *options)
    assert done.returncode == 0, done.stderr
    done = run_recipe(RECIPE, data, "--out", two, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1: train_loss") == 1
    for found, expected in zip(reproducible_rows(two), reproducible_rows(one), strict=True):
        assert found.keys() == expected.keys()
        for name in ("epoch", "lr", "train_loss", "train_top1", "val_loss", "top1", "top5"):
            assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-4)
    found, expected = (load_checkpoint(out / "checkpoint.pth.tar") for out in (two, one))
    assert found["options"] == expected["options"]
    for part in ("state_dict", "raw_state_dict"):
        # num_batches_tracked differs, because each process counts its own; it isn't used.
        a, b = (
            {k: v for k, v in c[part].items() if "num_batches" not in k} for c in (found, expected)
        )
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_keeps_its_merged_groups(data: Path, folder: Path) -> None:
    """Merged groups change the rounding, so a resumed run must use the measured ones again."""
    options = (data, *OPTIONS, "--workers", 0, "--merge-groups")
    resumed, single = folder / "measured", folder / "given"
    done = run_recipe(RECIPE, *options, "--out", resumed, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    line = r"\n[1-9]\d* of 48 convolutions run with fewer groups, see .*/measured/plans.json\n"
    assert re.search(line, done.stdout)
    plans = (resumed / "plans.json").read_bytes()
    single.mkdir()
    (single / "plans.json").write_bytes(plans)
    for out, start in ((resumed, ("--resume", resumed / "checkpoint.pth.tar")), (single, ())):
        done = run_recipe(RECIPE, *options, "--out", out, "--epochs", 2, *start)
        assert done.returncode == 0, done.stderr
        assert (out / "plans.json").read_bytes() == plans, "measured once"
    assert reproducible_rows(resumed) == reproducible_rows(single)
    assert_same_training_state(resumed / "checkpoint.pth.tar", single / "checkpoint.pth.tar")


def test_processes_share_the_plans_of_the_first(data: Path, folder: Path) -> None:
    out = folder / "shared"
    options = ("--out", out, *OPTIONS, "--workers", 0, "--merge-groups", "--epochs", 1)
    done = run_recipe(RECIPE, data, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("convolutions run with fewer groups") == 1
    assert "Traceback" not in done.stderr


def test_a_plans_file_of_other_content_is_refused(data: Path, folder: Path) -> None:
    out = folder / "refused"
    out.mkdir()
    (out / "plans.json").write_text("[]")
    done = run_recipe(RECIPE, data, "--out", out, *OPTIONS, "--workers", 0, "--merge-groups")
    assert done.returncode == 2
    assert "plans.json doesn't" in done.stderr.splitlines()[-1]
    assert (out / "plans.json").read_text() == "[]"
