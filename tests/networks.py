"""Small networks in eval mode for tests, with BatchNorms that have seen something."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import epsanet_fused as ef


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Norms with the images' statistics and uneven parameters: none is near the identity.

    What a block adds to its input is smaller than that, as in trained networks; else 33 blocks of
    noise would blow up any rounding.
    """
    generator = torch.Generator().manual_seed(0)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.momentum = None
        size = 0.2 if name.endswith("bn3") else 1.0
        nn.init.uniform_(norm.weight, 0.5 * size, 1.5 * size, generator=generator)
        nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


class ResNetBlock(ef.EPSABlock):
    """ResNet's bottleneck: a 3x3 convolution for the PSA module."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *args, **options) -> None:
        super().__init__(inplanes, planes, stride, *args, **options)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)


class OfficialBlock(nn.Module):
    """A block as the official code has it, by no class of this package but the reference's SE."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = OfficialPSA(planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if inplanes != 4 * planes:
            conv = nn.Conv2d(inplanes, 4 * planes, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += residual
        return self.relu(out)


class OfficialPSA(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        for i, (k, groups) in enumerate(zip((3, 5, 7, 9), (1, 4, 8, 16), strict=True), 1):
            conv = nn.Conv2d(planes, planes // 4, k, padding=k // 2, groups=groups, bias=False)
            setattr(self, f"conv_{i}", conv)
        self.se = ef.SEWeightModule(planes // 4)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]
        weights = torch.stack([self.se(branch) for branch in branches], 1).softmax(1)
        return torch.cat([b * w for b, w in zip(branches, weights.unbind(1), strict=True)][::-1], 1)


def small(block: type[ef.EPSABlock] = ef.EPSABlock) -> ef.EPSANet:
    """Five blocks, two of them in one stage."""
    torch.manual_seed(0)
    model = ef.EPSANet(block, (1, 2, 1, 1), 5, planes=(64, 64, 64, 128))
    return calibrate(model, torch.randn(4, 3, 64, 64))


def official() -> nn.Module:
    """A network of another package whose blocks are built like the official ones."""
    torch.manual_seed(0)
    return calibrate(nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), OfficialBlock(64, 64),
                                   OfficialBlock(256, 64)), torch.randn(4, 3, 32, 32))  # fmt: skip
