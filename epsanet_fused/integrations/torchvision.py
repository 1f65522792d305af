"""EPSANet under torchvision's detectors: an FPN backbone, Faster R-CNN, RetinaNet and Mask R-CNN.

    from epsanet_fused.integrations.torchvision import fasterrcnn_epsanet50_fpn

    model = fasterrcnn_epsanet50_fpn(num_classes=3, weights_backbone="epsanet50.pth.tar")

The detectors are torchvision's own classes and take and return what those do. The defaults are the
setting of the published results (arXiv 2105.14447, table 4): stem and first stage frozen, the
norms' statistics frozen, RetinaNet's P6 made from C5. What is published for EPSANet-50 and the 80
categories of COCO are mmdetection's counts of trainable parameters; ours, with the background as
one class more, ``num_classes=81``, are within 0.15 % of them:

============  ==========  ==========  =====================================================
detector      published   ours        ours less mmdetection's
============  ==========  ==========  =====================================================
Faster R-CNN  38.56 M     38,515,548  -50,176 of norms, +4,100 of box regression
Mask R-CNN    41.20 M     41,159,085  -50,176, +4,100, +257 of the mask classifier
RetinaNet     34.78 M     34,747,829  -50,176, +20,745 of the classifier
============  ==========  ==========  =====================================================

mmdetection trains the norms' weights and biases, which are buffers of ``FrozenBatchNorm2d``; and
these classes of torchvision's have box deltas, a mask and (RetinaNet) nine logits for the
background, too.
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
    """torchvision's, in the dtype of its input, which under autocast torchvision's is not."""

    def forward(self, x: Tensor) -> Tensor:
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
    """An EPSANet with a feature pyramid on top, as torchvision's ``resnet_fpn_backbone``.

    Args:
        arch: "epsanet50", "epsanet101", "epsanet50_large" or "epsanet101_large".
        weights: an ImageNet checkpoint, in any layout that ``ef.load_checkpoint`` reads; its
            classifier, of whatever width, is left out. None: random weights, for which to freeze
            nothing and to pass ``norm_layer=nn.BatchNorm2d``.
        norm_layer: of the network; the pyramid has none. A norm with statistics of its own keeps
            updating them in training, also in frozen stages.
        trainable_layers: how many stages to train, counted from the last: 0 to 5, where 5 is all
            four and the stem. The published 3 leaves the stem and ``layer1`` frozen.
        returned_layers: which stages, 1 to 4 and ascending, go into the pyramid.
        extra_blocks: makes further levels; None means ``LastLevelMaxPool``.

    Returns:
        A module with ``out_channels`` 256, that maps images (B, 3, H, W) to an ordered dict of
        (B, 256, H / s, W / s): "0", "1", ... with the strides s = 4, 8, 16, 32 of the returned
        layers, then the levels of ``extra_blocks``: "pool", of stride 64, by default. The network
        is its ``body``, with the names of ``ef.EPSANet``.

    Raises:
        TypeError, ValueError: if an argument isn't one of these, or the weights don't fit.
    """
    _check(arch, weights, trainable_layers, list(returned_layers))
    # The classifier is dropped below.
    network = EPSANet(num_classes=1, norm_layer=norm_layer, **ARCHITECTURES[arch])
    if weights is not None:
        _load_trunk(network, weights)
    trainable = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")
    trainable = trainable[: 6 if trainable_layers == 5 else trainable_layers]
    for name, child in network.named_children():
        child.requires_grad_(name in trainable)
    stages = [_STAGES[layer - 1] for layer in returned_layers]
    widths = [network.get_submodule(stage)[-1].conv3.out_channels for stage in stages]
    names = {stage: str(level) for level, stage in enumerate(stages)}
    return BackboneWithFPN(network, names, widths, _FPN_CHANNELS, extra_blocks)


def _load_trunk(network: EPSANet, path: StrPath) -> None:
    """All of a checkpoint but the classifier; the network is changed only if all of that fits."""
    state, _ = read_checkpoint(path)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    check_fit(_needed(network.state_dict()), _needed(state), path)
    network.load_state_dict(state, strict=False)


def _needed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the classifier, and without the count of batches, which frozen norms don't have."""
    return {
        key: value
        for key, value in state.items()
        if not key.startswith("fc.") and not key.endswith(".num_batches_tracked")
    }


def _check(
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
    """Faster R-CNN on an EPSANet with a feature pyramid (published: box AP 39.2 on COCO).

    Args:
        num_classes: the background, class 0, included: 91 for COCO's category ids as they are, 81
            for the 80 of them that exist.
        weights_backbone: the ``weights`` of ``epsanet_fpn_backbone``: an ImageNet checkpoint.
        trainable_backbone_layers: the ``trainable_layers`` of ``epsanet_fpn_backbone``.
        arch, norm_layer: see ``epsanet_fpn_backbone``.
        **kwargs: of torchvision's ``FasterRCNN``: ``min_size``, ``box_score_thresh``, ...

    Returns:
        torchvision's ``FasterRCNN``: in training it maps a list of images (3, H, W) in 0 to 1 and
        their targets, "boxes" (N, 4) as x1, y1, x2, y2 in pixels and "labels" (N,) in int64, to a
        dict of losses; in evaluation, images to a list of dicts: "boxes", "labels", "scores".
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
    """Mask R-CNN on an EPSANet with a feature pyramid (published: box AP 40.0, mask AP 35.9).

    Args:
        num_classes, weights_backbone, trainable_backbone_layers, arch, norm_layer: see
            ``fasterrcnn_epsanet50_fpn``.
        **kwargs: of torchvision's ``MaskRCNN``.

    Returns:
        torchvision's ``MaskRCNN``: as Faster R-CNN, with "masks" in the targets, (N, H, W) in
        uint8, and in the results, (N, 1, H, W) in 0 to 1.
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
    """RetinaNet on an EPSANet with a feature pyramid (published: box AP 38.2 on COCO).

    The pyramid's P6 is made from C5, as published. (torchvision's ``retinanet_resnet50_fpn`` makes
    it from P5, which takes 4.1 M parameters less.)

    Args:
        num_classes, weights_backbone, trainable_backbone_layers, arch, norm_layer: see
            ``fasterrcnn_epsanet50_fpn``. Nothing is learnt for class 0, but as a label of objects.
        **kwargs: of torchvision's ``RetinaNet``.

    Returns:
        torchvision's ``RetinaNet``: targets and results are those of Faster R-CNN.
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
