"""The ways to run a convolution with its addition and ReLU: oneDNN's, cuDNN's and PyTorch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from epsanet_fused.utils.memory_format import is_channels_last


class ConvCall(NamedTuple):
    """The arguments of one call of the library's convolution, all but the input."""

    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


# Computes relu(conv(x) + residual) for (call, x, residual=None, relu=False, overwrite=False). If
# ``overwrite``, it may write the output to the residual's memory.
Runner = Callable[..., Tensor]


def add_relu(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add the residual, if there is one; then apply the ReLU, if asked to."""
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out


@functools.cache
def select_runner(device_type: str, dtype: torch.dtype) -> Runner:
    """Return the library's fused function for this device and dtype, or ``run_plain``."""
    if device_type == "cpu" and torch.backends.mkldnn.is_available():
        supported: dict[torch.dtype, Callable[[], bool]] = {
            torch.float32: lambda: True,
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        return run_onednn if dtype in supported and supported[dtype]() else run_plain
    if device_type == "cuda" and torch.version.cuda:
        return run_cudnn if dtype in (torch.float32, torch.float16) else run_plain
    return run_plain


class NoEngineError(RuntimeError):
    """cuDNN cannot run this convolution with its residual and ReLU in one call."""


def run_plain(
    call: ConvCall,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """Run the convolution, the addition and the ReLU one by one."""
    weight, bias, groups, stride, padding, dilation = call
    return add_relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups), residual, relu)


def run_onednn(
    call: ConvCall,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """Run oneDNN's fused convolution."""
    weight, bias, groups, stride, padding, dilation = call
    geometry = (padding, stride, dilation, groups)
    # Overloads by name: resolving one from its arguments takes several microseconds.
    pointwise: Any = torch.ops.mkldnn._convolution_pointwise
    out: Tensor
    if residual is None:
        out = pointwise.default(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
    elif groups > 1 or not is_channels_last(x):
        # oneDNN's fused addition has no kernel for these in 16 bits.
        out = pointwise.default(x, weight, bias, *geometry, "none", [], "")
        out = add_relu(out, residual, relu)
    else:
        activation = "relu" if relu else None
        addition: tuple[Any, ...] = (weight, bias, *geometry, "add", 1.0, activation, [], None)
        if overwrite and residual.is_contiguous(memory_format=torch.channels_last):
            out = torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, *addition)
        else:
            out = pointwise.binary(x, residual, *addition)
    return out


def run_cudnn(
    call: ConvCall,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """Run cuDNN's fused convolution.

    Raises:
        NoEngineError: if cuDNN refuses the call.
    """
    weight, bias, groups, stride, padding, dilation = call
    if not relu:
        return run_plain(call, x, residual)
    geometry = (stride, padding, dilation, groups)
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoEngineError(str(error)) from error
