"""The Triton kernels of psa_tail_norm's forward, all but the last, which is normalize_kernel.

``common.py`` explains the names; docs/design.md has the formulas. All is computed from x less its
mean over the sample's pixels: where the mean is large, sums of x itself would cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epsanet_fused.backends.triton.common import (
    extents,
    row_coords,
    split_coords,
    split_total,
    tile_offsets,
)
from epsanet_fused.backends.triton.gate import excite_and_select
from epsanet_fused.backends.triton.normalize import norm_scale, sample_norm


@triton.jit
def _channel_m2(
    branch,
    strides,
    b,
    c,
    C,
    HW,
    p_begin,
    tiles,
    DIV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return first_pixel and a split's sum and m2, as SplitStats has them: (BLOCK_C,) each."""
    lanes = tl.arange(0, BLOCK_P)
    begin = tile_offsets(b, c, tl.zeros((1,), tl.int32), strides, DIV, CHANNELS_LAST)
    first = tl.load(branch + begin, mask=(c < C)[:, None], other=0.0).to(ACC)  # (BLOCK_C, 1)
    first = tl.where(first - first == 0, first, 0.0)
    # Each lane keeps the sum, the m2 (Welford) and the number of the pixels that it has seen.
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    m2 = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    count = tl.zeros((BLOCK_P,), ACC)
    for tile in range(0, tiles):
        p = p_begin + tile * BLOCK_P + lanes
        mask = (c < C)[:, None] & (p < HW)[None, :]
        offsets = tile_offsets(b, c, p, strides, DIV, CHANNELS_LAST)
        x = tl.load(branch + offsets, mask=mask, other=0.0).to(ACC)
        x = tl.where(mask, x - first, 0.0)
        delta = tl.where(mask, x - total * (1.0 / tl.maximum(count, 1.0))[None, :], 0.0)
        m2 += delta * delta * (count / (count + 1.0))[None, :]
        total += x
        count += (p < HW).to(ACC)
    # The lanes are merged (Chan).
    n = tl.sum(count, axis=0)
    all_lanes = tl.sum(total, axis=1)  # (BLOCK_C,)
    delta = total / tl.maximum(count, 1.0)[None, :] - (all_lanes / n)[:, None]
    m2 += count[None, :] * delta * delta
    return tl.reshape(first, (BLOCK_C,)), all_lanes, tl.sum(m2, axis=1)


@triton.jit
def _m2_sample(
    tail,
    split_stats,
    b,
    c_begin,
    c_end,
    split,
    splits,
    tiles,
    C,
    HW,
    S: tl.constexpr,
    DIV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write split_stats of sample b for channels c_begin to c_end, over the split's pixels."""
    p_begin = split * (tiles * BLOCK_P)
    for c0 in range(c_begin, c_end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        for s in tl.static_range(S):
            first, total, m2 = _channel_m2(
                tail.branches[s],
                tail.branch_strides[s],
                b,
                c,
                C,
                HW,
                p_begin,
                tiles,
                DIV,
                CHANNELS_LAST,
                BLOCK_C,
                BLOCK_P,
                ACC,
            )
            offsets = ((b * splits + split) * S + s) * C + c
            tl.store(split_stats.sums + offsets, total, mask=c < C)
            tl.store(split_stats.m2 + offsets, m2, mask=c < C)
            if split == 0:
                tl.store(split_stats.first_pixel + (b * S + s) * C + c, first, mask=c < C)


@triton.jit
def _norm_gate_sample(
    split_stats,
    stats,
    fc,
    b,
    splits,
    split_pixels,
    C,
    HW,
    R,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write squeeze, m2 and attention of sample b, merging its splits of split_pixels (Chan)."""
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, CHANNELS)
    mask = (s < S)[:, None] & (c < C)[None, :]
    sums = split_stats.sums
    mean = split_total(sums, b, splits, s, c, mask, C, S, ACC) / HW  # of x - first_pixel
    m2 = tl.zeros(mask.shape, ACC)
    for split in range(0, splits):
        row = ((b * splits + split) * S + s)[:, None] * C + c[None, :]
        n = tl.minimum(split_pixels, HW - split * split_pixels).to(ACC)
        delta = tl.load(sums + row, mask=mask, other=0.0) / n - mean
        m2 += tl.load(split_stats.m2 + row, mask=mask, other=0.0) + n * delta * delta
    offsets = (b * S + s)[:, None] * C + c[None, :]
    m = tl.load(split_stats.first_pixel + offsets, mask=mask, other=0.0) + mean
    tl.store(stats.squeeze + offsets, m, mask=mask)
    tl.store(stats.m2 + offsets, m2, mask=mask)
    excite_and_select(m, stats.attention, fc, offsets, s, c, C, R, S, BLOCK_R, ACC)


@triton.jit
def m2_kernel(
    tail,
    split_stats,
    C,
    HW,
    splits,
    tiles,
    S: tl.constexpr,
    DIV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write split_stats: each channel's first pixel, and sum and m2 of each split's pixels.

    Grid: B * splits * cdiv(C, BLOCK_C).
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, split, c_begin = split_coords(C, splits, BLOCK_C)
    _m2_sample(
        tail,
        split_stats,
        b,
        c_begin,
        c_begin + BLOCK_C,
        split,
        splits,
        tiles,
        C,
        HW,
        S,
        DIV,
        CHANNELS_LAST,
        BLOCK_C,
        BLOCK_P,
        ACC,
    )


@triton.jit
def norm_gate_kernel(
    split_stats,
    stats,
    fc,
    C,
    HW,
    R,
    splits,
    split_pixels,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write stats.squeeze, m2 and attention (B, S, C) from the results of m2_kernel. Grid: B."""
    b = tl.program_id(0).to(tl.int64)
    _norm_gate_sample(
        split_stats,
        stats,
        fc,
        b,
        splits,
        split_pixels,
        C,
        HW,
        R,
        S,
        BLOCK_S,
        CHANNELS,
        BLOCK_R,
        ACC,
    )


@triton.jit
def m2_gate_kernel(
    tail,
    split_stats,
    stats,
    fc,
    C,
    HW,
    R,
    tiles,
    S: tl.constexpr,
    DIV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Run m2_kernel and norm_gate_kernel in one launch, one program for each sample. Grid: B."""
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b = tl.program_id(0).to(tl.int64)
    _m2_sample(
        tail, split_stats, b, 0, C, 0, 1, tiles, C, HW, S, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC
    )
    tl.debug_barrier()  # the gate reads split_stats that other threads of this program wrote
    _norm_gate_sample(
        split_stats, stats, fc, b, 1, HW, C, HW, R, S, BLOCK_S, CHANNELS, BLOCK_R, ACC
    )


@triton.jit
def statistics_kernel(
    stats,
    gamma,
    beta,
    weight,
    shift,
    B,
    C,
    HW,
    S: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write stats.mean and var (S * C,) over all samples, and each sample's weight and shift.

    Those are (B, S, C); see NormTerms. A program has BLOCK_K rows i = s * C + c and goes through
    the batch BLOCK_B samples at a time. Grid: cdiv(S * C, BLOCK_K).
    """
    i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = ((S - 1 - i // C) * C + i % C)[None, :]
    k_mask = (i < S * C)[None, :]
    total = tl.zeros((1, BLOCK_K), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        _, rows, mask = row_coords(b0, i, B, S * C, BLOCK_B)
        a = tl.load(stats.attention + rows, mask=mask, other=0.0).to(tl.float64)
        m = tl.load(stats.squeeze + rows, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(a * m, axis=0)[None, :]
    batch_mean = total / B
    total = tl.zeros((1, BLOCK_K), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        _, rows, mask = row_coords(b0, i, B, S * C, BLOCK_B)
        a = tl.load(stats.attention + rows, mask=mask, other=0.0).to(tl.float64)
        offset = a * tl.load(stats.squeeze + rows, mask=mask, other=0.0).to(tl.float64) - batch_mean
        m2 = tl.load(stats.m2 + rows, mask=mask, other=0.0).to(tl.float64)
        tail_m2 = tl.where(mask, a * a * m2 + offset * offset * HW, 0.0)  # around batch_mean
        total += tl.sum(tail_m2, axis=0)[None, :]
    batch_mean, batch_var = batch_mean.to(ACC), (total / HW / B).to(ACC)
    tl.store(stats.mean + k, batch_mean, mask=k_mask)
    tl.store(stats.var + k, batch_var, mask=k_mask)
    scale = norm_scale(batch_var, gamma, k, k_mask, EPS, ACC)
    for b0 in range(0, B, BLOCK_B):
        _, rows, mask = row_coords(b0, i, B, S * C, BLOCK_B)
        a = tl.load(stats.attention + rows, mask=mask, other=0.0)
        m = tl.load(stats.squeeze + rows, mask=mask, other=0.0)
        row_weight, row_shift, _ = sample_norm(a, m, batch_mean, scale, beta, k, k_mask, ACC)
        tl.store(weight + rows, row_weight, mask=mask)
        tl.store(shift + rows, row_shift, mask=mask)
