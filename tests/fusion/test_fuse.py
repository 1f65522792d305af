"""``fuse`` replaces all verified PSA modules, keeps the rest of the model, and names the others."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import psa_variants as variants
from helpers.networks import official
from helpers.psa_variants import (
    VARIANTS,
    Holder,
    OfficialPSA,
    assert_skipped,
    holder,
    official_with,
    official_with_forward,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import epsanet_fused as ef
from epsanet_fused.fusion.fuse import FUSED_CLASSES


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "2048 to 64"])
def test_keeps_names_and_parameters(name: str) -> None:
    model, _, order, _ = holder(name)
    before = model.state_dict(keep_vars=True)
    parts = dict(model.named_modules())
    ef.fuse(model, order=order)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert list(dict(model.named_modules())) == list(parts)
    assert [p is q for p, q in zip(model.modules(), parts.values(), strict=True)].count(False) == 1


def test_all_modules_of_a_network_are_replaced() -> None:
    model = official()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        ef.fuse(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert [type(m).__name__ for m in model.modules()].count("FusedPSAModule") == 2
    assert "OfficialPSA" not in [type(m).__name__ for m in model.modules()]


def test_training_continues_unchanged() -> None:
    """Losses after three steps are equal with and without fusion, momentum included."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
        torch.manual_seed(seed)
        loss = (model(torch.randn(2, 64, 6, 6, dtype=torch.float64)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Holder(OfficialPSA(64, 64)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for seed in range(3):
            step(model, optimizer, seed)
        if fused:
            ef.fuse(model)
        losses.append([step(model, optimizer, seed) for seed in range(3, 6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_frozen_parameters_stay_frozen() -> None:
    model = Holder(OfficialPSA(64, 64))
    model.body["psa"].conv_2.weight.requires_grad_(False)
    ef.fuse(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, required in flags.items() if not required] == ["body.psa.conv_2.weight"]


def test_hooks_on_the_module_and_its_convolutions_are_kept() -> None:
    model = Holder(OfficialPSA(64, 64))
    seen: list[str] = []
    psa = model.body["psa"]
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in (("psa", psa), ("conv_3", psa.conv_3))
    ]
    ef.fuse(model)
    assert seen == []  # verification does not call them
    model(torch.randn(1, 64, 5, 5))
    assert seen == ["conv_3", "psa"]
    for handle in handles:
        handle.remove()
    model(torch.randn(1, 64, 5, 5))
    assert seen == ["conv_3", "psa"]


def test_attributes_of_other_code_are_kept() -> None:
    """YOLO's parser stores on each layer the index of its input."""
    psa = variants.YOLOPSA(32, 32)
    psa.i, psa.f, psa.type = 9, -1, "PSAModule"
    [fused] = ef.fuse(nn.Sequential(psa))
    assert (fused.i, fused.f, fused.type) == (9, -1, "PSAModule")
    assert "training" in vars(fused)


def test_a_module_in_two_places_stays_shared() -> None:
    psa = OfficialPSA(64, 64)
    model = nn.Sequential(psa, nn.ReLU(), psa)
    ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule
    assert model[0] is model[2]


def test_a_psa_module_itself_is_replaced() -> None:
    psa = OfficialPSA(64, 64)
    fused = ef.fuse(psa)
    assert type(fused) is ef.FusedPSAModule
    assert fused.conv_1 is psa.conv_1
    assert type(psa) is OfficialPSA  # not changed


def test_fusing_twice_changes_nothing() -> None:
    model = ef.fuse(Holder(OfficialPSA(64, 64)))
    first = model.body["psa"]
    assert ef.fuse(model) is model
    assert model.body["psa"] is first
    assert ef.fuse(model, order="natural").body["psa"] is first


def test_parametrized_weights_are_kept() -> None:
    model = Holder(OfficialPSA(64, 64)).double()
    psa = model.body["psa"]
    parametrizations.weight_norm(psa.conv_1)
    parametrizations.weight_norm(psa.se.fc1)
    x = torch.randn(1, 64, 5, 5, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(ef.fuse(model)(x), expected)
    assert isinstance(model.body["psa"], FUSED_CLASSES)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        ef.fuse("epsanet50")
    with pytest.raises(ValueError, match="order must be 'reversed' or 'natural', got 'forward'"):
        ef.fuse(Holder(OfficialPSA(64, 64)), order="forward")


class TwoArguments(OfficialPSA):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if mask is None else out * mask


class OwnLoading(OfficialPSA):
    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *rest: object) -> None:
        super()._load_from_state_dict(state_dict, *rest)


def with_temperature() -> nn.Module:
    psa = official_with_forward(lambda psa, x: psa.inner(x) * psa.temperature)
    psa.register_buffer("temperature", torch.ones(1))
    return psa


def with_patched_forward(name: str) -> nn.Module:
    psa = OfficialPSA(64, 64)
    part = psa.get_submodule(name)
    part.forward = functools.partial(lambda old, x: old(x), part.forward)
    return psa


def with_hook(name: str) -> nn.Module:
    psa = OfficialPSA(64, 64)
    psa.get_submodule(name).register_forward_hook(lambda *_: None)
    return psa


def with_load_hook() -> nn.Module:
    psa = OfficialPSA(64, 64)
    psa.register_load_state_dict_pre_hook(lambda *_: None)
    return psa


def with_dropout() -> nn.Module:
    psa = OfficialPSA(64, 64)
    psa.last = nn.Dropout(0.0)
    return psa


def compiled() -> nn.Module:
    psa = OfficialPSA(64, 64)
    psa.compile()
    return psa


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return OfficialPSA(64, 64)


def lazy() -> nn.Module:
    return official_with(conv_1=nn.LazyConv2d(16, 3, padding=1))


SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout module": (with_dropout, "last has a buffer, or is"),
    "buffer": (with_temperature, "it has a buffer, or is a dropout"),
    "patched forward": (lambda: with_patched_forward(""), "it has a forward that was replaced"),
    "patched forward of the SE": (
        lambda: with_patched_forward("se"),
        "se has a forward that was replaced",
    ),
    "hook on the SE": (lambda: with_hook("se"), "se has hooks"),
    "hook in the SE": (lambda: with_hook("se.fc1"), "se.fc1 has hooks"),
    "hook for loading": (with_load_hook, "hooks for loading a state_dict"),
    "loading of its own": (lambda: OwnLoading(64, 64), "has a _load_from_state_dict of its own"),
    "two arguments": (lambda: TwoArguments(64, 64), "takes more than one tensor"),
    "compiled": (compiled, "it is compiled"),
    "meta": (on_meta, "its parameters aren't there yet"),
    "lazy": (lazy, "its parameters aren't there yet"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_with_the_reason(name: str) -> None:
    make, reason = SKIPPED[name]
    assert_skipped(make(), reason)


def test_a_warning_that_raises_changes_nothing() -> None:
    model = nn.Sequential(OfficialPSA(64, 64), variants.SoftmaxOverChannels(64, 64))
    before = list(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="skipped"):
        warnings.simplefilter("error")
        ef.fuse(model)
    assert list(model) == before


def test_dry_run_changes_nothing_and_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(
        OfficialPSA(64, 64), variants.SoftmaxOverChannels(64, 64), variants.BiRefNetPSA(64)
    )
    before = list(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ef.fuse(model, dry_run=True) is model
    assert list(model) == before
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["module", "class", "kernels/groups", "SE", "input", "becomes"]
    made_of = ["3x3/1", "5x5/4", "7x7/8", "9x9/16", "16-4-16", "whole"]
    assert rows[0].split() == ["0", "OfficialPSA", *made_of, "FusedPSAModule"]
    assert rows[1].endswith("skipped: it computes something else than a PSA module of such parts")
    assert rows[2].endswith("order='natural' takes it")
