"""The last kernel of psa_tail_norm, forward and backward, and the norm as it applies to one sample.

``common.py`` explains the names; docs/design.md has the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epsanet_fused.backends.triton.common import (
    extents,
    flat_coords,
    per_channel,
    tile_coords,
    tile_offsets,
)


@triton.jit
def norm_scale(batch_var, gamma, k, mask, EPS: tl.constexpr, ACC: tl.constexpr):
    """Return gamma / sqrt(batch_var + EPS) for channels k of the concat."""
    scale = tl.rsqrt(batch_var + EPS)
    if gamma is not None:
        scale *= tl.load(gamma + k, mask=mask, other=0.0).to(ACC)
    return scale


@triton.jit
def sample_norm(a, m, batch_mean, scale, beta, k, mask, ACC: tl.constexpr):
    """Return the norm of a * x as weight * (x - m) + shift, and a * m - batch_mean.

    Products and sums are fused explicitly and not by the compiler's choice: backward must get the
    same bits as forward, else the ReLU's gradient would not match its output.
    """
    offset = tl.fma(a, m, -batch_mean)
    if beta is not None:
        shift = tl.fma(offset, scale, tl.load(beta + k, mask=mask, other=0.0).to(ACC))
    else:
        shift = offset * scale
    return a * scale, shift, offset


@triton.jit
def _normalize(
    branch,
    concat,
    grad_branch,
    mask,
    terms,
    row,
    k_mask,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write one tile or run of the concat (grad_branch is None) or of a branch's gradient."""
    m = per_channel(terms.squeeze, row, k_mask, GROUP, ACC)
    w = per_channel(terms.weight, row, k_mask, GROUP, ACC)
    x = tl.load(branch, mask=mask, other=0.0).to(ACC) - m
    z = tl.fma(x, w, per_channel(terms.shift, row, k_mask, GROUP, ACC))
    # A NaN passes, as in PyTorch's relu.
    if grad_branch is None:
        tl.store(concat, tl.where(z < 0, 0.0, z), mask=mask)
    else:
        g = tl.load(concat, mask=mask, other=0.0).to(ACC)
        y = x * per_channel(terms.factor, row, k_mask, GROUP, ACC)
        y += per_channel(terms.grad_mean, row, k_mask, GROUP, ACC)
        tl.store(grad_branch, y + w * tl.where(z <= 0, 0.0, g), mask=mask)


@triton.jit
def normalize_kernel(
    tail,
    grad_branches,
    grad_strides,
    terms,
    C,
    HW,
    S: tl.constexpr,
    DIV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Normalize and concatenate the branches, or compute their gradients; any strides.

    NormTerms has the formulas. Forward (grad_branches is None): write tail.concat, the output.
    Backward: read it, the output's gradient.
    Grid: B * cdiv(C, BLOCK_C) * cdiv(HW, BLOCK_P), in reverse.
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, c, p = tile_coords(C, HW, BLOCK_C, BLOCK_P)
    mask = (c < C)[:, None] & (p < HW)[None, :]
    for s in tl.static_range(S):
        k = (S - 1 - s) * C + c
        x = tail.branches[s] + tile_offsets(b, c, p, tail.branch_strides[s], DIV, CHANNELS_LAST)
        y = tail.concat + tile_offsets(b, k, p, tail.concat_strides, DIV, CHANNELS_LAST)
        grad = None
        if grad_branches is not None:
            grad = grad_branches[s] + tile_offsets(b, c, p, grad_strides[s], DIV, CHANNELS_LAST)
        _normalize(x, y, grad, mask, terms, (b * S + s) * C + c, c < C, 0, ACC)


@triton.jit
def normalize_flat_kernel(
    branches,
    concat,
    grad_branches,
    terms,
    size,
    C,
    groups,
    S: tl.constexpr,
    DIV: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Run normalize_kernel for dense NCHW, with wide accesses even where HW is odd.

    A branch's sample is one run of size * DIV = C * HW elements. GROUP pixels share a channel, and
    HW = groups * GROUP. Grid: B * cdiv(C * HW, BLOCK), in reverse.
    """
    size *= DIV
    b, i, c = flat_coords(size, groups, BLOCK, GROUP)
    for s in tl.static_range(S):
        x = branches[s] + b * size + i
        y = concat + (b * S + (S - 1 - s)) * size + i
        grad = None
        if grad_branches is not None:
            grad = grad_branches[s] + b * size + i
        _normalize(x, y, grad, i < size, terms, (b * S + s) * C + c, c < C, GROUP, ACC)
