"""Networks and images: ResNet-50 beside EPSANet-50, two photographs, calibrated BatchNorms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import epsanet_fused as ef

IMAGE_SIZE = 224
SEED = 2105_14447
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResNetBlock(ef.EPSABlock):
    """ResNet's bottleneck: a 3x3 convolution in place of the PSA module."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *args: Any, **options: Any):
        super().__init__(inplanes, planes, stride, *args, **options)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)


epsanet50 = functools.partial(ef.epsanet50, fused=False)
# The networks that EPSANet is compared with. They share its code; only the blocks differ.
BASELINES: dict[str, Callable[[], nn.Module]] = {
    "resnet50": functools.partial(ef.EPSANet, ResNetBlock, [3, 4, 6, 3]),
}


def baseline_of(provider: str) -> str | None:
    """Return the baseline that a provider such as "resnet50:eager" runs, or None for EPSANet."""
    name, colon, _ = provider.partition(":")
    return name if colon and name in BASELINES else None


def load_photos() -> Tensor:
    """Load scikit-learn's two sample photographs as (2, 3, 224, 224), normalised for ImageNet."""
    from sklearn.datasets import load_sample_images  # an optional dependency

    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    x = images.permute(0, 3, 1, 2).float() / 255  # (2, 3, 427, 640)
    edge = (x.shape[3] - x.shape[2]) // 2
    x = x[..., edge : edge + x.shape[2]]  # centre crop: (2, 3, 427, 427)
    x = F.interpolate(x, size=IMAGE_SIZE, mode="bilinear", antialias=True, align_corners=False)
    return (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def noise(*shape: int) -> Tensor:
    """Return standard normal values, the same ones each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def calibrated(build: Callable[[], nn.Module], images: Tensor) -> nn.Module:
    """Build a network in eval mode, with a fixed seed and the images' BatchNorm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = build()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # running statistics = the mean over all batches: here one batch
    with torch.no_grad():
        network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()
