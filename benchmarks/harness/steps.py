"""Make the step that is timed: an inference, a training step or a backward of a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from harness.cases import Case

Step = Callable[[], list[Tensor]]  # returns the output and, in training, the gradients


def make_step(module: nn.Module, inputs: tuple[Tensor, ...], case: Case) -> Step:
    """Make a step of inference, of training (forward and backward), or of the backward alone.

    The caller turns gradients off for inference, because that must not be timed.
    """
    device, autocast = inputs[0].device.type, case.autocast
    # The float64 oracle of a mixed-precision step runs without autocast.
    mixed = autocast and inputs[0].dtype != torch.float64

    def forward() -> Tensor:
        with torch.autocast(device, autocast) if mixed else nullcontext():
            return module(*inputs)

    if case.mode == "inference":
        return lambda: [forward()]
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    out = forward()
    grad = output_gradient(out, case.period)
    if case.mode == "backward":
        return lambda: list(torch.autograd.grad(out, leaves, grad, retain_graph=True))

    def train() -> list[Tensor]:
        result = forward()
        return [result.detach(), *torch.autograd.grad(result, leaves, grad)]

    return train


def output_gradient(out: Tensor, period: int) -> Tensor:
    """Return the gradient of the output: noise that is the same for all providers and the oracle.

    It has the output's dtype and memory format. Its first ``period`` samples repeat.
    """
    generator = torch.Generator(out.device).manual_seed(1)
    shape = (min(period, out.shape[0]), *out.shape[1:])
    noise = torch.randn(shape, generator=generator, device=out.device)
    # bfloat16 values are exact in all other dtypes; float16 holds them unless they are extreme.
    repeats = (out.shape[0] // shape[0], *(1 for _ in shape[1:]))
    return torch.empty_like(out).copy_(noise.bfloat16().repeat(repeats))
