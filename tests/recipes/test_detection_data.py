"""Datasets in COCO's format become the right targets, and detections the right scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_dataset import (
    CocoAnnotations,
    EvaluationDataset,
    TrainingDataset,
    check_same_categories,
    read_annotations,
)
from coco_metrics import average_precision, to_coco_results
from detection import build, learning_rate, parse_arguments
from distributed import InputError, SampleError, SeededDataset
from helpers.datasets import DIGIT, DISC, TRIANGLE, load_annotations, write_coco
from imagefolder import read_image
from PIL import Image

CATEGORIES = [DIGIT, TRIANGLE, DISC]
Damage = Callable[[dict[str, Any]], Any]

# pycocotools is compiled for an older NumPy, whose __array__ has no argument "copy".
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "data", train=5, val=2)


def read_split(data: Path, split: str = "train", masks: bool = True) -> CocoAnnotations:
    path = data / "annotations" / f"instances_{split}2017.json"
    return read_annotations(path, data / f"{split}2017", masks)


def unflipped(data: Path) -> TrainingDataset:
    train = TrainingDataset(read_split(data), masks=True)
    train.transform.transforms[0].p = 0.0
    return train


def test_training_items_are_the_objects(data: Path) -> None:
    """Crowds, boxes without width and images without objects are dropped; boxes are clipped."""
    train = unflipped(data)
    content = load_annotations(data, "train")[1]
    assert train.ids == [image["id"] for image in content["images"][:4]]
    for image_id, (image, target) in zip(train.ids, (train[n] for n in range(4)), strict=True):
        entry = next(i for i in content["images"] if i["id"] == image_id)
        height, width = entry["height"], entry["width"]
        assert image.shape == (3, height, width)
        assert image.dtype == torch.float32
        assert target["labels"].tolist() == [1, 3, 2]  # category ids 3, 40, 7 of 3, 7, 40
        assert target["masks"].shape == (3, height, width)
        own = [a for a in content["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
        expected = [a["bbox"] for a in own if a["bbox"][2] > 0]
        for (x, y, w, h), box in zip(expected, target["boxes"].tolist(), strict=True):
            assert box == [x, y, min(x + w, width), y + h]
        for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].tolist(), strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            within = (x1 - 1 <= columns) & (columns < x2 + 1) & (y1 - 1 <= rows) & (rows < y2 + 1)
            assert within.all()
            assert mask.sum() > 0.4 * (x2 - x1) * (y2 - y1)
    disc = train[1][0][:, train[1][1]["masks"][1].bool()]  # (3, pixels)
    assert disc[0].mean() > 0.8
    assert disc[2].mean() < 0.2


def test_half_of_the_images_are_flipped_with_their_targets(data: Path) -> None:
    plain, flipped = (
        unflipped(data),
        SeededDataset(TrainingDataset(read_split(data), masks=True), seed=3),
    )
    flips = 0
    for epoch in range(20):
        image, target = flipped[epoch, 0]
        again, _ = flipped[epoch, 0]
        assert torch.equal(image, again)
        expected, own = plain[0]
        if torch.equal(image, expected):
            assert torch.equal(target["boxes"], own["boxes"])
            continue
        flips += 1
        assert torch.equal(image, expected.flip(-1))
        assert torch.equal(target["masks"], own["masks"].flip(-1))
        width, (x1, y1, x2, y2) = image.shape[-1], own["boxes"].unbind(1)
        assert torch.equal(target["boxes"], torch.stack([width - x2, y1, width - x1, y2], dim=1))
    assert 4 <= flips <= 16


def test_every_image_is_evaluated(data: Path) -> None:
    val = EvaluationDataset(read_split(data, "val"))
    content = load_annotations(data, "val")[1]
    assert [val[n][1] for n in range(len(val))] == [image["id"] for image in content["images"]]
    image = np.asarray(Image.open(data / "val2017" / content["images"][0]["file_name"]))
    expected = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)
    torch.testing.assert_close(val[0][0], expected)


def perfect(annotations: CocoAnnotations, reported: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Return the results of a perfect detector, whose labels are mapped to these categories."""
    results: dict[str, list[dict[str, Any]]] = {"box": [], "mask": []}
    for image_id in annotations.coco.imgs:
        own = [a for a in annotations.coco.imgToAnns[image_id] if not a["iscrowd"]]
        x, y, w, h = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4).unbind(1)
        image = annotations.coco.imgs[image_id]
        masks = [annotations.coco.annToMask(a) for a in own]
        masks = np.array(masks, np.float32).reshape(-1, 1, image["height"], image["width"])
        found = {
            "boxes": torch.stack([x, y, x + w, y + h], dim=1),
            "labels": torch.tensor([1 + CATEGORIES.index(a["category_id"]) for a in own]).long(),
            "scores": torch.linspace(0.9, 0.6, len(own)),
            "masks": torch.from_numpy(masks) * 0.8,
        }
        for kind, some in to_coco_results(image_id, found, reported).items():
            results[kind] += some
    return results


def test_average_precision_of_known_results(data: Path) -> None:
    """100 % if all is found, a third if two of three categories are swapped, 0 without results."""
    annotations = read_split(data, "val")
    assert annotations.categories == CATEGORIES
    averages = average_precision(annotations.coco, perfect(annotations, annotations.categories))
    assert list(averages) == [
        f"{kind}_{name}"
        for kind in ("box", "mask")
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    ]
    for name in ("box_AP", "box_AP50", "mask_AP75", "mask_APs"):
        assert averages[name] == pytest.approx(100), name
    assert math.isnan(averages["box_APl"])
    mixed = average_precision(annotations.coco, perfect(annotations, [TRIANGLE, DIGIT, DISC]))
    assert mixed["box_AP"] == pytest.approx(100 / 3)
    assert mixed["mask_AP"] == pytest.approx(100 / 3)
    nothing = average_precision(annotations.coco, {"box": [], "mask": []})
    assert nothing["box_AP"] == nothing["mask_AP50"] == 0


def test_labels_without_a_category_are_dropped() -> None:
    found = {"boxes": torch.ones(3, 4), "labels": torch.tensor([0, 2, 3]), "scores": torch.ones(3)}
    assert [r["category_id"] for r in to_coco_results(5, found, [4, 8])["box"]] == [8]


def test_the_defaults_are_the_published_schedule(tmp_path: Path) -> None:
    args = parse_arguments([str(tmp_path)])
    assert (args.epochs, args.batch_size, args.momentum, args.weight_decay) == (12, 16, 0.9, 1e-4)
    assert (args.min_size, args.max_size, args.trainable_layers) == (800, 1333, 3)
    steps = 7329
    rates = {(e, s): learning_rate(args, e, s, steps) for e in range(12) for s in (0, 250, 500)}
    assert rates[0, 0] == pytest.approx(0.02 / 1000)
    assert rates[0, 250] == pytest.approx(0.02 * 0.5005)
    assert rates[0, 500] == rates[7, 0] == 0.02
    assert rates[8, 0] == rates[10, 500] == pytest.approx(0.002)
    assert rates[11, 0] == pytest.approx(0.0002)


def drop(kind: str, field: str) -> Damage:
    return lambda content: content[kind][1].pop(field)


def put(kind: str, field: str, value: Any) -> Damage:
    return lambda content: content[kind][1].update({field: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("images"), "must hold an object with the lists images, annotations, cat"),
        (drop("images", "file_name"), r"images\[1\] must have id, file_name, width, height$"),
        (drop("annotations", "bbox"), r"annotations\[1\] must have image_id, category_id, bbox$"),
        (put("images", "width", "96"), r"images\[1\] must have its .* pixels, got '96' and 96"),
        (put("annotations", "bbox", [1, 2, 3]), r"\[1\].bbox must be .* got \[1, 2, 3\]"),
        (put("annotations", "bbox", [1, 2, 3, math.nan]), r"bbox must be .* got \[1, 2, 3, nan\]"),
        (put("annotations", "category_id", 91), r"\[1\].category_id is 91, which no entry of cat"),
        (put("annotations", "image_id", 5), r"\[1\].image_id is 5, which no entry of images has"),
        (put("images", "id", 1000), "the ids of images must all be different"),
        (put("images", "id", [1]), "the ids of images must all be integers, or all strings"),
        (put("categories", "id", "a"), "the ids of categories must all be integers, or all"),
        (put("images", "file_name", 5), r"images\[1\].file_name must be a string, got 5"),
        (put("annotations", "bbox", [1, 2, -3, 4]), r"bbox must be .* got \[1, 2, -3, 4\]"),
        (put("images", "file_name", "no.jpg"), "names the image .*train2017/no.jpg, which isn't"),
    ],
)
def test_incomplete_annotations_are_refused(data: Path, damage: Damage, message: str) -> None:
    path, content = load_annotations(data, "train")
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_split(data)


def test_a_file_that_is_not_json_is_refused(data: Path) -> None:
    path, _ = load_annotations(data, "train")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"can't read the annotations .*train2017\.json: Expect"):
        read_split(data)


def test_area_and_iscrowd_may_be_missing(data: Path) -> None:
    path, content = load_annotations(data, "val")
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    for number, annotation in enumerate(content["annotations"]):
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = number  # from 0, which pycocotools treats as "no match"
    path.write_text(json.dumps(content))
    annotations = read_split(data, "val")
    averages = average_precision(annotations.coco, perfect(annotations, annotations.categories))
    assert averages["box_AP"] == pytest.approx(100)
    assert averages["mask_AP"] == pytest.approx(100)


def edited(
    data: Path, edit: Callable[[dict[str, Any]], Any], masks: bool = True
) -> CocoAnnotations:
    path, content = load_annotations(data, "train")
    for annotation in content["annotations"]:
        edit(annotation)
    path.write_text(json.dumps(content))
    return read_split(data, masks=masks)


def test_a_dataset_without_objects_is_refused(data: Path) -> None:
    crowds = edited(data, lambda a: a.update(iscrowd=1))
    with pytest.raises(InputError, match=r"train2017\.json must have objects to train on"):
        TrainingDataset(crowds, masks=False)
    with pytest.raises(InputError, match=r"train2017\.json must have objects to evaluate on"):
        EvaluationDataset(crowds)


def test_without_masks_segmentations_are_neither_needed_nor_kept(data: Path) -> None:
    annotations = read_split(data, masks=False)
    assert not any("segmentation" in annotation for annotation in annotations.coco.anns.values())
    edited(data, lambda a: a.pop("segmentation"), masks=False)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [["a", "b"]],
        [[1, 2, 3, 4]],
        {"size": [80, 96], "counts": [3, 4]},
        {"size": [96, 80], "counts": [96 * 80]},
        {"size": [80, 96], "counts": [-1, 80 * 96 + 1]},
    ],
)
def test_masks_need_segmentations(data: Path, segmentation: Any) -> None:
    with pytest.raises(InputError, match=r"annotations\[0\] must have a segmentation"):
        edited(data, lambda a: a.update(segmentation=segmentation))


def test_compressed_rle_that_ends_early_is_refused(data: Path) -> None:
    path, content = load_annotations(data, "train")
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"size": sizes[annotation["image_id"]], "counts": "34"}
    path.write_text(json.dumps(content))
    with pytest.raises(SampleError, match=r"can't read annotations\[\d+\].segmentation"):
        TrainingDataset(read_split(data), masks=True)[0]


def test_an_image_of_another_size_is_refused(data: Path) -> None:
    path = next((data / "train2017").iterdir())
    for path in (data / "train2017").iterdir():
        Image.open(path).resize((50, 40)).save(path)
    with pytest.raises(SampleError, match=r"\.jpg has 50x40 pixels, but 96x80 in"):
        TrainingDataset(read_split(data), masks=False)[0]


def test_splits_of_unequal_categories_are_refused(data: Path) -> None:
    path, content = load_annotations(data, "val")
    content["categories"].append({"id": 91, "name": "more"})
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="must have the same categories; only one of them has 91"):
        check_same_categories(read_split(data), read_split(data, "val"))


@pytest.mark.parametrize("detector", ["fasterrcnn", "retinanet", "maskrcnn"])
def test_mixed_precision_keeps_the_boxes_in_float32(
    data: Path, tmp_path: Path, detector: str
) -> None:
    """bfloat16 would round coordinates beyond 256 to even numbers."""
    args = parse_arguments([str(data), "--detector", detector, "--min-size", "320"])
    model = build(args, read_split(data)).eval()
    model.score_thresh = 0.0  # RetinaNet's
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        [found] = model([torch.rand(3, 320, 480)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    boxes = found["boxes"][found["boxes"] > 256]
    assert len(boxes) > 0
    assert not torch.equal(boxes, boxes.bfloat16().float())


def test_16_bit_gray_images_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = np.asarray(read_image(str(tmp_path / "ramp.png")))
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(SampleError, match=r"can't read the image .*float\.tiff: its pixels"):
        read_image(str(tmp_path / "float.tiff"))
