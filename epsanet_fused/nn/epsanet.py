"""EPSANet: a ResNet with a PSA module in place of the 3x3 convolution of each bottleneck."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from epsanet_fused.nn.fused_psa import FusedPSAModule
from epsanet_fused.nn.psa import CONV_GROUPS, CONV_KERNELS, PSAModule
from epsanet_fused.ops.psa_tail_norm import fuses_norm_by_default
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import is_unmodified

NormLayer = Callable[[int], nn.Module]


class EPSABlock(nn.Module):
    """Bottleneck of 1x1 convolution, PSA module and 1x1 convolution (paper, section 3.3).

    Args:
        inplanes: number of input channels.
        planes: number of channels of the PSA module; the output has ``planes * expansion``.
        stride: stride of the PSA module.
        downsample: module that maps the input to the shape of the output, for the shortcut; None
            if the two shapes are equal.
        norm_layer: function from a number of channels to a norm; None means ``nn.BatchNorm2d``.
        conv_kernels: kernel sizes of the PSA module.
        conv_groups: groups of the PSA module.
        reduction: reduction of the PSA module's SE.
        fused: True builds a ``FusedPSAModule``, False the plain ``PSAModule``.

    Raises:
        ValueError: if the PSA module cannot be built (see ``PSAModule``).

    Shape: (B, inplanes, H, W) -> (B, planes * expansion, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: NormLayer | None = None,
        conv_kernels: Sequence[int] = CONV_KERNELS,
        conv_groups: Sequence[int] = CONV_GROUPS,
        *,
        reduction: int = 16,
        fused: bool = True,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        psa = FusedPSAModule if fused else PSAModule
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = psa(planes, planes, conv_kernels, stride, conv_groups, reduction=reduction)
        self.bn2 = norm_layer(planes)
        self.conv3 = nn.Conv2d(planes, outplanes, kernel_size=1, bias=False)
        self.bn3 = norm_layer(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.drop_path: nn.Module | None = None  # applied before the shortcut is added

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (B, planes * expansion, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self._psa_norm_relu(out)))
        if self.drop_path is not None:
            out = self.drop_path(out)
        return self.relu(out + identity)

    def _psa_norm_relu(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles both sides of "and"
            if self._uses_fused_norm(x):
                return self.conv2.forward_norm(x, self.bn2)  # type: ignore[operator]
        return self.relu(self.bn2(self.conv2(x)))

    def _uses_fused_norm(self, x: Tensor) -> bool:
        """Return whether ``psa_tail_norm`` runs conv2's tail, bn2 and relu as one.

        True in training mode, if all three are of exactly these classes and without hooks, and the
        backend fuses the norm by default.
        """
        return (
            self.bn2.training
            and is_unmodified(self.conv2, FusedPSAModule)
            and self.conv2.reads_se()  # type: ignore[operator]
            and is_unmodified(self.bn2, nn.BatchNorm2d)
            and is_unmodified(self.relu, nn.ReLU)
            and not isinstance(x, torch.fx.Proxy)  # an fx graph cannot hold a norm as an argument
            and fuses_norm_by_default(x.device.type)
        )


class EPSALargeBlock(EPSABlock):
    """Block of the Large networks: twice the planes of ``EPSABlock``, half the expansion."""

    expansion = 2


class EPSANet(nn.Module):
    """EPSANet (arXiv 2105.14447, table 2): stem, four stages of blocks, pooling and classifier.

    Args:
        block: ``EPSABlock`` or a subclass of it.
        layers: number of blocks in each of the four stages.
        num_classes: number of outputs of the classifier.
        in_chans: number of image channels.
        planes: ``planes`` of the blocks in each stage; the default is EPSANet (Small).
        norm_layer: function from a number of channels to a norm; None means ``nn.BatchNorm2d``.
        conv_kernels: kernel sizes of every PSA module.
        conv_groups: groups of every PSA module.
        reduction: reduction of every PSA module's SE.
        fused: True builds ``FusedPSAModule``s, False plain ``PSAModule``s.

    Raises:
        ValueError: if there are not four stages of at least one block, an image has no channel, or
            a PSA module cannot be built (see ``PSAModule``).

    Shape: images (B, in_chans, H, W) -> logits (B, num_classes).
    """

    def __init__(
        self,
        block: type[EPSABlock],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        planes: Sequence[int] = (64, 128, 256, 512),
        norm_layer: NormLayer | None = None,
        conv_kernels: Sequence[int] = CONV_KERNELS,
        conv_groups: Sequence[int] = CONV_GROUPS,
        reduction: int = 16,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or len(planes) != 4 or min(layers) < 1:
            raise ValueError(
                f"EPSANet: layers and planes must have four entries, one per stage, each of layers "
                f"at least 1, got {tuple(layers)} and {tuple(planes)}"
            )
        if in_chans < 1:
            raise ValueError(f"EPSANet: in_chans must be at least 1, got {in_chans}")
        norm_layer = norm_layer or nn.BatchNorm2d
        options = {
            "norm_layer": norm_layer,
            "conv_kernels": conv_kernels,
            "conv_groups": conv_groups,
            "reduction": reduction,
            "fused": fused,
        }
        widths = [64, *(p * block.expansion for p in planes)]
        self.conv1 = nn.Conv2d(in_chans, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _make_stage(block, widths[0], planes[0], layers[0], 1, options)
        self.layer2 = _make_stage(block, widths[1], planes[1], layers[1], 2, options)
        self.layer3 = _make_stage(block, widths[2], planes[2], layers[2], 2, options)
        self.layer4 = _make_stage(block, widths[3], planes[3], layers[3], 2, options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[4], num_classes)
        _init_weights(self)

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of the images ``x`` (B, in_chans, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 64, H / 4, W / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, width, H / 32, W / 32)
        return self.fc(self.avgpool(x).flatten(1))


def _make_stage(
    block: type[EPSABlock],
    inplanes: int,
    planes: int,
    depth: int,
    stride: int,
    options: dict[str, Any],
) -> nn.Sequential:
    """Build ``depth`` blocks; the first has the stride and changes the number of channels."""
    outplanes = planes * block.expansion
    downsample = None
    if stride != 1 or inplanes != outplanes:
        downsample = nn.Sequential(
            nn.Conv2d(inplanes, outplanes, kernel_size=1, stride=stride, bias=False),
            options["norm_layer"](outplanes),
        )
    first = block(inplanes, planes, stride, downsample, **options)
    return nn.Sequential(first, *(block(outplanes, planes, **options) for _ in range(1, depth)))


def _init_weights(model: nn.Module) -> None:
    """Draw convolutions from N(0, 2 / (k * k * out_channels)) and set each norm to the identity."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
            nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


# The authors published the size of the Large networks but not their kernels and groups. This choice
# is ours. It meets all four published numbers (27.90 M and 49.59 M parameters, 4.72 and 8.97
# GFLOPs); other choices meet them too.
_LARGE = {
    "block": EPSALargeBlock,
    "planes": (128, 256, 512, 1024),
    "conv_kernels": (3, 5, 5, 7),
    "conv_groups": (32, 32, 32, 32),
}

# Arguments of EPSANet for each published network.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "epsanet50": {"block": EPSABlock, "layers": (3, 4, 6, 3)},
    "epsanet101": {"block": EPSABlock, "layers": (3, 4, 23, 3)},
    "epsanet50_large": _LARGE | {"layers": (3, 4, 6, 3)},
    "epsanet101_large": _LARGE | {"layers": (3, 4, 23, 3)},
}


def epsanet50(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """Build EPSANet-50 (Small): 22,561,715 parameters, 3.62 GFLOPs at 224x224.

    Args:
        num_classes: number of outputs of the classifier.
        fused: True builds ``FusedPSAModule``s, False plain ``PSAModule``s.
        **options: any other keyword argument of ``EPSANet``.
    """
    return _build("epsanet50", num_classes, fused, options)


def epsanet101(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """Build EPSANet-101 (Small): 38,900,279 parameters, 6.82 GFLOPs at 224x224.

    Arguments as for ``epsanet50``.
    """
    return _build("epsanet101", num_classes, fused, options)


def epsanet50_large(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """Build EPSANet-50 (Large), *our reading of it*: 27,899,518 parameters, 4.72 GFLOPs.

    The authors did not release the Large networks. Kernels 3, 5, 5, 7 with 32 groups each are our
    choice among those that meet the published numbers; ``conv_kernels`` and ``conv_groups`` select
    another. Arguments as for ``epsanet50``.
    """
    return _build("epsanet50_large", num_classes, fused, options)


def epsanet101_large(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """Build EPSANet-101 (Large), *our reading of it*: 49,592,198 parameters, 8.97 GFLOPs.

    Kernels and groups are those of ``epsanet50_large``. Arguments as for ``epsanet50``.
    """
    return _build("epsanet101_large", num_classes, fused, options)


def _build(name: str, num_classes: int, fused: bool, options: dict[str, Any]) -> EPSANet:
    return EPSANet(num_classes=num_classes, fused=fused, **ARCHITECTURES[name] | options)
