"""recipes/detection.py ends with a one-line error, not a traceback, on bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.datasets import load_annotations, write_coco
from helpers.processes import run_recipe

SMALL = ("--detector", "retinanet", "--min-size", 64, "--max-size", 96, "--device", "cpu")
SMALL += ("--batch-size", 2, "--workers", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "data", train=4, val=2)


def check_error(message: str, *arguments: object, status: int = 2) -> None:
    """Run the recipe and check its exit status and the last line of stderr."""
    done = run_recipe("detection.py", *arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("detection")
    assert message in last


def _remove_annotations(data: Path) -> None:
    (data / "annotations" / "instances_val2017.json").unlink()


def _remove_images(data: Path) -> None:
    shutil.rmtree(data / "train2017")


def _truncate_an_image(data: Path) -> None:
    path = data / "train2017" / "000000000001.jpg"
    path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_annotations, "can't read the annotations"),
        (_remove_images, "train2017/000000000000.jpg, and 3 more, which isn't there"),
        (_truncate_an_image, "000000000001.jpg: image file is truncated"),
    ],
)
def test_bad_data(damage: Callable[[Path], None], message: str, data: Path, tmp_path: Path) -> None:
    damage(data)
    # With a worker: its error must become one line, too.
    arguments = ("--out", tmp_path / "out", *SMALL, "--batch-size", 3, "--workers", 1)
    check_error(message, data, *arguments)


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
def test_bad_arguments(arguments: list[object], message: str, data: Path, tmp_path: Path) -> None:
    check_error(message, data, "--out", tmp_path / "out", *SMALL, *arguments)


def test_val_without_objects_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    path, content = load_annotations(data, "val")
    path.write_text(json.dumps(content | {"annotations": []}))
    done = run_recipe("detection.py", data, "--out", tmp_path / "out", *SMALL)
    assert done.returncode == 2
    assert "val2017.json must have objects to evaluate on" in done.stderr
    assert "epoch" not in done.stderr


def test_weights_of_another_network(data: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, path := tmp_path / "file")
    arguments = ("--weights", path, "--out", tmp_path / "out", *SMALL)
    check_error("does not fit the model: missing bn1.weight", data, *arguments)


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    arguments = ("--lr", 1e25, "--warmup-steps", 0, "--batch-size", 1, "--out", tmp_path / "out")
    check_error("the loss became nan", data, *SMALL, *arguments, status=1)
    assert list((tmp_path / "out").iterdir()) == []
