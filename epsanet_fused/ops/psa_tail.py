"""psa_tail: everything of a PSA module that follows its convolutions, and its backward.

Users call ``psa_tail``. It runs a pair of functional operators registered with torch.library, the
forward and the backward. The backward needs squeeze and attention, both tiny; they are outputs of
the forward, so that compilers, checkpointing and CUDA graphs see all of the operator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epsanet_fused.backends.interface import (
    SAVED_ARGS,
    SE_ARGS,
    SEWeights,
    empty_backward,
    empty_forward,
)
from epsanet_fused.backends.registry import current_backend, get_backend, resolve
from epsanet_fused.ops.checks import check_order, check_psa_tail
from epsanet_fused.ops.derivatives import (
    differentiate_plainly,
    is_more_than_one_backward,
    needs_plain_formula,
)

_LIBRARY = torch.library.Library("epsanet_fused", "FRAGMENT")
_LIBRARY.define(
    f"psa_tail(Tensor[] branches, {SE_ARGS}, Tensor? scale, Tensor? shift, bool relu, str backend) "
    f"-> (Tensor out, {SAVED_ARGS})"
)
_LIBRARY.define(
    f"psa_tail_backward(Tensor grad, Tensor[] branches, {SAVED_ARGS}, {SE_ARGS}, "
    "bool branch_grads, bool fc_grads, str backend) -> (Tensor[] grad_branches, Tensor[] grad_fc)"
)


def psa_tail(
    branches: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    order: str = "reversed",
) -> Tensor:
    """Squeeze, excite, select, recalibrate and concatenate in reverse (arXiv 2105.14447, 3.2).

    For branch s with channels c: ``attention = softmax_s(sigmoid(fc2 relu(fc1 mean_hw(x_s))))``
    and ``out[:, (S - 1 - s) * C + c] = x_s[:, c] * attention[:, s, c]``. Each branch may have fc
    weights of its own, as in other published modules.

    It is differentiable to any order, and torch.func transforms it. The kernels run the forward and
    the first backward; whatever else is asked for runs the formula in plain PyTorch.

    Args:
        branches: S >= 2 tensors (B, C, H, W) of one shape, dtype and device; the branch of the
            smallest kernel first. float16, bfloat16, float32 or float64; any strides; B may be 0.
        fc1_weight: (R, C, 1, 1) or (R, C); (S, R, C) for weights of each branch. The fc tensors
            may have any of these dtypes.
        fc1_bias: (R,) or (S, R).
        fc2_weight: (C, R, 1, 1) or (C, R); or (S, C, R).
        fc2_bias: (C,) or (S, C).
        scale: (S * C,), in the order of the output's channels. With ``shift`` and ``relu`` it forms
            an epilogue for inference: ``relu(scale * out + shift)``, each part where it is given.
        shift: (S * C,), see ``scale``.
        relu: see ``scale``.
        order: of the branches in the output. "reversed" puts the last one first, as the paper's
            code does; "natural" the first.

    Returns:
        (B, S * C, H, W) in the branches' dtype, in this order; channels_last if every branch
        is, else contiguous. Sums are accumulated in float32 (float64 for float64).

    Raises:
        TypeError: for an argument that is no tensor or has a dtype that isn't accepted.
        ValueError: for shapes and devices that don't fit, or an epilogue where a gradient is due.
        RuntimeError: if the backend asked for can't run on these tensors.
    """
    if order != "reversed":
        check_order("psa_tail", order)
        fc = SEWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        branches, (fc1_weight, fc1_bias, fc2_weight, fc2_bias) = reverse(branches, fc)
    name = current_backend()
    failure = None
    if name != "reference" and not torch.compiler.is_compiling():
        weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        try:
            out = _try_inference(name, branches, weights, scale, shift, relu)
            if out is not None:
                return out
        except Exception as error:  # check_psa_tail says it better if an argument is to blame
            failure = error
    fc = SEWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if not torch.jit.is_tracing():  # there sizes are tensors, whose comparison warns
        check_psa_tail(branches, fc, scale, shift, relu)
    if failure is not None:
        raise failure
    fc = as_matrices(fc)
    if name == "reference" or needs_plain_formula(branches, (*fc, scale, shift)):
        return get_backend("reference").forward(branches, fc, scale, shift, relu)[0]
    return torch.ops.epsanet_fused.psa_tail(branches, *fc, scale, shift, relu, name)[0]


def _try_inference(
    name: str,
    branches: Sequence[Tensor],
    fc: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> Tensor | None:
    """Return the output by the backend's ``inference``, or None where that can't be used.

    For small tails Python takes most of the time. This way skips the checks, because ``inference``
    refuses the same tensors, and the dispatcher's call back into Python. The backend can't tell
    whether a gradient is due or relu is a bool, so this function does. ``fc`` is a plain tuple,
    which is built four times as fast as SEWeights.
    """
    if not isinstance(branches, (list, tuple)) or not isinstance(relu, bool):
        return None
    if needs_plain_formula(branches, fc, (scale, shift)):
        return None
    if torch.is_grad_enabled():
        epilogue = [v for v in (scale, shift) if v is not None]
        if any(t.requires_grad for t in (*branches, *fc, *epilogue)):
            return None
    backend = resolve(name, branches[0].device.type, branches)
    if not hasattr(backend, "inference"):
        return None
    return backend.inference(branches, fc, scale, shift, relu)


def as_matrices(fc: SEWeights) -> SEWeights:
    """Return fc with the weights as (R, C) and (C, R), without the 1 x 1 of a convolution."""
    if fc.per_branch:
        return fc
    return SEWeights(fc.fc1_weight.flatten(1), fc.fc1_bias, fc.fc2_weight.flatten(1), fc.fc2_bias)


def reverse(branches: Sequence[Tensor], fc: SEWeights) -> tuple[Sequence[Tensor], SEWeights]:
    """Return the branches in reverse, each with its weights: the operators put the last one first.

    What is no sequence or no tensor stays as it is: the checks will name it.
    """
    if isinstance(branches, (list, tuple)):
        branches = branches[::-1]
    if isinstance(fc.fc1_weight, Tensor) and fc.per_branch:
        fc = SEWeights(*(p.flip(0) if isinstance(p, Tensor) and p.dim() else p for p in fc))
    return branches, fc


@torch.library.impl(_LIBRARY, "psa_tail", "CompositeExplicitAutograd")
def _forward(branches: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fc, scale, shift, relu, name = rest
    backend = resolve(name, branches[0].device.type, branches)
    return backend.forward(branches, SEWeights(*fc), scale, shift, relu)


@torch.library.impl(_LIBRARY, "psa_tail_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, branches: list[Tensor], squeeze: Tensor, attention: Tensor, *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    *fc, branch_grads, fc_grads, name = rest
    backend = resolve(name, grad.device.type, branches)
    return backend.backward(
        grad, branches, squeeze, attention, SEWeights(*fc), branch_grads, fc_grads
    )


@torch.library.register_fake("epsanet_fused::psa_tail", lib=_LIBRARY)
def _fake_forward(branches: list[Tensor], *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_forward(branches)


@torch.library.register_fake("epsanet_fused::psa_tail_backward", lib=_LIBRARY)
def _fake_backward(
    _grad: Tensor, branches: list[Tensor], _squeeze: Tensor, _attention: Tensor, *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    *fc, branch_grads, fc_grads, _name = rest
    return empty_backward(branches, SEWeights(*fc), branch_grads, fc_grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branches, *fc, scale, shift, relu, backend = inputs
    _, squeeze, attention = output
    ctx.mark_non_differentiable(squeeze, attention)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*branches, squeeze, attention, *fc)
    ctx.backend = backend
    ctx.has_epilogue = scale is not None or shift is not None or relu


def _autograd(ctx: Any, grad: Tensor | None, *_grad_saved: None) -> tuple[Any, ...]:
    if ctx.has_epilogue:
        raise NotImplementedError("psa_tail: scale, shift and relu have no gradient")
    *branches, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias = ctx.saved_tensors
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    wants_branches, *wants_fc = ctx.needs_input_grad[:5]
    no_branches = [None] * len(branches)
    if grad is None:
        return no_branches, *[None] * 8
    if is_more_than_one_backward(grad):
        plain = get_backend("reference").forward
        found = differentiate_plainly(
            lambda *given: plain(given[:-4], SEWeights(*given[-4:]), None, None, False)[0],
            (*branches, *fc),
            (*wants_branches, *wants_fc),
            grad,
        )
        return found[: len(branches)], *found[len(branches) :], *[None] * 4
    asked = (any(wants_branches), any(wants_fc))
    grad_branches, grad_fc = torch.ops.epsanet_fused.psa_tail_backward(
        grad, branches, squeeze, attention, *fc, *asked, ctx.backend
    )
    return grad_branches or no_branches, *(grad_fc or [None] * 4), *[None] * 4


torch.library.register_autograd(
    "epsanet_fused::psa_tail", _autograd, setup_context=_setup_context, lib=_LIBRARY
)
