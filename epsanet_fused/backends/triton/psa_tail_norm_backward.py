"""The Triton kernels of psa_tail_norm's backward, all but the last: that is normalize_kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from epsanet_fused.backends.triton.common import (
    extents,
    select_backward,
    sums_place,
    tile_offsets,
)
from epsanet_fused.backends.triton.psa_tail_norm import affine, norm_scale, rows_place


@triton.jit
def _gradient_sums(
    part, part_strides, cat, cat_strides, m, weight, shift, b, c, k, C, HW, p_begin, tiles,
    DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over a split's pixels of g, what the relu lets pass of cat, and of g * (part - m)."""
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    products = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for tile in range(0, tiles):
        p = p_begin + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (p < HW)[None, :]
        offsets = tile_offsets(b, c, p, part_strides, DIV, CHANNELS_LAST)
        x = tl.load(part + offsets, mask=mask, other=0.0).to(ACC) - m[:, None]
        offsets = tile_offsets(b, k + c, p, cat_strides, DIV, CHANNELS_LAST)
        g = tl.load(cat + offsets, mask=mask, other=0.0).to(ACC)
        z = tl.fma(x, tl.broadcast_to(weight[:, None], x.shape), shift[:, None])
        g = tl.where(z <= 0, 0.0, g)
        total += g
        products += g * x
    return tl.sum(total, axis=1), tl.sum(products, axis=1)


@triton.jit
def gradient_sum_kernel(
    parts, part_strides, cat, cat_strides, sums, products, squeeze, attention, mean, var,
    gamma, beta, C, HW, splits, tiles,
    S: tl.constexpr, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr, EPS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums and products (B, splits, S, C) over each split's pixels of the gradient in cat.

    Grid: B * splits * cdiv(C, BLOCK_C).
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, split, c_begin = sums_place(C, splits, BLOCK_C)
    c = c_begin + tl.arange(0, BLOCK_C)
    for s in tl.static_range(S):
        row, first_k = (b * S + s) * C + c, (S - 1 - s) * C
        a = tl.load(attention + row, mask=c < C, other=0.0)
        m = tl.load(squeeze + row, mask=c < C, other=0.0)
        center = tl.load(mean + first_k + c, mask=c < C, other=0.0)
        variance = tl.load(var + first_k + c, mask=c < C, other=0.0)
        scale = norm_scale(variance, gamma, first_k + c, c < C, EPS, ACC)
        weight, shift, _ = affine(a, m, center, scale, beta, first_k + c, c < C, ACC)
        total, product = _gradient_sums(
            parts[s], part_strides[s], cat, cat_strides, m, weight, shift, b, c, first_k, C, HW,
            split * (tiles * BLOCK_P), tiles, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC,
        )  # fmt: skip
        place = ((b * splits + split) * S + s) * C + c
        tl.store(sums + place, total, mask=c < C)
        tl.store(products + place, product, mask=c < C)


@triton.jit
def _totals(sums, products, b, splits, i, mask, SC, ACC: tl.constexpr):
    """The splits' sums and products of samples b and rows i: (BLOCK_B, BLOCK_K)."""
    total = tl.zeros(mask.shape, ACC)
    product = tl.zeros(mask.shape, ACC)
    for split in range(0, splits):
        place = (b * splits + split)[:, None] * SC + i[None, :]
        total += tl.load(sums + place, mask=mask, other=0.0)
        product += tl.load(products + place, mask=mask, other=0.0)
    return total, product


@triton.jit
def gradient_statistics_kernel(
    sums, products, squeeze, deviation, attention, mean, var, gamma, beta,
    grad_gamma, grad_beta, grad_attention, weight, shift, factor, constant, B, C, HW, splits,
    S: tl.constexpr, EPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of gamma and beta (S * C,) and, unless None, of the attention (B, S, C).

    With that also what the branches' gradients are made of, see _normalize: spread is ``constant``
    and what comes back through the squeeze. Grid: cdiv(S * C, BLOCK_K).
    """
    i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = ((S - 1 - i // C) * C + i % C)[None, :]
    k_mask = (i < S * C)[None, :]
    center = tl.load(mean + k, mask=k_mask, other=0.0)
    variance = tl.load(var + k, mask=k_mask, other=0.0)
    by_gamma = tl.zeros((1, BLOCK_K), tl.float64)
    by_beta = tl.zeros((1, BLOCK_K), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        b, rows, mask = rows_place(b0, i, B, S * C, BLOCK_B)
        total, product = _totals(sums, products, b, splits, i, mask, S * C, ACC)
        a = tl.load(attention + rows, mask=mask, other=0.0).to(tl.float64)
        m = tl.load(squeeze + rows, mask=mask, other=0.0).to(tl.float64)
        by_beta += tl.sum(total.to(tl.float64), axis=0)[None, :]
        by_gamma += tl.sum(a * product + (a * m - center) * total, axis=0)[None, :]
    invstd = tl.rsqrt(variance + EPS)
    by_gamma = by_gamma.to(ACC) * invstd
    by_beta = by_beta.to(ACC)
    if grad_gamma is not None:
        tl.store(grad_gamma + k, by_gamma, mask=k_mask)
    if grad_beta is not None:
        tl.store(grad_beta + k, by_beta, mask=k_mask)
    if grad_attention is not None:
        scale = norm_scale(variance, gamma, k, k_mask, EPS, ACC)
        slope = invstd * by_gamma / HW / B
        for b0 in range(0, B, BLOCK_B):
            b, rows, mask = rows_place(b0, i, B, S * C, BLOCK_B)
            total, product = _totals(sums, products, b, splits, i, mask, S * C, ACC)
            a = tl.load(attention + rows, mask=mask, other=0.0)
            m = tl.load(squeeze + rows, mask=mask, other=0.0)
            d = tl.load(deviation + rows, mask=mask, other=0.0)
            w, z, offset = affine(a, m, center, scale, beta, k, k_mask, ACC)
            # What every pixel's gradient lacks at x = m, before weight.
            rest = by_beta / HW / B + offset * slope
            grad_a = scale * (product - slope * a * d + m * (total - HW * rest))
            tl.store(grad_attention + rows, grad_a, mask=mask)
            tl.store(weight + rows, w, mask=mask)
            tl.store(shift + rows, z, mask=mask)
            tl.store(factor + rows, -w * a * slope, mask=mask)
            tl.store(constant + rows, -w * rest, mask=mask)


@triton.jit
def norm_gate_backward_kernel(
    grad_attention, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    constant, spread, hidden, grad_pre1, grad_pre2, C, HW, R,
    S: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """spread (B, S, C): constant, and what each pixel gets back through the squeeze. Grid: B.

    Also what fc's gradients are made of; see select_backward.
    """
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, CHANNELS)
    mask = (s < S)[:, None] & (c < C)[None, :]
    offsets = (b * S + s)[:, None] * C + c[None, :]
    grad = tl.load(grad_attention + offsets, mask=mask, other=0.0)
    z = tl.load(squeeze + offsets, mask=mask, other=0.0)
    grad_z = select_backward(
        grad, z, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        hidden, grad_pre1, grad_pre2, offsets, b, s, c, C, R, S, BLOCK_R, ACC,
    )  # fmt: skip
    rest = tl.load(constant + offsets, mask=mask, other=0.0)
    tl.store(spread + offsets, rest + grad_z / HW, mask=mask)
