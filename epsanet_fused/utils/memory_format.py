"""Memory formats and dtypes: one rule for the fake kernels and for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def memory_format_name(memory_format: torch.memory_format) -> str:
    """Return "contiguous" or "channels_last"."""
    return next(name for name, value in MEMORY_FORMATS.items() if value == memory_format)


def is_channels_last(x: Tensor) -> bool:
    """Tell whether x (B, C, H, W) has its channels innermost; x may be a slice of a larger tensor.

    A tensor that is contiguous in both formats (one channel, or one pixel) counts as contiguous.
    """
    if torch.jit.is_tracing():  # there sizes are tensors, whose comparison warns
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    C, H, W = x.shape[1:]
    if x.is_contiguous() or C == 1 or H * W == 1:
        return False
    _, c, h, w = x.stride()
    # The stride of a dimension of size one has no meaning.
    return c == 1 and (w >= C or W == 1) and (h >= C * W or H == 1)


def output_memory_format(branches: Sequence[Tensor]) -> torch.memory_format:
    """Return channels_last if every branch is, else contiguous."""
    if all(is_channels_last(x) for x in branches):
        return torch.channels_last
    return torch.contiguous_format


def empty_output(branches: Sequence[Tensor]) -> Tensor:
    """Return an uninitialized output (B, S * C, H, W) in the memory format of these inputs."""
    B, C, H, W = branches[0].shape
    return torch.empty(
        (B, len(branches) * C, H, W),
        dtype=branches[0].dtype,
        device=branches[0].device,
        memory_format=output_memory_format(branches),
    )


def empty_grad(branch: Tensor) -> Tensor:
    """Return an uninitialized gradient of the branch, dense and in its memory format."""
    return torch.empty(
        branch.shape,
        dtype=branch.dtype,
        device=branch.device,
        memory_format=output_memory_format([branch]),
    )


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
