"""Images and their objects in COCO's format, as torchvision's detectors take them."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from imagefolder import read_image
from processes import InputError, SampleError, first_line
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

Target = dict[str, Tensor]

_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


class Truth(NamedTuple):
    """The annotations of a set, and where its images are."""

    path: Path
    folder: Path
    coco: COCO

    @property
    def categories(self) -> list[int]:
        """The ids, ascending: label 1 is the first of them, as 0 is the background."""
        return sorted(self.coco.cats)


def read_truth(path: Path, folder: Path, masks: bool) -> Truth:
    """Read a file of annotations, and see that it is whole and that its images are there.

    Annotations are numbered anew from 1, as pycocotools takes number 0 for none; without "iscrowd"
    they aren't a crowd, without "area" they have their box's. Without ``masks`` they lose their
    segmentations, most of the memory of a large set.

    Raises:
        InputError: if a file is missing, a field is, or an id that another entry refers to.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise InputError(f"can't read the annotations {path}: {first_line(error)}") from None
    _check_fields(path, content)
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
        annotation["iscrowd"] = annotation.get("iscrowd") or 0
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if not masks:
            annotation.pop("segmentation", None)
    coco = COCO()
    coco.dataset = content
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    _check_references(path, coco)
    if masks:
        _check_segmentations(path, coco)
    names = [image["file_name"] for image in coco.imgs.values()]
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} names the image {folder / missing[0]}{more}, which isn't there")
    return Truth(path, folder, coco)


def _check_fields(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or not all(
        isinstance(content.get(kind), list) for kind in _FIELDS
    ):
        raise InputError(f"{path} must hold an object with the lists {', '.join(_FIELDS)}")
    for kind, fields in _FIELDS.items():
        for place, entry in enumerate(content[kind]):
            if not isinstance(entry, dict) or not entry.keys() >= set(fields):
                raise InputError(f"{path}: {kind}[{place}] must have {', '.join(fields)}")
        ids = [entry["id"] for entry in content[kind] if "id" in fields]
        if not (_all_of(int, ids) or _all_of(str, ids)):
            raise InputError(f"{path}: the ids of {kind} must all be integers, or all strings")
    for place, image in enumerate(content["images"]):
        if not isinstance(image["file_name"], str):
            raise InputError(
                f"{path}: images[{place}].file_name must be a string, got {image['file_name']!r}"
            )
        if not all(isinstance(image[side], int) for side in ("width", "height")):
            raise InputError(
                f"{path}: images[{place}] must have its width and height in pixels, got "
                f"{image['width']!r} and {image['height']!r}"
            )
    for place, annotation in enumerate(content["annotations"]):
        if not _is_box(annotation["bbox"]):
            raise InputError(
                f"{path}: annotations[{place}].bbox must be x, y, width and height, four numbers, "
                f"the last two not negative, got {annotation['bbox']}"
            )


def _all_of(kind: type, values: list[Any]) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
        and min(value[2:]) >= 0
    )


def _check_references(path: Path, coco: COCO) -> None:
    for kind, index in (("images", coco.imgs), ("categories", coco.cats)):
        if len(index) < len(coco.dataset[kind]):
            raise InputError(f"{path}: the ids of {kind} must all be different, and some are not")
    for place, annotation in enumerate(coco.dataset["annotations"]):
        for field, index in (("image_id", coco.imgs), ("category_id", coco.cats)):
            if annotation[field] not in index:
                raise InputError(
                    f"{path}: annotations[{place}].{field} is {annotation[field]!r}, which no "
                    f"entry of {'images' if field == 'image_id' else 'categories'} has"
                )


def check_categories(train: Truth, val: Truth) -> None:
    """Raises an InputError unless both have the same categories."""
    if difference := set(train.categories) ^ set(val.categories):
        raise InputError(
            f"{train.path} and {val.path} must have the same categories; only one of them has "
            f"{', '.join(map(str, sorted(difference)[:6]))}"
        )


class TrainingSet(Dataset[tuple[Tensor, Target]]):
    """Images that have objects, each flipped to its mirror image half of the times.

    Left out are crowds, what of a box lies outside of its image, boxes of less than a pixel in
    width or height, and images of which nothing is left.

    Items are an image (3, H, W), float32 of 0 to 1, and its N objects: "boxes" (N, 4), float32, as
    x1, y1, x2, y2 in pixels, "labels" (N,), int64, and if asked for "masks" (N, H, W), uint8.

    Args:
        truth: what to train on.
        masks: whether items have masks.

    Raises:
        InputError: if there is no object.
        SampleError: from the items, if an image or a segmentation can't be read.
    """

    def __init__(self, truth: Truth, masks: bool) -> None:
        self.truth, self.masks = truth, masks
        self.labels = {category: n for n, category in enumerate(truth.categories, 1)}
        objects = {key: _objects(truth, image) for key, image in truth.coco.imgs.items()}
        self.objects = {key: found for key, found in objects.items() if found}
        self.ids = list(self.objects)
        if not self.ids:
            raise InputError(f"{truth.path} must have objects to train on, and has none")
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry = self.truth.coco.imgs[self.ids[index]]
        image, objects = read_pixels(self.truth, entry), self.objects[entry["id"]]
        boxes = torch.tensor([_clipped(o["bbox"], entry) for o in objects])  # (N, 4)
        size = image.shape[-2:]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects]),
        }
        if self.masks:
            masks = np.stack([self._mask(o) for o in objects])  # (N, H, W)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return self.transform(tv_tensors.Image(image), target)

    def _mask(self, annotation: dict[str, Any]) -> np.ndarray:
        try:
            mask = self.truth.coco.annToMask(annotation)
            if mask.max(initial=0) > 1:  # compressed RLE whose runs end before the image does
                raise ValueError("its runs don't fill the image")
            return mask
        except Exception as error:  # whatever a library in C makes of a broken polygon
            raise SampleError(
                f"{self.truth.path}: can't read annotations[{annotation['id'] - 1}].segmentation: "
                f"{first_line(error)}"
            ) from None


def _objects(truth: Truth, image: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations of an image that can be trained on."""
    found = []
    for annotation in truth.coco.imgToAnns.get(image["id"], ()):
        x1, y1, x2, y2 = _clipped(annotation["bbox"], image)
        if not annotation["iscrowd"] and x2 - x1 >= 1 and y2 - y1 >= 1:
            found.append(annotation)
    return found


def _clipped(box: list[float], image: dict[str, Any]) -> tuple[float, float, float, float]:
    """x, y, width, height -> x1, y1, x2, y2, within the image."""
    x, y, w, h = map(float, box)
    width, height = float(image["width"]), float(image["height"])
    return max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)


def _check_segmentations(path: Path, coco: COCO) -> None:
    """Each must be polygons, or RLE of its image: pycocotools makes of another what it finds."""
    for place, annotation in enumerate(coco.dataset["annotations"]):
        entry = coco.imgs[annotation["image_id"]]
        if not _is_segmentation(annotation.get("segmentation"), entry["height"], entry["width"]):
            raise InputError(
                f"{path}: annotations[{place}] must have a segmentation to train and evaluate "
                f"masks on: polygons of six numbers or more, or RLE of {entry['height']} x "
                f"{entry['width']} pixels"
            )


def _is_segmentation(value: Any, height: int, width: int) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and all(_is_polygon(each) for each in value)
    if not isinstance(value, dict) or value.get("size") != [height, width]:
        return False
    counts = value.get("counts")
    if isinstance(counts, list):
        return (
            _all_of(int, counts) and min(counts, default=0) >= 0 and sum(counts) == height * width
        )
    return isinstance(counts, str)


def _is_polygon(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    return numbers and len(value) >= 6 and len(value) % 2 == 0


class EvaluationSet(Dataset[tuple[Tensor, Any]]):
    """All images of a set, with objects or without: (3, H, W), float32 of 0 to 1, and the id."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.ids = list(truth.coco.imgs)
        if all(annotation["iscrowd"] for annotation in truth.coco.anns.values()):
            raise InputError(f"{truth.path} must have objects to evaluate on, and has none")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        entry = self.truth.coco.imgs[self.ids[index]]
        return read_pixels(self.truth, entry).float() / 255, entry["id"]


def read_pixels(truth: Truth, entry: dict[str, Any]) -> Tensor:
    """An image as (3, H, W), uint8.

    Raises:
        SampleError: if the file isn't an image, or not of the size that the annotations are for.
    """
    path = truth.folder / entry["file_name"]
    image = read_image(str(path))
    if image.size != (entry["width"], entry["height"]):
        raise SampleError(
            f"the image {path} has {image.size[0]}x{image.size[1]} pixels, but "
            f"{entry['width']}x{entry['height']} in {truth.path}"
        )
    return v2.functional.pil_to_tensor(image)
