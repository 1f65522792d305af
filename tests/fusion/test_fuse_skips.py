"""What fuse doesn't take for a PSA module, or can't replace unnoticed, stays and is named."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import psa_variants as variants
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import epsanet_fused as ef


def official(**changes: nn.Module) -> variants.Official:
    """An official module, some of whose parts are others."""
    psa = variants.Official(64, 64, se=changes.pop("se", variants.SE))
    for name, part in changes.items():
        psa.set_submodule(name.replace("__", "."), part)
    return psa


def around(forward: Callable[[nn.Module, Tensor], Tensor]) -> variants.Official:
    """An official module whose forward is this, around its own, which is ``psa.inner``."""

    class Around(variants.Official):
        def inner(self, x: Tensor) -> Tensor:
            return super().forward(x)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Around(64, 64)


def of_one_hidden_unit(activation: nn.Module) -> variants.Official:
    return official(se=functools.partial(variants.SE, reduction=16), se__relu=activation)


class ReLU6Branches(variants.Official):
    def convolve(self, x: Tensor) -> list[Tensor]:
        return [F.relu6(branch) for branch in super().convolve(x)]


class DetachedSE(variants.SE):
    """The same numbers, but another training: no gradient goes through the attention."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class MaxPooledSE(variants.SE):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.avg_pool = nn.AdaptiveMaxPool2d(1)


class TwoArguments(variants.Official):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if mask is None else out * mask


class OwnLoading(variants.Official):
    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *rest: object) -> None:
        super()._load_from_state_dict(state_dict, *rest)


class BranchOfTwo(nn.Module):
    """It makes a branch, but not from one tensor."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, twice: bool) -> Tensor:
        return self.conv(x)


class CallsItWithTwo(variants.Official):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.conv_1 = BranchOfTwo(self.conv_1)

    def convolve(self, x: Tensor) -> list[Tensor]:
        return [self.conv_1(x, True), self.conv_2(x), self.conv_3(x), self.conv_4(x)]


def with_temperature() -> nn.Module:
    psa = around(lambda psa, x: psa.inner(x) * psa.temperature)
    psa.register_buffer("temperature", torch.ones(1))
    return psa


def counting() -> nn.Module:
    def count(psa: nn.Module, x: Tensor) -> Tensor:
        psa.step += 1
        return psa.inner(x) if psa.step < 100 else x

    psa = around(count)
    psa.step = 0
    return psa


def keeping() -> nn.Module:
    def keep(psa: nn.Module, x: Tensor) -> Tensor:
        psa.last = psa.inner(x)
        return psa.last

    return around(keep)


def replaced(name: str) -> nn.Module:
    psa = official()
    part = psa.get_submodule(name)
    part.forward = functools.partial(lambda old, x: old(x), part.forward)
    return psa


def hooked(name: str) -> nn.Module:
    psa = official()
    psa.get_submodule(name).register_forward_hook(lambda *_: None)
    return psa


def compiled() -> nn.Module:
    psa = official()
    psa.compile()
    return psa


def with_load_hook() -> nn.Module:
    psa = official()
    psa.register_load_state_dict_pre_hook(lambda *_: None)
    return psa


def with_one_more(part: nn.Module) -> nn.Module:
    psa = official()
    psa.last = part
    return psa


def meta() -> nn.Module:
    with torch.device("meta"):
        return official()


def lazy() -> nn.Module:
    return official(conv_1=nn.LazyConv2d(16, 3, padding=1))


ELSE = "it computes something else"
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax over channels": (lambda: variants.SoftmaxOverChannels(64, 64), ELSE),
    "another gate": (lambda: official(se=variants.SEOfHardSigmoids), ELSE),
    "max pooling": (lambda: official(se=MaxPooledSE), ELSE),
    "ReLU6 in the SE": (lambda: official(se__relu=nn.ReLU6()), ELSE),
    "ReLU6 of branches": (lambda: ReLU6Branches(64, 64), ELSE),
    "a clamp": (lambda: around(lambda psa, x: psa.inner(x).clamp(-5, 5)), ELSE),
    "no NaN": (lambda: around(lambda psa, x: psa.inner(x).nan_to_num()), ELSE),
    "one leaky unit": (lambda: of_one_hidden_unit(nn.LeakyReLU(0.1)), ELSE),
    "one ELU": (lambda: of_one_hidden_unit(nn.ELU()), ELSE),
    "one linear unit": (lambda: of_one_hidden_unit(nn.Identity()), ELSE),
    "another without gradients": (
        lambda: around(lambda psa, x: psa.inner(x) * (1 + 0.1 * (not torch.is_grad_enabled()))),
        ELSE,
    ),
    "detached": (lambda: official(se=DetachedSE), ELSE),
    "a checkpoint that can't be looked into": (
        lambda: around(lambda psa, x: checkpoint(psa.inner, x, use_reentrant=True)),
        "can't be run on noise",
    ),
    "the other order": (lambda: variants.InOrder(64, 64), "order='natural' takes it"),
    "one size": (lambda: around(lambda psa, x: psa.inner(x.view(-1, 64, 7, 7))), "can't be run on"),
    "a tuple": (lambda: around(lambda psa, x: (psa.inner(x), x)), "it returns a tuple"),
    "dropout": (
        lambda: around(lambda psa, x: psa.inner(F.dropout(x, 0.5, psa.training))), "random",
    ),
    "a dropout of nothing": (lambda: with_one_more(nn.Dropout(0.0)), "last has a buffer, or is"),
    "a rare skip": (
        lambda: around(lambda psa, x: x if torch.rand(()) < 1e-3 else psa.inner(x)), "random",
    ),
    "a buffer": (with_temperature, "it has a buffer, or is a dropout"),
    "a counter": (counting, "it keeps something from call to call: step"),
    "a memory": (keeping, "it keeps something from call to call: last"),
    "a replaced forward": (lambda: replaced(""), "it has a forward that was replaced"),
    "a replaced forward of its SE": (lambda: replaced("se"), "se has a forward that was replaced"),
    "hooks on the SE": (lambda: hooked("se"), "se has hooks"),
    "hooks in the SE": (lambda: hooked("se.fc1"), "se.fc1 has hooks"),
    "hooks for loading": (with_load_hook, "hooks for loading a state_dict"),
    "a way of loading": (lambda: OwnLoading(64, 64), "has a _load_from_state_dict of its own"),
    "two arguments": (lambda: TwoArguments(64, 64), "takes more than one tensor"),
    "a branch of two arguments": (CallsItWithTwo, ELSE),
    "compiled": (compiled, "it is compiled"),
    "meta": (meta, "its parameters aren't there yet"),
    "lazy": (lazy, "its parameters aren't there yet"),
    "no hidden unit": (
        lambda: official(se__fc1=nn.Conv2d(16, 0, 1), se__fc2=nn.Conv2d(0, 16, 1)),
        "no hidden unit",
    ),
    "one norm more": (lambda: with_one_more(nn.BatchNorm2d(64)), "more than the parts of a PSA"),
    "one convolution more": (lambda: with_one_more(nn.Conv2d(64, 64, 1)), "more than the parts"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_and_named(name: str) -> None:
    make, reason = LEFT_ALONE[name]
    psa = make()
    model = nn.Sequential(official(), psa)
    with pytest.warns(UserWarning, match="fuse: ") as caught:
        ef.fuse(model)
    [message] = [str(w.message) for w in caught if "fuse: " in str(w.message)]
    assert message.startswith(f"fuse: 1 ({type(psa).__name__}) is left alone: ")
    assert reason in message
    assert model[1] is psa
    assert type(model[0]) is ef.FusedPSAModule


@pytest.mark.parametrize("channels", [64, 128, 192])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ELU(), nn.Identity(), nn.ReLU6()])
def test_one_hidden_unit_tells_activations_apart(
    activation: nn.Module, stride: int, channels: int
) -> None:
    psa = variants.Official(channels, 64, stride=stride)
    psa.se = variants.SE(16, reduction=16)
    model = nn.Sequential(psa, copy.deepcopy(psa))
    model[1].se.relu = activation
    with pytest.warns(UserWarning, match=r"fuse: 1 \(Official\) is left alone"):
        ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule


def test_a_warning_that_raises_leaves_all_as_it_was() -> None:
    model = nn.Sequential(official(), variants.SoftmaxOverChannels(64, 64))
    before = list(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="left alone"):
        warnings.simplefilter("error")
        ef.fuse(model)
    assert list(model) == before


def test_a_look_changes_nothing_in_anybodys_weights() -> None:
    """spectral_norm moves on whenever its weight is read."""
    model = nn.Sequential(official(), variants.SoftmaxOverChannels(64, 64))
    for module in (model[1].se.fc1, model[1].conv_2):
        parametrizations.spectral_norm(module)
    before = copy.deepcopy(model.state_dict())
    ef.fuse(model, dry_run=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_ordinary_se_blocks_go_without_a_word() -> None:
    """Their convolutions are alike, or have other widths."""

    class SEBasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(16)
            self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(16)
            self.se = variants.SE(16)

    model = nn.Sequential(official(), SEBasicBlock())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ef.fuse(model)
