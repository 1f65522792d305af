"""The operators in plain PyTorch, for any device and dtype.

It is the shortest description of what the kernels compute: one squeeze tensor, the SE MLP once for
all branches, one concatenation. PyTorch's own autograd can differentiate ``forward``; ``backward``
is the same derivative written out, as autograd is off inside an operator. ``norm_forward`` and
``norm_backward`` are the pair of psa_tail_norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from epsanet_fused.backends.interface import NormParams, NormStats, SEWeights
from epsanet_fused.utils.memory_format import accumulator_dtype, empty_grad, output_memory_format

name = "reference"


def unavailable_reason(device_type: str) -> str | None:
    """Return None: plain PyTorch runs everywhere."""
    return None


def forward(
    branches: Sequence[Tensor],
    fc: SEWeights,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, squeeze and attention; see ``interface.Backend``."""
    dtype = branches[0].dtype
    acc = accumulator_dtype(dtype)
    # Autocast would run the small matrix products in 16 bit.
    with torch.autocast(branches[0].device.type, enabled=False):
        squeeze = torch.stack([x.mean((2, 3), dtype=acc) for x in branches], 1)  # (B, S, C)
        attention = _attention(squeeze, fc)
        weights = attention.to(dtype)[..., None, None].unbind(1)  # S x (B, C, 1, 1)
        out = torch.cat([x * w for x, w in zip(branches[::-1], weights[::-1], strict=True)], 1)
        if scale is not None or shift is not None or relu:
            out = _epilogue(out.to(acc), scale, shift, relu).to(dtype)
    if not torch._C._are_functorch_transforms_active():  # vmap doesn't know memory formats
        out = out.contiguous(memory_format=output_memory_format(branches))
    return out, squeeze, attention


def _attention(squeeze: Tensor, fc: SEWeights) -> Tensor:
    """Return the softmax of the gate across the branches, (B, S, C)."""
    _, gate = _excite(squeeze, fc)
    return torch.softmax(gate, dim=1)


def _excite(squeeze: Tensor, fc: SEWeights) -> tuple[Tensor, Tensor]:
    """Return the SE's hidden units (B, S, R) and its gate (B, S, C), in the squeeze's dtype."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (p.to(squeeze.dtype) for p in fc)
    if not fc.per_branch:
        hidden = F.relu(F.linear(squeeze, fc1_weight, fc1_bias))
        return hidden, torch.sigmoid(F.linear(hidden, fc2_weight, fc2_bias))
    # Not mT, which the TorchScript exporter to ONNX doesn't know.
    fc1, fc2 = fc1_weight.transpose(1, 2), fc2_weight.transpose(1, 2)
    hidden = F.relu(_by_branch_matmul(squeeze, fc1) + fc1_bias)
    return hidden, torch.sigmoid(_by_branch_matmul(hidden, fc2) + fc2_bias)


def _by_branch_matmul(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply rows (B, S, n) by a matrix (n, m) for each branch: (B, S, m)."""
    return (rows.transpose(0, 1) @ matrices).transpose(0, 1)


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
    fc: SEWeights,
    branch_grads: bool,
    fc_grads: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of the branches and of fc; see ``interface.Backend``."""
    grads = _split(grad, len(branches))
    pairs = zip(grads, branches, strict=True)
    grad_attention = torch.stack(
        [(g * x).sum((2, 3), dtype=squeeze.dtype) for g, x in pairs], 1
    )  # (B, S, C)
    grad_squeeze, grad_fc = _gate_backward(grad_attention, squeeze, attention, fc, fc_grads)
    if not branch_grads:
        return [], grad_fc
    grad_mean = grad_squeeze / _pixels(branches)  # (B, S, C), the same for all pixels
    grad_branches = []
    for s, (g, x) in enumerate(zip(grads, branches, strict=True)):
        a, m = (t[:, s, :, None, None] for t in (attention, grad_mean))  # (B, C, 1, 1)
        grad_branches.append(empty_grad(x).copy_(g * a + m))
    return grad_branches, grad_fc


def _split(concat: Tensor, S: int) -> tuple[Tensor, ...]:
    """Split a tensor with the output's channels by branches: S x (B, C, H, W)."""
    return concat.chunk(S, dim=1)[::-1]


def _pixels(branches: Sequence[Tensor]) -> int:
    return branches[0].shape[2] * branches[0].shape[3]


def _gate_backward(
    grad_attention: Tensor, squeeze: Tensor, attention: Tensor, fc: SEWeights, fc_grads: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the squeeze (B, S, C) and of fc from that of the attention."""
    acc = squeeze.dtype
    hidden, gate = _excite(squeeze, fc)
    # "pre" stands for what precedes a nonlinearity.
    mean = (grad_attention * attention).sum(1, keepdim=True)
    grad_pre2 = attention * (grad_attention - mean) * gate * (1 - gate)  # (B, S, C)
    multiply = _by_branch_matmul if fc.per_branch else torch.matmul
    grad_pre1 = multiply(grad_pre2, fc.fc2_weight.to(acc))  # (B, S, R)
    grad_pre1 = torch.where(hidden <= 0, 0, grad_pre1)  # a NaN passes, as in PyTorch's relu
    grad_squeeze = multiply(grad_pre1, fc.fc1_weight.to(acc))  # (B, S, C)
    if not fc_grads:
        return grad_squeeze, []
    tensors = (grad_pre1, squeeze, grad_pre2, hidden)
    if fc.per_branch:
        pre1, x, pre2, h = (t.transpose(0, 1) for t in tensors)  # (S, B, R or C)
    else:
        pre1, x, pre2, h = (t.flatten(0, 1) for t in tensors)  # (B * S, R or C)
    grad_fc = [pre1.mT @ x, pre1.sum(-2), pre2.mT @ h, pre2.sum(-2)]
    return grad_squeeze, [g.to(p.dtype) for g, p in zip(grad_fc, fc, strict=True)]


def norm_forward(
    branches: Sequence[Tensor], fc: SEWeights, norm: NormParams
) -> tuple[Tensor, NormStats]:
    """Return the output and the statistics; see ``interface.NormBackend``."""
    dtype = branches[0].dtype
    acc = accumulator_dtype(dtype)
    with torch.autocast(branches[0].device.type, enabled=False):
        squeeze = torch.stack([_mean(x, acc) for x in branches], 1)  # (B, S, C)
        centered = _centered(branches, squeeze)
        m2 = torch.stack([x.square().sum((2, 3)) for x in centered], 1)  # (B, S, C)
        attention = _attention(squeeze, fc)
        mean, var = _batch_statistics(squeeze, m2, attention, _pixels(branches))  # (S, C)
        stats = NormStats(squeeze, m2, attention, _by_channel(mean), _by_channel(var))
        normalized = _normalized(centered, _sample_norm(stats, norm))
        parts = [F.relu(z).to(dtype) for z in normalized]
    out = torch.cat(parts[::-1], 1)
    return out.contiguous(memory_format=output_memory_format(branches)), stats


def _mean(x: Tensor, acc: torch.dtype) -> Tensor:
    """Return the mean over the pixels, (B, C).

    It sums the differences to the first pixel: so a large mean costs small values no digits.
    """
    first = x[:, :, :1, :1].to(acc)
    first = torch.where(first.isfinite(), first, 0)
    return (x - first).mean((2, 3)) + first[..., 0, 0]


def _centered(branches: Sequence[Tensor], squeeze: Tensor) -> list[Tensor]:
    """Return the branches less their means, S x (B, C, H, W), in the squeeze's dtype."""
    means = squeeze[..., None, None].unbind(1)
    return [x - m for x, m in zip(branches, means, strict=True)]


def _batch_statistics(
    squeeze: Tensor, m2: Tensor, attention: Tensor, pixels: int
) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance (S, C) of the tail's output over the batch.

    In one sample the output ``attention * x`` has the mean ``attention * squeeze`` and the sum of
    squared differences ``attention^2 * m2``; the samples are combined as Chan et al. do.
    """
    means = attention * squeeze
    mean = means.sum(0) / max(len(means), 1)
    var = (attention.square() * m2 + pixels * (means - mean).square()).sum(0)
    return mean, var / max(len(means) * pixels, 1)


def _by_channel(vector: Tensor) -> Tensor:
    """Return a vector (S, C) as (S * C,), in the order of the output's channels."""
    return vector.flip(0).flatten()


def _by_branch(vector: Tensor, like: Tensor) -> Tensor:
    """Return a vector (S * C,) in the output's order as (S, C), in the dtype of ``like``."""
    return vector.to(like.dtype).view(like.shape[-2:]).flip(0)


class _SampleNorm(NamedTuple):
    """The norm of the tail's output as a function of the centered branches.

    It is ``weight * (x - squeeze) + shift`` in each sample and channel.
    """

    weight: Tensor  # (B, S, C)
    shift: Tensor  # (B, S, C)
    offset: Tensor  # (B, S, C), the sample's mean of the tail's output less the batch's
    invstd: Tensor  # (S, C)
    scale: Tensor  # (S, C), invstd * gamma


def _sample_norm(stats: NormStats, norm: NormParams) -> _SampleNorm:
    squeeze, _, attention, mean, var = stats
    invstd = torch.rsqrt(_by_branch(var, squeeze) + norm.eps)
    scale = invstd if norm.gamma is None else invstd * _by_branch(norm.gamma, squeeze)
    offset = attention * squeeze - _by_branch(mean, squeeze)
    shift = offset * scale
    if norm.beta is not None:
        shift = shift + _by_branch(norm.beta, squeeze)
    return _SampleNorm(attention * scale, shift, offset, invstd, scale)


def _normalized(centered: Sequence[Tensor], sample: _SampleNorm) -> list[Tensor]:
    """Return the ReLU's input, S x (B, C, H, W): the same bits in the forward and the backward."""
    weights, shifts = (t[..., None, None].unbind(1) for t in (sample.weight, sample.shift))
    return [x * w + b for x, w, b in zip(centered, weights, shifts, strict=True)]


def norm_backward(
    grad: Tensor,
    branches: Sequence[Tensor],
    stats: NormStats,
    fc: SEWeights,
    norm: NormParams,
    branch_grads: bool,
    fc_grads: bool,
    norm_grads: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the gradients of the branches, fc, gamma and beta; see ``interface.NormBackend``."""
    squeeze, m2, attention, _, _ = stats
    pixels = _pixels(branches)
    sample = _sample_norm(stats, norm)
    centered = _centered(branches, squeeze)
    grads = _relu_backward(grad, _normalized(centered, sample))
    sums = torch.stack([g.sum((2, 3), dtype=squeeze.dtype) for g in grads], 1)  # (B, S, C)
    pairs = zip(grads, centered, strict=True)
    products = torch.stack([(g * x).sum((2, 3)) for g, x in pairs], 1)  # (B, S, C)
    grad_beta = sums.sum(0)  # (S, C)
    grad_gamma = sample.invstd * (attention * products + sample.offset * sums).sum(0)

    # With p = attention * x, the norm gives p the gradient
    #     scale * (grad - grad_const - slope * attention * (x - squeeze)).
    # All is in terms of x - squeeze: where the mean is large, sums of x itself would cancel.
    n = max(len(squeeze) * pixels, 1)
    slope = sample.invstd * grad_gamma / n  # (S, C)
    grad_const = grad_beta / n + sample.offset * slope  # (B, S, C)
    grad_attention = sample.scale * (
        products - slope * attention * m2 + squeeze * (sums - pixels * grad_const)
    )
    grad_squeeze, grad_fc = _gate_backward(grad_attention, squeeze, attention, fc, fc_grads)

    grad_branches = []
    if branch_grads:
        factor = -sample.weight * attention * slope
        grad_mean = grad_squeeze / pixels - sample.weight * grad_const
        for s, (g, x, c) in enumerate(zip(grads, branches, centered, strict=True)):
            w, f, m = (t[:, s, :, None, None] for t in (sample.weight, factor, grad_mean))
            grad_branches.append(empty_grad(x).copy_(w * g + f * c + m))
    grad_norm = []
    if norm_grads:
        both = ((grad_gamma, norm.gamma), (grad_beta, norm.beta))
        grad_norm = [_by_channel(g).to(p.dtype) for g, p in both if p is not None]
    return grad_branches, grad_fc, grad_norm


def _relu_backward(grad: Tensor, normalized: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of the ReLU's input, S x (B, C, H, W); a NaN passes, as in PyTorch's."""
    grads = _split(grad, len(normalized))
    return [torch.where(z <= 0, 0, g) for g, z in zip(grads, normalized, strict=True)]
