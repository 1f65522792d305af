"""Small datasets of real images and a backbone's checkpoint, written to disk as users have them."""

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

# The category ids are as in COCO: they don't start at 1, have gaps and are in no order.
DIGIT, DISC, TRIANGLE = 3, 40, 7
CATEGORIES = [(DISC, "disc"), (DIGIT, "digit"), (TRIANGLE, "triangle")]
SIZES = ((96, 80), (80, 96), (96, 96))  # (width, height) of the images, in turn


def write_digits(
    root: Path, classes: int = 4, train: int = 12, val: int = 5, side: int = 40
) -> Path:
    """Write scanned digits to root/train/CLASS/*.png and root/val/CLASS/*.png.

    Args:
        train: images of each class for training.
        val: images of each class for evaluation.
        side: height and width of the images in pixels.
    """
    digits = load_digits()
    for label in range(classes):
        images = digits.images[digits.target == label][: train + val]  # (N, 8, 8) in [0, 16]
        for i, image in enumerate(images):
            split = "train" if i < train else "val"
            path = root / split / f"digit{label}" / f"{i:03}.png"
            _save(path, image * (255 / 16), side)
    return root


def write_patches(root: Path, train: int = 8, val: int = 3, side: int = 64) -> Path:
    """Write patches of a temple's and a flower's photograph as JPEG, in folders as above."""
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        corners = [(y, x) for y in range(0, 256, side) for x in range(0, 512, side)]
        for i, (y, x) in enumerate(corners[: train + val]):
            split = "train" if i < train else "val"
            patch = photograph[y : y + side, x : x + side]  # (side, side, 3) in [0, 255]
            _save(root / split / name / f"{i:03}.jpg", patch, side)
    return root


def _save(path: Path, pixels: np.ndarray, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    image.resize((side, side), Image.Resampling.BILINEAR).save(path)


def write_coco(root: Path, train: int = 8, val: int = 5) -> Path:
    """Write root/{train,val}2017/*.jpg and root/annotations/instances_{train,val}2017.json.

    The images are patches of two photographs, each with a bright digit (RLE), a red disc and a blue
    triangle (polygons). The last image of each split has no object, the first one a crowd, and the
    first training image also a box of width 0.
    """
    first = 0
    for split, count in (("train", train), ("val", val)):
        content = _write_split(root / f"{split}2017", first, count)
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        first += count
    return root


def load_annotations(root: Path, split: str) -> tuple[Path, dict[str, Any]]:
    """Return the path and the content of a split's annotation file."""
    path = root / "annotations" / f"instances_{split}2017.json"
    return path, json.loads(path.read_text())


def _write_split(folder: Path, first: int, count: int) -> dict[str, Any]:
    """Write the images from the number ``first`` on, and return their annotations."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(first, first + count):
        width, height = SIZES[number % len(SIZES)]
        image = _patch(number, width, height)
        entry = {"id": 1000 + 7 * number, "file_name": f"{number:012}.jpg"}
        entry |= {"width": width, "height": height}
        images.append(entry)
        objects = []
        if number < first + count - 1:
            objects = [_digit(image, number), _disc(image, number), _triangle(image, number)]
        if number == first:
            objects.append(_crowd(width, height))
        if number == 0:
            objects.append(dict(objects[0], bbox=[5.0, 5.0, 0.0, 9.0], area=0.0))
        annotations += [{"id": 0, "image_id": entry["id"], **each} for each in objects]
        image.save(folder / entry["file_name"], quality=95)
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = 11 * number
    categories = [{"id": key, "name": name} for key, name in CATEGORIES]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _patch(number: int, width: int, height: int) -> Image.Image:
    """Return a patch of a photograph with reduced contrast, so that drawn objects stand out."""
    photograph = load_sample_images().images[number % 2]
    x, y = 37 * number % (640 - width), 53 * number % (427 - height)
    pixels = 60 + photograph[y : y + height, x : x + width] // 4
    return Image.fromarray(pixels.astype(np.uint8))


def _digit(image: Image.Image, number: int) -> dict[str, Any]:
    """Draw a digit of 32x32 pixels in the upper left quarter; its mask is uncompressed RLE."""
    digit = Image.fromarray((load_digits().images[number] * (255 / 16)).astype(np.uint8))
    digit = digit.resize((32, 32), Image.Resampling.BILINEAR)
    x, y = 3 + 2 * (number % 4), 4 + 3 * (number % 3)
    image.paste((250, 250, 250), (x, y), digit)
    mask = np.zeros((image.height, image.width), np.uint8)
    mask[y : y + 32, x : x + 32] = np.asarray(digit) > 80
    rows, columns = np.nonzero(mask)
    left, top = columns.min(), rows.min()
    box = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
    return _annotation(DIGIT, box, mask.sum(), _rle(mask))


def _disc(image: Image.Image, number: int) -> dict[str, Any]:
    """Draw a disc of 20 to 26 pixels in the lower half; its outline is a polygon."""
    radius = 10 + number % 4
    x, y = 14 + 3 * (number % 5), image.height - 16 - number % 3
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=(230, 30, 20))
    box = [x - radius, y - radius, 2 * radius, 2 * radius]
    return _annotation(DISC, box, np.pi * radius**2, [points.ravel().tolist()])


def _triangle(image: Image.Image, number: int) -> dict[str, Any]:
    """Draw a triangle in the right half; in every third image its box exceeds the image."""
    side = 26 + 2 * (number % 3)
    x = image.width - side + (4 if number % 3 == 0 else -2)
    y = 20 + 4 * (number % 4)
    points = [(x, y + side), (x + side / 2, y), (x + side, y + side)]
    ImageDraw.Draw(image).polygon(points, fill=(20, 40, 230))
    return _annotation(TRIANGLE, [x, y, side, side], side**2 / 2, [list(sum(points, ()))])


def _crowd(width: int, height: int) -> dict[str, Any]:
    """Return a crowd that covers the lower right quarter."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :, width // 2 :] = 1
    box = [width // 2, height // 2, width - width // 2, height - height // 2]
    return _annotation(DISC, box, mask.sum(), _rle(mask)) | {"iscrowd": 1}


def _annotation(category: int, box: list[Any], area: float, segmentation: Any) -> dict[str, Any]:
    return {
        "category_id": category,
        "bbox": [float(v) for v in box],
        "area": float(area),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def _rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) as COCO's uncompressed RLE: run lengths by columns, zeros first."""
    pixels = np.concatenate([[0], mask.ravel(order="F"), [2]])
    ends = np.flatnonzero(np.diff(pixels))
    counts = np.diff(ends, prepend=0)
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def write_backbone(path: Path, classes: int = 7) -> ef.EPSANet:
    """Write a checkpoint of an EPSANet-50 in the official layout, and return the model.

    Its norms have the activations' mean and variance, and a small scale where they are added to the
    residual, as in a trained network: so activations stay bounded when the norms are frozen.
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
