"""Memory formats: one rule, shared by the fake kernels and by every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x (B, C, H, W) keeps its channels innermost, also as a slice of a larger tensor.

    A tensor that is contiguous in both formats (one channel, or one pixel) counts as contiguous.
    """
    C, H, W = x.shape[1:]
    if x.is_contiguous() or C == 1 or H * W == 1:
        return False
    _, c, h, w = x.stride()
    # A stride means nothing along a dimension of size one.
    return c == 1 and (w >= C or W == 1) and (h >= C * W or H == 1)


def output_format(branches: Sequence[Tensor]) -> torch.memory_format:
    """channels_last if every branch is, else contiguous."""
    if all(is_channels_last(x) for x in branches):
        return torch.channels_last
    return torch.contiguous_format


def empty_output(branches: Sequence[Tensor]) -> Tensor:
    """Uninitialised (B, S * C, H, W) in the format that the operator promises for these inputs."""
    B, C, H, W = branches[0].shape
    return torch.empty(
        (B, len(branches) * C, H, W),
        dtype=branches[0].dtype,
        device=branches[0].device,
        memory_format=output_format(branches),
    )


def empty_grad(branch: Tensor) -> Tensor:
    """Uninitialised gradient of one branch (B, C, H, W), in the branch's own format, dense."""
    return torch.empty(
        branch.shape,
        dtype=branch.dtype,
        device=branch.device,
        memory_format=output_format([branch]),
    )


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
