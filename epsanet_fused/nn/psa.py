"""The PSA module in plain PyTorch, in the order of the paper: the ground truth.

This file favours clarity over speed. Every faster implementation in this package is tested against
it in float64. Paper: EPSANet (arXiv 2105.14447), sections 3.1 and 3.2, figures 2 to 5.

Shapes: B samples, S = 4 branches of C channels each, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from epsanet_fused.utils.annotations import with_real_annotations

CONV_KERNELS = (3, 5, 7, 9)
CONV_GROUPS = (1, 4, 8, 16)


class SEWeightModule(nn.Module):
    """Squeeze-and-excitation weights: one number in (0, 1) per channel (paper, section 3.1).

    Args:
        channels: C, the number of input channels.
        reduction: the hidden layer has ``channels // reduction`` units.

    Raises:
        ValueError: if the hidden layer would have no unit.

    Shape: (B, C, H, W) -> (B, C, 1, 1).
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1 or channels // reduction < 1:
            raise ValueError(
                f"SEWeightModule: channels={channels} with reduction={reduction} gives a hidden "
                f"width of {channels // max(reduction, 1)}; reduction must be between 1 and "
                f"channels, so use more channels or a smaller reduction"
            )
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1)
        self.sigmoid = nn.Sigmoid()

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return the channel weights (B, C, 1, 1) of ``x`` (B, C, H, W)."""
        out = self.avg_pool(x)  # (B, C, 1, 1)
        out = self.relu(self.fc1(out))  # (B, C // reduction, 1, 1)
        return self.sigmoid(self.fc2(out))  # (B, C, 1, 1)


def recalibrate_and_concat(branches: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Apply the softmax across branches, scale the branches, concatenate them in reverse order.

    These are the steps of the tail that follow squeeze and excite (paper, section 3.2).

    Args:
        branches: S tensors (B, C, H, W), the one with the smallest kernel first.
        weights: S tensors (B, C, 1, 1), the SE module's weights of each branch.

    Returns:
        (B, S * C, H, W); the *last* branch has the first C channels.
    """
    B, C, H, W = branches[0].shape
    S = len(branches)
    feats = torch.cat(branches, dim=1).view(B, S, C, H, W)
    attention = torch.cat(weights, dim=1).view(B, S, C, 1, 1)
    attention = torch.softmax(attention, dim=1)  # across branches, per sample and channel
    feats = feats * attention
    out = feats[:, 0]  # (B, C, H, W)
    for s in range(1, S):
        out = torch.cat((feats[:, s], out), dim=1)  # (B, (s + 1) * C, H, W)
    return out


class PSAModule(nn.Module):
    """Pyramid Squeeze Attention in plain PyTorch (paper, section 3.2).

    Args:
        inplans: number of input channels.
        planes: number of output channels; each of the four branches has ``planes // 4``.
        conv_kernels: kernel size of each of the four convolutions; odd.
        stride: stride of all four convolutions.
        conv_groups: number of groups of each of the four convolutions.
        reduction: reduction of the SE module that the branches share.

    Raises:
        ValueError: if the groups do not divide the channels, the SE module would have no hidden
            unit, or the kernels or groups are not four valid numbers.

    Shape: (B, inplans, H, W) -> (B, planes, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        inplans: int,
        planes: int,
        conv_kernels: Sequence[int] = CONV_KERNELS,
        stride: int = 1,
        conv_groups: Sequence[int] = CONV_GROUPS,
        *,
        reduction: int = 16,
    ) -> None:
        super().__init__()
        _check_arguments(inplans, planes, conv_kernels, conv_groups, reduction)
        convs = [
            nn.Conv2d(inplans, planes // 4, k, stride, padding=k // 2, groups=g, bias=False)
            for k, g in zip(conv_kernels, conv_groups, strict=True)
        ]
        self.conv_1, self.conv_2, self.conv_3, self.conv_4 = convs
        self.se = SEWeightModule(planes // 4, reduction)

    def convolve(self, x: Tensor) -> list[Tensor]:
        """Return the four branches, each (B, planes // 4, H / stride, W / stride)."""
        return [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return the recalibrated branches of ``x``, concatenated in reverse order."""
        branches = self.convolve(x)
        return recalibrate_and_concat(branches, [self.se(branch) for branch in branches])


def _check_arguments(
    inplans: int,
    planes: int,
    conv_kernels: Sequence[int],
    conv_groups: Sequence[int],
    reduction: int,
) -> None:
    """Raise a ValueError that names the first argument that is not accepted."""
    for name, values in (("conv_kernels", conv_kernels), ("conv_groups", conv_groups)):
        if len(values) != 4:
            raise ValueError(
                f"PSAModule: {name} must have four entries, got {len(values)}: {tuple(values)}"
            )
    if even := [k for k in conv_kernels if k % 2 == 0]:
        raise ValueError(
            f"PSAModule: conv_kernels must be odd so that all branches have one size, got {even}"
        )
    if planes % 4:
        raise ValueError(
            f"PSAModule: planes must be a multiple of 4, one share per branch, got {planes}"
        )
    width = planes // 4
    if bad := [g for g in conv_groups if g < 1]:
        raise ValueError(
            f"PSAModule: conv_groups={tuple(conv_groups)} must be positive, got {bad}; 1 is an "
            f"ordinary convolution"
        )
    for g in conv_groups:
        if inplans % g or width % g:
            raise ValueError(
                f"PSAModule: inplans={inplans} and planes // 4 = {width} must both divide into "
                f"conv_groups={tuple(conv_groups)}, but {g} does not divide them; change the "
                f"widths or the groups (the default groups fit any multiple of 64)"
            )
    if reduction < 1 or width < reduction:
        raise ValueError(
            f"PSAModule: planes // 4 = {width} with reduction={reduction} leaves the channel "
            f"attention without a hidden unit; use planes >= {4 * max(reduction, 1)} or "
            f"1 <= reduction <= {width}"
        )
