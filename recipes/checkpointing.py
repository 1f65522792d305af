"""The output folder of a run: checkpoints and the log."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from distributed import InputError, RunError, World, find_run_error
from training import Trainer

from epsanet_fused.utils.atomic_write import write_atomically

Row = dict[str, Any]

# The options that must be equal in a checkpoint and in the run that resumes from it.
_MUST_AGREE = ("classes", "categories")


class Checkpointer:
    """The output folder of a run; the first process writes it.

    It gets ``checkpoint.pth.tar`` after each epoch and ``model_best.pth.tar`` when the score is the
    best so far, both in the official layout, readable by ``ef.load_checkpoint``, and ``log.csv``
    with one row an epoch. A checkpoint also holds the rows up to its epoch, so the log of a resumed
    run doesn't depend on the files in the folder.

    Args:
        folder: created if it is missing. It must not hold a checkpoint, unless ``resume`` is a
            checkpoint in this folder.
        arch: the model's name.
        options: plain values that determine the results; stored in the checkpoint.
        resume: the checkpoint that the run resumes from.

    Raises:
        InputError: if the folder isn't writable, or holds the checkpoint of another run.
    """

    def __init__(
        self, folder: Path, world: World, arch: str, options: dict[str, Any], resume: Path | None
    ) -> None:
        self.folder, self.world, self.arch, self.options = folder, world, arch, options
        self.checkpoint = folder / "checkpoint.pth.tar"
        self.plans = folder / "plans.json"  # see training.merge_groups
        self.epoch, self.best = 0, -math.inf
        self.rows: list[Row] = []
        resumes_here = resume is not None and resume.parent.resolve() == folder.resolve()
        if self.checkpoint.exists() and not resumes_here:
            raise InputError(
                f"--out {folder} holds the checkpoint of another run: resume it by --resume "
                f"{self.checkpoint}, or choose another folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: can't make the folder {folder}: {error}") from None
        if not os.access(folder, os.W_OK):
            raise InputError(f"--out {folder} must be a writable folder, which this isn't")

    def resume(self, trainer: Trainer, path: Path) -> None:
        """Load a checkpoint into the trainer, and print what is missing in it or differs.

        Raises:
            InputError: if the checkpoint can't be read or doesn't fit the model or the data.
        """
        entries, notes = trainer.resume(path)
        if (arch := entries.get("arch", self.arch)) != self.arch:
            notes.append(f"its model is called {arch}, not {self.arch}, but its weights fit")
        if "epoch" not in entries:
            raise InputError(f"--resume {path} holds no epoch; bare weights are for --weights")
        self._check_agreement(path, entries.get("options"))
        self.epoch = int(entries["epoch"])
        notes += self._resume_best(entries)
        if "log" in entries:
            self.rows = list(entries["log"])
        else:
            notes.append(f"it has no log, which begins with epoch {self.epoch + 1}")
        notes += _differences(entries.get("options"), self.options)
        self.world.print(f"resuming {path} after epoch {self.epoch}")
        for note in notes:
            self.world.print(f"resuming: {note}")

    def _check_agreement(self, path: Path, before: dict[str, Any] | None) -> None:
        for name in _MUST_AGREE:
            if before is not None and before.get(name) != self.options.get(name):
                raise InputError(
                    f"--resume {path} was trained on the {name} {_listed(before.get(name))}, and "
                    f"the data have {_listed(self.options.get(name))}"
                )

    def _resume_best(self, entries: dict[str, Any]) -> list[str]:
        notes = []
        if "best_prec1" in entries:
            self.best = float(entries["best_prec1"])
        else:
            notes.append("it has no best score, so the next epoch's is the best")
        if not (self.folder / "model_best.pth.tar").exists() and self.best > -math.inf:
            notes.append(
                f"its best score is {self.best:.4f}, but {self.folder} has no model_best.pth.tar: "
                f"it is written when an epoch exceeds that score"
            )
        return notes

    def save(self, trainer: Trainer, row: Row, score: float) -> None:
        """Write the log and the checkpoints of an epoch; a higher score is better.

        The checkpoint is written last: a run that is killed before resumes from the previous epoch
        and writes all files of this one again.

        Raises:
            RunError: if a file can't be written.
        """
        epoch = self.epoch + 1
        self.rows.append({"epoch": epoch, **row})
        if is_best := score > self.best:  # false for NaN
            self.best = score
        if self.world.is_first:
            try:
                self._write(trainer, epoch, is_best)
            except OSError as error:
                raise RunError(f"can't write to {self.folder}: {error}") from None
        self.epoch = epoch

    def _write(self, trainer: Trainer, epoch: int, is_best: bool) -> None:
        checkpoint = {
            "epoch": epoch,
            "arch": self.arch,
            "best_prec1": self.best,
            "options": self.options,
            "log": self.rows,
            **trainer.state(),
        }
        torch.save(checkpoint, data := io.BytesIO())
        if is_best:
            write_atomically(self.folder / "model_best.pth.tar", data.getvalue())
        write_atomically(self.folder / "log.csv", _csv(self.rows))
        write_atomically(self.checkpoint, data.getvalue())

    @contextmanager
    def resume_advice(self) -> Iterator[None]:
        """Add to a ``RunError`` raised inside how to resume the run."""
        try:
            yield
        except Exception as error:
            if (reason := find_run_error(error)) is None:
                raise
            advice = "no epoch was finished"
            if self.checkpoint.exists():
                advice = f"to go on after epoch {self.epoch}, add --resume {self.checkpoint}"
            reason.args = (f"{reason}; {advice}",)
            raise reason from None


def _listed(values: Sequence[Any] | None) -> str:
    values = [] if values is None else values
    more = f", ... ({len(values)})" if len(values) > 6 else ""
    return f"{', '.join(map(str, values[:6])) or 'none'}{more}"


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _differences(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    if before is None:
        return ["it has no options of its training"]
    return [
        f"{name} was {before.get(name)}, now it is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
