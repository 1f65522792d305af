"""The code and commands of README and docs/usage.md that need timm, torchvision or onnx run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.datasets import write_backbone, write_coco, write_digits
from helpers.processes import PAGES, ROOT, commands, one_thread_environment, python_blocks

import epsanet_fused as ef

USAGE = next(page for page in PAGES if page.name == "usage.md")


# The exporter's own warnings.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": ef.epsanet50().state_dict()}, "epsanet50.pth.tar")
    in_timm, in_torchvision, onnx = python_blocks(USAGE, needs_more=True)
    names: dict[str, object] = {}
    exec(in_timm, names)
    assert names["model"].num_classes == 10
    channels = [t.shape[1] for t in names["backbone"](torch.randn(1, 3, 64, 64))]
    assert channels == [64, 256, 512, 1024, 2048]
    exec(in_torchvision, names)
    [found] = names["detector"].eval()([torch.rand(3, 96, 96)])
    assert found["boxes"].shape[1] == 4
    exec(onnx, {"torch": torch, "model": names["model"]})
    assert Path("epsanet50.onnx").stat().st_size > 0


# Options that make a command end in seconds on a CPU.
SMALL = {
    "classification": "--epochs 1 --batch-size 8 --image-size 32 --workers 0",
    "detection": "--epochs 1 --batch-size 2 --min-size 64 --max-size 96 --workers 0 --lr 1e-4",
}


def run(command: list[str], folder: Path, *more: str) -> str:
    """Run a command of the docs with further options, and return its stdout.

    Args:
        command: "python" and its arguments.
        folder: holds the files that the command names.
    """
    done = subprocess.run(
        [sys.executable, *command[1:], *more],
        cwd=folder,
        env=one_thread_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def test_every_python_command_has_a_test() -> None:
    shown = [command for page in PAGES for command in commands(page, "python")]
    scripts = [re.split(r"[./ ]", " ".join(command))[1:3] for command in shown]
    assert [s for s in scripts if s[0] == "recipes"] == [["recipes", name] for name in SMALL]
    assert len(shown) == len(SMALL) + 2  # timm's command, and the self-check


def test_the_command_of_the_recipe_for_classification_runs_and_resumes(folder: Path) -> None:
    [command] = commands(USAGE, "python recipes/classification.py")
    write_digits(folder / "DATA")
    small = SMALL["classification"].split()
    assert "epoch 1: train_loss" in run(command, folder, *small)
    [resume] = re.findall(r"`(--resume \S+)`", USAGE.read_text())
    again = run(command, folder, *small, "--epochs", "2", *resume.split())
    assert "epoch 2: train_loss" in again


def test_the_command_of_the_recipe_for_detection_runs(folder: Path) -> None:
    [command] = commands(USAGE, "python recipes/detection.py")
    write_coco(folder / "DATA", train=4, val=2)
    write_backbone(folder / "epsanet50.pth.tar")
    out = run(command, folder, *SMALL["detection"].split())
    assert "mask_AP" in out


def test_the_command_for_timms_scripts_runs(folder: Path) -> None:
    [command] = commands(USAGE, "python -m epsanet_fused.integrations.timm")
    (folder / "train.py").write_text(
        "import sys, timm\nprint(sys.argv, timm.is_model(sys.argv[-1]))"
    )
    out = run(command, folder)
    assert out.strip().endswith("train.py', 'DATA', '--model', 'epsanet50'] True")
