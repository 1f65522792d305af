"""What the recipe for detection refuses: one line that names it, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.datasets import annotations_of, write_coco
from helpers.processes import recipe

SMALL = ("--detector", "retinanet", "--min-size", 64, "--max-size", 96, "--device", "cpu")
SMALL += ("--batch-size", 2, "--workers", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "data", train=4, val=2)


def refused(message: str, *arguments: object, status: int = 2) -> None:
    done = recipe("detection.py", *arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("detection")
    assert message in last


def _no_annotations(data: Path) -> None:
    (data / "annotations" / "instances_val2017.json").unlink()


def _no_images(data: Path) -> None:
    shutil.rmtree(data / "train2017")


def _torn_image(data: Path) -> None:
    path = data / "train2017" / "000000000001.jpg"
    path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_annotations, "can't read the annotations"),
        (_no_images, "train2017/000000000000.jpg, and 3 more, which isn't there"),
        (_torn_image, "000000000001.jpg: image file is truncated"),
    ],
)
def test_data(spoil: Callable[[Path], None], message: str, data: Path, tmp_path: Path) -> None:
    spoil(data)
    # With a worker: what goes wrong there has to come out as one line, too.
    arguments = ("--out", tmp_path / "out", *SMALL, "--batch-size", 3, "--workers", 1)
    refused(message, data, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", 16], "--batch-size 16 is more than there are training images: 3"),
        (["--max-size", 40], "--max-size must be at least --min-size, got 40 for 64"),
        (["--trainable-layers", 6], "--trainable-layers: must be an integer of 0 to 5, got '6'"),
        (["--eval"], "--eval needs --resume FILE"),
        (["--train-images", "elsewhere"], "elsewhere/000000000000.jpg, and 3 more, which isn't"),
    ],
)
def test_arguments(arguments: list[object], message: str, data: Path, tmp_path: Path) -> None:
    refused(message, data, "--out", tmp_path / "out", *SMALL, *arguments)


def test_what_cannot_be_scored_is_said_before_an_epoch(data: Path, tmp_path: Path) -> None:
    path, content = annotations_of(data, "val")
    path.write_text(json.dumps(content | {"annotations": []}))
    done = recipe("detection.py", data, "--out", tmp_path / "out", *SMALL)
    assert done.returncode == 2
    assert "val2017.json must have objects to evaluate on" in done.stderr
    assert "epoch" not in done.stderr


def test_weights_that_are_none(data: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, path := tmp_path / "file")
    arguments = ("--weights", path, "--out", tmp_path / "out", *SMALL)
    refused("does not fit the model: missing bn1.weight", data, *arguments)


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    arguments = ("--lr", 1e25, "--warmup-steps", 0, "--batch-size", 1, "--out", tmp_path / "out")
    refused("the loss became nan", data, *SMALL, *arguments, status=1)
    assert list((tmp_path / "out").iterdir()) == []
