"""fuse, a detector in training and a recipe on a GPU, the last two in float16."""

from __future__ import annotations

import copy
import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import psa_variants as variants
from PIL import Image

import epsanet_fused as ef

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "classification.py"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: variants.OfficialPSA(64, 64),
        lambda: variants.BiRefNetPSA(64),
        lambda: variants.OutOfPlaceExternalAttention(64),
    ],
    ids=["official", "BiRefNet", "one SE per branch"],
)
def test_fuse(make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = torch.nn.Sequential(make()).to("cuda", dtype)
    x = torch.randn(2, 64, 9, 7, device="cuda", dtype=dtype)
    order = "reversed" if isinstance(model[0], variants.OfficialPSA) else "natural"
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        out = ef.fuse(model, order=order)(x)
    assert type(model[0]).__name__.startswith("FusedPSA")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error < 3 * torch.finfo(dtype).eps


def test_a_detector_trains_in_float16() -> None:
    # Imported here, so that the other tests run where torchvision is missing.
    from epsanet_fused.integrations.torchvision import retinanet_epsanet50_fpn

    torch.manual_seed(0)
    model = retinanet_epsanet50_fpn(
        num_classes=3, norm_layer=torch.nn.BatchNorm2d, trainable_backbone_layers=5, min_size=128
    ).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda")
    images = [torch.rand(3, 128, 128, device="cuda") for _ in range(2)]
    box = torch.tensor([[20.0, 20.0, 90.0, 90.0]], device="cuda")
    targets = [{"boxes": box, "labels": torch.tensor([1], device="cuda")} for _ in images]
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = sum(model(images, targets).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def write_images(root: Path) -> None:
    """Write noisy images of vertical and of horizontal stripes."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 32), ("val", 8)):
        for name in ("columns", "rows"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                stripes = np.tile(np.arange(64) // 4 % 2 * 120, (64, 1))
                pixels = (stripes if name == "columns" else stripes.T) + noise.integers(0, 99)
                Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")


def classify(data: Path, out: Path, epochs: int, *options: str | Path) -> list[dict[str, str]]:
    size = ["--epochs", str(epochs), "--batch-size", "16", "--image-size", "64", "--workers", "2"]
    how = ["--lr", "0.01", "--amp", "--channels-last"]
    done = subprocess.run(
        [sys.executable, RECIPE, data, "--out", out, *size, *how, *options],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_recipe_for_classification_runs_in_float16_and_resumes(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    out = tmp_path / "out"
    [first] = classify(tmp_path / "data", out, 1)
    before, second = classify(tmp_path / "data", out, 2, "--resume", out / "checkpoint.pth.tar")
    assert before == first
    assert math.isfinite(float(second["train_loss"]))
    assert float(first["peak_memory_mb"]) > 0
