"""recipes/classification.py ends with a one-line error, not a traceback, on bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import classification
import pytest
import torch
from helpers.datasets import write_digits
from helpers.processes import run_recipe

import epsanet_fused as ef

SMALL = ("--image-size", 32, "--workers", 0, "--batch-size", 4, "--device", "cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "data", classes=2, train=4, val=2)


def check_error(message: str, *arguments: object, status: int = 2) -> None:
    """Run the recipe and check its exit status and the last line of stderr."""
    done = run_recipe("classification.py", *arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("classification")
    assert message in last


def _remove_val(data: Path) -> None:
    shutil.rmtree(data / "val")


def _remove_classes(data: Path) -> None:
    shutil.rmtree(data / "train")
    (data / "train").mkdir()


def _empty_a_class(data: Path) -> None:
    for path in (data / "train" / "digit1").iterdir():
        path.unlink()


def _rename_a_class(data: Path) -> None:
    (data / "val" / "digit1").rename(data / "val" / "nought")


def _truncate_an_image(data: Path) -> None:
    path = data / "train" / "digit1" / "002.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_val, "data must hold a folder val, which isn't there"),
        (
            _remove_classes,
            "train must hold a folder of images for each class: Couldn't find any class",
        ),
        (_empty_a_class, "Found no valid file for the classes digit1"),
        (_rename_a_class, "must have the same classes; only one of them has digit1, nought"),
        (
            _truncate_an_image,
            "train/digit1/002.png: image file is truncated; no epoch was finished",
        ),
    ],
)
def test_bad_data(damage: Callable[[Path], None], message: str, data: Path, tmp_path: Path) -> None:
    damage(data)
    # With a worker: its error must become one line, too.
    check_error(message, data, "--out", tmp_path / "out", *SMALL, "--workers", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", 16], "--batch-size 16 is more than there are training images: 8"),
        (["--accumulate", 3], "--batch-size 4 must divide into 3 equal micro-batches"),
        (["--device", "abacus"], "--device: can't use 'abacus' here"),
        (["--eval"], "--eval needs --weights FILE or --resume FILE"),
    ],
)
def test_bad_combinations(
    arguments: list[object], message: str, data: Path, tmp_path: Path
) -> None:
    check_error(message, data, "--out", tmp_path / "out", *SMALL, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "argument DATA: must be a folder, got 'nowhere'"),
        ([".", "--image-size", "31"], "argument --image-size: must be an integer of 32 to 4096"),
        ([".", "--lr", "-1"], "argument --lr: must be a number above 0, got '-1'"),
        ([".", "--lr", "nan"], "argument --lr: must be a number above 0, got 'nan'"),
        ([".", "--weight-decay", "-1"], "--weight-decay: must be a number of at least 0, got '-1'"),
        ([".", "--ema", "1"], "argument --ema: must be a number of 0 to below 1, got '1'"),
        ([".", "--warmup-epochs", "120"], "must be less than --epochs, got 120 of 120"),
        ([".", "--resume", "nowhere"], "argument --resume: must be a file, got 'nowhere'"),
        ([".", "--resume", __file__, "--weights", __file__], "not allowed with argument --resume"),
    ],
)
def test_bad_values(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: the parser ends before the recipe begins."""
    with pytest.raises(SystemExit) as caught:
        classification.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_not_a_checkpoint(data: Path, tmp_path: Path) -> None:
    (path := tmp_path / "file").write_bytes(b"no checkpoint")
    arguments = ("--weights", path, "--out", tmp_path / "out", *SMALL)
    check_error(f"--weights {path} is torn, or holds more than tensors", data, *arguments)


def test_weights_of_another_network(data: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, path := tmp_path / "file")
    arguments = ("--resume", path, "--out", tmp_path / "out")
    check_error("does not fit the model: missing bn1.weight", data, *arguments, *SMALL)


def test_a_checkpoint_of_other_classes(data: Path, tmp_path: Path) -> None:
    model = ef.epsanet50(num_classes=len(list((data / "val").iterdir())))
    state = {"state_dict": model.state_dict(), "epoch": 1, "options": {"classes": ["cat", "dog"]}}
    torch.save(state, path := tmp_path / "file")
    check_error("was trained on other classes", data, "--eval", "--resume", path, *SMALL)
    arguments = ("--resume", path, "--out", tmp_path / "out", *SMALL)
    check_error("was trained on the classes cat, dog, and the data have", data, *arguments)


def test_an_output_folder_of_another_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"of another run")
    check_error("holds the checkpoint of another run", data, "--out", tmp_path, *SMALL)
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == b"of another run"


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_error("the loss became nan", data, "--lr", 1e25, "--out", out, *SMALL, status=1)
    assert list(out.iterdir()) == []
