"""recipes/detection.py --eval agrees with a plain loop, in one process and in two."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import load_annotations, write_backbone, write_coco
from helpers.processes import run_recipe
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from epsanet_fused.integrations.torchvision import (
    fasterrcnn_epsanet50_fpn,
    maskrcnn_epsanet50_fpn,
    retinanet_epsanet50_fpn,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # pycocotools is compiled for an older NumPy, whose __array__ has no argument "copy".
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
]

BUILDERS = {
    "fasterrcnn": fasterrcnn_epsanet50_fpn,
    "retinanet": retinanet_epsanet50_fpn,
    "maskrcnn": maskrcnn_epsanet50_fpn,
}
SMALL = ("--min-size", 96, "--max-size", 128, "--device", "cpu")
CATEGORIES = [3, 7, 40]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that is removed after the module: a checkpoint takes 160 MB."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Path:
    write_backbone(folder / "epsanet50.pth.tar")
    return folder / "epsanet50.pth.tar"


def make_model(detector: str, backbone: Path) -> nn.Module:
    """Build a detector whose heads are untrained, with scores high enough to give detections."""
    torch.manual_seed(0)
    model = BUILDERS[detector](
        num_classes=4, weights_backbone=backbone, min_size=96, max_size=128
    ).eval()
    if detector == "retinanet":
        nn.init.normal_(model.head.classification_head.cls_logits.bias, -1.0)
    return model


def detect(model: nn.Module, data: Path) -> dict[int, dict[str, Tensor]]:
    """Return the model's detections by image id; the images are read with Pillow and NumPy."""
    found = {}
    for entry in load_annotations(data, "val")[1]["images"]:
        pixels = np.asarray(Image.open(data / "val2017" / entry["file_name"])) / np.float32(255)
        with torch.no_grad():
            found[entry["id"]] = model([torch.from_numpy(pixels).permute(2, 0, 1)])[0]
    return found


def write_similar_objects(data: Path, found: dict[int, dict[str, Tensor]]) -> None:
    """Replace the annotated objects by ones near the detections, for an average precision above 0.

    Every third detection becomes an object; boxes are up to 10 % wider, masks a pixel to the right.
    """
    path, content = load_annotations(data, "val")
    crowds = [a for a in content["annotations"] if a["iscrowd"]]
    content["annotations"] = crowds
    for image_id, one in found.items():
        for n in range(0, min(len(one["boxes"]), 30), 3):
            x1, y1, x2, y2 = one["boxes"][n].tolist()
            label = one["labels"][n].item()
            if label == 0:
                continue
            box = [x1, y1, (x2 - x1) * (1 + n / 300), y2 - y1]
            annotation = {"image_id": image_id, "category_id": CATEGORIES[label - 1], "bbox": box}
            if "masks" in one:
                annotation["segmentation"] = encoded(one["masks"][n, 0].roll(1, dims=1))
            annotation |= {"id": 7000 + len(content["annotations"]), "iscrowd": 0}
            content["annotations"].append(annotation | {"area": box[2] * box[3]})
    path.write_text(json.dumps(content))


def encoded(mask: Tensor) -> dict[str, Any]:
    """Return a mask (H, W) in [0, 1] as compressed RLE."""
    code = rle.encode(np.asfortranarray((mask > 0.5).numpy().astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def expected_results(found: dict[int, dict[str, Tensor]], kind: str) -> list[dict[str, Any]]:
    """Return the detections as COCO results of "box" or "mask"."""
    results = []
    for image_id, one in found.items():
        if kind == "mask" and "masks" not in one:
            continue
        for n, label in enumerate(one["labels"].tolist()):
            if label == 0:
                continue
            x1, y1, x2, y2 = one["boxes"][n].tolist()
            result = {"image_id": image_id, "category_id": CATEGORIES[label - 1]}
            result["score"] = one["scores"][n].item()
            if kind == "box":
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                result["segmentation"] = encoded(one["masks"][n, 0])
            results.append(result)
    return results


def expected_averages(data: Path, found: dict[int, dict[str, Tensor]]) -> dict[str, float]:
    """Compute the average precisions as pycocotools' demo does."""
    annotations = COCO(str(load_annotations(data, "val")[0]))
    averages = {}
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        if results := expected_results(found, kind):
            evaluation = COCOeval(annotations, annotations.loadRes(results), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
            pairs = zip(names, evaluation.stats, strict=False)
            averages |= {f"{kind}_{name}": 100 * value for name, value in pairs}
    return averages


def averages_in(stdout: str) -> dict[str, float]:
    pairs = re.findall(r"(\w+_AP\w*) (\S+)", stdout)
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("detector", BUILDERS)
def test_average_precision(detector: str, folder: Path, backbone: Path, tmp_path: Path) -> None:
    """One process and two print the numbers of a plain loop."""
    data, model = write_coco(tmp_path / "data", train=1, val=4), make_model(detector, backbone)
    found = detect(model, data)
    write_similar_objects(data, found)
    checkpoint = folder / f"{detector}.pth.tar"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    options = ("--detector", detector, "--eval", "--resume", checkpoint, *SMALL)
    one = run_recipe("detection.py", data, *options, "--workers", 1)
    two = run_recipe("detection.py", data, *options, "--workers", 0, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert "evaluate: 100%" in one.stderr
    expected = expected_averages(data, found)
    assert 1 < expected["box_AP"] < 90
    assert ("mask_AP" in expected) == (detector == "maskrcnn")
    reported = averages_in(one.stdout)
    assert reported.keys() == expected.keys()
    for name, value in expected.items():
        assert reported[name] == pytest.approx(value, abs=1e-3) or (
            value == -100 and math.isnan(reported[name])
        ), name
    assert two.stdout == one.stdout
    checkpoint.unlink()


def test_other_categories_are_refused(folder: Path, backbone: Path, tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", train=1, val=2)
    state = make_model("retinanet", backbone).state_dict()
    checkpoint = folder / "other.pth.tar"
    torch.save({"state_dict": state, "options": {"categories": [1, 2, 3]}}, checkpoint)
    options = ("--detector", "retinanet", "--eval", "--resume", checkpoint, *SMALL)
    done = run_recipe("detection.py", data, *options)
    assert done.returncode == 2
    assert "was trained on the categories [1, 2, 3], and " in done.stderr
    assert done.stderr.strip().endswith("has [3, 7, 40]")
    assert "Traceback" not in done.stderr
