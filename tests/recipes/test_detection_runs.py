"""recipes/detection.py learns; a resumed run and two processes give the same result."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.datasets import write_backbone, write_coco
from helpers.processes import (
    assert_same_training_state,
    interrupt_recipe,
    load_checkpoint,
    reproducible_rows,
    rows_of,
    run_recipe,
)

import epsanet_fused as ef
from epsanet_fused.integrations.torchvision import retinanet_epsanet50_fpn

SMALL = ("--min-size", 64, "--max-size", 96, "--workers", 0, "--device", "cpu")
BOX = [f"box_{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
MASK = [name.replace("box", "mask") for name in BOX]
# Three epochs of three steps.
TRAINING = ("--detector", "retinanet", "--epochs", 3, "--batch-size", 2, "--lr", 0.002)
TRAINING += ("--warmup-steps", 3, "--milestones", 2, *SMALL)


def run_detection(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return run_recipe("detection.py", *arguments, processes=processes)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that is removed after the module: a run leaves 500 MB."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_coco(folder / "data", train=7, val=2)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Path:
    write_backbone(folder / "epsanet50.pth.tar")
    return folder / "epsanet50.pth.tar"


@pytest.fixture(scope="module")
def trained(
    folder: Path, data: Path, backbone: Path
) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = folder / "trained"
    done = run_detection(data, "--weights", backbone, "--out", out, *TRAINING, "--workers", 1)
    return done, out


def test_training_learns_and_writes_a_log(trained) -> None:
    done, out = trained
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "epoch 3/3: 100%" in done.stderr
    assert "evaluate: 100%" in done.stderr
    assert "training on 6 images, evaluating on 2" in done.stdout
    rows = rows_of(out / "log.csv")
    losses = ["classification", "bbox_regression"]
    assert list(rows[0]) == ["epoch", "lr", "loss", *losses, "images_per_s", *BOX]
    rates = [float(row["lr"]) for row in rows]
    assert rates[0] == pytest.approx(0.002 * (0.001 + 0.999 * 2 / 3))
    assert rates[1] == 0.002
    assert rates[2] == pytest.approx(0.0002)
    assert len(rates) == 3
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in losses))
        assert float(row["images_per_s"]) > 0
    files = {"checkpoint.pth.tar", "model_best.pth.tar", "log.csv"}
    assert {p.name for p in out.iterdir()} == files


def test_frozen_layers_keep_the_given_weights(trained, backbone: Path) -> None:
    """The checkpoint loads into the package's detector, and only trained layers have changed."""
    _, out = trained
    model = retinanet_epsanet50_fpn(num_classes=4)
    entries = ef.load_checkpoint(model, out / "checkpoint.pth.tar")
    assert entries["epoch"] == 3
    assert entries["arch"] == "retinanet_epsanet50_fpn"
    assert entries["options"]["categories"] == [3, 7, 40]
    assert entries["best_prec1"] == max(float(row["box_AP"]) for row in rows_of(out / "log.csv"))
    given = load_checkpoint(backbone)["state_dict"]
    changed = set()
    for name, value in model.backbone.body.state_dict().items():
        if not torch.equal(value, given[f"module.{name}"]):
            changed.add(name.split(".")[0])
            assert "conv" in name or "se." in name or "downsample.0" in name, name
    assert changed == {"layer2", "layer3", "layer4"}


def test_a_killed_run_resumes_bit_by_bit(trained, folder: Path, data: Path, backbone: Path) -> None:
    _, uninterrupted = trained
    out = folder / "killed"
    arguments = (data, "--out", out, *TRAINING)
    start = (*arguments, "--weights", backbone)
    status, _ = interrupt_recipe(
        signal.SIGKILL, r"epoch 2/3: +33%", "detection.py", *start, errors=folder / "stderr"
    )
    assert status == -signal.SIGKILL
    assert load_checkpoint(out / "checkpoint.pth.tar")["epoch"] == 1
    done = run_detection(*arguments, "--resume", out / "checkpoint.pth.tar")
    assert done.returncode == 0, done.stderr
    assert "after epoch 1" in done.stdout
    assert_same_training_state(out / "checkpoint.pth.tar", uninterrupted / "checkpoint.pth.tar")
    assert reproducible_rows(out) == reproducible_rows(uninterrupted)


# Two steps of two micro-batches of one image.
SHARED = ("--batch-size", 2, "--epochs", 1, "--warmup-steps", 0, "--lr", 0.001, *SMALL)


@pytest.mark.parametrize("detector", ["retinanet", "fasterrcnn"])
def test_two_processes_equal_one(detector: str, folder: Path, backbone: Path) -> None:
    """This includes the random sampling of anchors and proposals, seeded for each micro-batch."""
    data = write_coco(folder / f"{detector}_data", train=5, val=2)
    arguments = (data, "--detector", detector, "--weights", backbone, *SHARED)
    one, two = folder / f"{detector}_one", folder / f"{detector}_two"
    single = run_detection(*arguments, "--out", one, "--accumulate", 2)
    double = run_detection(*arguments, "--out", two, processes=2)
    assert single.returncode == double.returncode == 0, single.stderr + double.stderr
    assert double.stdout.count("epoch 1: loss") == 1
    for a, b in zip(reproducible_rows(one), reproducible_rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4, nan_ok=True), name
    assert_same_training_state(two / "checkpoint.pth.tar", one / "checkpoint.pth.tar", 1e-3, 1e-6)


def test_mask_rcnn_in_mixed_precision(folder: Path, backbone: Path) -> None:
    """The log has losses and average precisions of masks; --eval gives the same numbers."""
    data, out = write_coco(folder / "masks", train=3, val=2), folder / "maskrcnn"
    options = ("--detector", "maskrcnn", "--amp", "--channels-last", *SMALL)
    arguments = (*options, "--out", out, "--epochs", 2, "--batch-size", 1, "--lr", 1e-4)
    done = run_detection(data, *arguments, "--weights", backbone, "--warmup-steps", 0)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out / "log.csv")
    losses = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask"]
    assert list(rows[0]) == ["epoch", "lr", "loss", *losses, "images_per_s", *BOX, *MASK]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    evaluated = run_detection(data, *options, "--eval", "--resume", out / "checkpoint.pth.tar")
    assert evaluated.returncode == 0, evaluated.stderr
    for name in (*BOX, *MASK):
        assert f"{name} {float(rows[1][name]):.4f}" in evaluated.stdout


def test_groups_of_the_backbone_are_merged(folder: Path, backbone: Path) -> None:
    data, out = write_coco(folder / "merged_data", train=3, val=2), folder / "merged"
    options = ("--amp", "--channels-last", *SMALL, "--epochs", 1, "--batch-size", 1)
    start = ("--merge-groups", "--weights", backbone)
    done = run_detection(data, "--out", out, *options, *start)
    assert done.returncode == 0, done.stderr
    assert "of 48 convolutions run with fewer groups" in done.stdout
    keys = json.loads((out / "plans.json").read_text())
    assert all("training, bfloat16, channels_last" in key for key in keys), "as --amp runs them"
