"""Small sets of real images, written to disk as users have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

import epsanet_fused as ef


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


DIGIT, DISC, TRIANGLE = 3, 40, 7  # ids as in COCO: not from 1, with gaps, in no order
CATEGORIES = [(DISC, "disc"), (DIGIT, "digit"), (TRIANGLE, "triangle")]
SIZES = ((96, 80), (80, 96), (96, 96))  # width, height, in turn


def write_coco(root: Path, train: int = 8, val: int = 5) -> Path:
    """DATA/{train,val}2017/*.jpg and DATA/annotations/instances_{train,val}2017.json.

    Patches of two photographs with a bright digit (RLE), a red disc and a blue triangle (polygons)
    in each. The last image of each part has no object, the first a crowd, and the first to train on
    a box without width.
    """
    first = 0
    for part, count in (("train", train), ("val", val)):
        content = _part(root / f"{part}2017", first, count)
        path = root / "annotations" / f"instances_{part}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        first += count
    return root


def annotations_of(root: Path, part: str) -> tuple[Path, dict[str, Any]]:
    path = root / "annotations" / f"instances_{part}2017.json"
    return path, json.loads(path.read_text())


def _part(folder: Path, first: int, count: int) -> dict[str, Any]:
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(first, first + count):
        width, height = SIZES[number % len(SIZES)]
        image = _patch(number, width, height)
        entry = {"id": 1000 + 7 * number, "file_name": f"{number:012}.jpg"}
        entry |= {"width": width, "height": height}
        images.append(entry)
        found = []
        if number < first + count - 1:
            found = [_digit(image, number), _disc(image, number), _triangle(image, number)]
        if number == first:
            found.append(_crowd(width, height))
        if number == 0:
            found.append(dict(found[0], bbox=[5.0, 5.0, 0.0, 9.0], area=0.0))
        annotations += [{"id": 0, "image_id": entry["id"], **one} for one in found]
        image.save(folder / entry["file_name"], quality=95)
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = 11 * number
    categories = [{"id": key, "name": name} for key, name in CATEGORIES]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _patch(number: int, width: int, height: int) -> Image.Image:
    """Of the photograph's own contrast, halved, so that what is put in stands out."""
    photograph = load_sample_images().images[number % 2]
    x, y = 37 * number % (640 - width), 53 * number % (427 - height)
    pixels = 60 + photograph[y : y + height, x : x + width] // 4
    return Image.fromarray(pixels.astype(np.uint8))


def _digit(image: Image.Image, number: int) -> dict[str, Any]:
    """32x32 pixels in the upper left quarter; its mask is uncompressed RLE."""
    digit = Image.fromarray((load_digits().images[number] * (255 / 16)).astype(np.uint8))
    digit = digit.resize((32, 32), Image.Resampling.BILINEAR)
    x, y = 3 + 2 * (number % 4), 4 + 3 * (number % 3)
    image.paste((250, 250, 250), (x, y), digit)
    mask = np.zeros((image.height, image.width), np.uint8)
    mask[y : y + 32, x : x + 32] = np.asarray(digit) > 80
    rows, columns = np.nonzero(mask)
    left, top = columns.min(), rows.min()
    box = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
    return _annotation(DIGIT, box, mask.sum(), _runs(mask))


def _disc(image: Image.Image, number: int) -> dict[str, Any]:
    """Of 20 to 26 pixels, in the lower half; its outline is a polygon."""
    radius = 10 + number % 4
    x, y = 14 + 3 * (number % 5), image.height - 16 - number % 3
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=(230, 30, 20))
    box = [x - radius, y - radius, 2 * radius, 2 * radius]
    return _annotation(DISC, box, np.pi * radius**2, [points.ravel().tolist()])


def _triangle(image: Image.Image, number: int) -> dict[str, Any]:
    """In the right half; its box reaches out of every third image."""
    side = 26 + 2 * (number % 3)
    x = image.width - side + (4 if number % 3 == 0 else -2)
    y = 20 + 4 * (number % 4)
    points = [(x, y + side), (x + side / 2, y), (x + side, y + side)]
    ImageDraw.Draw(image).polygon(points, fill=(20, 40, 230))
    return _annotation(TRIANGLE, [x, y, side, side], side**2 / 2, [list(sum(points, ()))])


def _crowd(width: int, height: int) -> dict[str, Any]:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :, width // 2 :] = 1
    box = [width // 2, height // 2, width - width // 2, height - height // 2]
    return _annotation(DISC, box, mask.sum(), _runs(mask)) | {"iscrowd": 1}


def _annotation(category: int, box: list[Any], area: float, segmentation: Any) -> dict[str, Any]:
    return {
        "category_id": category,
        "bbox": [float(v) for v in box],
        "area": float(area),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def _runs(mask: np.ndarray) -> dict[str, Any]:
    """Lengths of runs of equal pixels, column by column, of zeros first."""
    pixels = np.concatenate([[0], mask.ravel(order="F"), [2]])
    ends = np.flatnonzero(np.diff(pixels))
    counts = np.diff(ends, prepend=0)
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def write_backbone(path: Path, classes: int = 7) -> ef.EPSANet:
    """An EPSANet-50 in the official layout, whose norms are as in a trained one.

    They know the activations' mean and variance, and add little to a residual, so that frozen norms
    keep the activations in bounds.
    """
    torch.manual_seed(0)
    model = ef.epsanet50(num_classes=classes)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
            scale = 0.2 if name.endswith(("bn3", "downsample.1")) else 0.5
            nn.init.uniform_(module.weight, 0.8 * scale, 1.2 * scale)
            nn.init.normal_(module.bias, 0.0, 0.1 * scale)
    with torch.no_grad():
        model(torch.randn(8, 3, 96, 96))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    content = {"epoch": 120, "arch": "epsanet50", "state_dict": state, "best_prec1": torch.ones(())}
    torch.save(content, path)
    return model.eval()
