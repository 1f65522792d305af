"""Verification rejects modules that compute something else, and leaves no traces."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import psa_variants as variants
from helpers.psa_variants import (
    Holder,
    OfficialPSA,
    assert_skipped,
    official_with,
    official_with_forward,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import epsanet_fused as ef


def with_one_hidden_unit(activation: nn.Module) -> OfficialPSA:
    return official_with(functools.partial(variants.SE, reduction=16), se__relu=activation)


class ReLU6Branches(OfficialPSA):
    def convolve(self, x: Tensor) -> list[Tensor]:
        return [F.relu6(branch) for branch in super().convolve(x)]


class DetachedSE(variants.SE):
    """The same output, but no gradient flows through the attention."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class MaxPooledSE(variants.SE):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.avg_pool = nn.AdaptiveMaxPool2d(1)


class ConvWithFlag(nn.Module):
    """A branch that takes a second argument."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, flag: bool) -> Tensor:
        return self.conv(x)


class BranchWithFlag(OfficialPSA):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.conv_1 = ConvWithFlag(self.conv_1)

    def convolve(self, x: Tensor) -> list[Tensor]:
        return [self.conv_1(x, True), self.conv_2(x), self.conv_3(x), self.conv_4(x)]


def keeping(kept: Any, update: Callable[[Any, Tensor], object]) -> nn.Module:
    """A module that updates what it keeps, but never replaces it."""

    def forward(psa: nn.Module, x: Tensor) -> Tensor:
        update(psa.kept, x.detach())
        return psa.inner(x)

    psa = official_with_forward(forward)
    psa.kept = kept
    return psa


def counting() -> nn.Module:
    def forward(psa: nn.Module, x: Tensor) -> Tensor:
        psa.step += 1
        return psa.inner(x) if psa.step < 100 else x

    psa = official_with_forward(forward)
    psa.step = 0
    return psa


def remembering() -> nn.Module:
    def forward(psa: nn.Module, x: Tensor) -> Tensor:
        psa.last = psa.inner(x)
        return psa.last

    return official_with_forward(forward)


OTHER = "it computes something else"
SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax over channels": (lambda: variants.SoftmaxOverChannels(64, 64), OTHER),
    "hard sigmoid": (lambda: official_with(variants.HardSigmoidSE), OTHER),
    "max pooling": (lambda: official_with(MaxPooledSE), OTHER),
    "ReLU6 in the SE": (lambda: official_with(se__relu=nn.ReLU6()), OTHER),
    "ReLU6 of branches": (lambda: ReLU6Branches(64, 64), OTHER),
    "clamp": (lambda: official_with_forward(lambda psa, x: psa.inner(x).clamp(-5, 5)), OTHER),
    "no NaN": (lambda: official_with_forward(lambda psa, x: psa.inner(x).nan_to_num()), OTHER),
    "one leaky unit": (lambda: with_one_hidden_unit(nn.LeakyReLU(0.1)), OTHER),
    "one ELU": (lambda: with_one_hidden_unit(nn.ELU()), OTHER),
    "one linear unit": (lambda: with_one_hidden_unit(nn.Identity()), OTHER),
    "different without gradients": (
        lambda: official_with_forward(
            lambda psa, x: psa.inner(x) * (1 + 0.1 * (not torch.is_grad_enabled()))
        ),
        OTHER,
    ),
    "detached SE": (lambda: official_with(DetachedSE), OTHER),
    "branch with two arguments": (BranchWithFlag, OTHER),
    "reentrant checkpoint": (
        lambda: official_with_forward(lambda psa, x: checkpoint(psa.inner, x, use_reentrant=True)),
        "can't be run on noise",
    ),
    "other order": (lambda: variants.NaturalOrder(64, 64), "order='natural' takes it"),
    "one input size": (
        lambda: official_with_forward(lambda psa, x: psa.inner(x.view(-1, 64, 7, 7))),
        "can't be run on",
    ),
    "tuple": (
        lambda: official_with_forward(lambda psa, x: (psa.inner(x), x)),
        "it returns a tuple",
    ),
    "dropout function": (
        lambda: official_with_forward(lambda psa, x: psa.inner(F.dropout(x, 0.5, psa.training))),
        "random",
    ),
    "rare random skip": (
        lambda: official_with_forward(lambda psa, x: x if torch.rand(()) < 1e-3 else psa.inner(x)),
        "random",
    ),
    "rare skip by Python's generator": (
        lambda: official_with_forward(lambda psa, x: x if random.random() < 1e-3 else psa.inner(x)),
        "random",
    ),
    "rare skip by NumPy's generator": (
        lambda: official_with_forward(
            lambda psa, x: x if np.random.rand() < 1e-3 else psa.inner(x)
        ),
        "random",
    ),
    "mean that is updated in place": (
        lambda: keeping(torch.zeros(64), lambda kept, x: kept.add_(x.mean((0, 2, 3)))),
        "call to call: kept",
    ),
    "counter in an object": (
        lambda: keeping(
            SimpleNamespace(n=0.5), lambda kept, x: setattr(kept, "n", kept.n + len(x))
        ),
        "call to call: kept",
    ),
    "counter in a dict": (
        lambda: keeping({"n": 0.5}, lambda kept, x: kept.update(n=kept["n"] + len(x))),
        "call to call: kept",
    ),
    "tensor in a list": (
        lambda: keeping([torch.zeros(64)], lambda kept, x: kept[0].add_(x.mean((0, 2, 3)))),
        "call to call: kept",
    ),
    "counter": (counting, "it keeps something from call to call: step"),
    "memory": (remembering, "it keeps something from call to call: last"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_with_the_reason(name: str) -> None:
    make, reason = SKIPPED[name]
    assert_skipped(make(), reason)


def test_generators_of_python_and_numpy_are_restored() -> None:
    def forward(psa: nn.Module, x: Tensor) -> Tensor:
        return psa.inner(x) * (random.random() + np.random.rand())

    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    assert_skipped(official_with_forward(forward), "it draws random numbers")
    assert random.getstate() == python
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy)


def test_unchanging_attributes_are_accepted() -> None:
    psa = OfficialPSA(64, 64)
    psa.scale, psa.config, psa.sizes = torch.ones(1), SimpleNamespace(width=64), {"C": 64}
    model = nn.Sequential(psa)
    ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule


@pytest.mark.parametrize("channels", [64, 128, 192])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ELU(), nn.Identity(), nn.ReLU6()])
def test_one_hidden_unit_tells_activations_apart(
    activation: nn.Module, stride: int, channels: int
) -> None:
    psa = OfficialPSA(channels, 64, stride=stride)
    psa.se = variants.SE(16, reduction=16)
    model = nn.Sequential(psa, copy.deepcopy(psa))
    model[1].se.relu = activation
    with pytest.warns(UserWarning, match=r"fuse: 1 \(OfficialPSA\) is skipped"):
        ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule


class FloatSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().softmax(1).to(x.dtype)


def test_a_softmax_in_float32_is_accepted() -> None:
    model = nn.Sequential(official_with(softmax=FloatSoftmax()))
    x = torch.randn(2, 64, 7, 8)
    expected = model(x)
    torch.testing.assert_close(ef.fuse(model)(x), expected)
    assert type(model[0]) is ef.FusedPSAModule


def test_weights_are_not_changed() -> None:
    """spectral_norm updates its state whenever its weight is read."""
    model = nn.Sequential(OfficialPSA(64, 64), variants.SoftmaxOverChannels(64, 64))
    for module in (model[1].se.fc1, model[1].conv_2):
        parametrizations.spectral_norm(module)
    before = copy.deepcopy(model.state_dict())
    ef.fuse(model, dry_run=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_seeds_of_accelerators_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("torch.manual_seed sets the seed of every device")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    ef.fuse(Holder(OfficialPSA(64, 64)))


def test_the_random_state_and_the_training_mode_are_kept() -> None:
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        model = ef.fuse(Holder(OfficialPSA(64, 64)).eval())
    torch.random.set_rng_state(state)
    first = torch.rand(3)
    torch.random.set_rng_state(state)
    psa = OfficialPSA(64, 64)
    torch.random.set_rng_state(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ef.fuse(Holder(psa))
    torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)
    assert not model.training
