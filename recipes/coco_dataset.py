"""Detection datasets in COCO's format, with the targets that torchvision's detectors take."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from distributed import InputError, SampleError, first_line
from imagefolder import read_image
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


class CocoAnnotations(NamedTuple):
    """The annotations of a dataset, their file and the folder of the images."""

    path: Path
    folder: Path
    coco: COCO

    @property
    def categories(self) -> list[int]:
        """The category ids in ascending order: of label 1, label 2, ...; 0 is the background."""
        return sorted(self.coco.cats)


def read_annotations(path: Path, folder: Path, masks: bool) -> CocoAnnotations:
    """Read an annotation file, and check that it is complete and that its images exist.

    The annotations are renumbered from 1, because pycocotools treats the id 0 as "no match". A
    missing "iscrowd" becomes 0, and a missing "area" that of the box. Without ``masks`` the
    segmentations are dropped: they are most of the memory of a large dataset.

    Raises:
        InputError: if a file or a field is missing, or an id that another entry refers to.
    """
    content = _read_json(path)
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
    return CocoAnnotations(path, folder, coco)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise InputError(f"can't read the annotations {path}: {first_line(error)}") from None


def _check_fields(path: Path, content: Any) -> None:
    """Check that all entries have their fields, and that the fields have the right types."""
    if not isinstance(content, dict) or not all(
        isinstance(content.get(kind), list) for kind in _FIELDS
    ):
        raise InputError(f"{path} must hold an object with the lists {', '.join(_FIELDS)}")
    for kind, fields in _FIELDS.items():
        for i, entry in enumerate(content[kind]):
            if not isinstance(entry, dict) or not entry.keys() >= set(fields):
                raise InputError(f"{path}: {kind}[{i}] must have {', '.join(fields)}")
        ids = [entry["id"] for entry in content[kind] if "id" in fields]
        if not (_all_are(int, ids) or _all_are(str, ids)):
            raise InputError(f"{path}: the ids of {kind} must all be integers, or all strings")
    for i, image in enumerate(content["images"]):
        if not isinstance(image["file_name"], str):
            raise InputError(
                f"{path}: images[{i}].file_name must be a string, got {image['file_name']!r}"
            )
        if not all(isinstance(image[side], int) for side in ("width", "height")):
            raise InputError(
                f"{path}: images[{i}] must have its width and height in pixels, got "
                f"{image['width']!r} and {image['height']!r}"
            )
    for i, annotation in enumerate(content["annotations"]):
        if not _is_box(annotation["bbox"]):
            raise InputError(
                f"{path}: annotations[{i}].bbox must be x, y, width and height, four numbers, "
                f"the last two not negative, got {annotation['bbox']}"
            )


def _all_are(kind: type, values: list[Any]) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
        and min(value[2:]) >= 0
    )


def _check_references(path: Path, coco: COCO) -> None:
    """Check that ids are unique, and that annotations refer to existing ones."""
    for kind, index in (("images", coco.imgs), ("categories", coco.cats)):
        if len(index) < len(coco.dataset[kind]):
            raise InputError(f"{path}: the ids of {kind} must all be different, and some are not")
    for i, annotation in enumerate(coco.dataset["annotations"]):
        for field, index in (("image_id", coco.imgs), ("category_id", coco.cats)):
            if annotation[field] not in index:
                raise InputError(
                    f"{path}: annotations[{i}].{field} is {annotation[field]!r}, which no "
                    f"entry of {'images' if field == 'image_id' else 'categories'} has"
                )


def check_same_categories(train: CocoAnnotations, val: CocoAnnotations) -> None:
    """Raise an InputError unless both datasets have the same categories."""
    if difference := set(train.categories) ^ set(val.categories):
        raise InputError(
            f"{train.path} and {val.path} must have the same categories; only one of them has "
            f"{', '.join(map(str, sorted(difference)[:6]))}"
        )


class TrainingDataset(Dataset[tuple[Tensor, Target]]):
    """The images that have objects, flipped horizontally with probability 0.5.

    Boxes are clipped to their image. Crowds and boxes of less than one pixel in width or height are
    dropped, and so are the images without a remaining object.

    Items are an image (3, H, W), float32 in [0, 1], and the target of its N objects: "boxes"
    (N, 4), float32, as x1, y1, x2, y2 in pixels, "labels" (N,), int64, and optionally "masks"
    (N, H, W), uint8.

    Args:
        annotations: the images and objects.
        masks: add "masks" to the targets.

    Raises:
        InputError: if there is no object.
        SampleError: by the items, if an image or a segmentation can't be read.
    """

    def __init__(self, annotations: CocoAnnotations, masks: bool) -> None:
        self.annotations, self.masks = annotations, masks
        self.labels = {category: n for n, category in enumerate(annotations.categories, 1)}
        images = annotations.coco.imgs.items()
        objects = {key: _trainable_objects(annotations, image) for key, image in images}
        self.objects = {key: found for key, found in objects.items() if found}
        self.ids = list(self.objects)
        if not self.ids:
            raise InputError(f"{annotations.path} must have objects to train on, and has none")
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry = self.annotations.coco.imgs[self.ids[index]]
        image, objects = read_pixels(self.annotations, entry), self.objects[entry["id"]]
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
            mask = self.annotations.coco.annToMask(annotation)
            if mask.max(initial=0) > 1:  # compressed RLE whose runs end before the image
                raise ValueError("its runs don't fill the image")
            return mask
        except Exception as error:  # pycocotools raises errors of many types
            name = f"annotations[{annotation['id'] - 1}].segmentation"
            raise SampleError(
                f"{self.annotations.path}: can't read {name}: {first_line(error)}"
            ) from None


def _trainable_objects(annotations: CocoAnnotations, image: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an image's annotations, without crowds and boxes of less than a pixel."""
    found = []
    for annotation in annotations.coco.imgToAnns.get(image["id"], ()):
        x1, y1, x2, y2 = _clipped(annotation["bbox"], image)
        if not annotation["iscrowd"] and x2 - x1 >= 1 and y2 - y1 >= 1:
            found.append(annotation)
    return found


def _clipped(box: list[float], image: dict[str, Any]) -> tuple[float, float, float, float]:
    """Convert a box from x, y, width, height to x1, y1, x2, y2, clipped to the image."""
    x, y, w, h = map(float, box)
    width, height = float(image["width"]), float(image["height"])
    return max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)


def _check_segmentations(path: Path, coco: COCO) -> None:
    """Check that segmentations are polygons or RLE of the image's size: pycocotools doesn't."""
    for i, annotation in enumerate(coco.dataset["annotations"]):
        entry = coco.imgs[annotation["image_id"]]
        if not _is_segmentation(annotation.get("segmentation"), entry["height"], entry["width"]):
            raise InputError(
                f"{path}: annotations[{i}] must have a segmentation to train and evaluate "
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
            _all_are(int, counts) and min(counts, default=0) >= 0 and sum(counts) == height * width
        )
    return isinstance(counts, str)


def _is_polygon(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    return numbers and len(value) >= 6 and len(value) % 2 == 0


class EvaluationDataset(Dataset[tuple[Tensor, Any]]):
    """All images, also those without objects: (3, H, W), float32 in [0, 1], and the image's id.

    Raises:
        InputError: if there is no object.
    """

    def __init__(self, annotations: CocoAnnotations) -> None:
        self.annotations = annotations
        self.ids = list(annotations.coco.imgs)
        if all(annotation["iscrowd"] for annotation in annotations.coco.anns.values()):
            raise InputError(f"{annotations.path} must have objects to evaluate on, and has none")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        entry = self.annotations.coco.imgs[self.ids[index]]
        return read_pixels(self.annotations, entry).float() / 255, entry["id"]


def read_pixels(annotations: CocoAnnotations, entry: dict[str, Any]) -> Tensor:
    """Read an image as (3, H, W), uint8.

    Raises:
        SampleError: if the file isn't an image, or hasn't the size that is in the annotations.
    """
    path = annotations.folder / entry["file_name"]
    image = read_image(str(path))
    if image.size != (entry["width"], entry["height"]):
        raise SampleError(
            f"the image {path} has {image.size[0]}x{image.size[1]} pixels, but "
            f"{entry['width']}x{entry['height']} in {annotations.path}"
        )
    return v2.functional.pil_to_tensor(image)
