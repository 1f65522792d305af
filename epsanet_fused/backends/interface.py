"""The interface of a backend, and the types in which arguments and results travel to and from it.

A backend is a module or an object that satisfies ``Backend``; reference.py is the shortest example.
The operators in ops/ are its only callers. They check the arguments, so a backend needn't. The
results must have the shapes, strides and dtypes of the operators' fake kernels; this file's
``empty_`` functions allocate such results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epsanet_fused.utils.memory_format import accumulator_dtype, empty_grad, empty_output

# The dtypes of branches and weights.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Arguments in the operators' schemas: the fields of SEWeights, NormParams and NormStats, and what
# psa_tail saves for its backward.
SE_ARGS = "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias"
NORM_ARGS = "Tensor? gamma, Tensor? beta, float eps"
STATS_ARGS = "Tensor squeeze, Tensor m2, Tensor attention, Tensor mean, Tensor var"
SAVED_ARGS = "Tensor squeeze, Tensor attention"


class SEWeights(NamedTuple):
    """The weights of the squeeze-and-excitation MLP, for C channels and R hidden units.

    The branches share one, or each has its own: then every tensor has a first dimension of S.
    """

    fc1_weight: Tensor  # (R, C) or (S, R, C)
    fc1_bias: Tensor  # (R,) or (S, R)
    fc2_weight: Tensor  # (C, R) or (S, C, R)
    fc2_bias: Tensor  # (C,) or (S, C)

    @property
    def per_branch(self) -> bool:
        """True if each branch has weights of its own."""
        return self.fc1_weight.dim() == 3

    @property
    def hidden(self) -> int:
        """R, the number of hidden units."""
        return self.fc1_weight.shape[1 if self.per_branch else 0]


class NormParams(NamedTuple):
    """The parameters of a BatchNorm2d, in the order of the output's channels."""

    gamma: Tensor | None  # (S * C,)
    beta: Tensor | None  # (S * C,)
    eps: float


class NormStats(NamedTuple):
    """The statistics that the forward of psa_tail_norm saves for the backward.

    All are in the accumulator's dtype. ``squeeze`` and ``m2`` describe the branches, ``mean`` and
    ``var`` (biased) the tail's output in the batch.
    """

    squeeze: Tensor  # (B, S, C), the mean over the pixels
    m2: Tensor  # (B, S, C), the sum over the pixels of (x - squeeze)^2
    attention: Tensor  # (B, S, C)
    mean: Tensor  # (S * C,), in the order of the output's channels
    var: Tensor  # (S * C,)


class Backend(Protocol):
    """One way to run psa_tail and psa_tail_backward."""

    name: str

    def unavailable_reason(self, device_type: str) -> str | None:
        """Return why the backend can't run on such a device here, or None if it can."""

    def forward(
        self,
        branches: Sequence[Tensor],
        fc: SEWeights,
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the tail and the epilogue ``relu(scale * out + shift)``.

        Returns:
            The output (B, S * C, H, W), squeeze (B, S, C) and attention (B, S, C).
        """

    def backward(
        self,
        grad: Tensor,
        branches: Sequence[Tensor],
        squeeze: Tensor,
        attention: Tensor,
        fc: SEWeights,
        branch_grads: bool,
        fc_grads: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of the branches and of the four fc tensors.

        ``branch_grads`` and ``fc_grads`` say which are asked for; the other list is empty.
        """


class InferenceBackend(Backend, Protocol):
    """A backend with a shorter way to the output alone, for calls that need no gradient."""

    def inference(
        self,
        branches: Sequence[Tensor],
        fc: tuple[Tensor, Tensor, Tensor, Tensor],
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
    ) -> Tensor:
        """Return the output of ``forward``, or raise an error.

        The tensors come from the user unchecked: the backend must refuse all that ops/checks.py
        refuses, and its message doesn't matter. The fc weights may have the 1 x 1 of a convolution.
        """


class NormBackend(Backend, Protocol):
    """A backend that also has psa_tail_norm and psa_tail_norm_backward."""

    def norm_forward(
        self, branches: Sequence[Tensor], fc: SEWeights, norm: NormParams
    ) -> tuple[Tensor, NormStats]:
        """Run the tail, the batch norm and the ReLU.

        Returns:
            The output (B, S * C, H, W) and the statistics. An empty batch has zeros for ``mean``
            and ``var``.
        """

    def norm_backward(
        self,
        grad: Tensor,
        branches: Sequence[Tensor],
        stats: NormStats,
        fc: SEWeights,
        norm: NormParams,
        branch_grads: bool,
        fc_grads: bool,
        norm_grads: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the gradients of the branches, of the fc tensors, and of gamma and beta.

        The flags say which are asked for; the other lists are empty. A gamma or beta of None has
        no entry in the last list.
        """


def empty_forward(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the uninitialized results of ``forward``: output, squeeze and attention."""
    out = empty_output(branches)
    samples = (branches[0].shape[0], len(branches), branches[0].shape[1])  # (B, S, C)
    squeeze = out.new_empty(samples, dtype=accumulator_dtype(out.dtype))
    return out, squeeze, squeeze.new_empty(samples)


def empty_norm_forward(branches: Sequence[Tensor]) -> tuple[Tensor, NormStats]:
    """Return the uninitialized results of ``norm_forward``: output and statistics."""
    out, squeeze, attention = empty_forward(branches)
    m2 = squeeze.new_empty(squeeze.shape)
    mean, var = (squeeze.new_empty(out.shape[1]) for _ in range(2))  # (S * C,)
    return out, NormStats(squeeze, m2, attention, mean, var)


def empty_backward(
    branches: Sequence[Tensor], fc: SEWeights, branch_grads: bool, fc_grads: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the uninitialized results of ``backward``: gradients of the branches and of fc."""
    return (
        [empty_grad(x) for x in branches] if branch_grads else [],
        [p.new_empty(p.shape) for p in fc] if fc_grads else [],
    )


def empty_norm_backward(
    branches: Sequence[Tensor],
    fc: SEWeights,
    norm: NormParams,
    branch_grads: bool,
    fc_grads: bool,
    norm_grads: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the uninitialized results of ``norm_backward``."""
    params = [p for p in (norm.gamma, norm.beta) if p is not None and norm_grads]
    grad_branches, grad_fc = empty_backward(branches, fc, branch_grads, fc_grads)
    return grad_branches, grad_fc, [p.new_empty(p.shape) for p in params]
