"""Small sets of real images, written to disk as users have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images


def write_digits(
    root: Path, classes: int = 4, train: int = 12, val: int = 5, side: int = 40
) -> Path:
    """DATA/train/CLASS/*.png, DATA/val/CLASS/*.png: scanned digits, so many of each class."""
    digits = load_digits()
    for label in range(classes):
        images = digits.images[digits.target == label][: train + val]  # (N, 8, 8), of 0 to 16
        for i, image in enumerate(images):
            part = "train" if i < train else "val"
            _save(root / part / f"digit{label}" / f"{i:03}.png", image * (255 / 16), side)
    return root


def write_patches(root: Path, train: int = 8, val: int = 3, side: int = 64) -> Path:
    """The same layout, of two classes: patches of a temple's and of a flower's photograph, JPEG."""
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        corners = [(y, x) for y in range(0, 256, side) for x in range(0, 512, side)]
        for i, (y, x) in enumerate(corners[: train + val]):
            part = "train" if i < train else "val"
            patch = photograph[y : y + side, x : x + side]  # (side, side, 3), of 0 to 255
            _save(root / part / name / f"{i:03}.jpg", patch, side)
    return root


def _save(path: Path, pixels: np.ndarray, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    image.resize((side, side), Image.Resampling.BILINEAR).save(path)
