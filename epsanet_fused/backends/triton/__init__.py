"""The Triton backend, for CUDA and ROCm.

psa_tail takes two or three launches forward and three or four backward, psa_tail_norm three or four
and four or five. The kernels read any strides in which H and W can be one dimension, so no dense
input is copied.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from epsanet_fused.backends.interface import (
    NormParams,
    NormStats,
    SEWeights,
    empty_backward,
    empty_forward,
    empty_norm_backward,
    empty_norm_forward,
)

name = "triton"


@functools.cache
def unavailable_reason(device_type: str) -> str | None:
    """Return why Triton can't run on such a device here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from epsanet_fused.backends.triton import common
    except Exception as error:  # a triton that doesn't match torch or Python fails in many ways
        return f"triton fails to import: {type(error).__name__}: {error}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    if device_type == "cuda" and common.INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which is for tests on a CPU"
    if device_type == "cuda" or (device_type == "cpu" and common.INTERPRETED):
        return None
    if device_type == "cpu":
        return "it needs a CUDA or ROCm device; on a CPU it is for tests, under TRITON_INTERPRET=1"
    return f"it needs a CUDA or ROCm device, not {device_type}"


def forward(
    branches: Sequence[Tensor],
    fc: SEWeights,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, squeeze and attention; see ``interface.Backend``."""
    from epsanet_fused.backends.triton import launch

    out, squeeze, attention = empty_forward(branches)
    if len(out) == 0:
        return out, squeeze, attention
    fc = _contiguous(fc)
    scale, shift = (None if v is None else v.contiguous() for v in (scale, shift))
    with _on_device_of(out):
        args = launch.tail_args(branches, out)
        launch.sum_and_gate(args, squeeze, attention, fc)
        launch.recalibrate(args, attention, scale, shift, relu)
    return out, squeeze, attention


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
    from epsanet_fused.backends.triton import launch

    fc = _contiguous(fc)
    grad_branches, grad_fc = empty_backward(branches, fc, branch_grads, fc_grads)
    if len(grad) == 0:
        return grad_branches, [g.zero_() for g in grad_fc]
    with _on_device_of(grad):
        se = launch.empty_se_grads(squeeze, attention, fc, fc_grads)
        args = launch.tail_args(branches, grad)
        launch.sum_and_gate_backward(args, se)
        if fc_grads:
            launch.fc_grads(se, SEWeights(*grad_fc))
        if branch_grads:
            grad_args = launch.tail_args(grad_branches, args.concat)
            launch.recalibrate_backward(grad_args, se)
    return grad_branches, grad_fc


def norm_forward(
    branches: Sequence[Tensor], fc: SEWeights, norm: NormParams
) -> tuple[Tensor, NormStats]:
    """Return the output and the statistics; see ``interface.NormBackend``."""
    from epsanet_fused.backends.triton import launch, launch_norm

    out, stats = empty_norm_forward(branches)
    if len(out) == 0:
        stats.mean.zero_()
        stats.var.zero_()
        return out, stats
    fc, norm = _contiguous(fc), _contiguous_norm(norm)
    with _on_device_of(out):
        args = launch.tail_args(branches, out)
        launch_norm.m2_and_gate(args, stats, fc)
        terms = launch_norm.statistics(args, stats, norm)
        launch_norm.normalize_branches(args, terms)
    return out, stats


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
    from epsanet_fused.backends.triton import common, launch, launch_norm

    fc, norm = _contiguous(fc), _contiguous_norm(norm)
    grad_branches, grad_fc, grad_norm = empty_norm_backward(
        branches, fc, norm, branch_grads, fc_grads, norm_grads
    )
    if len(grad) == 0:
        return grad_branches, [g.zero_() for g in grad_fc], [g.zero_() for g in grad_norm]
    written = iter(grad_norm)
    params = (norm.gamma, norm.beta)
    grad_gamma, grad_beta = (None if p is None else next(written, None) for p in params)
    terms = None
    if branch_grads or fc_grads:
        terms = common.NormGradTerms(*stats.squeeze.new_empty((5, *stats.squeeze.shape)).unbind())
    with _on_device_of(grad):
        args = launch.tail_args(branches, grad, grad_branches)
        sums = launch_norm.gradient_sums(args, stats, norm)
        launch_norm.gradient_statistics(args, sums, stats, norm, (grad_gamma, grad_beta), terms)
        if terms is not None:
            se = launch.empty_se_grads(stats.squeeze, stats.attention, fc, fc_grads)
            norm_terms = launch_norm.gate_backward(args, terms, se)
            if fc_grads:
                launch.fc_grads(se, SEWeights(*grad_fc))
            if branch_grads:
                launch_norm.normalize_branches(args, norm_terms)
    return grad_branches, grad_fc, grad_norm


def _contiguous(fc: SEWeights) -> SEWeights:
    return SEWeights(*(p.contiguous() for p in fc))


def _contiguous_norm(norm: NormParams) -> NormParams:
    gamma, beta = (None if p is None else p.contiguous() for p in (norm.gamma, norm.beta))
    return NormParams(gamma, beta, norm.eps)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
