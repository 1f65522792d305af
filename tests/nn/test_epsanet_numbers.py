"""A fused EPSANet-50 gives the plain one's logits, gradients and running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import epsanet_fused as ef
from epsanet_fused.testing.accuracy import max_error

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 10
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def networks() -> tuple[ef.EPSANet, ef.EPSANet]:
    """Plain and fused networks with the same weights and the statistics of one batch."""
    plain = ef.epsanet50(num_classes=CLASSES, fused=False)
    with torch.no_grad():
        plain(images())
    fused = ef.epsanet50(num_classes=CLASSES)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
    """Return logits, gradients and the norms' statistics of a copy of the model."""
    model = copy.deepcopy(model).to(dtype).train(training)
    logits = model(images().to(dtype))
    ramp = torch.linspace(-1, 1, logits.numel(), dtype=dtype).view(logits.shape)
    (logits * ramp).sum().backward()
    return {
        "logits": logits.detach(),
        **{name: p.grad for name, p in model.named_parameters()},
        **{name: b for name, b in model.named_buffers() if b.is_floating_point()},
    }


@each_mode
def test_every_tensor_in_float64(training: bool) -> None:
    """In float64 rounding is so small that any wrong formula shows."""
    plain, fused = networks()
    oracle, results = (run(model, torch.float64, training) for model in (plain, fused))
    assert results.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert max_error(results[name], exact) <= 1e-9 * exact.abs().max().item(), name


def away_from_kinks(model: ef.EPSANet) -> None:
    """Shift all norms so that the inputs of each ReLU outside the SEs are positive.

    The gradient of a ReLU jumps at 0. If an input is as close to 0 as a rounding error, rounding
    decides about the gradient, and that difference is larger than the errors to compare.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.constant_(module.bias, 8.0)
            if name.endswith("bn3"):
                nn.init.constant_(module.weight, 0.2)


def kind_of(name: str) -> str:
    part = name.split(".")[0] if name.startswith("layer") else "stem and classifier"
    return f"statistics of {part}" if "running" in name else f"gradients of {part}"


def relative_errors(results: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, float]:
    """Return |error| / |exact| per kind of tensor, with the norm over all tensors of that kind."""
    squares: dict[str, Tensor] = {}
    for name, exact in oracle.items():
        kind = name if name == "logits" else kind_of(name)
        pair = torch.stack([(results[name] - exact).square().sum(), exact.square().sum()])
        squares[kind] = squares.get(kind, 0) + pair
    return {kind: (error / size).sqrt().item() for kind, (error, size) in squares.items()}


@each_mode
def test_float32_is_as_accurate_as_plain_pytorch(training: bool) -> None:
    """The norm of the error is at most twice plain PyTorch's.

    The largest of 22 million errors would depend on chance.
    """
    plain, fused = networks()
    away_from_kinks(plain)
    with torch.no_grad():
        plain(images())
    away_from_kinks(fused)
    fused.load_state_dict(plain.state_dict())
    oracle = run(plain, torch.float64, training)
    limits = relative_errors(run(plain, torch.float32, training), oracle)
    errors = relative_errors(run(fused, torch.float32, training), oracle)
    assert len(errors) == 11
    floor = 8 * torch.finfo(torch.float32).eps
    for kind, error in errors.items():
        assert error <= 2 * limits[kind] + floor, kind


def test_bf16_autocast() -> None:
    """On a CPU, errors are no larger than the plain network's, and gradients are float32."""
    plain, fused = networks()
    exact = plain.eval()(images())
    with torch.autocast("cpu", torch.bfloat16):
        same, out = plain(images()), fused.eval()(images())
    limit = 2 * (same - exact).norm() + 1e-3 * exact.norm()
    assert (out - exact).norm() <= limit <= 0.1 * exact.norm()
    out.float().sum().backward()
    assert {p.grad.dtype for p in fused.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in fused.parameters())


class Checkpointed(nn.Module):
    """A block that recomputes its activations in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = ef.EPSANet(ef.EPSABlock, (2, 1, 1, 1), CLASSES, planes=(64,) * 4)
    again = copy.deepcopy(model)
    for stage in (again.layer1, again.layer2, again.layer3, again.layer4):
        for i, block in enumerate(stage):
            stage[i] = Checkpointed(block)
    for m in (model, again):
        m(images()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
