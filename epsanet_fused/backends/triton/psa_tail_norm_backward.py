"""The Triton kernels of psa_tail_norm's backward, all but the last, which is normalize_kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from epsanet_fused.backends.triton.common import extents, row_coords, split_coords, tile_offsets
from epsanet_fused.backends.triton.gate import excite_and_select_backward
from epsanet_fused.backends.triton.normalize import norm_scale, sample_norm


@triton.jit
def _channel_grad_sums(
    branch,
    branch_strides,
    concat,
    concat_strides,
    m,
    weight,
    shift,
    b,
    c,
    first_k,
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
    """Return a split's sums over pixels of g and of g * (branch - m): (BLOCK_C,) each.

    g is the gradient behind the ReLU: the concat, where the ReLU's output isn't 0.
    """
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    products = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for tile in range(0, tiles):
        p = p_begin + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (p < HW)[None, :]
        offsets = tile_offsets(b, c, p, branch_strides, DIV, CHANNELS_LAST)
        x = tl.load(branch + offsets, mask=mask, other=0.0).to(ACC) - m[:, None]
        offsets = tile_offsets(b, first_k + c, p, concat_strides, DIV, CHANNELS_LAST)
        g = tl.load(concat + offsets, mask=mask, other=0.0).to(ACC)
        z = tl.fma(x, tl.broadcast_to(weight[:, None], x.shape), shift[:, None])
        g = tl.where(z <= 0, 0.0, g)
        total += g
        products += g * x
    return tl.sum(total, axis=1), tl.sum(products, axis=1)


@triton.jit
def gradient_sum_kernel(
    tail,
    sums,
    products,
    stats,
    gamma,
    beta,
    C,
    HW,
    splits,
    tiles,
    S: tl.constexpr,
    DIV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write sums and products (B, splits, S, C) over each split's pixels.

    They are of g and of g * (branch - squeeze), where g is the gradient behind the ReLU.
    Grid: B * splits * cdiv(C, BLOCK_C).
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, split, c_begin = split_coords(C, splits, BLOCK_C)
    c = c_begin + tl.arange(0, BLOCK_C)
    for s in tl.static_range(S):
        row, first_k = (b * S + s) * C + c, (S - 1 - s) * C
        a = tl.load(stats.attention + row, mask=c < C, other=0.0)
        m = tl.load(stats.squeeze + row, mask=c < C, other=0.0)
        batch_mean = tl.load(stats.mean + first_k + c, mask=c < C, other=0.0)
        batch_var = tl.load(stats.var + first_k + c, mask=c < C, other=0.0)
        scale = norm_scale(batch_var, gamma, first_k + c, c < C, EPS, ACC)
        weight, shift, _ = sample_norm(a, m, batch_mean, scale, beta, first_k + c, c < C, ACC)
        total, product = _channel_grad_sums(
            tail.branches[s],
            tail.branch_strides[s],
            tail.concat,
            tail.concat_strides,
            m,
            weight,
            shift,
            b,
            c,
            first_k,
            C,
            HW,
            split * (tiles * BLOCK_P),
            tiles,
            DIV,
            CHANNELS_LAST,
            BLOCK_C,
            BLOCK_P,
            ACC,
        )
        offsets = ((b * splits + split) * S + s) * C + c
        tl.store(sums + offsets, total, mask=c < C)
        tl.store(products + offsets, product, mask=c < C)


@triton.jit
def _batch_totals(sums, products, b, splits, i, mask, SC, ACC: tl.constexpr):
    """Add up the splits' sums and products of samples b and rows i: (BLOCK_B, BLOCK_K) each."""
    total = tl.zeros(mask.shape, ACC)
    product = tl.zeros(mask.shape, ACC)
    for split in range(0, splits):
        offsets = (b * splits + split)[:, None] * SC + i[None, :]
        total += tl.load(sums + offsets, mask=mask, other=0.0)
        product += tl.load(products + offsets, mask=mask, other=0.0)
    return total, product


@triton.jit
def gradient_statistics_kernel(
    sums,
    products,
    stats,
    gamma,
    beta,
    grad_gamma,
    grad_beta,
    terms,
    B,
    C,
    HW,
    splits,
    S: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write grad_gamma and grad_beta (S * C,) and terms, a NormGradTerms, unless None.

    Rows and blocks are those of statistics_kernel. Grid: cdiv(S * C, BLOCK_K).
    """
    i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = ((S - 1 - i // C) * C + i % C)[None, :]
    k_mask = (i < S * C)[None, :]
    batch_mean = tl.load(stats.mean + k, mask=k_mask, other=0.0)
    batch_var = tl.load(stats.var + k, mask=k_mask, other=0.0)
    gamma_sum = tl.zeros((1, BLOCK_K), tl.float64)
    beta_sum = tl.zeros((1, BLOCK_K), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        b, rows, mask = row_coords(b0, i, B, S * C, BLOCK_B)
        total, product = _batch_totals(sums, products, b, splits, i, mask, S * C, ACC)
        a = tl.load(stats.attention + rows, mask=mask, other=0.0).to(tl.float64)
        m = tl.load(stats.squeeze + rows, mask=mask, other=0.0).to(tl.float64)
        beta_sum += tl.sum(total.to(tl.float64), axis=0)[None, :]
        gamma_sum += tl.sum(a * product + (a * m - batch_mean) * total, axis=0)[None, :]
    invstd = tl.rsqrt(batch_var + EPS)
    gamma_sum, beta_sum = gamma_sum.to(ACC) * invstd, beta_sum.to(ACC)
    if grad_gamma is not None:
        tl.store(grad_gamma + k, gamma_sum, mask=k_mask)
    if grad_beta is not None:
        tl.store(grad_beta + k, beta_sum, mask=k_mask)
    if terms is not None:
        scale = norm_scale(batch_var, gamma, k, k_mask, EPS, ACC)
        slope = invstd * gamma_sum / HW / B
        for b0 in range(0, B, BLOCK_B):
            b, rows, mask = row_coords(b0, i, B, S * C, BLOCK_B)
            total, product = _batch_totals(sums, products, b, splits, i, mask, S * C, ACC)
            a = tl.load(stats.attention + rows, mask=mask, other=0.0)
            m = tl.load(stats.squeeze + rows, mask=mask, other=0.0)
            m2 = tl.load(stats.m2 + rows, mask=mask, other=0.0)
            row_weight, row_shift, offset = sample_norm(
                a, m, batch_mean, scale, beta, k, k_mask, ACC
            )
            grad_const = beta_sum / HW / B + offset * slope  # subtracted at x = m, before weight
            grad_a = scale * (product - slope * a * m2 + m * (total - HW * grad_const))
            tl.store(terms.grad_attention + rows, grad_a, mask=mask)
            tl.store(terms.weight + rows, row_weight, mask=mask)
            tl.store(terms.shift + rows, row_shift, mask=mask)
            tl.store(terms.factor + rows, -row_weight * a * slope, mask=mask)
            tl.store(terms.batch_grad_mean + rows, -row_weight * grad_const, mask=mask)


@triton.jit
def norm_gate_backward_kernel(
    grad_attention,
    squeeze,
    attention,
    fc,
    batch_grad_mean,
    grad_mean,
    fc_grad_inputs,
    C,
    HW,
    R,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write grad_mean (B, S, C): batch_grad_mean and the gradient through the squeeze. Grid: B.

    Also writes fc_grad_inputs, unless None.
    """
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, CHANNELS)
    mask = (s < S)[:, None] & (c < C)[None, :]
    offsets = (b * S + s)[:, None] * C + c[None, :]
    grad = tl.load(grad_attention + offsets, mask=mask, other=0.0)
    m = tl.load(squeeze + offsets, mask=mask, other=0.0)
    grad_m = excite_and_select_backward(
        grad, m, attention, fc, fc_grad_inputs, offsets, b, s, c, C, R, S, BLOCK_R, ACC
    )
    from_batch = tl.load(batch_grad_mean + offsets, mask=mask, other=0.0)
    tl.store(grad_mean + offsets, from_batch + grad_m / HW, mask=mask)
