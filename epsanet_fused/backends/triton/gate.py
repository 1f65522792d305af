"""The SE module and the softmax across branches, for one sample; and their gradients.

``common.py`` explains the names. A program has all branches and channels of its sample: values are
(BLOCK_S, CHANNELS), padded to powers of two. It goes through the hidden units BLOCK_R at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _modules(fc, BLOCK_S: tl.constexpr):
    """Return the SEs to load, one for all branches or one for each, and which of them exist."""
    if fc.modules is None:
        s = tl.arange(0, 1)
        return s, s == 0
    else:
        s = tl.arange(0, BLOCK_S)
        return s, s < fc.modules


@triton.jit
def _hidden_units(m, fc, r, c, C, R, ACC: tl.constexpr):
    """Return relu(fc1 m) (BLOCK_S, BLOCK_R) of hidden units r, and fc1's rows r.

    The rows are (1, BLOCK_R, CHANNELS), or those of each branch: (BLOCK_S, BLOCK_R, CHANNELS).
    """
    s, s_mask = _modules(fc, m.shape[0])
    mask = s_mask[:, None, None] & (r < R)[None, :, None] & (c < C)[None, None, :]
    rows = (s[:, None] * R + r[None, :])[:, :, None]
    w1 = tl.load(fc.fc1_weight + rows * C + c[None, None, :], mask=mask, other=0.0).to(ACC)
    h = tl.sum(m[:, None, :] * w1, axis=2)
    bias_mask = s_mask[:, None] & (r < R)[None, :]
    h += tl.load(fc.fc1_bias + s[:, None] * R + r[None, :], mask=bias_mask, other=0.0).to(ACC)
    # A NaN passes, as in PyTorch's relu. The padding is set to 0: an infinite m makes it NaN.
    return tl.where((h < 0) | (r >= R)[None, :], 0.0, h), w1


@triton.jit
def _fc2_columns(fc, r, c, C, R, BLOCK_S: tl.constexpr, ACC: tl.constexpr):
    """Return fc2's columns r, transposed: (1 or BLOCK_S, BLOCK_R, CHANNELS)."""
    s, s_mask = _modules(fc, BLOCK_S)
    mask = s_mask[:, None, None] & (r < R)[None, :, None] & (c < C)[None, None, :]
    rows = (s[:, None] * C + c[None, :])[:, None, :]
    return tl.load(fc.fc2_weight + rows * R + r[None, :, None], mask=mask, other=0.0).to(ACC)


@triton.jit
def _sigmoid_gate(m, fc, c, C, R, BLOCK_R: tl.constexpr, ACC: tl.constexpr):
    """Return sigmoid(fc2 relu(fc1 m)): (BLOCK_S, CHANNELS)."""
    s, s_mask = _modules(fc, m.shape[0])
    mask = s_mask[:, None] & (c < C)[None, :]
    bias = tl.load(fc.fc2_bias + s[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)
    pre = tl.zeros(m.shape, ACC) + bias
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        h, _ = _hidden_units(m, fc, r, c, C, R, ACC)
        w2 = _fc2_columns(fc, r, c, C, R, m.shape[0], ACC)
        pre += tl.sum(h[:, :, None] * w2, axis=1)
    return 1.0 / (1.0 + tl.exp(-pre))


@triton.jit
def _fc_backward(
    m,
    pre2,
    fc,
    fc_grad_inputs,
    b,
    s,
    c,
    C,
    R,
    S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the gradient of m from pre2, that of the gate before its sigmoid.

    Both are (BLOCK_S, CHANNELS). Also writes hidden and grad_pre1, unless fc_grad_inputs is None.
    """
    grad_m = tl.zeros(m.shape, ACC)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        h, w1 = _hidden_units(m, fc, r, c, C, R, ACC)
        w2 = _fc2_columns(fc, r, c, C, R, m.shape[0], ACC)
        pre1 = tl.sum(pre2[:, None, :] * w2, axis=2)
        pre1 = tl.where((h <= 0) | (r >= R)[None, :], 0.0, pre1)
        grad_m += tl.sum(pre1[:, :, None] * w1, axis=1)
        if fc_grad_inputs is not None:
            offsets = (b * S + s)[:, None] * R + r[None, :]
            mask = (s < S)[:, None] & (r < R)[None, :]
            tl.store(fc_grad_inputs.hidden + offsets, h, mask=mask)
            tl.store(fc_grad_inputs.grad_pre1 + offsets, pre1, mask=mask)
    return grad_m


@triton.jit
def excite_and_select(
    m, attention, fc, offsets, s, c, C, R, S: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):
    """Write one sample's attention (S, C), at ``offsets``, from its squeeze m."""
    gate = _sigmoid_gate(m, fc, c, C, R, BLOCK_R, ACC)
    # The gate is in (0, 1): the softmax needs no maximum subtracted.
    e = tl.where((s < S)[:, None], tl.exp(gate), 0.0)
    mask = (s < S)[:, None] & (c < C)[None, :]
    tl.store(attention + offsets, e / tl.sum(e, axis=0)[None, :], mask=mask)


@triton.jit
def excite_and_select_backward(
    grad,
    m,
    attention,
    fc,
    fc_grad_inputs,
    offsets,
    b,
    s,
    c,
    C,
    R,
    S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the gradient of one sample's squeeze m from ``grad``, that of its attention.

    Both are (BLOCK_S, CHANNELS). Also writes fc_grad_inputs, unless None: hidden and grad_pre1
    (B, S, R) and grad_pre2 (B, S, C), the gradients of fc1's and fc2's outputs.
    """
    gate = _sigmoid_gate(m, fc, c, C, R, BLOCK_R, ACC)
    mask = (s < S)[:, None] & (c < C)[None, :]
    a = tl.load(attention + offsets, mask=mask, other=0.0)
    mean = tl.sum(grad * a, axis=0)[None, :]
    pre2 = tl.where(mask, a * (grad - mean) * gate * (1.0 - gate), 0.0)
    if fc_grad_inputs is not None:
        tl.store(fc_grad_inputs.grad_pre2 + offsets, pre2, mask=mask)
    return _fc_backward(m, pre2, fc, fc_grad_inputs, b, s, c, C, R, S, BLOCK_R, ACC)


@triton.jit
def fc_grad_kernel(
    squeeze,
    fc_grad_inputs,
    grad_fc,
    rows,
    modules,
    C,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write grad_fc, the fc gradients, summed over rows = B * S in a fixed order.

    With weights of each branch (modules = S), over every S-th row.
    Grid: cdiv(C, BLOCK_C) * cdiv(R, BLOCK_R) * modules.
    """
    hidden, grad_pre1, grad_pre2 = fc_grad_inputs
    r_blocks = tl.cdiv(R, BLOCK_R)
    blocks = tl.cdiv(C, BLOCK_C) * r_blocks
    module = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    c = block // r_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    r = block % r_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    grad_w1 = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    grad_w2 = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    grad_b1 = tl.zeros((BLOCK_R,), ACC)
    grad_b2 = tl.zeros((BLOCK_C,), ACC)
    for n0 in range(0, rows // modules, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N).to(tl.int64)) * modules + module
        c_mask = (n < rows)[:, None] & (c < C)[None, :]
        r_mask = (n < rows)[:, None] & (r < R)[None, :]
        m = tl.load(squeeze + n[:, None] * C + c[None, :], mask=c_mask, other=0.0)
        pre2 = tl.load(grad_pre2 + n[:, None] * C + c[None, :], mask=c_mask, other=0.0)
        h = tl.load(hidden + n[:, None] * R + r[None, :], mask=r_mask, other=0.0)
        pre1 = tl.load(grad_pre1 + n[:, None] * R + r[None, :], mask=r_mask, other=0.0)
        grad_w1 += tl.sum(pre1[:, :, None] * m[:, None, :], axis=0)
        grad_w2 += tl.sum(h[:, :, None] * pre2[:, None, :], axis=0)
        grad_b1 += tl.sum(pre1, axis=0)
        grad_b2 += tl.sum(pre2, axis=0)
    mask = (r < R)[:, None] & (c < C)[None, :]
    weights = module * R * C
    tl.store(grad_fc.fc1_weight + weights + r[:, None] * C + c[None, :], grad_w1, mask=mask)
    tl.store(grad_fc.fc2_weight + weights + c[None, :] * R + r[:, None], grad_w2, mask=mask)
    # Programs that share r or c have the same bias gradient; the first of them writes it.
    if block < r_blocks:
        tl.store(grad_fc.fc1_bias + module * R + r, grad_b1, mask=r < R)
    if block % r_blocks == 0:
        tl.store(grad_fc.fc2_bias + module * C + c, grad_b2, mask=c < C)
