"""``fuse`` warns of no block whose convolutions follow one another or are gated one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.psa_variants import SE, OfficialPSA
from torch import Tensor, nn

import epsanet_fused as ef


class SEBasicBlock(nn.Module):
    """A residual block; its first convolution and its shortcut have one input and equal shapes."""

    def __init__(self, C_in: int, C: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(C)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(C)
        self.se = SE(C)
        self.downsample = nn.Conv2d(C_in, C, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out * self.se(out) + self.downsample(x)).relu()


class InvertedResidual(nn.Module):
    """A block of MobileNetV3 or EfficientNet, with a Swish written by hand."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(C, 4 * C, 1)
        self.depthwise = nn.Conv2d(4 * C, 4 * C, 3, padding=1, groups=4 * C)
        self.bn = nn.BatchNorm2d(4 * C)
        self.se = SE(4 * C)
        self.project = nn.Conv2d(4 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(x)
        out = out * out.sigmoid()
        out = self.bn(self.depthwise(out))
        out = out * out.sigmoid()
        return x + self.project(out * self.se(out))


class Attention(nn.Module):
    """Three convolutions of one input, and a softmax over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(2) for part in (self.q, self.k, self.v))
        return (v @ (q.transpose(1, 2) @ k).softmax(-1)).view_as(x)


class SEInEachBranch(nn.Module):
    """The branches know nothing of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, k, padding=k // 2), Scaled(8)) for k in (3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Scaled(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.se = SE(C)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x)


class Separable(nn.Module):
    """Depthwise and pointwise convolution and an SE, and nothing else with parameters."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.pointwise = nn.Conv2d(C, C, 1)
        self.se = SE(C)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pointwise(self.depthwise(x))
        return x + out * self.se(out)


ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "SE-ResNet's block": lambda: SEBasicBlock(16, 16, 1),
    "SE-ResNet's block with stride": lambda: SEBasicBlock(16, 32, 2),
    "an inverted residual": lambda: InvertedResidual(16),
    "an attention": Attention,
    "an SE within each branch": SEInEachBranch,
    "a separable convolution": lambda: Separable(16),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_blocks_cause_no_warning(name: str) -> None:
    model = nn.Sequential(OfficialPSA(64, 64), ORDINARY[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule


@pytest.mark.parametrize("block", [InvertedResidual, Separable])
def test_a_network_of_ordinary_blocks_is_refused_without_a_warning(
    block: Callable[[int], nn.Module],
) -> None:
    stages = [layer for C in (16, 24) for layer in (nn.LazyConv2d(C, 3, 2, 1), block(C), block(C))]
    model = nn.Sequential(*stages)
    model(torch.randn(1, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"Sequential has none$"):
            ef.fuse(model)
