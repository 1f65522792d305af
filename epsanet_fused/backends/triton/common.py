"""The coordinates, offsets and loads that all Triton kernels share, and the names in them.

Tensors:

- ``branches``: the S outputs (B, C, H, W) of the convolutions, or their gradients.
- ``concat``: (B, S * C, H, W), the branches in reverse order: the output, or its gradient.
- ``squeeze`` (B, S, C), values ``m``: the mean of each channel of each branch over its pixels.
- ``attention`` (B, S, C), values ``a``: what each channel of each branch is multiplied by.
- ``m2`` (B, S, C): the sum over the pixels of (x - squeeze)^2.
- ``grad_mean`` (B, S, C): the term of a branch's gradient that all pixels of a channel share. It
  comes back through the means over the pixels.

Indices: b is a sample, s a branch, c a channel of a branch, k = (S - 1 - s) * C + c the same
channel of the concat, r a hidden unit of the SE module, and p a pixel: H and W are one dimension of
HW pixels. Strides are (batch, channel, pixel), in elements.

Tiling: a program loads tiles of BLOCK_C channels and BLOCK_P pixels. Kernels that sum over pixels
take ``tiles`` of them one after another and may divide a channel's pixels into ``splits``, one
program each. Where every sample is one run of memory, a program takes BLOCK elements of it instead.

DIV is a power of two that divides the inner extent (pixels for NCHW, channels for channels_last)
and all strides but the inner one. The launch code divides those arguments by DIV, and the kernels
multiply them by it: so the compiler knows the alignment and can use wide loads.

ACC is the dtype of all sums and of the (B, S, C) tensors: float64 for float64, else float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Triton reads TRITON_INTERPRET when a kernel is decorated, that is on import.
INTERPRETED = knobs.runtime.interpret
Strides = tuple[int, int, int]  # batch, channel, pixel


class TailTensors(NamedTuple):
    """The large tensors that a kernel reads or writes, with their strides divided by DIV."""

    branches: tuple[Tensor, ...]
    branch_strides: tuple[Strides, ...]
    concat: Tensor | None = None
    concat_strides: Strides | None = None


class FCGradInputs(NamedTuple):
    """The factors of the fc gradients: the gate's backward writes and fc_grad_kernel reads them."""

    hidden: Tensor  # (B, S, R), after the ReLU
    grad_pre1: Tensor  # (B, S, R), the gradient of fc1's output
    grad_pre2: Tensor  # (B, S, C), the gradient of fc2's output


class FCTensors(NamedTuple):
    """The weights of the SE as the kernels take them: of all branches, or of each."""

    fc1_weight: Tensor  # (R, C) or (S, R, C)
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    modules: int | None  # S; None: the branches share one


class GateTensors(NamedTuple):
    """The tensors of the gate; the last two are the results of its backward."""

    squeeze: Tensor
    attention: Tensor
    fc: FCTensors
    grad_mean: Tensor | None = None  # None: forward
    fc_grad_inputs: FCGradInputs | None = None  # None: not wanted


class SplitStats(NamedTuple):
    """The statistics of each split's pixels that m2_kernel writes and norm_gate_kernel reads."""

    first_pixel: Tensor  # (B, S, C), of the sample, or 0 where that isn't finite
    sums: Tensor  # (B, splits, S, C), of x - first_pixel
    m2: Tensor  # (B, splits, S, C), around the split's own mean


class NormGradTerms(NamedTuple):
    """The results of gradient_statistics_kernel for each sample, all (B, S, C)."""

    grad_attention: Tensor
    weight: Tensor
    shift: Tensor
    factor: Tensor
    batch_grad_mean: Tensor  # grad_mean without the part that comes back through the squeeze


class NormTerms(NamedTuple):
    """The terms of the normalized output and of the branches' gradients, all (B, S, C).

    z = weight * (branch - squeeze) + shift is the output before the ReLU. With g the gradient
    behind the ReLU, that of the branch is weight * g + factor * (branch - squeeze) + grad_mean.
    """

    squeeze: Tensor
    weight: Tensor
    shift: Tensor
    factor: Tensor | None = None  # None: forward
    grad_mean: Tensor | None = None  # None: forward


@triton.jit
def extents(C, HW, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return C and HW, the inner one multiplied by DIV."""
    if CHANNELS_LAST:
        return C * DIV, HW
    else:
        return C, HW * DIV


@triton.jit
def split_coords(C, splits, BLOCK_C: tl.constexpr):
    """Return this program's b, split and first channel. Grid: B * splits * cdiv(C, BLOCK_C)."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    b = (pid // blocks // splits).to(tl.int64)
    return b, pid // blocks % splits, pid % blocks * BLOCK_C


@triton.jit
def tile_coords(C, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return this program's b, channels (BLOCK_C,) and pixels (BLOCK_P,).

    Grid: B * cdiv(C, BLOCK_C) * cdiv(HW, BLOCK_P), in reverse: the samples that the sum kernel read
    last are still in L2.
    """
    c_blocks = tl.cdiv(C, BLOCK_C)
    p_blocks = tl.cdiv(HW, BLOCK_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    p = pid % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid // p_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // p_blocks // c_blocks).to(tl.int64), c, p


@triton.jit
def flat_coords(size, groups, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return this program's b, elements (BLOCK,) and their channels (BLOCK // GROUP,).

    A sample is one run of ``size`` elements. GROUP of them share a channel, ``groups`` times.
    Grid: B * cdiv(size, BLOCK), in reverse as for tile_coords.
    """
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block = pid % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    c = (block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)) // groups
    return (pid // blocks).to(tl.int64), i, c


@triton.jit
def row_coords(b0, i, B, SC, BLOCK_B: tl.constexpr):
    """Return samples b from b0 on, the offsets of rows i of theirs in (B, SC), and a mask.

    b is (BLOCK_B,), the others are (BLOCK_B, BLOCK_K).
    """
    b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
    return b, b[:, None] * SC + i[None, :], (b < B)[:, None] & (i < SC)[None, :]


@triton.jit
def tile_offsets(b, c, p, strides, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the offsets (BLOCK_C, BLOCK_P) of channels c and pixels p of sample b, in int64."""
    batch = b * strides[0] * DIV
    c = c.to(tl.int64)[:, None]
    p = p.to(tl.int64)[None, :]
    if CHANNELS_LAST:
        return batch + c * strides[1] + p * strides[2] * DIV
    else:
        return batch + c * strides[1] * DIV + p * strides[2]


@triton.jit
def per_channel(vector, index, mask, GROUP: tl.constexpr, ACC: tl.constexpr):
    """Load vector[index] and broadcast it to the shape of a tile or of a run.

    For a tile (GROUP = 0) the shape is (BLOCK_C, 1), for a run (BLOCK,), GROUP elements a channel.
    """
    x = tl.load(vector + index, mask=mask, other=0.0).to(ACC)
    if GROUP == 0:
        return x[:, None]
    else:
        return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], GROUP)), (x.shape[0] * GROUP,))


@triton.jit
def split_total(sums, b, splits, s, c, mask, C, S: tl.constexpr, ACC: tl.constexpr):
    """Add up the sums of sample b's splits in a fixed order: (BLOCK_S, CHANNELS)."""
    total = tl.zeros(mask.shape, ACC)
    for split in range(0, splits):
        row = (b * splits + split) * S + s
        total += tl.load(sums + row[:, None] * C + c[None, :], mask=mask, other=0.0)
    return total
