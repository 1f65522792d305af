"""C++ kernels for CPUs: each sample is read once from memory, summed, gated and written.

AVX-512, AVX2 or whatever the compiler's baseline is, chosen when the library is first used;
EPSANET_FUSED_CPU_CAPABILITY names a smaller one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from epsanet_fused.backends.native import library

NATIVE_PATH = 0


def unavailable(device_type: str) -> str | None:
    found = library()
    if found.problem is not None:
        return found.problem
    if found.cpu_capability is None:
        wanted = os.environ.get("EPSANET_FUSED_CPU_CAPABILITY")
        return f"EPSANET_FUSED_CPU_CAPABILITY={wanted!r} names no instruction set of this CPU"
    return None if device_type == "cpu" else f"it runs on CPU tensors, not on {device_type}"


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
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return torch.ops.epsanet_fused.psa_tail_native(branches, *fc, scale, shift, relu, NATIVE_PATH)


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
    return torch.ops.epsanet_fused.psa_tail_native_backward(
        grad, branches, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        branch_grads, fc_grads, NATIVE_PATH,
    )  # fmt: skip
