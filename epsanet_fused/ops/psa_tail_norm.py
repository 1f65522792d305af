"""The operator of training: the tail, the BatchNorm2d behind it and the ReLU, and their backward.

The batch's statistics follow from each sample's squeeze and from its pixels' deviation from it, so
the tail's own output is nowhere in memory: not between the parts, and not for the backward, which
computes it again from the branches. docs/design.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.backends.registry import chosen, resolve_norm
from epsanet_fused.ops.checks import check_psa_tail, check_psa_tail_norm, check_vectors
from epsanet_fused.ops.psa_tail import (
    LIBRARY,
    psa_tail,
    refuse_forward_mode,
    refuse_second_derivative,
)
from epsanet_fused.utils.memory_format import accumulator_dtype, empty_grad, empty_output

_FC = "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias"
_NORM = "Tensor? gamma, Tensor? beta, float eps"
_STATS = "Tensor squeeze, Tensor deviation, Tensor attention, Tensor mean, Tensor var"
_FORWARD = f"(Tensor[] branches, {_FC}, {_NORM}{{}}) -> (Tensor out, {_STATS})"
_BACKWARD = (
    f"(Tensor grad, Tensor[] branches, {_STATS}, {_FC}, {_NORM}, "
    "bool branch_grads, bool fc_grads, bool norm_grads{}) "
    "-> (Tensor[] grad_branches, Tensor[] grad_fc, Tensor[] grad_norm)"
)
LIBRARY.define("psa_tail_norm" + _FORWARD.format(", str backend"))
LIBRARY.define("psa_tail_norm_backward" + _BACKWARD.format(", str backend"))
# The compiled library's kernels, by themselves, as in ops.py.
LIBRARY.define("psa_tail_norm_native" + _FORWARD.format(""))
LIBRARY.define("psa_tail_norm_native_backward" + _BACKWARD.format(""))


def psa_tail_norm(
    branches: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm: nn.BatchNorm2d,
) -> Tensor:
    """``relu(norm(psa_tail(branches, ...)))`` with the batch's statistics (arXiv 2105.14447, 3.3).

    The norm's running statistics are updated as its own forward would.

    Args:
        branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias: as for ``psa_tail``.
        norm: a BatchNorm2d over the S * C channels that uses the batch's statistics: in training
            mode, or without running ones. Its tensors may be of any dtype that the fc tensors may.

    Returns:
        (B, S * C, H, W) in the branches' dtype and memory format, as ``psa_tail`` returns it. Sums
        are accumulated in float32 (float64 for float64).

    Raises:
        TypeError: for what is no tensor or no BatchNorm2d, or of a dtype that isn't accepted.
        ValueError: for shapes and devices that don't fit, a norm that doesn't use the batch's
            statistics, and one value per channel, as BatchNorm2d does.
        RuntimeError: if the backend asked for can't run on these tensors, or has no psa_tail_norm.
        NotImplementedError: for second derivatives and forward-mode differentiation.

    Differentiable once. For higher orders and torch.func use ``use_backend("reference")``.
    """
    name = chosen()
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_psa_tail_norm(branches, *fc, norm)
    if name == "reference":
        return F.relu(norm(psa_tail(branches, *fc)))
    if not torch.compiler.is_compiling():
        given = (t for t in (*branches, *fc, norm.weight, norm.bias) if t is not None)
        refuse_forward_mode("psa_tail_norm", tuple(given))
    matrices = (fc1_weight.flatten(1), fc1_bias, fc2_weight.flatten(1), fc2_bias)
    out, *_, mean, var = torch.ops.epsanet_fused.psa_tail_norm(
        branches, *matrices, norm.weight, norm.bias, norm.eps, name
    )
    _track(norm, mean, var, out.numel() // norm.num_features)
    return out


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n: int) -> None:
    """Update the running statistics as BatchNorm2d does, from n values per channel."""
    if not (norm.training and norm.track_running_stats):
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1 / norm.num_batches_tracked.to(mean.dtype)
    if n == 0:
        return
    pairs = ((norm.running_mean, mean), (norm.running_var, var * (n / (n - 1))))
    for running, batch in pairs:
        if running is not None:
            running.copy_(momentum * batch + (1 - momentum) * running)


@torch.library.impl(LIBRARY, "psa_tail_norm", "CompositeExplicitAutograd")
def _forward(branches, *rest):
    *arguments, backend = rest
    run = resolve_norm(backend, branches[0].device.type, branches).norm_forward
    return run(branches, *arguments)


@torch.library.impl(LIBRARY, "psa_tail_norm_backward", "CompositeExplicitAutograd")
def _backward(grad, branches, *rest):
    *arguments, backend = rest
    run = resolve_norm(backend, grad.device.type, branches).norm_backward
    return run(grad, branches, *arguments)


@torch.library.register_fake("epsanet_fused::psa_tail_norm", lib=LIBRARY)
def _fake_forward(branches, *rest):
    x = branches[0]
    B, S, C = x.shape[0], len(branches), x.shape[1]
    acc = accumulator_dtype(x.dtype)
    samples = (x.new_empty((B, S, C), dtype=acc) for _ in range(3))
    channels = (x.new_empty((S * C,), dtype=acc) for _ in range(2))
    return empty_output(branches), *samples, *channels


@torch.library.register_fake("epsanet_fused::psa_tail_norm_native", lib=LIBRARY)
def _fake_native(branches, *rest):
    *fc, gamma, beta, _eps = rest
    check_psa_tail(branches, *fc, None, None, False)
    check_vectors(branches, gamma=gamma, beta=beta)
    return _fake_forward(branches, *rest)


@torch.library.register_fake("epsanet_fused::psa_tail_norm_backward", lib=LIBRARY)
@torch.library.register_fake("epsanet_fused::psa_tail_norm_native_backward", lib=LIBRARY)
def _fake_backward(
    grad, branches, squeeze, deviation, attention, mean, var,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, beta, eps,
    branch_grads, fc_grads, norm_grads, *choice,
):  # fmt: skip
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    affine = [p for p in (gamma, beta) if p is not None]
    return (
        [empty_grad(x) for x in branches] if branch_grads else [],
        [p.new_empty(p.shape) for p in fc] if fc_grads else [],
        [p.new_empty(p.shape) for p in affine] if norm_grads else [],
    )


def _setup_context(ctx, inputs, output):
    branches, *fc, gamma, beta, eps, backend = inputs
    _, *stats = output
    ctx.mark_non_differentiable(*stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*branches, *stats, *fc, gamma, beta)
    ctx.eps, ctx.backend = eps, backend


def _autograd(ctx, grad, *_grad_stats):
    *branches, gamma, beta = ctx.saved_tensors
    branches, stats_and_fc = branches[:-9], branches[-9:]
    wants_branches, *wants = ctx.needs_input_grad[:7]
    none_branches = [None] * len(branches)
    if grad is None:
        return none_branches, *[None] * 8
    grad_branches, grad_fc, grad_norm = torch.ops.epsanet_fused.psa_tail_norm_backward(
        grad, branches, *stats_and_fc, gamma, beta, ctx.eps,
        any(wants_branches), any(wants[:4]), any(wants[4:]), ctx.backend,
    )  # fmt: skip
    left = iter(grad_norm)
    grad_affine = [None if p is None else next(left, None) for p in (gamma, beta)]
    return grad_branches or none_branches, *(grad_fc or [None] * 4), *grad_affine, None, None


torch.library.register_autograd(
    "epsanet_fused::psa_tail_norm", _autograd, setup_context=_setup_context, lib=LIBRARY
)
refuse_second_derivative("psa_tail_norm")
