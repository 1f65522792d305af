"""psa_tail_norm: the tail, the BatchNorm2d behind it and the ReLU in training, and their backward.

The batch's statistics follow from each sample's squeeze and m2 (the sum of squared differences to
it), so the tail's own output is never in memory: the forward doesn't write it, and the backward
computes it again from the branches. docs/design.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.backends import defaults
from epsanet_fused.backends.interface import (
    NORM_ARGS,
    SE_ARGS,
    STATS_ARGS,
    NormBackend,
    NormParams,
    NormStats,
    SEWeights,
    empty_norm_backward,
    empty_norm_forward,
)
from epsanet_fused.backends.registry import current_backend, get_backend, resolve
from epsanet_fused.ops.checks import check_order, check_psa_tail_norm
from epsanet_fused.ops.derivatives import (
    differentiate_plainly,
    is_more_than_one_backward,
    needs_plain_formula,
)
from epsanet_fused.ops.psa_tail import as_matrices, psa_tail, reverse
from epsanet_fused.utils.memory_format import accumulator_dtype

_LIBRARY = torch.library.Library("epsanet_fused", "FRAGMENT")
_LIBRARY.define(
    f"psa_tail_norm(Tensor[] branches, {SE_ARGS}, {NORM_ARGS}, str backend) "
    f"-> (Tensor out, {STATS_ARGS})"
)
_LIBRARY.define(
    f"psa_tail_norm_backward(Tensor grad, Tensor[] branches, {STATS_ARGS}, {SE_ARGS}, "
    f"{NORM_ARGS}, bool branch_grads, bool fc_grads, bool norm_grads, str backend) "
    "-> (Tensor[] grad_branches, Tensor[] grad_fc, Tensor[] grad_norm)"
)


def psa_tail_norm(
    branches: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm: nn.BatchNorm2d,
    *,
    order: str = "reversed",
) -> Tensor:
    """Compute ``relu(norm(psa_tail(branches, ...)))`` (arXiv 2105.14447, 3.3).

    The norm uses the batch's statistics, and its running ones are updated as its own forward would.
    Derivatives of any order and torch.func: as for ``psa_tail``.

    Args:
        branches: as for ``psa_tail``, and so are the four fc tensors.
        fc1_weight: (R, C, 1, 1) or (R, C); (S, R, C) for weights of each branch.
        fc1_bias: (R,) or (S, R).
        fc2_weight: (C, R, 1, 1) or (C, R); or (S, C, R).
        fc2_bias: (C,) or (S, C).
        norm: a BatchNorm2d over the S * C channels that uses the batch's statistics: in training
            mode, or without running ones. Its tensors may have any dtype that the fc tensors may.
        order: as for ``psa_tail``.

    Returns:
        (B, S * C, H, W) in the branches' dtype and memory format, as from ``psa_tail``. Sums are
        accumulated in float32 (float64 for float64).

    Raises:
        TypeError: for an argument that is no tensor or no BatchNorm2d, or has a dtype that isn't
            accepted.
        ValueError: for shapes and devices that don't fit, a norm that doesn't use the batch's
            statistics, and one value per channel, as BatchNorm2d does.
        RuntimeError: if the backend asked for can't run on these tensors, or has no psa_tail_norm.
    """
    name = current_backend()
    fc = SEWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if order != "reversed":
        check_order("psa_tail_norm", order)
        branches, fc = reverse(branches, fc)
    check_psa_tail_norm(branches, fc, norm)
    if name == "reference" or needs_plain_formula(branches, (*fc, norm.weight, norm.bias)):
        return F.relu(norm(psa_tail(branches, *fc)))
    out, *_, mean, var = torch.ops.epsanet_fused.psa_tail_norm(
        branches, *as_matrices(fc), norm.weight, norm.bias, norm.eps, name
    )
    _update_running_stats(norm, mean, var, out.numel() // norm.num_features)
    return out


@torch.no_grad()
def _update_running_stats(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n: int) -> None:
    """Update the running statistics as BatchNorm2d does, from n values per channel."""
    if not (norm.training and norm.track_running_stats):
        return
    momentum: Tensor | float | None = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1 / norm.num_batches_tracked.to(mean.dtype)
    if n == 0 or momentum is None:
        return
    pairs = ((norm.running_mean, mean), (norm.running_var, var * (n / (n - 1))))
    for running, batch in pairs:
        if running is not None:
            running.copy_(momentum * batch + (1 - momentum) * running)


def fuses_norm_by_default(device_type: str) -> bool:
    """Tell whether a block in training takes psa_tail_norm on such a device.

    With "auto" it does so where ``defaults.NORM_TABLE`` says that this is faster. "reference" never
    does. Any other backend does if it has psa_tail_norm.
    """
    return _fuses_norm(current_backend(), device_type)


def _fuses_norm(name: str, device_type: str) -> bool:
    if name == "auto":
        measured = defaults.NORM_TABLE.get(device_type)
        return measured is not None and resolve(name, device_type) is get_backend(measured)
    backend = get_backend(name)
    if name == "reference" or backend.unavailable_reason(device_type) is not None:
        return False
    return hasattr(backend, "norm_forward")


# A constant to torch.compile, which guards on current_backend() but can't trace this; see registry.
_fuses_norm._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_norm(name: str, device_type: str, branches: Sequence[Tensor] = ()) -> NormBackend:
    """Return the backend that runs psa_tail_norm when the user asks for ``name``.

    Raises:
        RuntimeError: if the one asked for can't run on such a device, or has no psa_tail_norm.
    """
    backend = resolve(name, device_type, branches)
    if not hasattr(backend, "norm_forward"):
        if name != "auto":
            raise RuntimeError(
                f"psa_tail_norm: the backend {name!r} doesn't have it; 'auto' runs it in plain "
                f"PyTorch where no other backend has it"
            )
        # The branches chose the fastest backend for the tail. Without them it is the usual one.
        backend = resolve(name, device_type)
        if not hasattr(backend, "norm_forward"):
            backend = get_backend("reference")
    return cast(NormBackend, backend)


@torch.library.impl(_LIBRARY, "psa_tail_norm", "CompositeExplicitAutograd")
def _forward(branches: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *fc, gamma, beta, eps, name = rest
    backend = resolve_norm(name, branches[0].device.type, branches)
    out, stats = backend.norm_forward(branches, SEWeights(*fc), NormParams(gamma, beta, eps))
    return out, *stats


@torch.library.impl(_LIBRARY, "psa_tail_norm_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, branches: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    stats, fc, norm, asked, name = _split_backward(rest)
    backend = resolve_norm(name, grad.device.type, branches)
    return backend.norm_backward(grad, branches, stats, fc, norm, *asked)


def _split_backward(
    rest: tuple[Any, ...],
) -> tuple[NormStats, SEWeights, NormParams, tuple[bool, bool, bool], str]:
    """Group the arguments of psa_tail_norm_backward behind the branches."""
    branch_grads, fc_grads, norm_grads, name = rest[12:]
    asked = (branch_grads, fc_grads, norm_grads)
    return NormStats(*rest[:5]), SEWeights(*rest[5:9]), NormParams(*rest[9:12]), asked, name


@torch.library.register_fake("epsanet_fused::psa_tail_norm", lib=_LIBRARY)
def _fake_forward(branches: list[Tensor], *_rest: Any) -> tuple[Tensor, ...]:
    out, stats = empty_norm_forward(branches)
    return out, *stats


@torch.library.register_fake("epsanet_fused::psa_tail_norm_backward", lib=_LIBRARY)
def _fake_backward(
    _grad: Tensor, branches: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    _, fc, norm, asked, _ = _split_backward(rest)
    return empty_norm_backward(branches, fc, norm, *asked)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branches, *fc, gamma, beta, eps, backend = inputs
    _, *stats = output
    ctx.mark_non_differentiable(*stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*branches, *stats, *fc, gamma, beta)
    ctx.eps, ctx.backend = eps, backend


def _autograd(ctx: Any, grad: Tensor | None, *_grad_stats: None) -> tuple[Any, ...]:
    *tensors, gamma, beta = ctx.saved_tensors
    branches, stats_and_fc = tensors[:-9], tensors[-9:]
    no_branches = [None] * len(branches)
    if grad is None:
        return no_branches, *[None] * 8
    wants_branches, *wants = ctx.needs_input_grad[:7]
    if is_more_than_one_backward(grad):
        plain = get_backend("reference").forward

        def formula(*given: Any) -> Tensor:
            *branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, beta = given
            fc = SEWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
            tail = plain(branches, fc, None, None, False)[0]
            acc = accumulator_dtype(tail.dtype)  # batch_norm takes tensors of one dtype
            gamma, beta = (None if p is None else p.to(acc) for p in (gamma, beta))
            out = F.batch_norm(tail.to(acc), None, None, gamma, beta, True, 0.0, ctx.eps)
            return F.relu(out).to(tail.dtype)

        inputs = (*branches, *stats_and_fc[5:], gamma, beta)
        found = differentiate_plainly(formula, inputs, (*wants_branches, *wants), grad)
        return found[: len(branches)], *found[len(branches) :], None, None
    asked = (any(wants_branches), any(wants[:4]), any(wants[4:]))
    grad_branches, grad_fc, found = torch.ops.epsanet_fused.psa_tail_norm_backward(
        grad, branches, *stats_and_fc, gamma, beta, ctx.eps, *asked, ctx.backend
    )
    left = iter(found)
    grad_norm = [None if p is None else next(left, None) for p in (gamma, beta)]
    return grad_branches or no_branches, *(grad_fc or [None] * 4), *grad_norm, None, None


torch.library.register_autograd(
    "epsanet_fused::psa_tail_norm", _autograd, setup_context=_setup_context, lib=_LIBRARY
)
