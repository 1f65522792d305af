"""The networks that EPSANet is compared with. They share its code; only the blocks differ."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import epsanet_fused as ef


class ResNetBlock(ef.EPSABlock):
    """ResNet's bottleneck: a 3x3 convolution in place of the PSA module."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *args: Any, **options: Any):
        super().__init__(inplanes, planes, stride, *args, **options)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)


class SEResNetBlock(ResNetBlock):
    """ResNet's bottleneck with squeeze and excitation of the residual (arXiv 1709.01507, fig 3)."""

    def __init__(self, inplanes: int, planes: int, *args: Any, **options: Any):
        super().__init__(inplanes, planes, *args, **options)
        self.bn3 = nn.Sequential(self.bn3, SqueezeExcite(planes * self.expansion))


class SqueezeExcite(nn.Module):
    """The product of x and the SE weights of its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se = ef.SEWeightModule(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x)


def _network50(block: type[ef.EPSABlock]) -> nn.Module:
    return ef.EPSANet(block, [3, 4, 6, 3])


BASELINES: dict[str, Callable[[], nn.Module]] = {
    "resnet50": functools.partial(_network50, ResNetBlock),
    "seresnet50": functools.partial(_network50, SEResNetBlock),
}


def baseline_of(provider: str) -> str | None:
    """Return the baseline that a provider such as "resnet50:eager" runs, or None for EPSANet."""
    name, colon, _ = provider.partition(":")
    return name if colon and name in BASELINES else None
