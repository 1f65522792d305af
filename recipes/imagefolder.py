"""Datasets of one folder of images for each class, cropped as in the ImageNet recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from distributed import InputError, SampleError, first_line
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_train(data: Path, size: int) -> ImageFolder:
    """Open DATA/train/CLASS/*, with random resized crops and horizontal flips.

    Items are an image (3, size, size), float32 and normalised, and the index of its class.

    Raises:
        InputError: if a folder is missing, or a class has no image.
        SampleError: by the items, if a file can't be read as an image.
    """
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return _load(data, "train", crop)


def load_val(data: Path, size: int) -> ImageFolder:
    """Open DATA/val/CLASS/*, with the shorter side resized to size * 256 / 224 and a centre crop.

    Items and errors are those of ``load_train``.
    """
    centre = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    return _load(data, "val", centre)


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raise an InputError unless both datasets have the same classes."""
    if difference := set(train.classes) ^ set(val.classes):
        raise InputError(
            f"{train.root} and {val.root} must have the same classes; only one of them has "
            f"{', '.join(sorted(difference)[:6])}"
        )


def _load(data: Path, split: str, crop: list[object]) -> ImageFolder:
    if not (folder := data / split).is_dir():
        raise InputError(f"{data} must hold a folder {split}, which isn't there")
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    try:
        return ImageFolder(str(folder), transforms.Compose([*crop, *normalise]), loader=read_image)
    except FileNotFoundError as error:  # no class, or one without an image
        raise InputError(f"{folder} must hold a folder of images for each class: {error}") from None


def read_image(path: str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        SampleError: if the file can't be read as an image; names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow's convert would clip, not scale
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of mode {image.mode}, of no known range")
            return image.convert("RGB")
    except Exception as error:  # broken files raise errors of many types
        raise SampleError(f"can't read the image {path}: {first_line(error)}") from None
