"""The Triton kernels of psa_tail_norm's forward, and those that write, which backward shares.

``common.py`` explains the words and the arguments; docs/design.md has the formulas. Branch s and
channel c are row i = s * C + c of what is (B, S, C), and k = (S - 1 - s) * C + c of the cat. All is
in terms of x less its mean over the sample's pixels: where that is large, sums of x would cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epsanet_fused.backends.triton.common import (
    extents,
    per_channel,
    run_place,
    select,
    split_total,
    sums_place,
    tile_offsets,
    tile_place,
)


@triton.jit
def _deviations(
    part, part_strides, b, c, C, HW, p_begin, tiles,
    DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """first, a split's sum of x - first, and its sum of squares around its own mean: (BLOCK_C,).

    ``first`` is the sample's first pixel, or 0 if that is no number.
    """
    lanes = tl.arange(0, BLOCK_P)
    begin = tile_offsets(b, c, tl.zeros((1,), tl.int32), part_strides, DIV, CHANNELS_LAST)
    first = tl.load(part + begin, mask=(c < C)[:, None], other=0.0).to(ACC)  # (BLOCK_C, 1)
    first = tl.where(first - first == 0, first, 0.0)
    # Of the pixels that a lane has seen: sum, squares around their mean, and how many.
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    squares = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    count = tl.zeros((BLOCK_P,), ACC)
    for tile in range(0, tiles):
        p = p_begin + tile * BLOCK_P + lanes
        mask = (c < C)[:, None] & (p < HW)[None, :]
        offsets = tile_offsets(b, c, p, part_strides, DIV, CHANNELS_LAST)
        x = tl.load(part + offsets, mask=mask, other=0.0).to(ACC)
        x = tl.where(mask, x - first, 0.0)
        from_mean = tl.where(mask, x - total * (1.0 / tl.maximum(count, 1.0))[None, :], 0.0)
        squares += from_mean * from_mean * (count / (count + 1.0))[None, :]
        total += x
        count += (p < HW).to(ACC)
    n = tl.sum(count, axis=0)
    all_lanes = tl.sum(total, axis=1)  # (BLOCK_C,)
    from_mean = total / tl.maximum(count, 1.0)[None, :] - (all_lanes / n)[:, None]
    squares += count[None, :] * from_mean * from_mean
    return tl.reshape(first, (BLOCK_C,)), all_lanes, tl.sum(squares, axis=1)


@triton.jit
def _deviations_of_sample(
    parts, part_strides, first, sums, squares, b, c_begin, c_end, split, splits, tiles, C, HW,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write sums and squares[b, split, :, c_begin:c_end], and first[b, :, c_begin:c_end]."""
    p_begin = split * (tiles * BLOCK_P)
    for c0 in range(c_begin, c_end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        for s in tl.static_range(S):
            pixel, total, around = _deviations(
                parts[s], part_strides[s], b, c, C, HW, p_begin, tiles,
                DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip
            place = ((b * splits + split) * S + s) * C + c
            tl.store(sums + place, total, mask=c < C)
            tl.store(squares + place, around, mask=c < C)
            if split == 0:
                tl.store(first + (b * S + s) * C + c, pixel, mask=c < C)


@triton.jit
def _squeeze_and_select(
    first, sums, squares, squeeze, deviation, attention,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, b, splits, share, C, HW, R,
    S: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sample b's squeeze, deviation and attention, (S, C), from the splits of ``share`` pixels."""
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, CHANNELS)
    mask = (s < S)[:, None] & (c < C)[None, :]
    mean = split_total(sums, b, splits, s, c, mask, C, S, ACC) / HW  # less the first pixel
    around = tl.zeros(mask.shape, ACC)
    for split in range(0, splits):
        place = ((b * splits + split) * S + s)[:, None] * C + c[None, :]
        n = tl.minimum(share, HW - split * share).to(ACC)
        from_mean = tl.load(sums + place, mask=mask, other=0.0) / n - mean
        around += tl.load(squares + place, mask=mask, other=0.0) + n * from_mean * from_mean
    offsets = (b * S + s)[:, None] * C + c[None, :]
    z = tl.load(first + offsets, mask=mask, other=0.0) + mean
    tl.store(squeeze + offsets, z, mask=mask)
    tl.store(deviation + offsets, around, mask=mask)
    select(
        z, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias, offsets, s, c, C, R,
        S, BLOCK_R, ACC,
    )  # fmt: skip


@triton.jit
def deviation_kernel(
    parts, part_strides, first, sums, squares, C, HW, splits, tiles,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """first (B, S, C), sums and squares (B, splits, S, C). Grid: B * splits * cdiv(C, BLOCK_C)."""
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, split, c_begin = sums_place(C, splits, BLOCK_C)
    _deviations_of_sample(
        parts, part_strides, first, sums, squares, b, c_begin, c_begin + BLOCK_C, split, splits,
        tiles, C, HW, S, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC,
    )  # fmt: skip


@triton.jit
def norm_gate_kernel(
    first, sums, squares, squeeze, deviation, attention,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, C, HW, R, splits, share,
    S: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """squeeze, deviation and attention (B, S, C), from what deviation_kernel wrote. Grid: B."""
    b = tl.program_id(0).to(tl.int64)
    _squeeze_and_select(
        first, sums, squares, squeeze, deviation, attention,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, b, splits, share, C, HW, R,
        S, BLOCK_S, CHANNELS, BLOCK_R, ACC,
    )  # fmt: skip


@triton.jit
def deviation_gate_kernel(
    parts, part_strides, first, sums, squares, squeeze, deviation, attention,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, C, HW, R, tiles,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """deviation_kernel and norm_gate_kernel in one launch, a program for each sample. Grid: B."""
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b = tl.program_id(0).to(tl.int64)
    _deviations_of_sample(
        parts, part_strides, first, sums, squares, b, 0, C, 0, 1, tiles, C, HW,
        S, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC,
    )  # fmt: skip
    tl.debug_barrier()  # they were written by other threads of this program
    _squeeze_and_select(
        first, sums, squares, squeeze, deviation, attention,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, b, 1, HW, C, HW, R,
        S, BLOCK_S, CHANNELS, BLOCK_R, ACC,
    )  # fmt: skip


@triton.jit
def norm_scale(var, gamma, k, mask, EPS: tl.constexpr, ACC: tl.constexpr):
    """What the norm multiplies channels k by."""
    scale = tl.rsqrt(var + EPS)
    if gamma is not None:
        scale *= tl.load(gamma + k, mask=mask, other=0.0).to(ACC)
    return scale


@triton.jit
def affine(a, m, mean, scale, beta, k, mask, ACC: tl.constexpr):
    """The norm as weight * (x - m) + shift, for channels k; and how far a * m is from the mean.

    Sums of products are fused by name, not by the compiler's choice: backward has to get the very
    bits of forward, or a relu would let another gradient pass than its number.
    """
    offset = tl.fma(a, m, -mean)
    if beta is not None:
        shift = tl.fma(offset, scale, tl.load(beta + k, mask=mask, other=0.0).to(ACC))
    else:
        shift = offset * scale
    return a * scale, shift, offset


@triton.jit
def rows_place(b0, i, B, SC, BLOCK_B: tl.constexpr):
    """Samples from b0 on, the offsets (BLOCK_B, BLOCK_K) of their rows i in (B, SC), and a mask."""
    b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
    return b, b[:, None] * SC + i[None, :], (b < B)[:, None] & (i < SC)[None, :]


@triton.jit
def statistics_kernel(
    squeeze, deviation, attention, mean, var, gamma, beta, weight, shift, B, C, HW,
    S: tl.constexpr, EPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """mean and var (S * C,) over all samples, and what they make of each: weight, shift (B, S, C).

    Grid: cdiv(S * C, BLOCK_K).
    """
    i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = ((S - 1 - i // C) * C + i % C)[None, :]
    k_mask = (i < S * C)[None, :]
    total = tl.zeros((1, BLOCK_K), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        _, rows, mask = rows_place(b0, i, B, S * C, BLOCK_B)
        a = tl.load(attention + rows, mask=mask, other=0.0).to(tl.float64)
        m = tl.load(squeeze + rows, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(a * m, axis=0)[None, :]
    center = total / B
    total = tl.zeros((1, BLOCK_K), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        _, rows, mask = rows_place(b0, i, B, S * C, BLOCK_B)
        a = tl.load(attention + rows, mask=mask, other=0.0).to(tl.float64)
        offset = a * tl.load(squeeze + rows, mask=mask, other=0.0).to(tl.float64) - center
        d = tl.load(deviation + rows, mask=mask, other=0.0).to(tl.float64)
        squares = tl.where(mask, a * a * d + offset * offset * HW, 0.0)
        total += tl.sum(squares, axis=0)[None, :]
    center, variance = center.to(ACC), (total / HW / B).to(ACC)
    tl.store(mean + k, center, mask=k_mask)
    tl.store(var + k, variance, mask=k_mask)
    scale = norm_scale(variance, gamma, k, k_mask, EPS, ACC)
    for b0 in range(0, B, BLOCK_B):
        _, rows, mask = rows_place(b0, i, B, S * C, BLOCK_B)
        a = tl.load(attention + rows, mask=mask, other=0.0)
        m = tl.load(squeeze + rows, mask=mask, other=0.0)
        w, z, _ = affine(a, m, center, scale, beta, k, k_mask, ACC)
        tl.store(weight + rows, w, mask=mask)
        tl.store(shift + rows, z, mask=mask)


@triton.jit
def _normalize(
    part, whole, grad_part, mask, squeeze, weight, shift, factor, spread, row, k_mask,
    GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Forward (grad_part is None): whole = relu(weight * (part - squeeze) + shift).

    Backward, with g what the relu lets pass of whole, its gradient:
    grad_part = weight * g + factor * (part - squeeze) + spread.
    """
    m = per_channel(squeeze, row, k_mask, GROUP, ACC)
    w = per_channel(weight, row, k_mask, GROUP, ACC)
    x = tl.load(part, mask=mask, other=0.0).to(ACC) - m
    z = tl.fma(x, w, per_channel(shift, row, k_mask, GROUP, ACC))
    if grad_part is None:
        tl.store(whole, tl.where(z < 0, 0.0, z), mask=mask)
    else:
        g = tl.load(whole, mask=mask, other=0.0).to(ACC)
        y = x * per_channel(factor, row, k_mask, GROUP, ACC)
        y += per_channel(spread, row, k_mask, GROUP, ACC)
        # A NaN passes, as in PyTorch's relu.
        tl.store(grad_part, y + w * tl.where(z <= 0, 0.0, g), mask=mask)


@triton.jit
def normalize_kernel(
    parts, part_strides, cat, cat_strides, grads, grad_strides,
    squeeze, weight, shift, factor, spread, C, HW,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The output from the branches (grads is None), or their gradients; any strides.

    Grid: B * cdiv(C, BLOCK_C) * cdiv(HW, BLOCK_P), walked backwards.
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, c, p = tile_place(C, HW, BLOCK_C, BLOCK_P)
    mask = (c < C)[:, None] & (p < HW)[None, :]
    for s in tl.static_range(S):
        part = parts[s] + tile_offsets(b, c, p, part_strides[s], DIV, CHANNELS_LAST)
        whole = cat + tile_offsets(b, (S - 1 - s) * C + c, p, cat_strides, DIV, CHANNELS_LAST)
        grad = None
        if grads is not None:
            grad = grads[s] + tile_offsets(b, c, p, grad_strides[s], DIV, CHANNELS_LAST)
        _normalize(
            part, whole, grad, mask, squeeze, weight, shift, factor, spread, (b * S + s) * C + c,
            c < C, 0, ACC,
        )  # fmt: skip


@triton.jit
def normalize_flat_kernel(
    parts, cat, grads, squeeze, weight, shift, factor, spread, size, C, groups,
    S: tl.constexpr, DIV: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """normalize_kernel for dense NCHW: a part's sample is one run of size * DIV = C * HW.

    GROUP pixels share a channel, and HW = groups * GROUP. Grid: B * cdiv(C * HW, BLOCK), walked
    backwards.
    """
    size *= DIV
    b, i, c = run_place(size, groups, BLOCK, GROUP)
    for s in tl.static_range(S):
        part = parts[s] + b * size + i
        whole = cat + (b * S + (S - 1 - s)) * size + i
        grad = None
        if grads is not None:
            grad = grads[s] + b * size + i
        _normalize(
            part, whole, grad, i < size, squeeze, weight, shift, factor, spread,
            (b * S + s) * C + c, c < C, GROUP, ACC,
        )  # fmt: skip
