"""The tail in plain PyTorch, cleaned: one squeeze tensor, the SE once for all branches, one cat.

Any device, any dtype. ``forward`` is differentiable by PyTorch's own autograd; ``backward`` is the
same derivative written out, for use inside the operator, where autograd is off; ``norm_forward``
and ``norm_backward`` are the pair of psa_tail_norm. It is also the shortest description of what the
kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from epsanet_fused.utils.memory_format import accumulator_dtype, empty_grad, output_format


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
    grads = _parts(grad, branches)
    grad_attention = torch.stack(
        [(g * x).sum((2, 3), dtype=acc) for g, x in zip(grads, branches, strict=True)], 1
    )  # (B, S, C)
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    grad_squeeze, grad_fc = _gate_backward(grad_attention, squeeze, attention, fc, fc_grads)
    if not branch_grads:
        return [], grad_fc
    grad_branches = []
    spread = grad_squeeze / (branches[0].shape[2] * branches[0].shape[3])
    for g, x, a, d in zip(grads, branches, attention.unbind(1), spread.unbind(1), strict=True):
        grad_x = g * a[..., None, None] + d[..., None, None]  # in acc: (B, C, H, W)
        grad_branches.append(empty_grad(x).copy_(grad_x))
    return grad_branches, grad_fc


def _parts(cat: Tensor, branches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each branch's part of what is laid out as the output is: S x (B, C, H, W)."""
    return cat.chunk(len(branches), dim=1)[::-1]


def _gate_backward(
    grad_attention: Tensor,
    squeeze: Tensor,
    attention: Tensor,
    fc: Sequence[Tensor],
    fc_grads: bool,
) -> tuple[Tensor, list[Tensor]]:
    """From the gradient of the attention (B, S, C) to the squeeze's and those of the fc tensors."""
    acc = squeeze.dtype
    fc1_weight, _, fc2_weight, _ = fc
    # Through the softmax, the sigmoid and the two layers; what precedes a nonlinearity is "pre".
    hidden, gate = _excite(squeeze, *fc)
    mean = (grad_attention * attention).sum(1, keepdim=True)
    grad_pre2 = attention * (grad_attention - mean) * gate * (1 - gate)  # (B, S, C)
    grad_pre1 = grad_pre2 @ fc2_weight.to(acc)  # (B, S, R)
    grad_pre1 = torch.where(hidden <= 0, 0, grad_pre1)  # a NaN passes, as in PyTorch's relu
    grad_squeeze = grad_pre1 @ fc1_weight.to(acc)  # (B, S, C)
    if not fc_grads:
        return grad_squeeze, []
    grad_fc = [
        grad_pre1.flatten(0, 1).T @ squeeze.flatten(0, 1),  # (R, C)
        grad_pre1.sum((0, 1)),
        grad_pre2.flatten(0, 1).T @ hidden.flatten(0, 1),  # (C, R)
        grad_pre2.sum((0, 1)),
    ]
    return grad_squeeze, [g.to(p.dtype) for g, p in zip(grad_fc, fc, strict=True)]


def norm_forward(
    branches: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = branches[0].dtype
    acc = accumulator_dtype(dtype)
    pixels = branches[0].shape[2] * branches[0].shape[3]
    with torch.autocast(branches[0].device.type, enabled=False):
        squeeze = torch.stack([_mean(x, acc) for x in branches], 1)  # (B, S, C)
        centered = _centered(branches, squeeze)
        deviation = torch.stack([x.square().sum((2, 3)) for x in centered], 1)  # (B, S, C)
        _, gate = _excite(squeeze, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        attention = torch.softmax(gate, dim=1)
        # The tail's output a * x has the mean a * m and the deviation a^2 * d in each sample.
        means = attention * squeeze
        mean = means.sum(0) / max(len(means), 1)  # (S, C)
        var = (attention.square() * deviation + pixels * (means - mean).square()).sum(0)
        var = var / max(len(means) * pixels, 1)
        scale = _norm_scale(var, gamma, eps)
        weight, shift = _affine(attention, means - mean, scale, beta)
        parts = [F.relu(z).to(dtype) for z in _normalized(centered, weight, shift)]
    out = torch.cat(parts[::-1], 1).contiguous(memory_format=output_format(branches))
    return out, squeeze, deviation, attention, _in_cat(mean), _in_cat(var)


def _in_cat(vector: Tensor) -> Tensor:
    """(S, C) -> (S * C,), in the order of the output's channels."""
    return vector.flip(0).flatten()


def _by_branch(vector: Tensor, like: Tensor) -> Tensor:
    """(S * C,) in the order of the output's channels -> (S, C), in the dtype of ``like``."""
    return vector.to(like.dtype).view(like.shape[-2:]).flip(0)


def _mean(x: Tensor, acc: torch.dtype) -> Tensor:
    """(B, C), from differences to the first pixel: a large mean costs no digits of small ones."""
    first = x[:, :, :1, :1].to(acc)
    first = torch.where(first.isfinite(), first, 0)
    return (x - first).mean((2, 3)) + first[..., 0, 0]


def _centered(branches: Sequence[Tensor], squeeze: Tensor) -> list[Tensor]:
    """S x (B, C, H, W) around 0, in the squeeze's dtype."""
    means = squeeze[..., None, None].unbind(1)
    return [x - m for x, m in zip(branches, means, strict=True)]


def _norm_scale(var: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """(S, C), as var is."""
    invstd = torch.rsqrt(var + eps)
    return invstd if gamma is None else invstd * _by_branch(gamma, var)


def _affine(
    attention: Tensor, offset: Tensor, scale: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norm as ``weight * (x - squeeze) + shift``: both (B, S, C).

    ``offset`` (B, S, C) is how far the sample's mean of the tail's output is from the batch's.
    """
    shift = offset * scale
    return attention * scale, shift if beta is None else shift + _by_branch(beta, scale)


def _normalized(centered: Sequence[Tensor], weight: Tensor, shift: Tensor) -> list[Tensor]:
    """S x (B, C, H, W), what the relu is applied to; forward and backward must have the same."""
    factors = zip(weight[..., None, None].unbind(1), shift[..., None, None].unbind(1), strict=True)
    return [x * w + b for x, (w, b) in zip(centered, factors, strict=True)]


def norm_backward(
    grad: Tensor,
    branches: Sequence[Tensor],
    squeeze: Tensor,
    deviation: Tensor,
    attention: Tensor,
    mean: Tensor,
    var: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    branch_grads: bool,
    fc_grads: bool,
    norm_grads: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    pixels = branches[0].shape[2] * branches[0].shape[3]
    n = max(len(squeeze) * pixels, 1)
    mean, var = _by_branch(mean, squeeze), _by_branch(var, squeeze)  # (S, C)
    invstd, scale = torch.rsqrt(var + eps), _norm_scale(var, gamma, eps)
    offset = attention * squeeze - mean  # (B, S, C)
    weight, shift = _affine(attention, offset, scale, beta)
    centered = _centered(branches, squeeze)
    # The gradient behind the relu; a NaN passes, as in PyTorch's.
    masked = [
        torch.where(z <= 0, 0, g)
        for g, z in zip(_parts(grad, branches), _normalized(centered, weight, shift), strict=True)
    ]
    sums = torch.stack([g.sum((2, 3), dtype=squeeze.dtype) for g in masked], 1)  # (B, S, C)
    products = torch.stack(
        [(g * x).sum((2, 3)) for g, x in zip(masked, centered, strict=True)], 1
    )  # (B, S, C)

    # The tail's output is p = attention * x, and gamma scales (p - mean) * invstd. All is in terms
    # of x - squeeze: where the mean is large, sums of x itself would cancel.
    grad_beta = sums.sum(0)  # (S, C)
    grad_gamma = invstd * (attention * products + offset * sums).sum(0)
    slope = invstd * grad_gamma / n
    constant = grad_beta / n + offset * slope  # what is left of the gradient of p at x = squeeze
    grad_attention = scale * (
        products - slope * attention * deviation + squeeze * (sums - pixels * constant)
    )
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    grad_squeeze, grad_fc = _gate_backward(grad_attention, squeeze, attention, fc, fc_grads)

    grad_branches = []
    if branch_grads:
        factor = -weight * attention * slope
        spread = grad_squeeze / pixels - weight * constant
        for s, (g, x, c) in enumerate(zip(masked, branches, centered, strict=True)):
            w, f, d = (t[:, s, :, None, None] for t in (weight, factor, spread))
            grad_branches.append(empty_grad(x).copy_(w * g + f * c + d))
    grad_norm = []
    if norm_grads:
        pairs = ((grad_gamma, gamma), (grad_beta, beta))
        grad_norm = [_in_cat(g).to(p.dtype) for g, p in pairs if p is not None]
    return grad_branches, grad_fc, grad_norm
