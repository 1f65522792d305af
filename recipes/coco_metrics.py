"""Average precision of boxes and masks, computed by pycocotools."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

Result = dict[str, Any]

# The first six of COCOeval's stats. s, m, l: objects below 32^2, below 96^2, and of more pixels.
AVERAGES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_IOU_TYPES = {"box": "bbox", "mask": "segm"}


def to_coco_results(
    image_id: Any, detections: dict[str, Tensor], categories: Sequence[int]
) -> dict[str, list[Result]]:
    """Convert the detections of one image to COCO's format of results.

    Args:
        image_id: the image's id in the annotations.
        detections: "boxes" (N, 4) as x1, y1, x2, y2, "labels" (N,), "scores" (N,), and optionally
            "masks" (N, 1, H, W) in [0, 1].
        categories: the category id of label 1, label 2, ...; other labels are dropped.

    Returns:
        Under "box" results with a "bbox"; with masks, under "mask" results with a "segmentation".
    """
    boxes, labels, scores = (detections[key].tolist() for key in ("boxes", "labels", "scores"))
    results: dict[str, list[Result]] = {"box": []}
    if "masks" in detections:
        results["mask"] = []
        masks = (detections["masks"][:, 0] > 0.5).byte().cpu().numpy()  # (N, H, W)
    for n, ((x1, y1, x2, y2), label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
        if not 1 <= label <= len(categories):
            continue
        common = {"image_id": image_id, "category_id": categories[label - 1], "score": score}
        results["box"].append(common | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
        if "masks" in detections:
            # No "bbox": pycocotools would compute the area from it instead of from the mask.
            mask = rle.encode(np.asfortranarray(masks[n]))
            results["mask"].append(common | {"segmentation": mask})
    return results


def average_precision(annotations: COCO, results: dict[str, list[Result]]) -> dict[str, float]:
    """Return the average precisions in percent.

    Args:
        annotations: the expected objects.
        results: the results of all images, in the form that ``to_coco_results`` returns.

    Returns:
        box_AP, box_AP50, ..., and mask_AP, ... if ``results`` has masks. A value is NaN if there is
        no object of its size.
    """
    averages = {}
    for kind, entries in results.items():
        with redirect_stdout(io.StringIO()):
            evaluation = COCOeval(annotations, _load(annotations, entries), _IOU_TYPES[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for name, value in zip(AVERAGES, evaluation.stats.tolist(), strict=False):
            averages[f"{kind}_{name}"] = 100 * value if value >= 0 else math.nan
    return averages


def _load(annotations: COCO, results: list[Result]) -> COCO:
    if results:
        return annotations.loadRes(results)
    empty = COCO()  # loadRes fails on an empty list
    empty.dataset = annotations.dataset | {"annotations": []}
    empty.createIndex()
    return empty
