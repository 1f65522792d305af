"""The Triton kernels of psa_tail, in the order in which they run: sums, gate, recalibrate.

The same kernels run forward and backward. ``common.py`` explains the names. Loops over the S
branches are unrolled: a program of recalibrate_kernel has S independent loads in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epsanet_fused.backends.triton.common import (
    extents,
    flat_coords,
    per_channel,
    split_coords,
    split_total,
    tile_coords,
    tile_offsets,
)
from epsanet_fused.backends.triton.gate import excite_and_select, excite_and_select_backward


@triton.jit
def _channel_sums(
    branch,
    branch_strides,
    concat,
    concat_strides,
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
    """Return the sums over pixels of branch, or of branch * concat: (BLOCK_C,)."""
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for tile in range(0, tiles):
        p = p_begin + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (p < HW)[None, :]
        offsets = tile_offsets(b, c, p, branch_strides, DIV, CHANNELS_LAST)
        x = tl.load(branch + offsets, mask=mask, other=0.0).to(ACC)
        if concat is not None:
            offsets = tile_offsets(b, first_k + c, p, concat_strides, DIV, CHANNELS_LAST)
            x *= tl.load(concat + offsets, mask=mask, other=0.0).to(ACC)
        total += x
    return tl.sum(total, axis=1)


@triton.jit
def _sum_sample(
    tail,
    sums,
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
    """Write sums[b, split, :, c_begin:c_end], over the split's pixels."""
    p_begin = split * (tiles * BLOCK_P)
    for c0 in range(c_begin, c_end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        for s in tl.static_range(S):
            total = _channel_sums(
                tail.branches[s],
                tail.branch_strides[s],
                tail.concat,
                tail.concat_strides,
                b,
                c,
                (S - 1 - s) * C,
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
            tl.store(sums + ((b * splits + split) * S + s) * C + c, total, mask=c < C)


@triton.jit
def _gate_sample(
    sums,
    se,
    b,
    splits,
    C,
    HW,
    R,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Run the gate of sample b, or its backward; see gate_kernel."""
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, CHANNELS)
    mask = (s < S)[:, None] & (c < C)[None, :]
    offsets = (b * S + s)[:, None] * C + c[None, :]
    total = split_total(sums, b, splits, s, c, mask, C, S, ACC)
    if se.grad_mean is None:
        m = total / HW
        tl.store(se.squeeze + offsets, m, mask=mask)
        excite_and_select(m, se.attention, se.fc, offsets, s, c, C, R, S, BLOCK_R, ACC)
    else:
        m = tl.load(se.squeeze + offsets, mask=mask, other=0.0)
        grad_m = excite_and_select_backward(
            total,
            m,
            se.attention,
            se.fc,
            se.fc_grad_inputs,
            offsets,
            b,
            s,
            c,
            C,
            R,
            S,
            BLOCK_R,
            ACC,
        )
        tl.store(se.grad_mean + offsets, grad_m / HW, mask=mask)


@triton.jit
def sum_kernel(
    tail,
    sums,
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
    """Write the sums (B, splits, S, C) over each split's pixels.

    Forward (tail.concat is None): of the branches. Backward: of branches * concat, where concat is
    the output's gradient. Grid: B * splits * cdiv(C, BLOCK_C).
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, split, c_begin = split_coords(C, splits, BLOCK_C)
    _sum_sample(
        tail,
        sums,
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
def gate_kernel(
    sums,
    se,
    C,
    HW,
    R,
    splits,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Run the gate of each sample, or its backward, from the sums of sum_kernel. Grid: B.

    Forward (se.grad_mean is None): write squeeze and attention (B, S, C). Backward: read them;
    write grad_mean (B, S, C) and, unless None, fc_grad_inputs.
    """
    b = tl.program_id(0).to(tl.int64)
    _gate_sample(sums, se, b, splits, C, HW, R, S, BLOCK_S, CHANNELS, BLOCK_R, ACC)


@triton.jit
def sum_gate_kernel(
    tail,
    sums,
    se,
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
    """Run sum_kernel and gate_kernel in one launch, one program for each sample. Grid: B."""
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b = tl.program_id(0).to(tl.int64)
    _sum_sample(
        tail, sums, b, 0, C, 0, 1, tiles, C, HW, S, DIV, CHANNELS_LAST, BLOCK_C, BLOCK_P, ACC
    )
    tl.debug_barrier()  # the gate reads sums that other threads of this program wrote
    _gate_sample(sums, se, b, 1, C, HW, R, S, BLOCK_S, CHANNELS, BLOCK_R, ACC)


@triton.jit
def _recalibrate(
    branch,
    concat,
    mask,
    attention,
    grad_mean,
    row,
    scale,
    shift,
    k,
    k_mask,
    RELU: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write one tile or run of the concat (grad_mean is None) or of a branch's gradient."""
    a = per_channel(attention, row, k_mask, GROUP, ACC)
    if grad_mean is None:
        y = tl.load(branch, mask=mask, other=0.0).to(ACC) * a
        if scale is not None:
            y *= per_channel(scale, k, k_mask, GROUP, ACC)
        if shift is not None:
            y += per_channel(shift, k, k_mask, GROUP, ACC)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # a NaN passes, as in PyTorch's relu
        tl.store(concat, y, mask=mask)
    else:
        y = tl.load(concat, mask=mask, other=0.0).to(ACC) * a
        y += per_channel(grad_mean, row, k_mask, GROUP, ACC)
        tl.store(branch, y, mask=mask)


@triton.jit
def recalibrate_kernel(
    tail,
    attention,
    grad_mean,
    scale,
    shift,
    C,
    HW,
    S: tl.constexpr,
    DIV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Recalibrate and concatenate the branches, or compute their gradients; any strides.

    Forward (grad_mean is None): concat = relu(branch * attention * scale + shift), where scale,
    shift and relu are optional. Backward: branch = concat * attention + grad_mean, where both are
    gradients. Grid: B * cdiv(C, BLOCK_C) * cdiv(HW, BLOCK_P), in reverse.
    """
    C, HW = extents(C, HW, DIV, CHANNELS_LAST)
    b, c, p = tile_coords(C, HW, BLOCK_C, BLOCK_P)
    mask = (c < C)[:, None] & (p < HW)[None, :]
    for s in tl.static_range(S):
        k = (S - 1 - s) * C + c
        x = tail.branches[s] + tile_offsets(b, c, p, tail.branch_strides[s], DIV, CHANNELS_LAST)
        y = tail.concat + tile_offsets(b, k, p, tail.concat_strides, DIV, CHANNELS_LAST)
        row = (b * S + s) * C + c
        _recalibrate(x, y, mask, attention, grad_mean, row, scale, shift, k, c < C, RELU, 0, ACC)


@triton.jit
def recalibrate_flat_kernel(
    branches,
    concat,
    attention,
    grad_mean,
    scale,
    shift,
    size,
    C,
    groups,
    S: tl.constexpr,
    DIV: tl.constexpr,
    GROUP: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Run recalibrate_kernel for dense NCHW, with wide accesses even where HW is odd.

    A branch's sample is one run of size * DIV = C * HW elements. GROUP pixels share a channel, and
    HW = groups * GROUP. Grid: B * cdiv(C * HW, BLOCK), in reverse.
    """
    size *= DIV
    b, i, c = flat_coords(size, groups, BLOCK, GROUP)
    for s in tl.static_range(S):
        k = (S - 1 - s) * C + c
        x = branches[s] + b * size + i
        y = concat + (b * S + (S - 1 - s)) * size + i
        mask = i < size
        row = (b * S + s) * C + c
        _recalibrate(
            x, y, mask, attention, grad_mean, row, scale, shift, k, c < C, RELU, GROUP, ACC
        )
