"""Images in a folder for each class, as the ImageNet recipe crops them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from processes import InputError, SampleError, first_line
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_train(data: Path, size: int) -> ImageFolder:
    """DATA/train/CLASS/*: crops of random place, area and aspect, mirrored or not.

    Items are an image (3, size, size), float32 and normalised, and the number of its class.

    Raises:
        InputError: if a folder is missing, or a class has no image.
        SampleError: from the items, if a file can't be read as an image.
    """
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return _load(data, "train", crop)


def load_val(data: Path, size: int) -> ImageFolder:
    """DATA/val/CLASS/*: the centre of the image, its shorter side 256 / 224 of the crop's.

    Items and errors are those of ``load_train``.
    """
    centre = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    return _load(data, "val", centre)


def check_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raises an InputError unless both number the same classes."""
    if difference := set(train.classes) ^ set(val.classes):
        raise InputError(
            f"{train.root} and {val.root} must have the same classes; only one of them has "
            f"{', '.join(sorted(difference)[:6])}"
        )


def _load(data: Path, part: str, geometry: list[object]) -> ImageFolder:
    if not (folder := data / part).is_dir():
        raise InputError(f"{data} must hold a folder {part}, which isn't there")
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    try:
        return ImageFolder(str(folder), transforms.Compose([*geometry, *finish]), loader=read_image)
    except FileNotFoundError as error:  # no class, or one without an image
        raise InputError(f"{folder} must hold a folder of images for each class: {error}") from None


def read_image(path: str) -> Image.Image:
    """An image file in RGB; a SampleError that names the file if it is broken."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # which Pillow would clip, not scale
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of mode {image.mode}, of no known range")
            return image.convert("RGB")
    except Exception as error:  # broken files raise errors of many types
        raise SampleError(f"can't read the image {path}: {first_line(error)}") from None
