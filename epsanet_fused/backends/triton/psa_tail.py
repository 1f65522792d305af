"""The Triton kernels of the tail, read top to bottom: sums, gate, recalibrate; and their way back.

``common.py`` explains the words and the arguments.

Loops over the S branches are unrolled: a recalibrating program has S independent loads in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from epsanet_fused.backends.triton.common import (
    extents,
    per_channel,
    run_place,
    select,
    select_backward,
    split_total,
    sums_place,
    tile_offsets,
    tile_place,
)

# Decided when the kernels are decorated, that is on import.
INTERPRETED = knobs.runtime.interpret


@triton.jit
def _channel_sums(
    part, part_strides, cat, cat_strides, b, c, k, C, HW, p_begin, tiles,
    DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over pixels of part, or of part * cat: (BLOCK_C,)."""
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for tile in range(0, tiles):
        p = p_begin + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (p < HW)[None, :]
        offsets = tile_offsets(b, c, p, part_strides, DIV, CHANNELS_LAST)
        x = tl.load(part + offsets, mask=mask, other=0.0).to(ACC)
        if cat is not None:
            offsets = tile_offsets(b, k + c, p, cat_strides, DIV, CHANNELS_LAST)
            x *= tl.load(cat + offsets, mask=mask, other=0.0).to(ACC)
        total += x
    return tl.sum(total, axis=1)


@triton.jit
def _sum_sample(
    parts, part_strides, cat, cat_strides, sums, b, c_begin, c_end, split, splits, tiles, C, HW,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write sums[b, split, :, c_begin:c_end] over the split's share of the pixels."""
    p_begin = split * (tiles * BLOCK_P)
    for c0 in range(c_begin, c_end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        for s in tl.static_range(S):
            total = _channel_sums(
                parts[s], part_strides[s], cat, cat_strides, b, c, (S - 1 - s) * C, C, HW,
                p_begin, tiles, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip
            tl.store(sums + ((b * splits + split) * S + s) * C + c, total, mask=c < C)


@triton.jit
def _gate_sample(
    sums, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    spread, hidden, grad_pre1, grad_pre2, b, splits, C, HW, R,
    S: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Forward (spread is None): squeeze and attention of sample b, (S, C), from the parts' sums.

    Backward: from the sums of parts * cat to spread (S, C), what each pixel gets back through the
    mean; and to hidden and grad_pre1 (S, R) and grad_pre2 (S, C), for fc's gradients, unless None.
    """
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, CHANNELS)
    mask = (s < S)[:, None] & (c < C)[None, :]
    offsets = (b * S + s)[:, None] * C + c[None, :]
    total = split_total(sums, b, splits, s, c, mask, C, S, ACC)
    if spread is None:
        z = total / HW
        tl.store(squeeze + offsets, z, mask=mask)
        select(
            z, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias, offsets, s, c, C, R,
            S, BLOCK_R, ACC,
        )  # fmt: skip
    else:
        z = tl.load(squeeze + offsets, mask=mask, other=0.0)
        grad_z = select_backward(
            total, z, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
            hidden, grad_pre1, grad_pre2, offsets, b, s, c, C, R, S, BLOCK_R, ACC,
        )  # fmt: skip
        tl.store(spread + offsets, grad_z / HW, mask=mask)


@triton.jit
def sum_kernel(
    parts, part_strides, cat, cat_strides, sums, C, HW, splits, tiles,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums (B, splits, S, C) over each split's pixels, of parts or of parts * cat.

    Grid: B * splits * cdiv(C, BLOCK_C).
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, split, c_begin = sums_place(C, splits, BLOCK_C)
    _sum_sample(
        parts, part_strides, cat, cat_strides, sums, b, c_begin, c_begin + BLOCK_C, split, splits,
        tiles, C, HW, S, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC,
    )  # fmt: skip


@triton.jit
def gate_kernel(
    sums, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    spread, hidden, grad_pre1, grad_pre2, C, HW, R, splits,
    S: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gate (spread is None) or its backward, from the sums. Grid: B."""
    b = tl.program_id(0).to(tl.int64)
    _gate_sample(
        sums, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        spread, hidden, grad_pre1, grad_pre2, b, splits, C, HW, R,
        S, BLOCK_S, CHANNELS, BLOCK_R, ACC,
    )  # fmt: skip


@triton.jit
def sum_gate_kernel(
    parts, part_strides, cat, cat_strides, sums, squeeze, attention,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, spread, hidden, grad_pre1, grad_pre2,
    C, HW, R, tiles,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """sum_kernel and gate_kernel in one launch, a program for each sample. Grid: B."""
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b = tl.program_id(0).to(tl.int64)
    _sum_sample(
        parts, part_strides, cat, cat_strides, sums, b, 0, C, 0, 1, tiles, C, HW,
        S, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC,
    )  # fmt: skip
    tl.debug_barrier()  # the sums were written by other threads of this program
    _gate_sample(
        sums, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        spread, hidden, grad_pre1, grad_pre2, b, 1, C, HW, R,
        S, BLOCK_S, CHANNELS, BLOCK_R, ACC,
    )  # fmt: skip


@triton.jit
def fc_grad_kernel(
    squeeze, hidden, grad_pre1, grad_pre2,
    grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias, rows, C, R,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The fc gradients, summed over rows = B * S in a fixed order.

    Grid: cdiv(C, BLOCK_C) * cdiv(R, BLOCK_R).
    """
    r_blocks = tl.cdiv(R, BLOCK_R)
    c = tl.program_id(0) // r_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(0) % r_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    grad_w1 = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    grad_w2 = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    grad_b1 = tl.zeros((BLOCK_R,), ACC)
    grad_b2 = tl.zeros((BLOCK_C,), ACC)
    for n0 in range(0, rows, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        c_mask = (n < rows)[:, None] & (c < C)[None, :]
        r_mask = (n < rows)[:, None] & (r < R)[None, :]
        z = tl.load(squeeze + n[:, None] * C + c[None, :], mask=c_mask, other=0.0)
        pre2 = tl.load(grad_pre2 + n[:, None] * C + c[None, :], mask=c_mask, other=0.0)
        h = tl.load(hidden + n[:, None] * R + r[None, :], mask=r_mask, other=0.0)
        pre1 = tl.load(grad_pre1 + n[:, None] * R + r[None, :], mask=r_mask, other=0.0)
        grad_w1 += tl.sum(pre1[:, :, None] * z[:, None, :], axis=0)
        grad_w2 += tl.sum(h[:, :, None] * pre2[:, None, :], axis=0)
        grad_b1 += tl.sum(pre1, axis=0)
        grad_b2 += tl.sum(pre2, axis=0)
    mask = (r < R)[:, None] & (c < C)[None, :]
    tl.store(grad_fc1_weight + r[:, None] * C + c[None, :], grad_w1, mask=mask)
    tl.store(grad_fc2_weight + c[None, :] * R + r[:, None], grad_w2, mask=mask)
    # Blocks that share r or c computed the same bias gradient; the first of them writes it.
    if tl.program_id(0) < r_blocks:
        tl.store(grad_fc1_bias + r, grad_b1, mask=r < R)
    if tl.program_id(0) % r_blocks == 0:
        tl.store(grad_fc2_bias + c, grad_b2, mask=c < C)


@triton.jit
def _recalibrate(
    part, whole, mask, attention, spread, row, scale, shift, k, k_mask,
    RELU: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Without spread, forward: whole = part * attention, then the epilogue; see psa_tail.

    With it, backward: part = whole * attention + spread.
    """
    a = per_channel(attention, row, k_mask, GROUP, ACC)
    if spread is None:
        y = tl.load(part, mask=mask, other=0.0).to(ACC) * a
        if scale is not None:
            y *= per_channel(scale, k, k_mask, GROUP, ACC)
        if shift is not None:
            y += per_channel(shift, k, k_mask, GROUP, ACC)
        if RELU:
            y = tl.where(y < 0, 0.0, y)
        tl.store(whole, y, mask=mask)
    else:
        y = tl.load(whole, mask=mask, other=0.0).to(ACC) * a
        y += per_channel(spread, row, k_mask, GROUP, ACC)
        tl.store(part, y, mask=mask)


@triton.jit
def recalibrate_kernel(
    parts, part_strides, cat, cat_strides, attention, spread, scale, shift, C, HW,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr, RELU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scale and concatenate in reverse (forward), or split and scale (backward); any strides.

    Grid: B * cdiv(C, BLOCK_C) * cdiv(HW, BLOCK_P), walked backwards.
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, c, p = tile_place(C, HW, BLOCK_C, BLOCK_P)
    mask = (c < C)[:, None] & (p < HW)[None, :]
    for s in tl.static_range(S):
        k = (S - 1 - s) * C + c
        part = parts[s] + tile_offsets(b, c, p, part_strides[s], DIV, CHANNELS_LAST)
        whole = cat + tile_offsets(b, k, p, cat_strides, DIV, CHANNELS_LAST)
        _recalibrate(
            part, whole, mask, attention, spread, (b * S + s) * C + c, scale, shift, k, c < C,
            RELU, 0, ACC,
        )  # fmt: skip


@triton.jit
def recalibrate_flat_kernel(
    parts, cat, attention, spread, scale, shift, size, C, groups,
    S: tl.constexpr, DIV: tl.constexpr, GROUP: tl.constexpr, RELU: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """recalibrate_kernel for dense NCHW: a part's sample is one run of size * DIV = C * HW.

    So accesses are wide even where a row of pixels is odd. GROUP pixels share a channel, and
    HW = groups * GROUP. Grid: B * cdiv(C * HW, BLOCK), walked backwards.
    """
    size *= DIV
    b, i, c = run_place(size, groups, BLOCK, GROUP)
    for s in tl.static_range(S):
        k = (S - 1 - s) * C + c
        part = parts[s] + b * size + i
        whole = cat + (b * S + (S - 1 - s)) * size + i
        _recalibrate(
            part, whole, i < size, attention, spread, (b * S + s) * C + c, scale, shift, k, c < C,
            RELU, GROUP, ACC,
        )  # fmt: skip
