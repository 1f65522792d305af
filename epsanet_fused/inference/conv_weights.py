"""The weights with which other convolutions do exactly what a grouped one does.

A convolution that libraries run badly can be had from ones that they run well:

- *merged*: the weights of neighbouring groups in one block-diagonal weight, with zeros between
  them, and fewer groups. More arithmetic, often far less time.
- *widened*: a tile of neighbouring output pixels at once, each as a channel of its own, by a kernel
  that is as much larger and moves a tile at a time. A group with few outputs then fills a vector,
  for less arithmetic than by merging: 11 x 11 taps instead of 9 x 9 for a tile of 3 x 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.utils.memory_format import is_channels_last


def widen_weight(
    weight: Tensor, groups: int, tile: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The weight that makes a tile of neighbouring pixels at once.

    Args:
        weight: (K, C / groups, k, l).
        groups: of the convolution that it belongs to.
        tile: rows and columns of the tile.
        stride: of that convolution.

    Returns:
        (K * rows * columns, C / groups, k + stride * (rows - 1), l + stride * (columns - 1)), for a
        convolution with ``stride * tile`` for its stride; a group's channels come pixel by pixel.
    """
    K, inputs, *_ = weight.shape
    (rows, columns), (down, along) = tile, stride
    grouped = weight.view(groups, K // groups, inputs, *weight.shape[2:])
    pixels = [
        F.pad(
            grouped,
            (c * along, (columns - 1 - c) * along, r * down, (rows - 1 - r) * down),
        )
        for r in range(rows)
        for c in range(columns)
    ]
    # (groups, rows * columns, K / groups, C / groups, taller, wider)
    return torch.stack(pixels, 1).flatten(0, 2)


def narrow(
    out: Tensor, groups: int, tile: tuple[int, int], first: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """The image that a widened convolution has made a tile at a time.

    Args:
        out: (B, groups * rows * columns * K / groups, m, n), in the order of ``widen_weight``.
        first, size: the part to keep of the m * rows by n * columns pixels.

    Returns:
        (B, K, *size), in out's memory format.
    """
    B, channels, m, n = out.shape
    rows, columns = tile
    K = channels // (rows * columns)
    part = [slice(start, start + length) for start, length in zip(first, size, strict=True)]
    if is_channels_last(out):
        # A pixel's channels in a group lie together; moved as large numbers they move faster.
        unit = out.dtype
        if not torch.compiler.is_compiling():
            unit = _UNITS[math.gcd(out.element_size() * K // groups, 16)]
        tiles = out.permute(0, 2, 3, 1).view(unit).view(B, m, n, groups, rows, columns, -1)
        image = tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, m * rows, n * columns, -1)
        image = image[:, part[0], part[1]].contiguous()
        return image.view(out.dtype).permute(0, 3, 1, 2)
    tiles = out.reshape(B, groups, rows, columns, K // groups, m, n).permute(0, 1, 4, 5, 2, 6, 3)
    return tiles.reshape(B, K, m * rows, n * columns)[:, :, part[0], part[1]].contiguous()


_UNITS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}


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
