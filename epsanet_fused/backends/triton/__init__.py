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

from epsanet_fused.utils.memory_format import accumulator_dtype, empty_grad, empty_output


@functools.cache
def unavailable(device_type: str) -> str | None:
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
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from epsanet_fused.backends.triton import launch

    out = empty_output(branches)
    B, C = branches[0].shape[:2]
    squeeze = out.new_empty((B, len(branches), C), dtype=accumulator_dtype(out.dtype))
    attention = torch.empty_like(squeeze)
    if B == 0:
        return out, squeeze, attention
    fc = [t.contiguous() for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
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
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    branch_grads: bool,
    fc_grads: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    from epsanet_fused.backends.triton import launch

    fc = [t.contiguous() for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    grad_branches = [empty_grad(x) for x in branches] if branch_grads else []
    grad_fc = [torch.empty_like(t) for t in fc] if fc_grads else []
    if grad.shape[0] == 0:
        return grad_branches, [g.zero_() for g in grad_fc]
    spread = torch.empty_like(squeeze)  # (B, S, C)
    for_fc = _for_fc(squeeze, fc1_weight.shape[0]) if fc_grads else (None,) * 3
    with _on_device_of(grad):
        problem = launch.problem(branches, grad)
        launch.sum_and_gate(problem, True, squeeze, attention, fc, spread, for_fc)
        if fc_grads:
            launch.fc_grads(squeeze, for_fc, grad_fc)
        if branch_grads:
            launch.recalibrate(launch.problem(grad_branches, problem.cat), attention, spread)
    return grad_branches, grad_fc


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
    from epsanet_fused.backends.triton import launch, launch_norm

    out = empty_output(branches)
    B, C = branches[0].shape[:2]
    squeeze = out.new_empty((B, len(branches), C), dtype=accumulator_dtype(out.dtype))
    deviation, attention = torch.empty_like(squeeze), torch.empty_like(squeeze)
    mean, var = (squeeze.new_empty(out.shape[1]) for _ in range(2))
    if B == 0:
        return out, squeeze, deviation, attention, mean.zero_(), var.zero_()
    fc = [t.contiguous() for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    gamma, beta = (None if v is None else v.contiguous() for v in (gamma, beta))
    norm = launch_norm.Norm(gamma, beta, mean, var, eps)
    with _on_device_of(out):
        problem = launch.problem(branches, out)
        launch_norm.deviations_and_gate(problem, squeeze, deviation, attention, fc)
        weight, shift = launch_norm.statistics(problem, squeeze, deviation, attention, norm)
        launch_norm.normalize(problem, squeeze, weight, shift)
    return out, squeeze, deviation, attention, mean, var


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
    from epsanet_fused.backends.triton import launch, launch_norm

    fc = [t.contiguous() for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    gamma, beta = (None if v is None else v.contiguous() for v in (gamma, beta))
    grad_branches = [empty_grad(x) for x in branches] if branch_grads else []
    grad_fc = [torch.empty_like(t) for t in fc] if fc_grads else []
    both = [torch.empty_like(v) if norm_grads and v is not None else None for v in (gamma, beta)]
    grad_norm = [g for g in both if g is not None]
    if grad.shape[0] == 0:
        return grad_branches, [g.zero_() for g in grad_fc], [g.zero_() for g in grad_norm]
    for_attention: Sequence[Tensor | None] = (None,) * 5
    if branch_grads or fc_grads:
        for_attention = squeeze.new_empty((5, *squeeze.shape)).unbind()
    norm = launch_norm.Norm(gamma, beta, mean, var, eps)
    samples = (squeeze, deviation, attention)
    with _on_device_of(grad):
        problem = launch.problem(branches, grad, grad_branches)
        sums = launch_norm.gradient_sums(problem, squeeze, attention, norm)
        launch_norm.gradient_statistics(problem, sums, *samples, norm, both, for_attention)
        if branch_grads or fc_grads:
            grad_attention, weight, shift, factor, constant = for_attention
            spread = torch.empty_like(squeeze)
            for_fc = _for_fc(squeeze, fc1_weight.shape[0]) if fc_grads else (None,) * 3
            launch_norm.gate_backward(
                problem, grad_attention, squeeze, attention, fc, constant, spread, for_fc
            )
            if fc_grads:
                launch.fc_grads(squeeze, for_fc, grad_fc)
            if branch_grads:
                launch_norm.normalize(problem, squeeze, weight, shift, factor, spread)
    return grad_branches, grad_fc, grad_norm


def _for_fc(squeeze: Tensor, R: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised: the hidden units and their gradient (B, S, R), and the gate's (B, S, C)."""
    hidden = squeeze.new_empty((*squeeze.shape[:2], R))
    return hidden, torch.empty_like(hidden), torch.empty_like(squeeze)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
