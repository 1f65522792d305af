"""The float64 oracle, and the rule that decides if a result is accurate (see docs/numerics.md).

The tests, the benchmark and ``python -m epsanet_fused`` use both: the benchmark reports a time only
beside its error against the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from epsanet_fused.nn.psa import recalibrate_and_concat
from epsanet_fused.utils.memory_format import accumulator_dtype


def plain_tail(
    branches: Sequence[Tensor],
    *fc: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    order: str = "reversed",
) -> Tensor:
    """Compute the tail as nn/psa.py does, in plain PyTorch, with the arguments of ``psa_tail``.

    All tensors have the same dtype.
    """

    def se(x: Tensor, s: int) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = se_of_branch(fc, s)
        squeeze = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, C)
        hidden = F.relu(F.linear(squeeze, fc1_weight, fc1_bias))
        return torch.sigmoid(F.linear(hidden, fc2_weight, fc2_bias))[..., None, None]

    out = recalibrate_and_concat(list(branches), [se(x, s) for s, x in enumerate(branches)])
    if order == "natural":
        out = torch.cat(out.chunk(len(branches), 1)[::-1], 1)
    if scale is not None:
        out = out * scale[:, None, None]
    if shift is not None:
        out = out + shift[:, None, None]
    return F.relu(out) if relu else out


def se_of_branch(fc: Sequence[Tensor], s: int) -> list[Tensor]:
    """Return branch s's fc tensors, the weights as (R, C) and (C, R)."""
    if fc[0].dim() == 3:
        return [t[s] for t in fc]
    return [t.flatten(1) if t.dim() == 4 else t for t in fc]


def evaluate(
    tail: Callable[..., Tensor],
    branches: Sequence[Tensor],
    fc: Sequence[Tensor],
    grad: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Run ``tail`` on copies of the inputs, and return its output and all gradients.

    Args:
        tail: called as ``psa_tail`` is.
        branches: its branches; copied with their strides.
        fc: its four fc tensors; copied with their strides.
        grad: the gradient of the output; None for inference.
        dtype: convert all inputs to it first: float64 for the oracle. None keeps their dtypes.

    Returns:
        [out], or [out, the gradient of each branch, the gradients of the four fc tensors].
    """
    leaves = [_copy(t, dtype).requires_grad_(grad is not None) for t in (*branches, *fc)]
    with torch.set_grad_enabled(grad is not None):
        out = tail(leaves[: len(branches)], *leaves[len(branches) :])
    if grad is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def _copy(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a copy with t's strides and alignment: a slice or permutation stays one."""
    if t.numel() == 0:
        return t.detach().to(dtype or t.dtype, copy=True)
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    offset = t.storage_offset() % 16  # as misaligned as t is
    memory = torch.empty(offset + size, dtype=dtype or t.dtype, device=t.device)
    memory[offset:].copy_(t.detach().as_strided((size,), (1,)))
    return memory.as_strided(t.shape, t.stride(), offset)


def max_error(result: Tensor, oracle: Tensor) -> float:
    """Return the largest absolute difference; 0 for empty tensors, NaN if either holds one."""
    if oracle.numel() == 0:
        return 0.0
    return (result.to(oracle) - oracle).abs().max().item()


def bound(plain: Tensor, oracle: Tensor, dtype: torch.dtype, size: float = 1.0) -> float:
    """Return the largest accurate error: twice plain PyTorch's, plus a small floor.

    The floor is there because plain PyTorch's error may be small by luck. It is half a rounding to
    the result's dtype, which even an exact computation makes, and eight roundings of the
    accumulator.

    Args:
        plain: the result of plain PyTorch in ``dtype``.
        oracle: the same result in float64.
        dtype: of the result to judge.
        size: the largest number that was added up to the result, at least 1. Where a sum cancels,
            its error is a rounding of its terms, not of the result.
    """
    largest = oracle.abs().max().item() if oracle.numel() else 0.0
    floor = torch.finfo(dtype).eps / 2 * largest
    floor += 8 * torch.finfo(accumulator_dtype(dtype)).eps * max(1.0, largest, size)
    return 2 * max_error(plain, oracle) + floor
