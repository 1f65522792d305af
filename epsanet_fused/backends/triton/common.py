"""What the Triton kernels are made of: where a tile or a run lies, and one sample's gate.

Words: the *parts* are the S tensors (B, C, H, W), the branches or their gradients; the *cat* is
the one tensor (B, S * C, H, W) that holds them in reverse, the output or its gradient. H and W are
one flat pixel index p of HW values. Strides are (batch, channel, pixel), in elements.

DIV is a power of two that divides the inner extent (pixels for NCHW, channels for channels_last)
and all strides but the inner one. Those arguments come divided by it: multiplied here by a
constant, they tell the compiler how wide it may load (196 pixels: four at a time).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extents(C, HW, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """C and HW, the inner one multiplied by DIV."""
    if CHANNELS_LAST:
        return C * DIV, HW
    else:
        return C, HW * DIV


@triton.jit
def sums_place(C, splits, BLOCK_C: tl.constexpr):
    """Of a program of the grid B * splits * cdiv(C, BLOCK_C): its b, split and first channel."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    b = (pid // blocks // splits).to(tl.int64)
    return b, pid // blocks % splits, pid % blocks * BLOCK_C


@triton.jit
def tile_place(C, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of a program of the grid B * cdiv(C, BLOCK_C) * cdiv(HW, BLOCK_P): its b, c's and p's.

    The grid is walked backwards: the samples that the sums read last are still in L2.
    """
    c_blocks = tl.cdiv(C, BLOCK_C)
    p_blocks = tl.cdiv(HW, BLOCK_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    p = pid % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid // p_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // p_blocks // c_blocks).to(tl.int64), c, p


@triton.jit
def run_place(size, groups, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Of a program of the grid B * cdiv(size, BLOCK), walked backwards: its b, elements and c's.

    A sample is one run of ``size`` elements; ``groups`` times GROUP of them share a channel.
    """
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block = pid % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    c = (block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)) // groups
    return (pid // blocks).to(tl.int64), i, c


@triton.jit
def tile_offsets(b, c, p, strides, DIV: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets (BLOCK_C, BLOCK_P) of channels c and pixels p of sample b; int64 throughout."""
    batch = b * strides[0] * DIV
    c = c.to(tl.int64)[:, None]
    p = p.to(tl.int64)[None, :]
    if CHANNELS_LAST:
        return batch + c * strides[1] + p * strides[2] * DIV
    else:
        return batch + c * strides[1] * DIV + p * strides[2]


@triton.jit
def per_channel(vector, index, mask, GROUP: tl.constexpr, ACC: tl.constexpr):
    """vector[index] in the shape of a tile's rows (GROUP = 0) or of a run, GROUP pixels each."""
    x = tl.load(vector + index, mask=mask, other=0.0).to(ACC)
    if GROUP == 0:
        return x[:, None]
    else:
        return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], GROUP)), (x.shape[0] * GROUP,))


@triton.jit
def split_total(sums, b, splits, s, c, mask, C, S: tl.constexpr, ACC: tl.constexpr):
    """The splits' sums of sample b added up in a fixed order: (BLOCK_S, CHANNELS)."""
    total = tl.zeros(mask.shape, ACC)
    for split in range(0, splits):
        row = (b * splits + split) * S + s
        total += tl.load(sums + row[:, None] * C + c[None, :], mask=mask, other=0.0)
    return total


@triton.jit
def _hidden(z, fc1_weight, fc1_bias, r, c, C, R, ACC: tl.constexpr):
    """relu(fc1 z) for hidden units r, and fc1's rows: (BLOCK_S, BLOCK_R), (BLOCK_R, CHANNELS)."""
    mask = (r < R)[:, None] & (c < C)[None, :]
    w1 = tl.load(fc1_weight + r[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)
    h = tl.sum(z[:, None, :] * w1[None, :, :], axis=2)
    h += tl.load(fc1_bias + r, mask=r < R, other=0.0).to(ACC)[None, :]
    # A NaN passes, as in PyTorch's relu; but not into the padding, where an infinite z makes one.
    return tl.where((h < 0) | (r >= R)[None, :], 0.0, h), w1


@triton.jit
def _fc2_rows(fc2_weight, r, c, C, R, ACC: tl.constexpr):
    """fc2's columns r as rows: (BLOCK_R, CHANNELS)."""
    mask = (r < R)[:, None] & (c < C)[None, :]
    return tl.load(fc2_weight + c[None, :] * R + r[:, None], mask=mask, other=0.0).to(ACC)


@triton.jit
def _sigmoid_gate(
    z, fc1_weight, fc1_bias, fc2_weight, fc2_bias, c, C, R, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):
    """sigmoid(fc2 relu(fc1 z)): (BLOCK_S, CHANNELS)."""
    pre = tl.zeros(z.shape, ACC) + tl.load(fc2_bias + c, mask=c < C, other=0.0).to(ACC)[None, :]
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        h, _ = _hidden(z, fc1_weight, fc1_bias, r, c, C, R, ACC)
        w2 = _fc2_rows(fc2_weight, r, c, C, R, ACC)
        pre += tl.sum(h[:, :, None] * w2[None, :, :], axis=1)
    return 1.0 / (1.0 + tl.exp(-pre))


@triton.jit
def _fc_backward(
    z, pre2, fc1_weight, fc1_bias, fc2_weight, hidden, grad_pre1, b, s, c, C, R,
    S: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of z from that of the gate before its sigmoid: (BLOCK_S, CHANNELS)."""
    grad_z = tl.zeros(z.shape, ACC)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        h, w1 = _hidden(z, fc1_weight, fc1_bias, r, c, C, R, ACC)
        w2 = _fc2_rows(fc2_weight, r, c, C, R, ACC)
        pre1 = tl.sum(pre2[:, None, :] * w2[None, :, :], axis=2)
        pre1 = tl.where((h <= 0) | (r >= R)[None, :], 0.0, pre1)
        grad_z += tl.sum(pre1[:, :, None] * w1[None, :, :], axis=1)
        if hidden is not None:
            offsets = (b * S + s)[:, None] * R + r[None, :]
            mask = (s < S)[:, None] & (r < R)[None, :]
            tl.store(hidden + offsets, h, mask=mask)
            tl.store(grad_pre1 + offsets, pre1, mask=mask)
    return grad_z


@triton.jit
def select(
    z, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias, offsets, s, c, C, R,
    S: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write one sample's attention (S, C), at ``offsets``, from its squeeze z."""
    gate = _sigmoid_gate(z, fc1_weight, fc1_bias, fc2_weight, fc2_bias, c, C, R, BLOCK_R, ACC)
    # The gate is in (0, 1): its exponential needs no maximum subtracted.
    e = tl.where((s < S)[:, None], tl.exp(gate), 0.0)
    mask = (s < S)[:, None] & (c < C)[None, :]
    tl.store(attention + offsets, e / tl.sum(e, axis=0)[None, :], mask=mask)


@triton.jit
def select_backward(
    grad, z, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    hidden, grad_pre1, grad_pre2, offsets, b, s, c, C, R,
    S: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of one sample's squeeze z from that of its attention: (BLOCK_S, CHANNELS).

    Also writes hidden and grad_pre1 (S, R) and grad_pre2 (S, C), for fc's gradients, unless None.
    """
    gate = _sigmoid_gate(z, fc1_weight, fc1_bias, fc2_weight, fc2_bias, c, C, R, BLOCK_R, ACC)
    mask = (s < S)[:, None] & (c < C)[None, :]
    a = tl.load(attention + offsets, mask=mask, other=0.0)
    mean = tl.sum(grad * a, axis=0)[None, :]
    pre2 = tl.where(mask, a * (grad - mean) * gate * (1.0 - gate), 0.0)
    if grad_pre2 is not None:
        tl.store(grad_pre2 + offsets, pre2, mask=mask)
    return _fc_backward(
        z, pre2, fc1_weight, fc1_bias, fc2_weight, hidden, grad_pre1, b, s, c, C, R, S, BLOCK_R, ACC
    )
