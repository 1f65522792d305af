"""The weights with which other convolutions do exactly what a grouped one does.

A convolution that libraries run badly can be had from ones that they run well:

- *merged*: the weights of neighbouring groups in one block-diagonal weight, with zeros between
  them, and fewer groups. More arithmetic, often far less time.
- *widened*: a few neighbouring output pixels of a row at once, each as a channel of its own, by a
  kernel that is as much wider and moves as many pixels at a time. A group with few outputs then
  fills a vector, for little more arithmetic: 9 + 3 columns instead of 9 for four pixels.
- *split*: every input channel by itself (a depthwise convolution for each output of a group), then
  a 1x1 convolution with ones adds up the channels of each group. No more arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    blocks = weight.view(merged, factor, K // groups, inputs, *size)
    # (merged, K / groups, C / groups, k, k, factor, factor), the last two a diagonal
    blocks = torch.diag_embed(blocks.movedim(1, -1))
    return blocks.movedim((-2, -1), (1, 3)).reshape(K, factor * inputs, *size)


def widen_weight(weight: Tensor, groups: int, width: int, stride: int) -> Tensor:
    """The weight that makes ``width`` neighbouring pixels of a row at once.

    Args:
        weight: (K, C / groups, k, l).
        groups: of the convolution that it belongs to.
        width: how many pixels.
        stride: of that convolution along a row.

    Returns:
        (K * width, C / groups, k, l + stride * (width - 1)), for a stride of ``stride * width``;
        a group's channels come pixel by pixel.
    """
    K, inputs, k, l = weight.shape  # noqa: E741
    grouped = weight.view(groups, K // groups, inputs, k, l)
    wide = l + stride * (width - 1)
    out = weight.new_zeros(groups, width, K // groups, inputs, k, wide)
    for pixel in range(width):
        out[:, pixel, ..., pixel * stride : pixel * stride + l] = grouped
    return out.view(K * width, inputs, k, wide)


def narrow(out: Tensor, groups: int, width: int, first: int, columns: int) -> Tensor:
    """The image that a widened convolution has made in ``width`` columns at a time.

    Args:
        out: (B, groups * width * K / groups, H, n), in the order of ``widen_weight``.
        first: the first of the n * width columns to keep.
        columns: how many to keep.

    Returns:
        (B, K, H, columns), in out's memory format.
    """
    B, channels, H, n = out.shape
    K = channels // width
    if out.is_contiguous(memory_format=torch.channels_last):
        pixels = out.permute(0, 2, 3, 1).reshape(B, H, n, groups, width, K // groups)
        image = pixels.transpose(3, 4).reshape(B, H, n * width, K)  # a view if groups is 1
        image = image[:, :, first : first + columns].permute(0, 3, 1, 2)
        return image.contiguous(memory_format=torch.channels_last)
    pixels = out.view(B, groups, width, K // groups, H, n).movedim(2, -1)
    return pixels.reshape(B, K, H, n * width)[..., first : first + columns].contiguous()


def split_weights(weight: Tensor, groups: int) -> tuple[list[Tensor], list[Tensor]]:
    """Depthwise weights, and the 1x1 weights that add up what they make.

    Args:
        weight: (K, C / groups, k, k).

    Returns:
        K / groups weights (C, 1, k, k), and as many (K, C, 1, 1) of zeros and ones: the j-th pair
        makes the j-th output channel of every group.
    """
    K, inputs, *size = weight.shape
    outputs = K // groups
    grouped = weight.view(groups, outputs, inputs, *size)
    depthwise = [w.reshape(groups * inputs, 1, *size) for w in grouped.unbind(1)]
    own = torch.eye(groups, dtype=weight.dtype, device=weight.device)[:, None, :, None]
    output = torch.eye(outputs, dtype=weight.dtype, device=weight.device)[:, None, :, None, None]
    sums = (own * output).expand(-1, -1, -1, -1, inputs)  # (j, groups, outputs, groups, inputs)
    return depthwise, [w.reshape(K, groups * inputs, 1, 1) for w in sums.unbind(0)]


def fold(
    weight: Tensor, bias: Tensor | None, norm: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that does what this one and then ``norm`` in eval do.

    Args:
        weight: (K, C / groups, k, k).
        bias: (K,) or None.
        norm: a BatchNorm2d, or None for neither.

    Returns:
        In float32 at least where there is a norm, to be rounded once; else as they came.
    """
    if norm is None:
        return weight, bias
    scale, shift = affine(norm)
    weight = weight.to(scale.dtype) * scale[:, None, None, None]
    return weight, shift if bias is None else torch.addcmul(shift, bias.to(scale), scale)


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The scale and shift (K,) that a BatchNorm2d in eval comes to, at least in float32."""
    mean, var = norm.running_mean, norm.running_var
    wide = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean.to(wide) * scale
    return scale, shift if norm.bias is None else shift + norm.bias
