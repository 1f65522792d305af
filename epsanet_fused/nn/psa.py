"""The ground truth: the PSA module in plain PyTorch, step by step as the paper has it.

Nothing here is clever. Every faster way to run the module is tested against this file, in float64.
Paper: EPSANet (arXiv 2105.14447), section 3.2, figures 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CONV_KERNELS = (3, 5, 7, 9)
CONV_GROUPS = (1, 4, 8, 16)


class SEWeightModule(nn.Module):
    """Squeeze and excite: one weight in (0, 1) for each channel (paper, section 3.1).

    Args:
        channels: C, the channels of the input.
        reduction: the hidden width is ``channels // reduction``.

    Raises:
        ValueError: if the hidden width would be zero.

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

    def forward(self, x: Tensor) -> Tensor:
        out = self.avg_pool(x)  # (B, C, 1, 1)
        out = self.relu(self.fc1(out))  # (B, C // reduction, 1, 1)
        return self.sigmoid(self.fc2(out))  # (B, C, 1, 1)


def recalibrate_and_concat(branches: list[Tensor], weights: list[Tensor]) -> Tensor:
    """All that follows squeeze and excite, literally: attend, reweight, concatenate in reverse.

    Args:
        branches: S tensors (B, C, H, W), the smallest kernel's first.
        weights: the S branches' channel weights (B, C, 1, 1), by the SE module that they share.

    Returns:
        (B, S * C, H, W); the *last* branch has the first C channels.
    """
    B, C, H, W = branches[0].shape
    S = len(branches)
    feats = torch.cat(branches, dim=1).view(B, S, C, H, W)
    attention = torch.cat(weights, dim=1).view(B, S, C, 1, 1)
    attention = torch.softmax(attention, dim=1)  # across the branches, per sample and channel
    feats = feats * attention
    out = feats[:, 0]
    for s in range(1, S):
        out = torch.cat((feats[:, s], out), dim=1)
    return out  # (B, S * C, H, W)


class PSAModule(nn.Module):
    """Pyramid Squeeze Attention in plain PyTorch (paper, section 3.2).

    Args:
        inplans: channels of the input.
        planes: channels of the output; each of the four branches makes ``planes // 4``.
        conv_kernels: the four kernel sizes, odd.
        stride: of all four convolutions.
        conv_groups: the groups of the four convolutions.
        reduction: of the channel attention that the branches share.

    Raises:
        ValueError: if channels don't divide into the groups, or the attention has no hidden unit.

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
        _check_widths(inplans, planes, conv_kernels, conv_groups, reduction)
        convs = [
            nn.Conv2d(inplans, planes // 4, k, stride, padding=k // 2, groups=g, bias=False)
            for k, g in zip(conv_kernels, conv_groups, strict=True)
        ]
        self.conv_1, self.conv_2, self.conv_3, self.conv_4 = convs
        self.se = SEWeightModule(planes // 4, reduction)

    def convolve(self, x: Tensor) -> list[Tensor]:
        """The four branches, each (B, planes // 4, H', W')."""
        return [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]

    def forward(self, x: Tensor) -> Tensor:
        branches = self.convolve(x)
        return recalibrate_and_concat(branches, [self.se(branch) for branch in branches])


def _check_widths(
    inplans: int,
    planes: int,
    conv_kernels: Sequence[int],
    conv_groups: Sequence[int],
    reduction: int,
) -> None:
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
    split = planes // 4
    if bad := [g for g in conv_groups if g < 1]:
        raise ValueError(
            f"PSAModule: conv_groups={tuple(conv_groups)} must be positive, got {bad}; 1 is an "
            f"ordinary convolution"
        )
    for g in conv_groups:
        if inplans % g or split % g:
            raise ValueError(
                f"PSAModule: inplans={inplans} and planes // 4 = {split} must both divide into "
                f"conv_groups={tuple(conv_groups)}, but {g} does not divide them; change the "
                f"widths or the groups (the default groups fit any multiple of 64)"
            )
    if reduction < 1 or split < reduction:
        raise ValueError(
            f"PSAModule: planes // 4 = {split} with reduction={reduction} leaves the channel "
            f"attention without a hidden unit; use planes >= {4 * max(reduction, 1)} or "
            f"1 <= reduction <= {split}"
        )
