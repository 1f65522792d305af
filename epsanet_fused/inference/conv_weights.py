"""Build the weights of convolutions that replace a grouped one exactly.

Libraries run some grouped convolutions slowly. Two replacements compute the same sums:

- *merged* (``nn/grouped_conv.py``): neighbouring groups share one block-diagonal weight with zeros
  between them, so that fewer groups remain. More arithmetic, often far less time.
- *tiled* (``tile_weight``): each output channel becomes one channel for each pixel of a tile. The
  kernel grows by the tile, and the stride is that of whole tiles. A group with few outputs then
  fills a vector, with less arithmetic than merging needs: 11 x 11 taps instead of 9 x 9 for a tile
  of 3 x 3 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epsanet_fused.utils.memory_format import is_channels_last


def tile_weight(
    weight: Tensor, groups: int, tile: tuple[int, int], stride: Sequence[int]
) -> Tensor:
    """Return the weight that computes a tile of neighbouring pixels at once.

    Args:
        weight: (K, C / groups, k, l).
        groups: of the convolution that ``weight`` belongs to.
        tile: rows and columns of the tile.
        stride: of that convolution.

    Returns:
        (K * rows * columns, C / groups, k + stride * (rows - 1), l + stride * (columns - 1)), for a
        convolution with the stride ``stride * tile``. Within a group the channels are ordered by
        pixel, then by output.
    """
    K, inputs, *_ = weight.shape
    (rows, columns), (stride_h, stride_w) = tile, stride
    grouped = weight.view(groups, K // groups, inputs, *weight.shape[2:])
    pixels = []
    for r in range(rows):
        for c in range(columns):
            left, right = c * stride_w, (columns - 1 - c) * stride_w
            above, below = r * stride_h, (rows - 1 - r) * stride_h
            pixels.append(F.pad(grouped, (left, right, above, below)))
    # (groups, rows * columns, K / groups, C / groups, taller k, wider l)
    return torch.stack(pixels, 1).flatten(0, 2)


def untile(
    out: Tensor, groups: int, tile: tuple[int, int], start: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Return the image that a tiled convolution has computed as channels.

    Args:
        out: (B, groups * rows * columns * K / groups, m, n), in the order of ``tile_weight``.
        groups: of the tiled convolution.
        tile: rows and columns of the tile.
        start: the first row and column to keep of the m * rows by n * columns pixels.
        size: how many rows and columns to keep.

    Returns:
        (B, K, *size), in ``out``'s memory format.
    """
    B, channels, m, n = out.shape
    rows, columns = tile
    K = channels // (rows * columns)
    kept_rows, kept_columns = (slice(s, s + length) for s, length in zip(start, size, strict=True))
    if is_channels_last(out):
        # The channels of one pixel in one group are adjacent. A copy in wider units is faster.
        unit = out.dtype
        if not torch.compiler.is_compiling():
            unit = _COPY_UNITS[math.gcd(out.element_size() * K // groups, 16)]
        tiles = out.permute(0, 2, 3, 1).view(unit).view(B, m, n, groups, rows, columns, -1)
        # (B, m, rows, n, columns, groups, units of a pixel)
        image = tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, m * rows, n * columns, -1)
        image = image[:, kept_rows, kept_columns].contiguous()
        return image.view(out.dtype).permute(0, 3, 1, 2)
    tiles = out.reshape(B, groups, rows, columns, K // groups, m, n).permute(0, 1, 4, 5, 2, 6, 3)
    return tiles.reshape(B, K, m * rows, n * columns)[:, :, kept_rows, kept_columns].contiguous()


# The dtype to copy in, by its size in bytes.
_COPY_UNITS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}


def fold_norm(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of one convolution equal to this one followed by ``norm`` in eval.

    Args:
        weight: (K, C / groups, k, k).
        bias: (K,) or None.
        norm: a BatchNorm2d, or None for no norm.

    Returns:
        At least in float32 if there is a norm, so that the caller rounds once; else the arguments
        unchanged.
    """
    if norm is None:
        return weight, bias
    scale, shift = norm_scale_shift(norm)
    weight = weight.to(scale.dtype) * scale[:, None, None, None]
    return weight, shift if bias is None else torch.addcmul(shift, bias.to(scale), scale)


def norm_scale_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the scale and shift (K,) that a BatchNorm2d in eval applies, at least in float32."""
    mean: Tensor = norm.running_mean
    var: Tensor = norm.running_var
    wide = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean.to(wide) * scale
    return scale, shift if norm.bias is None else shift + norm.bias
