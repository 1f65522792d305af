"""Grouped convolutions run with fewer groups, which is often faster and computes the same.

Libraries are slow at many narrow groups. Merging joins neighbouring groups into one wider group,
whose weight is block-diagonal: the original weights on the diagonal, zeros elsewhere. Four groups
A, B, C, D (each maps C / 4 input channels to K / 4 output channels) merge to two like this::

    output channels      4 groups             2 merged groups
                      | A . . . |               | A 0 . . |
                      | . B . . |               | 0 B . . |
                      | . . C . |      ->       | . . C 0 |       0: a zero in the merged weight
                      | . . . D |               | . . 0 D |       .: not stored

The products with the zeros add nothing, so the results agree up to rounding; the merged weight
and the number of multiplications are twice as large.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.utils.memory_format import MEMORY_FORMATS, memory_format_name


class ConvPlan(NamedTuple):
    """The way to run one convolution; ``ef.plan_convs`` finds the fastest.

    Attributes:
        groups: number of groups to run with, a divisor of the convolution's own.
        tile: (rows, columns) of neighbouring output pixels to compute as channels of one pixel,
            with a larger kernel and stride; for inference only. (1, 1) is no tiling.
        memory_format: format to compute in; an input in another format is converted.
    """

    groups: int
    tile: tuple[int, int] = (1, 1)
    memory_format: torch.memory_format = torch.contiguous_format

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.save's default protocol can't write a torch.memory_format.
        return _plan, (self.groups, self.tile, memory_format_name(self.memory_format))


def _plan(groups: int, tile: tuple[int, int], memory_format: str) -> ConvPlan:
    return ConvPlan(groups, tile, MEMORY_FORMATS[memory_format])


def merge_weight(weight: Tensor, groups: int, merged: int) -> Tensor:
    """Return the weight for ``merged`` groups that computes what ``weight`` does with ``groups``.

    Args:
        weight: (K, C / groups, k, k).
        groups: number of groups of the original convolution.
        merged: number of groups after the merge, a divisor of ``groups``.

    Returns:
        (K, C / merged, k, k), block-diagonal; ``weight`` itself if ``merged == groups``.
        Differentiable with respect to ``weight``.
    """
    if merged == groups:
        return weight
    K, inputs, *size = weight.shape
    factor = groups // merged  # how many groups become one
    # factor tensors (merged, K / groups, C / groups, k, k)
    members = weight.view(merged, factor, K // groups, inputs, *size).unbind(1)
    # F.pad on each member, not a mask on the whole: compilers fold this into a constant.
    blocks = [
        F.pad(member, (0, 0, 0, 0, i * inputs, (factor - 1 - i) * inputs))
        for i, member in enumerate(members)
    ]
    # (merged, factor, K / groups, C / merged, k, k) -> (K, C / merged, k, k)
    return torch.stack(blocks, 1).reshape(K, factor * inputs, *size)


def merged_conv(x: Tensor, conv: nn.Conv2d, groups: int) -> Tensor:
    """Return ``conv(x)``, computed with ``groups`` groups; for training.

    ``conv`` must be one that ``pads_evenly``. Autograd records the merge. Forward and backward run
    as the merged convolution, and the weight's gradient has the shape of ``conv.weight``.
    """
    weight = merge_weight(conv.weight, conv.groups, groups)
    return F.conv2d(x, weight, conv.bias, conv.stride, numeric_padding(conv), conv.dilation, groups)


def is_plain_conv(module: Any) -> bool:
    """Return whether ``module`` is exactly a Conv2d (no subclass) that ``pads_evenly``."""
    return type(module) is nn.Conv2d and pads_evenly(module)


def pads_evenly(conv: Any) -> bool:
    """Return whether ``conv`` puts zeros around the image, as many on both sides of a dimension."""
    if conv.padding_mode != "zeros":
        return False
    return conv.padding != "same" or all(n % 2 == 0 for n in _same_padding(conv))


def numeric_padding(conv: Any) -> tuple[int, ...]:
    """Return the padding of ``conv`` in pixels per dimension, also if it is "same" or "valid"."""
    if not isinstance(conv.padding, str):
        padding: tuple[int, ...] = conv.padding
        return padding
    return (0, 0) if conv.padding == "valid" else tuple(n // 2 for n in _same_padding(conv))


def _same_padding(conv: Any) -> list[int]:
    """Return how many pixels per dimension padding="same" adds on both sides together."""
    return [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
