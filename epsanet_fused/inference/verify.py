"""Verify on random inputs that a block or a PSA module is what its rewritten form computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from epsanet_fused.inference.blocks import PlannedBlock, PlannedPSA, Rewrites, is_batch_norm
from epsanet_fused.nn.equivalence import TOLERANCE, copy_in_float64, first_line, randomize
from epsanet_fused.nn.fused_psa import is_psa
from epsanet_fused.nn.psa_layers import UnfusableError

_BLOCK_LAYERS = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample")
_SCALES = (1.0, 50.0)  # of the inputs: large numbers show a clamp, such as that of ReLU6


def is_block_like(module: Any) -> bool:
    """Return whether ``module`` has the layers of a bottleneck block."""
    has_all = all(hasattr(module, name) for name in _BLOCK_LAYERS)
    return has_all and (is_psa(module.conv2) or isinstance(module.conv2, nn.Conv2d))


def check_numbers(module: nn.Module, x: Tensor | None) -> str | None:
    """Return how the module differs from its rewritten form, or None if it doesn't.

    Copies in float64 with random weights are compared: present weights can hide a difference, as
    zeros in the last norm of a block do, and weights that are loaded later would bring it back.

    Args:
        module: a block or a PSA module by its structure.
        x: an input of it, for its shape.
    """
    if x is None:
        return "the example input doesn't reach it, or it takes more than one tensor"
    generator = torch.Generator().manual_seed(0)
    try:
        module = copy_in_float64(module)
        _randomize(module, generator)
        noise = torch.randn((max(1, min(2, len(x))), *x.shape[1:]), generator=generator)
        noise = noise.to(next(module.parameters()))
        for scale in _SCALES:
            if reason := _compare(module, noise * scale):
                return reason
    except UnfusableError as error:
        return str(error)
    except Exception as error:  # a module can raise any exception
        return f"it can't be run on noise: {first_line(error)}"
    return None


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw random parameters, and random statistics of the norms."""
    randomize(module, generator)
    norms: Iterable[Any] = filter(is_batch_norm, module.modules())
    for norm in norms:
        noise = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_mean.copy_(0.3 * noise)
        norm.running_var.copy_(0.5 + noise.abs())


def _compare(module: nn.Module, x: Tensor) -> str | None:
    rewritten = (
        PlannedBlock("", module, Rewrites())
        if is_block_like(module)
        else PlannedPSA("", module, None, Rewrites())
    )
    expected, out = module(x.clone()), rewritten(x)
    if not isinstance(expected, Tensor) or expected.shape != out.shape:
        return "its output isn't that of such a module"
    distance = ((out - expected).norm() / (expected.norm() or 1)).item()
    if not distance <= TOLERANCE:  # also for NaN
        return f"it computes something else: {distance:.1e} from what such a module gives"
    return None
