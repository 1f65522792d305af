"""The tail in plain PyTorch, cleaned: one squeeze tensor, the SE once for all branches, one cat.

Any device, any dtype. ``forward`` is differentiable by PyTorch's own autograd; ``backward`` is the
same derivative written out, for use inside the operator, where autograd is off. It is also the
shortest description of what the kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from epsanet_fused.layout import accumulator_dtype, empty_grad, output_format


def unavailable(device_type: str) -> str | None:
    return None


def forward(
    branches: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = branches[0].dtype
    acc = accumulator_dtype(dtype)
    # Autocast would run the small matrix products in 16 bit.
    with torch.autocast(branches[0].device.type, enabled=False):
        squeeze = torch.stack([x.mean((2, 3), dtype=acc) for x in branches], 1)  # (B, S, C)
        _, gate = _excite(squeeze, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        attention = torch.softmax(gate, dim=1)  # (B, S, C), across the branches
        weights = attention.to(dtype)[..., None, None].unbind(1)  # S x (B, C, 1, 1)
        out = torch.cat([x * w for x, w in zip(branches[::-1], weights[::-1], strict=True)], 1)
        if scale is not None or shift is not None or relu:
            out = _epilogue(out.to(acc), scale, shift, relu).to(dtype)
    return out.contiguous(memory_format=output_format(branches)), squeeze, attention


def _excite(
    squeeze: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The SE's hidden units (B, S, R) and its gate (B, S, C), in the squeeze's dtype."""
    acc = squeeze.dtype
    hidden = F.relu(F.linear(squeeze, fc1_weight.to(acc), fc1_bias.to(acc)))
    return hidden, torch.sigmoid(F.linear(hidden, fc2_weight.to(acc), fc2_bias.to(acc)))


def _epilogue(out: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    if scale is not None:
        out = out * scale.to(out.dtype)[:, None, None]
    if shift is not None:
        out = out + shift.to(out.dtype)[:, None, None]
    return F.relu(out) if relu else out


def backward(
    grad: Tensor,
    branches: Sequence[Tensor],
    squeeze: Tensor,
    attention: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    branch_grads: bool,
    fc_grads: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    acc = squeeze.dtype
    grads = grad.chunk(len(branches), dim=1)[::-1]  # S x (B, C, H, W), in the branches' order
    grad_attention = torch.stack(
        [(g * x).sum((2, 3), dtype=acc) for g, x in zip(grads, branches, strict=True)], 1
    )  # (B, S, C)

    # Through the softmax, the sigmoid and the two layers; what precedes a nonlinearity is "pre".
    hidden, gate = _excite(squeeze, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    mean = (grad_attention * attention).sum(1, keepdim=True)
    grad_pre2 = attention * (grad_attention - mean) * gate * (1 - gate)  # (B, S, C)
    grad_pre1 = grad_pre2 @ fc2_weight.to(acc)  # (B, S, R)
    grad_pre1 = torch.where(hidden <= 0, 0, grad_pre1)  # a NaN passes, as in PyTorch's relu
    grad_squeeze = grad_pre1 @ fc1_weight.to(acc)  # (B, S, C)

    grad_branches = []
    if branch_grads:
        spread = grad_squeeze / (branches[0].shape[2] * branches[0].shape[3])
        for g, x, a, d in zip(grads, branches, attention.unbind(1), spread.unbind(1), strict=True):
            grad_x = g * a[..., None, None] + d[..., None, None]  # in acc: (B, C, H, W)
            grad_branches.append(empty_grad(x).copy_(grad_x))
    if not fc_grads:
        return grad_branches, []
    grad_fc = [
        grad_pre1.flatten(0, 1).T @ squeeze.flatten(0, 1),  # (R, C)
        grad_pre1.sum((0, 1)),
        grad_pre2.flatten(0, 1).T @ hidden.flatten(0, 1),  # (C, R)
        grad_pre2.sum((0, 1)),
    ]
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return grad_branches, [g.to(p.dtype) for g, p in zip(grad_fc, parameters, strict=True)]
