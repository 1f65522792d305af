"""EPSANet as backbone of torchvision's detectors Faster R-CNN, RetinaNet and Mask R-CNN.

    from epsanet_fused.integrations.torchvision import fasterrcnn_epsanet50_fpn

    model = fasterrcnn_epsanet50_fpn(num_classes=3, weights_backbone="epsanet50.pth.tar")

The detectors are instances of torchvision's classes, with the same inputs and outputs. The defaults
are the setting of the published results (arXiv 2105.14447, table 4): stem, first stage and the
norms' statistics are frozen, and RetinaNet's P6 is computed from C5. The paper gives mmdetection's
counts of trainable parameters for EPSANet-50 and COCO's 80 categories. The counts of this module,
with the background as a further class (``num_classes=81``), are within 0.15 % of them:

============  ==========  ==========  =====================================================
detector      published   here        here minus mmdetection's
============  ==========  ==========  =====================================================
Faster R-CNN  38.56 M     38,515,548  -50,176 of norms, +4,100 of box regression
Mask R-CNN    41.20 M     41,159,085  -50,176, +4,100, +257 of the mask classifier
RetinaNet     34.78 M     34,747,829  -50,176, +20,745 of the classifier
============  ==========  ==========  =====================================================

mmdetection trains the norms' weights and biases, which are buffers in ``FrozenBatchNorm2d``.
torchvision's classes also predict box deltas, a mask and nine logits (RetinaNet) for background.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

try:
    from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import FrozenBatchNorm2d as _FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7
except ImportError as error:
    raise ImportError(
        "epsanet_fused.integrations.torchvision needs the package torchvision, in the version that "
        "goes with the installed torch: pip install torchvision"
    ) from error

from epsanet_fused.nn.checkpoint import check_fit, read_checkpoint
from epsanet_fused.nn.epsanet import ARCHITECTURES, EPSANet

StrPath = str | os.PathLike[str]


class FrozenBatchNorm2d(_FrozenBatchNorm2d):
    """torchvision's ``FrozenBatchNorm2d`` with an output in the input's dtype, also in autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) with the frozen statistics."""
        return super().forward(x).to(x.dtype)


_STAGES = ("layer1", "layer2", "layer3", "layer4")
_FPN_CHANNELS = 256


def epsanet_fpn_backbone(
    arch: str = "epsanet50",
    *,
    weights: StrPath | None = None,
    norm_layer: Callable[[int], nn.Module] = FrozenBatchNorm2d,
    trainable_layers: int = 3,
    returned_layers: Sequence[int] = (1, 2, 3, 4),
    extra_blocks: ExtraFPNBlock | None = None,
) -> BackboneWithFPN:
    """Build an EPSANet with a feature pyramid, like torchvision's ``resnet_fpn_backbone``.

    Args:
        arch: "epsanet50", "epsanet101", "epsanet50_large" or "epsanet101_large".
        weights: the path of an ImageNet checkpoint in any layout that ``ef.load_checkpoint`` reads;
            its classifier is ignored. None for random weights: then pass ``trainable_layers=5`` and
            ``norm_layer=nn.BatchNorm2d``, because frozen random layers can't learn.
        norm_layer: maps a channel count to a norm module of the network; the pyramid has no norms.
            ``nn.BatchNorm2d`` updates its statistics in training, also in frozen stages.
        trainable_layers: the number of stages to train, counted from the last, 0 to 4; 5 also
            trains the stem. The published 3 freezes the stem and ``layer1``.
        returned_layers: the stages, 1 to 4 in ascending order, that the pyramid uses.
        extra_blocks: computes further levels; None for ``LastLevelMaxPool``.

    Returns:
        A module with ``out_channels`` 256 that maps images (B, 3, H, W) to an ordered dict of
        (B, 256, H / s, W / s): "0", "1", ... with the strides s = 4, 8, 16, 32 of the returned
        layers, then the levels of ``extra_blocks``, by default "pool" with stride 64. Its ``body``
        is the network, with the parameter names of ``ef.EPSANet``.

    Raises:
        TypeError: if ``weights`` isn't a path, or ``extra_blocks`` isn't an ``ExtraFPNBlock``.
        ValueError: if another argument is out of range, or the weights don't fit.
        OSError: if the checkpoint can't be opened.
    """
    _check_arguments(arch, weights, trainable_layers, list(returned_layers))
    # The classifier is dropped below.
    network = EPSANet(num_classes=1, norm_layer=norm_layer, **ARCHITECTURES[arch])
    if weights is not None:
        _load_trunk(network, weights)
    last_first = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")
    trainable = last_first[: 6 if trainable_layers == 5 else trainable_layers]
    for name, child in network.named_children():
        child.requires_grad_(name in trainable)
    stages = [_STAGES[layer - 1] for layer in returned_layers]
    widths = [getattr(network, stage)[-1].conv3.out_channels for stage in stages]
    names = {stage: str(level) for level, stage in enumerate(stages)}
    return BackboneWithFPN(network, names, widths, _FPN_CHANNELS, extra_blocks)


def _load_trunk(network: EPSANet, path: StrPath) -> None:
    """Load a checkpoint without its classifier; the network is unchanged if it doesn't fit."""
    state, _ = read_checkpoint(path)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    check_fit(_required(network.state_dict()), _required(state), path)
    network.load_state_dict(state, strict=False)


def _required(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the classifier, and num_batches_tracked, which frozen norms don't have."""
    return {
        key: value
        for key, value in state.items()
        if not key.startswith("fc.") and not key.endswith(".num_batches_tracked")
    }


def _check_arguments(
    arch: str, weights: StrPath | None, trainable_layers: int, returned_layers: list[int]
) -> None:
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"epsanet_fpn_backbone: arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}"
        )
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"epsanet_fpn_backbone: weights must be the path of a checkpoint or None, "
            f"got {type(weights).__name__}"
        )
    if not _is_integer(trainable_layers) or not 0 <= trainable_layers <= 5:
        raise ValueError(
            f"epsanet_fpn_backbone: trainable_layers must be an integer of 0 to 5, where 5 trains "
            f"the stem, too, got {trainable_layers!r}"
        )
    stages = [layer for layer in range(1, 5) if layer in returned_layers]
    if not stages or returned_layers != stages:
        raise ValueError(
            f"epsanet_fpn_backbone: returned_layers must be integers of 1 to 4 in ascending order, "
            f"at least one of them, got {returned_layers}"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def fasterrcnn_epsanet50_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: StrPath | None = None,
    trainable_backbone_layers: int = 3,
    arch: str = "epsanet50",
    norm_layer: Callable[[int], nn.Module] = FrozenBatchNorm2d,
    **kwargs: Any,
) -> FasterRCNN:
    """Build Faster R-CNN on an EPSANet with a feature pyramid (published: box AP 39.2 on COCO).

    Args:
        num_classes: classes including the background, class 0: 91 for COCO's original category
            ids, 81 for its 80 categories numbered from 1.
        weights_backbone: path of an ImageNet checkpoint, the ``weights`` of
            ``epsanet_fpn_backbone``.
        trainable_backbone_layers: ``trainable_layers`` of ``epsanet_fpn_backbone``.
        arch: see ``epsanet_fpn_backbone``.
        norm_layer: see ``epsanet_fpn_backbone``.
        **kwargs: arguments of torchvision's ``FasterRCNN``: ``min_size``, ``box_score_thresh``, ...

    Returns:
        torchvision's ``FasterRCNN``. In training it maps a list of images (3, H, W) in [0, 1] and
        their targets, "boxes" (N, 4) as x1, y1, x2, y2 in pixels and "labels" (N,) in int64, to a
        dict of losses; in evaluation it maps images to a list of dicts with "boxes", "labels" and
        "scores".

    Raises:
        TypeError, ValueError, OSError: see ``epsanet_fpn_backbone``.
    """
    backbone = epsanet_fpn_backbone(
        arch,
        weights=weights_backbone,
        norm_layer=norm_layer,
        trainable_layers=trainable_backbone_layers,
    )
    return FasterRCNN(backbone, num_classes, **kwargs)


def maskrcnn_epsanet50_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: StrPath | None = None,
    trainable_backbone_layers: int = 3,
    arch: str = "epsanet50",
    norm_layer: Callable[[int], nn.Module] = FrozenBatchNorm2d,
    **kwargs: Any,
) -> MaskRCNN:
    """Build Mask R-CNN on an EPSANet with a feature pyramid (published: box AP 40.0, mask AP 35.9).

    Args:
        num_classes: see ``fasterrcnn_epsanet50_fpn``.
        weights_backbone: see ``fasterrcnn_epsanet50_fpn``.
        trainable_backbone_layers: see ``fasterrcnn_epsanet50_fpn``.
        arch: see ``epsanet_fpn_backbone``.
        norm_layer: see ``epsanet_fpn_backbone``.
        **kwargs: arguments of torchvision's ``MaskRCNN``.

    Returns:
        torchvision's ``MaskRCNN``: like Faster R-CNN, with "masks" (N, H, W), uint8, in the
        targets and "masks" (N, 1, H, W), in [0, 1], in the results.

    Raises:
        TypeError, ValueError, OSError: see ``epsanet_fpn_backbone``.
    """
    backbone = epsanet_fpn_backbone(
        arch,
        weights=weights_backbone,
        norm_layer=norm_layer,
        trainable_layers=trainable_backbone_layers,
    )
    return MaskRCNN(backbone, num_classes, **kwargs)


def retinanet_epsanet50_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: StrPath | None = None,
    trainable_backbone_layers: int = 3,
    arch: str = "epsanet50",
    norm_layer: Callable[[int], nn.Module] = FrozenBatchNorm2d,
    **kwargs: Any,
) -> RetinaNet:
    """Build RetinaNet on an EPSANet with a feature pyramid (published: box AP 38.2 on COCO).

    The pyramid's P6 is computed from C5, as published. torchvision's ``retinanet_resnet50_fpn``
    computes it from P5, which needs 4.1 M parameters less.

    Args:
        num_classes: see ``fasterrcnn_epsanet50_fpn``. RetinaNet has no background class, so class 0
            is unused unless objects have this label.
        weights_backbone: see ``fasterrcnn_epsanet50_fpn``.
        trainable_backbone_layers: see ``fasterrcnn_epsanet50_fpn``.
        arch: see ``epsanet_fpn_backbone``.
        norm_layer: see ``epsanet_fpn_backbone``.
        **kwargs: arguments of torchvision's ``RetinaNet``.

    Returns:
        torchvision's ``RetinaNet``; targets and results are those of Faster R-CNN.

    Raises:
        TypeError, ValueError, OSError: see ``epsanet_fpn_backbone``.
    """
    backbone = epsanet_fpn_backbone(
        arch,
        weights=weights_backbone,
        norm_layer=norm_layer,
        trainable_layers=trainable_backbone_layers,
        returned_layers=(2, 3, 4),
        extra_blocks=LastLevelP6P7(2048, _FPN_CHANNELS),
    )
    return RetinaNet(backbone, num_classes, **kwargs)
