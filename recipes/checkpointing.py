"""What a run leaves in its folder: checkpoints and the log."""

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
from processes import InputError, RunError, World, reason_of
from training import Trainer

from epsanet_fused.utils.atomic_write import write_atomically

Row = dict[str, Any]


class Record:
    """What a run leaves in its folder, written by the first process.

    ``checkpoint.pth.tar`` after each epoch, ``model_best.pth.tar`` when the score was the best, in
    the official layout and readable by ``ef.load_checkpoint``; ``log.csv``, a row an epoch. The
    rows are in the checkpoint, too, so that a resumed run has the log of its own past, whatever
    lies in the folder.

    Args:
        folder: is made. It must not hold a checkpoint, unless the run goes on from this folder.
        arch: the model's name.
        options: what the run's numbers hang on, of plain types; kept in the checkpoint.
        resume: the checkpoint that the run goes on from.

    Raises:
        InputError: if the folder can't be written to, or holds the checkpoint of another run.
    """

    def __init__(
        self, folder: Path, world: World, arch: str, options: dict[str, Any], resume: Path | None
    ) -> None:
        self.folder, self.world, self.arch, self.options = folder, world, arch, options
        self.checkpoint = folder / "checkpoint.pth.tar"
        self.plans = folder / "plans.json"  # see training.merge_groups
        self.epoch, self.best = 0, -math.inf
        self.rows: list[Row] = []
        goes_on_here = resume is not None and resume.parent.resolve() == folder.resolve()
        if self.checkpoint.exists() and not goes_on_here:
            raise InputError(
                f"--out {folder} holds the checkpoint of another run: go on with it by --resume "
                f"{self.checkpoint}, or take another folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: can't make the folder {folder}: {error}") from None
        if not os.access(folder, os.W_OK):
            raise InputError(f"--out {folder} must be a folder to write into, which this isn't")

    def resume(self, trainer: Trainer, path: Path) -> None:
        """Load a checkpoint, and say in a line each what of it differs or is missing."""
        rest, notes = trainer.resume(path)
        if (arch := rest.get("arch", self.arch)) != self.arch:
            notes.append(f"it calls its model {arch}, not {self.arch}, but fits")
        if "epoch" not in rest:
            raise InputError(f"--resume {path} holds no epoch; bare weights are for --weights")
        self.epoch = int(rest["epoch"])
        if "best_prec1" in rest:
            self.best = float(rest["best_prec1"])
        else:
            notes.append("it has no best score, which starts anew")
        if not (self.folder / "model_best.pth.tar").exists() and self.best > -math.inf:
            notes.append(
                f"its best score, {self.best:.4f}, has no model_best.pth.tar in {self.folder}, "
                f"which gets one when that is exceeded"
            )
        if "log" in rest:
            self.rows = list(rest["log"])
        else:
            notes.append(f"it has no log, which begins with epoch {self.epoch + 1}")
        before = rest.get("options")
        for name in _AGREE:
            if before is not None and before.get(name) != self.options.get(name):
                raise InputError(
                    f"--resume {path} was trained on the {name} {_some(before.get(name))}, and the "
                    f"data have {_some(self.options.get(name))}"
                )
        notes += _differences(before, self.options)
        self.world.say(f"resuming {path} after epoch {self.epoch}")
        for note in notes:
            self.world.say(f"resuming: {note}")

    def save(self, trainer: Trainer, row: Row, score: float) -> None:
        """Write an epoch down: its row, and the checkpoint with its score, the higher the better.

        Killed at any point, the folder holds a checkpoint from which a resumed run writes again
        whatever is missing: the checkpoint comes last.

        Raises:
            RunError: if a file can't be written.
        """
        epoch = self.epoch + 1
        self.rows.append({"epoch": epoch, **row})
        if is_best := score > self.best:  # NaN never is
            self.best = score
        if self.world.is_first:
            try:
                self._write(trainer, epoch, is_best)
            except OSError as error:
                raise RunError(f"can't write to {self.folder}: {error}") from None
        self.epoch = epoch

    def _write(self, trainer: Trainer, epoch: int, is_best: bool) -> None:
        data = io.BytesIO()
        torch.save(
            {
                "epoch": epoch,
                "arch": self.arch,
                "best_prec1": self.best,
                "options": self.options,
                "log": self.rows,
                **trainer.state(),
            },
            data,
        )
        if is_best:
            write_atomically(self.folder / "model_best.pth.tar", data.getvalue())
        write_atomically(self.folder / "log.csv", _csv(self.rows))
        write_atomically(self.checkpoint, data.getvalue())

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Says of a run that ends early from where it can go on."""
        try:
            yield
        except Exception as error:
            if (reason := reason_of(error)) is None:
                raise
            advice = "no epoch was finished"
            if self.checkpoint.exists():
                advice = f"to go on after epoch {self.epoch}, add --resume {self.checkpoint}"
            reason.args = (f"{reason}; {advice}",)
            raise reason from None


# What a checkpoint and the data must have in common.
_AGREE = ("classes", "categories")


def _some(values: Sequence[Any] | None) -> str:
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
        return ["it doesn't say with which options it was trained"]
    return [
        f"{name} was {before.get(name)}, now it is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
