"""The float64 oracle, and the rule by which a result passes (docs/numerics.md says why).

Used by the tests, the benchmark and ``python -m epsanet_fused``: a number is reported only beside
its error against this.
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
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The literal tail of nn/psa.py with the arguments of ``psa_tail``; all of one dtype."""

    def se(x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), fc1, fc1_bias))
        return torch.sigmoid(F.linear(hidden, fc2, fc2_bias))[..., None, None]  # (B, C, 1, 1)

    fc1, fc2 = fc1_weight.flatten(1), fc2_weight.flatten(1)
    out = recalibrate_and_concat(list(branches), [se(branch) for branch in branches])
    if scale is not None:
        out = out * scale[:, None, None]
    if shift is not None:
        out = out + shift[:, None, None]
    return F.relu(out) if relu else out


def evaluate(
    tail: Callable[..., Tensor],
    branches: Sequence[Tensor],
    fc: Sequence[Tensor],
    grad: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Run ``tail`` on copies of the inputs: its output, then with ``grad`` all gradients.

    Args:
        tail: called as ``psa_tail`` is.
        branches, fc: its inputs; copied with their strides.
        grad: the gradient of the output; None for inference.
        dtype: what to convert everything to first: float64 for the oracle.

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
    """A copy with t's strides and alignment, so that a slice or a permutation stays one."""
    if t.numel() == 0:
        return t.detach().to(dtype or t.dtype, copy=True)
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    offset = t.storage_offset() % 16  # as misaligned as t is
    memory = torch.empty(offset + size, dtype=dtype or t.dtype, device=t.device)
    memory[offset:].copy_(t.detach().as_strided((size,), (1,)))
    return memory.as_strided(t.shape, t.stride(), offset)


def max_error(result: Tensor, oracle: Tensor) -> float:
    """The largest absolute difference; 0 for empty tensors, NaN if either holds one."""
    if oracle.numel() == 0:
        return 0.0
    return (result.to(oracle) - oracle).abs().max().item()


def bound(plain: Tensor, oracle: Tensor, dtype: torch.dtype, size: float = 1.0) -> float:
    """The largest error that passes: twice plain PyTorch's in the same dtype, plus a small floor.

    The floor is what plain PyTorch may escape by luck: half a rounding to the result's dtype, which
    even an exact computation commits, and eight roundings of the accumulator.

    Args:
        plain, oracle: the same result by plain PyTorch in ``dtype``, and in float64.
        size: the largest number that was added up to get there, at least 1: where a sum cancels,
            its rounding is that of its terms, not of the result.
    """
    own = oracle.abs().max().item() if oracle.numel() else 0.0
    floor = torch.finfo(dtype).eps / 2 * own
    floor += 8 * torch.finfo(accumulator_dtype(dtype)).eps * max(1.0, own, size)
    return 2 * max_error(plain, oracle) + floor
