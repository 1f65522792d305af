"""A run's folder holds what a resumed run needs, and a checkpoint that doesn't fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpointing
import pytest
import torch
from checkpointing import Checkpointer
from distributed import InputError, RunError
from helpers.processes import rows_of
from helpers.small_trainer import ONE_PROCESS, Net, make_trainer, run_steps


def make_checkpointer(folder: Path, resume: Path | None = None, **options: Any) -> Checkpointer:
    return Checkpointer(folder, ONE_PROCESS, "net", options, resume)


def test_the_best_is_kept_and_the_log_has_a_row_an_epoch(tmp_path: Path) -> None:
    checkpointer, trainer = make_checkpointer(tmp_path / "a" / "b"), make_trainer()
    for score in (1.0, 3.0, 2.0, 3.0):
        checkpointer.save(trainer, {"score": score}, score)
    best = torch.load(checkpointer.folder / "model_best.pth.tar", weights_only=True)
    assert (best["epoch"], best["best_prec1"]) == (2, 3.0)
    assert [row["epoch"] for row in rows_of(checkpointer.folder / "log.csv")] == list("1234")


def test_resuming_an_earlier_checkpoint_drops_the_later_rows(tmp_path: Path, capsys) -> None:
    checkpointer, trainer = make_checkpointer(tmp_path, lr=0.1), make_trainer()
    for score in (1.0, 3.0, 2.0):
        checkpointer.save(trainer, {"score": score}, score)
    best = tmp_path / "model_best.pth.tar"
    resumed = make_checkpointer(tmp_path, best, lr=0.2)
    resumed.resume(trainer, best)
    resumed.save(trainer, {"score": 5.0}, 5.0)
    assert [row["score"] for row in rows_of(tmp_path / "log.csv")] == ["1.0", "3.0", "5.0"]
    assert capsys.readouterr().out == (
        f"resuming {best} after epoch 2\nresuming: lr was 0.1, now it is 0.2\n"
    )


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_failed_write_leaves_the_files_that_a_resumed_run_needs(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after ``writes`` of an epoch's three files."""
    checkpointer, trainer = make_checkpointer(tmp_path), make_trainer()
    checkpointer.save(trainer, {"score": 1.0}, 1.0)
    write, left = checkpointing.write_atomically, [None] * writes

    def fail_when_full(path: Path, data: bytes) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        write(path, data)

    monkeypatch.setattr(checkpointing, "write_atomically", fail_when_full)
    with pytest.raises(RunError, match="No space left"):
        checkpointer.save(trainer, {"score": 2.0}, 2.0)
    monkeypatch.undo()
    checkpoint = tmp_path / "checkpoint.pth.tar"
    resumed = make_checkpointer(tmp_path, checkpoint)
    resumed.resume(make_trainer(), checkpoint)
    assert (resumed.epoch, resumed.best) == (1, 1.0)
    resumed.save(trainer, {"score": 2.0}, 2.0)
    best = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    assert (best["epoch"], best["best_prec1"]) == (2, 2.0)
    assert [row["score"] for row in rows_of(tmp_path / "log.csv")] == ["1.0", "2.0"]


def test_resuming_keeps_the_optimizer_settings_of_the_command_line(tmp_path: Path) -> None:
    checkpointer, trainer = make_checkpointer(tmp_path), make_trainer()
    run_steps(trainer, 1)
    checkpointer.save(trainer, {}, 0.0)
    other = make_trainer()
    other.optimizer.param_groups[0]["momentum"] = 0.5
    other.resume(checkpointer.checkpoint)
    assert other.optimizer.param_groups[0]["momentum"] == 0.5
    torch.testing.assert_close(
        other.optimizer.state_dict()["state"], trainer.optimizer.state_dict()["state"]
    )


def write_checkpoint(tmp_path: Path, **more: Any) -> Path:
    """Write a checkpoint in the official layout."""
    torch.save({"state_dict": Net().double().state_dict(), **more}, path := tmp_path / "file")
    return path


def test_everything_that_a_checkpoint_lacks_is_reported(tmp_path: Path, capsys) -> None:
    path = write_checkpoint(tmp_path, epoch=4)
    checkpointer = make_checkpointer(tmp_path / "out", path)
    checkpointer.resume(make_trainer(ema_decay=0.9), path)
    stdout = capsys.readouterr().out
    for missing in ("average of the weights", "state of the optimizer", "best score", "log"):
        assert f"it has no {missing}" in stdout
    assert checkpointer.epoch == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "holds no epoch; bare weights are for --weights"),
        ({"epoch": 1, "optimizer": {"state": {}}}, "its optimizer doesn't fit the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, **more)
    with pytest.raises(InputError, match=message):
        make_checkpointer(tmp_path / "out", path).resume(make_trainer(), path)


def test_a_momentum_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    trainer = make_trainer()
    run_steps(trainer, 1)
    state = trainer.optimizer.state_dict()
    state["state"][0], state["state"][2] = state["state"][2], state["state"][0]
    path = write_checkpoint(tmp_path, epoch=1, optimizer=state)
    with pytest.raises(InputError, match=r"momentum_buffer is \(3, 4\) where the parameter is \(4"):
        make_trainer().resume(path)
