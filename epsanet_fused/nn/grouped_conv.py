"""Grouped convolutions run with fewer groups: exact, and often faster."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvPlan(NamedTuple):
    """How to execute a convolution; see conv_weights.py.

    groups: how many groups to leave.
    tile: how many neighbouring pixels to make at once: rows and columns.
    memory_format: to compute in; what comes in another is converted.
    """

    groups: int
    tile: tuple[int, int] = (1, 1)
    memory_format: torch.memory_format = torch.contiguous_format


def merge_weight(weight: Tensor, groups: int, merged: int) -> Tensor:
    """The weight that does with ``merged`` groups what ``weight`` does with ``groups``.

    Args:
        weight: (K, C / groups, k, k).
        groups: of the convolution that it belongs to.
        merged: the number of groups to leave, a divisor of ``groups``.

    Returns:
        (K, C / merged, k, k), block-diagonal; differentiable.
    """
    if merged == groups:
        return weight
    K, inputs, *size = weight.shape
    factor = groups // merged
    parts = weight.view(merged, factor, K // groups, inputs, *size).unbind(1)
    # Padded part by part: compilers fold that into a constant, but not what takes a mask to make.
    around = ((i * inputs, (factor - 1 - i) * inputs) for i in range(factor))
    blocks = [F.pad(p, (0, 0, 0, 0, *a)) for p, a in zip(parts, around, strict=True)]
    # (merged, factor, K / groups, C / merged, k, k)
    return torch.stack(blocks, 1).reshape(K, factor * inputs, *size)


def merged_conv(x: Tensor, conv: nn.Conv2d, groups: int) -> Tensor:
    """``conv(x)`` with ``groups`` groups, for training.

    The merge is part of what autograd sees: the library's forward and both of its backwards are
    those of the merged convolution, and the weight's gradient arrives in the weight's own shape.
    """
    weight = merge_weight(conv.weight, conv.groups, groups)
    return F.conv2d(x, weight, conv.bias, conv.stride, numeric_padding(conv), conv.dilation, groups)


def numeric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        same = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return tuple(same) if conv.padding == "same" else (0, 0)
    return conv.padding
