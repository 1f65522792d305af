"""Derivatives that the operators' kernels don't have: those of the same formula in plain PyTorch.

torch.library's operators are differentiable once, in reverse mode. Where more is asked for, an
operator runs the formula of the reference, which PyTorch differentiates and transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_plain_formula(*groups: Sequence[Tensor | None]) -> bool:
    """Tell whether a transform of torch.func is on, or a tensor here has a forward-mode tangent."""
    return torch._C._are_functorch_transforms_active() or has_tangent(*groups)


def has_tangent(*groups: Sequence[Tensor | None]) -> bool:
    """Tell whether a tensor here has a forward-mode tangent."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None
        for group in groups
        for t in group
    )


def is_more_than_one_backward(grad: Tensor) -> bool:
    """Tell, within a backward, whether it is itself differentiated, or runs on many gradients."""
    if torch.is_grad_enabled() or needs_plain_formula((grad,)):
        return True
    # What torch.autograd.grad(is_grads_batched=True) passes.
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiate_plainly(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of the plain formula, with a graph if gradients are enabled.

    Args:
        formula: computes the output from such inputs.
        inputs: tensors, or None for what was not given. One may depend on another.
        wanted: for each input, whether its gradient is wanted.
        grad: the gradient of the output.

    Returns:
        For each input its gradient, or None where it is not wanted.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the gradient goes through the formula alone: of two inputs, one may be
        # computed from the other, or both may be one tensor.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        out = formula(*inputs)
    asked = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    found = iter(
        torch.autograd.grad(out, asked, grad, create_graph=create_graph, materialize_grads=True)
    )
    return [
        next(found) if want and t is not None else None
        for t, want in zip(inputs, wanted, strict=True)
    ]
