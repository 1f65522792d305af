"""Triton kernels for CUDA and ROCm: forward in two or three launches, backward in three or four.

psa_tail_norm takes three or four forward, and four or five backward. They read any strides in which
H and W form one run of pixels, so no dense input is copied.
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
        from epsanet_fused.backends.triton import psa_tail
    except Exception as error:  # a triton that doesn't match torch or Python fails in many ways
        return f"triton fails to import: {type(error).__name__}: {error}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    if device_type == "cuda" and psa_tail.INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which is for tests on a CPU"
    if device_type == "cuda" or (device_type == "cpu" and psa_tail.INTERPRETED):
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
        problem = launch.problem(branches, out)
        launch.sum_and_gate(problem, False, squeeze, attention, fc)
        launch.recalibrate(problem, attention, None, scale, shift, relu)
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
    grad_mean = torch.empty_like(squeeze)  # (B, S, C)
    for_fc = _for_fc(squeeze, fc.fc1_weight.shape[0]) if fc_grads else (None,) * 3
    with _on_device_of(grad):
        problem = launch.problem(branches, grad)
        launch.sum_and_gate(problem, True, squeeze, attention, fc, grad_mean, for_fc)
        if fc_grads:
            launch.fc_grads(squeeze, for_fc, grad_fc)
        if branch_grads:
            launch.recalibrate(launch.problem(grad_branches, problem.cat), attention, grad_mean)
    return grad_branches, grad_fc


def norm_forward(
    branches: Sequence[Tensor], fc: SEWeights, norm: NormParams
) -> tuple[Tensor, NormStats]:
    """Return the output and the statistics; see ``interface.NormBackend``."""
    from epsanet_fused.backends.triton import launch, launch_norm

    out, stats = empty_norm_forward(branches)
    squeeze, m2, attention, mean, var = stats
    if len(out) == 0:
        mean.zero_()
        var.zero_()
        return out, stats
    fc, gamma, beta = _contiguous(fc), *_contiguous_affine(norm)
    with _on_device_of(out):
        problem = launch.problem(branches, out)
        launch_norm.deviations_and_gate(problem, squeeze, m2, attention, fc)
        params = launch_norm.Norm(gamma, beta, mean, var, norm.eps)
        weight, shift = launch_norm.statistics(problem, squeeze, m2, attention, params)
        launch_norm.normalize(problem, squeeze, weight, shift)
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
    from epsanet_fused.backends.triton import launch, launch_norm

    squeeze, m2, attention, mean, var = stats
    fc, gamma, beta = _contiguous(fc), *_contiguous_affine(norm)
    grad_branches, grad_fc, grad_norm = empty_norm_backward(
        branches, fc, norm, branch_grads, fc_grads, norm_grads
    )
    if len(grad) == 0:
        return grad_branches, [g.zero_() for g in grad_fc], [g.zero_() for g in grad_norm]
    written = iter(grad_norm)
    both = [None if v is None else next(written, None) for v in (gamma, beta)]
    for_attention: Sequence[Tensor | None] = (None,) * 5
    if branch_grads or fc_grads:
        for_attention = squeeze.new_empty((5, *squeeze.shape)).unbind()
    params = launch_norm.Norm(gamma, beta, mean, var, norm.eps)
    samples = (squeeze, m2, attention)
    with _on_device_of(grad):
        problem = launch.problem(branches, grad, grad_branches)
        sums = launch_norm.gradient_sums(problem, squeeze, attention, params)
        launch_norm.gradient_statistics(problem, sums, *samples, params, both, for_attention)
        if branch_grads or fc_grads:
            grad_attention, weight, shift, factor, grad_const = for_attention
            grad_mean = torch.empty_like(squeeze)
            for_fc = _for_fc(squeeze, fc.fc1_weight.shape[0]) if fc_grads else (None,) * 3
            launch_norm.gate_backward(
                problem, grad_attention, squeeze, attention, fc, grad_const, grad_mean, for_fc
            )
            if fc_grads:
                launch.fc_grads(squeeze, for_fc, grad_fc)
            if branch_grads:
                launch_norm.normalize(problem, squeeze, weight, shift, factor, grad_mean)
    return grad_branches, grad_fc, grad_norm


def _contiguous(fc: SEWeights) -> SEWeights:
    return SEWeights(*(p.contiguous() for p in fc))


def _contiguous_affine(norm: NormParams) -> tuple[Tensor | None, Tensor | None]:
    gamma, beta = (None if p is None else p.contiguous() for p in (norm.gamma, norm.beta))
    return gamma, beta


def _for_fc(squeeze: Tensor, R: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised: the hidden units and their gradient (B, S, R), and the gate's (B, S, C)."""
    hidden = squeeze.new_empty((*squeeze.shape[:2], R))
    return hidden, torch.empty_like(hidden), torch.empty_like(squeeze)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
