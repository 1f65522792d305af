"""Make the step that is timed: an inference, a training step or a backward of a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

Step = Callable[[], list[Tensor]]


class Prepared(NamedTuple):
    """A step to time: ``step()`` returns the output and, in training, the gradients."""

    step: Step
    backend: str  # the backend that runs, for example the one that "auto" takes
    choice: str  # the argument of ef.use_backend with which step must be called
    # The step to measure peak memory on: a replay of a CUDA graph allocates nothing.
    memory_step: Step | None


def make_step(
    module: nn.Module, inputs: tuple[Tensor, ...], mode: str, autocast: torch.dtype | None
) -> Step:
    """Make a step of inference, of training (forward and backward), or of the backward alone.

    The caller turns gradients off for inference, because that must not be timed.
    """
    device = inputs[0].device.type

    def forward() -> Tensor:
        with torch.autocast(device, autocast) if autocast else nullcontext():
            return module(*inputs)

    if mode == "inference":
        return lambda: [forward()]
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    out = forward()
    grad = output_gradient(out)
    if mode == "backward":
        return lambda: list(torch.autograd.grad(out, leaves, grad, retain_graph=True))

    def train() -> list[Tensor]:
        result = forward()
        return [result.detach(), *torch.autograd.grad(result, leaves, grad)]

    return train


def output_gradient(out: Tensor) -> Tensor:
    """Return the gradient of the output: noise that is the same for all providers and the oracle.

    It has the output's dtype and memory format.
    """
    generator = torch.Generator(out.device).manual_seed(1)
    noise = torch.randn(out.shape, generator=generator, device=out.device)
    # bfloat16 values are exact in all other dtypes; float16 holds them unless they are extreme.
    noise = noise.bfloat16()
    return torch.empty_like(out).copy_(noise)
