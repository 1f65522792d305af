"""Average precision of boxes and masks, by pycocotools."""

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

# The first of what COCOeval sums up; S, M, L: objects of below 32^2, to 96^2, and more pixels.
AVERAGES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_IOU_TYPES = {"box": "bbox", "mask": "segm"}


def results_of(
    image_id: Any, found: dict[str, Tensor], categories: Sequence[int]
) -> dict[str, list[Result]]:
    """What a detector found in an image, in COCO's format of results.

    Args:
        image_id: as in the annotations.
        found: "boxes" (N, 4) as x1, y1, x2, y2, "labels" (N,), "scores" (N,), and of detectors that
            have them "masks" (N, 1, H, W) of 0 to 1.
        categories: label 1 is the first of them; others than theirs are left out.

    Returns:
        {"box": results with a "bbox"}, and with masks "mask": results with a "segmentation".
    """
    boxes, labels, scores = (found[key].tolist() for key in ("boxes", "labels", "scores"))
    results: dict[str, list[Result]] = {"box": []}
    if "masks" in found:
        results["mask"] = []
        masks = (found["masks"][:, 0] > 0.5).byte().cpu().numpy()  # (N, H, W)
    for n, ((x1, y1, x2, y2), label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
        if not 1 <= label <= len(categories):
            continue
        common = {"image_id": image_id, "category_id": categories[label - 1], "score": score}
        results["box"].append(common | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
        if "masks" in found:
            # Without a box: pycocotools would take the area from that.
            results["mask"].append(
                common | {"segmentation": rle.encode(np.asfortranarray(masks[n]))}
            )
    return results


def average_precision(truth: COCO, results: dict[str, list[Result]]) -> dict[str, float]:
    """Percentages box_AP, box_AP50, ... and mask_AP, ... if there are masks; NaN without objects.

    Args:
        truth: the annotations.
        results: of all images, as ``results_of`` returns them.
    """
    averages = {}
    for kind, entries in results.items():
        with redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, _loaded(truth, entries), _IOU_TYPES[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for name, value in zip(AVERAGES, evaluation.stats.tolist(), strict=False):
            averages[f"{kind}_{name}"] = 100 * value if value >= 0 else math.nan
    return averages


def _loaded(truth: COCO, results: list[Result]) -> COCO:
    if results:
        return truth.loadRes(results)
    nothing = COCO()  # loadRes needs a first result to tell their kind
    nothing.dataset = truth.dataset | {"annotations": []}
    nothing.createIndex()
    return nothing
