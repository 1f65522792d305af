"""EPSANet, the network: a ResNet whose bottlenecks hold a PSA module for their 3x3 convolution."""

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
from epsanet_fused.utils.hooks import hooked

NormLayer = Callable[[int], nn.Module]


class EPSABlock(nn.Module):
    """Bottleneck with a PSA module in its middle (paper, section 3.3).

    Args:
        inplanes: channels of the input.
        planes: channels inside; the output has ``planes * expansion``.
        stride: of the PSA module.
        downsample: maps the input to the output's shape for the residual; None where they agree.
        norm_layer: makes a normalisation from a channel count; None means ``nn.BatchNorm2d``.
        conv_kernels, conv_groups, reduction: of the PSA module.
        fused: False builds the plain ``PSAModule``.

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
        self.drop_path: nn.Module | None = None  # what to do to the residual before it is added

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self._psa(out)))
        if self.drop_path is not None:
            out = self.drop_path(out)
        return self.relu(out + identity)

    def _psa(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript would compile both of an "and"
            if self._takes_norm_tail(x):
                return self.conv2.forward_norm(x, self.bn2)
        return self.relu(self.bn2(self.conv2(x)))

    def _takes_norm_tail(self, x: Tensor) -> bool:
        """Whether psa_tail_norm does what conv2, bn2 and relu would do here, and is to do it."""
        return (
            self.bn2.training
            and _is_plainly(self.conv2, FusedPSAModule)
            and _is_plainly(self.bn2, nn.BatchNorm2d)
            and _is_plainly(self.relu, nn.ReLU)
            and not isinstance(x, torch.fx.Proxy)  # a tracer can't take a norm for an argument
            and fuses_norm_by_default(x.device.type)
        )


def _is_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class does: no subclass, no hook.

    A parametrised module is a subclass.
    """
    return type(module) is kind and "forward" not in vars(module) and not hooked(module)


class EPSALargeBlock(EPSABlock):
    """The wide block of the Large networks: twice the planes, half the expansion."""

    expansion = 2


class EPSANet(nn.Module):
    """EPSANet (arXiv 2105.14447, table 2): stem, four stages of blocks, pooling and classifier.

    Args:
        block: ``EPSABlock`` or a subclass of it.
        layers: the number of blocks in each of the four stages.
        num_classes: the width of the classifier.
        in_chans: channels of the images.
        planes: of the blocks in each stage; the default is EPSANet (Small).
        norm_layer: makes a normalisation from a channel count; None means ``nn.BatchNorm2d``.
        conv_kernels, conv_groups, reduction: of every PSA module.
        fused: False builds plain ``PSAModule``s.

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

    def forward(self, x: Tensor) -> Tensor:
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
    """Convolutions from a normal distribution of variance 2 / (k * k * out); norms at identity."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
            nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


# The authors published the sizes of Large, not the network. This choice is ours: it meets all four
# published figures (27.90 M and 49.59 M parameters, 4.72 and 8.97 GFLOPs), and so would others.
_LARGE = {
    "block": EPSALargeBlock,
    "planes": (128, 256, 512, 1024),
    "conv_kernels": (3, 5, 5, 7),
    "conv_groups": (32, 32, 32, 32),
}

# The arguments of EPSANet that make each of the published networks.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "epsanet50": {"block": EPSABlock, "layers": (3, 4, 6, 3)},
    "epsanet101": {"block": EPSABlock, "layers": (3, 4, 23, 3)},
    "epsanet50_large": _LARGE | {"layers": (3, 4, 6, 3)},
    "epsanet101_large": _LARGE | {"layers": (3, 4, 23, 3)},
}


def epsanet50(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """EPSANet-50 (Small): 22,561,715 parameters, 3.62 GFLOPs at 224x224.

    Args:
        num_classes: the width of the classifier.
        fused: False builds plain ``PSAModule``s.
        **options: any other keyword of ``EPSANet``.
    """
    return _build("epsanet50", num_classes, fused, options)


def epsanet101(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """EPSANet-101 (Small): 38,900,279 parameters, 6.82 GFLOPs. Arguments as for ``epsanet50``."""
    return _build("epsanet101", num_classes, fused, options)


def epsanet50_large(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """EPSANet-50 (Large), *as we read it*: 27,899,518 parameters, 4.72 GFLOPs.

    The authors never released Large. Kernels 3, 5, 5, 7 with 32 groups each are our choice among
    those that fit the published figures; pass ``conv_kernels`` and ``conv_groups`` for another.
    Arguments as for ``epsanet50``.
    """
    return _build("epsanet50_large", num_classes, fused, options)


def epsanet101_large(num_classes: int = 1000, fused: bool = True, **options: Any) -> EPSANet:
    """EPSANet-101 (Large), *as we read it*: 49,592,198 parameters, 8.97 GFLOPs.

    See ``epsanet50_large`` for what is known of Large. Arguments as for ``epsanet50``.
    """
    return _build("epsanet101_large", num_classes, fused, options)


def _build(name: str, num_classes: int, fused: bool, options: dict[str, Any]) -> EPSANet:
    return EPSANet(num_classes=num_classes, fused=fused, **ARCHITECTURES[name] | options)
