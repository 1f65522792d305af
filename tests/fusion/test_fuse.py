"""fuse takes every PSA module that it proves to be one, keeps all of it, and names the rest."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import psa_variants as variants
from helpers.networks import official
from helpers.psa_variants import NATURAL, REVERSED, VARIANTS, Holder, holder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import epsanet_fused as ef
from epsanet_fused.fusion.modules import FusedPSAVariant

each_variant = pytest.mark.parametrize("name", VARIANTS)
# Without the one that takes seconds to be looked at.
each_light_variant = pytest.mark.parametrize("name", [n for n in VARIANTS if n != "2048 to 64"])


@each_variant
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_numbers(name: str, training: bool) -> None:
    model, x, order, kind = holder(name)
    model.double().train(training)
    x = x.double()
    expected = copy.deepcopy(model)(x.clone())
    assert ef.fuse(model, order=order) is model
    assert type(model.body["psa"]) is kind
    assert all(m.training is training for m in model.modules())
    torch.testing.assert_close(model(x.clone()), expected, rtol=1e-10, atol=1e-12)


@each_light_variant
def test_same_gradients(name: str) -> None:
    model, x, order, _ = holder(name)
    model.double()
    fused = ef.fuse(copy.deepcopy(model), order=order)
    if name == "External-Attention":
        for each in (model, fused):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                each(x.double()).sum().backward()
        return
    gradients = []
    for each in (model, fused):
        leaf = x.double().requires_grad_()
        out = each(leaf)
        ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients.append(torch.autograd.grad((out * ramp).sum(), [leaf, *each.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_what_is_written_over_the_input_stays_written() -> None:
    model, x, order, _ = holder("External-Attention")
    model, given = model.double(), x.double()
    expected = given.clone()
    with torch.no_grad():
        model(expected)
        ef.fuse(model, order=order)(given)
    assert not torch.equal(expected, x)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


@each_light_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_works_in_the_models_dtype(name: str, dtype: torch.dtype) -> None:
    model, x, order, _ = holder(name)
    model = model.to(dtype)
    x = x.to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        out = ef.fuse(model, order=order)(x)
    assert out.dtype == dtype
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error < 3 * torch.finfo(dtype).eps


@each_light_variant
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


@settings(max_examples=20, deadline=None)
@given(
    kernels=st.lists(st.sampled_from((1, 3, 5, 7)), min_size=2, max_size=5, unique=True),
    c_in=st.integers(1, 5),
    width=st.sampled_from((4, 6, 12)),
    own_se=st.booleans(),
    order=st.sampled_from((REVERSED, NATURAL)),
)
def test_any_list_of_branches(
    kernels: list[int], c_in: int, width: int, own_se: bool, order: str
) -> None:
    psa = variants.Listed(c_in, width, kernels, own_se, order == REVERSED).double()
    x = torch.randn(2, c_in, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(ef.fuse(psa, order=order)(x), psa(x))


@each_light_variant
def test_compiles_without_a_graph_break(name: str) -> None:
    model, x, order, _ = holder(name)
    ef.fuse(model.eval(), order=order)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.clone()), model(x.clone()))


def test_whole_networks_at_once() -> None:
    model = official()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        ef.fuse(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert [type(m).__name__ for m in model.modules()].count("FusedPSAModule") == 2
    assert "OfficialPSA" not in [type(m).__name__ for m in model.modules()]


def test_a_training_goes_on_where_it_was() -> None:
    """With the optimizer's momentum: half-trained as it was, then fused or not."""

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
        model = Holder(variants.Official(64, 64)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for seed in range(3):
            step(model, optimizer, seed)
        if fused:
            ef.fuse(model)
        losses.append([step(model, optimizer, seed) for seed in range(3, 6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_frozen_stays_frozen() -> None:
    model = Holder(variants.Official(64, 64))
    model.body["psa"].conv_2.weight.requires_grad_(False)
    ef.fuse(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, wanted in flags.items() if not wanted] == ["body.psa.conv_2.weight"]


def test_hooks_on_the_module_and_on_its_convolutions_stay() -> None:
    model = Holder(variants.Official(64, 64))
    seen: list[str] = []
    psa = model.body["psa"]
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in (("psa", psa), ("conv_3", psa.conv_3))
    ]
    ef.fuse(model)
    assert seen == []  # the proof doesn't call them
    model(torch.randn(1, 64, 5, 5))
    assert seen == ["conv_3", "psa"]
    for handle in handles:
        handle.remove()
    model(torch.randn(1, 64, 5, 5))
    assert seen == ["conv_3", "psa"]


def test_marks_of_others_stay() -> None:
    """YOLO's parser notes on each layer where its input comes from."""
    psa = variants.InYOLO(32, 32)
    psa.i, psa.f, psa.type = 9, -1, "PSAModule"
    [fused] = ef.fuse(nn.Sequential(psa))
    assert (fused.i, fused.f, fused.type) == (9, -1, "PSAModule")
    assert "training" in vars(fused)


def test_a_module_in_two_places_stays_one() -> None:
    psa = variants.Official(64, 64)
    model = nn.Sequential(psa, nn.ReLU(), psa)
    ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule
    assert model[0] is model[2]


def test_branches_may_have_any_norm_and_mirrored_edges() -> None:
    psa = variants.Official(64, 64, conv_groups=(1, 4, 8, 16))
    psa.conv_1 = nn.Sequential(psa.conv_1, nn.GroupNorm(4, 16), nn.PReLU())
    psa.conv_4.padding_mode = "reflect"
    model, x = Holder(psa).double(), torch.randn(2, 64, 7, 8, dtype=torch.float64)
    expected = model(x)
    ef.fuse(model)
    assert type(model.body["psa"]) is FusedPSAVariant
    torch.testing.assert_close(model(x), expected)


def test_a_gate_in_float32_for_autocasts_sake_is_the_same_gate() -> None:
    class InFloat(variants.Official):
        def __init__(self) -> None:
            super().__init__(64, 64)
            self.softmax = _FloatSoftmax()

    model = nn.Sequential(InFloat())
    x = torch.randn(2, 64, 7, 8)
    expected = model(x)
    torch.testing.assert_close(ef.fuse(model)(x), expected)
    assert type(model[0]) is ef.FusedPSAModule


class _FloatSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().softmax(1).to(x.dtype)


def test_lazy_layers_elsewhere_are_no_hindrance() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    model = nn.Sequential(variants.Official(64, 64), nn.Sequential(lazy))
    ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule


def test_symbolic_tracing_takes_the_tail_as_a_whole() -> None:
    for name in ("BiRefNet", "External-Attention, mended"):
        model, x, order, _ = holder(name)
        ef.fuse(model.eval(), order=order)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_psa_module_itself_is_replaced() -> None:
    psa = variants.Official(64, 64)
    fused = ef.fuse(psa)
    assert type(fused) is ef.FusedPSAModule
    assert fused.conv_1 is psa.conv_1
    assert type(psa) is variants.Official  # and keeps working


def test_twice_is_once() -> None:
    model = ef.fuse(Holder(variants.Official(64, 64)))
    first = model.body["psa"]
    assert ef.fuse(model) is model
    assert model.body["psa"] is first
    assert ef.fuse(model, order="natural").body["psa"] is first


def test_parametrised_weights_are_taken_along() -> None:
    model = Holder(variants.Official(64, 64)).double()
    psa = model.body["psa"]
    parametrizations.weight_norm(psa.conv_1)
    parametrizations.weight_norm(psa.se.fc1)
    x = torch.randn(1, 64, 5, 5, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(ef.fuse(model)(x), expected)
    assert type(model.body["psa"]) is ef.FusedPSAModule


def test_the_seeds_of_accelerators_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("torch.manual_seed sets the seed of every device")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    ef.fuse(Holder(variants.Official(64, 64)))


def test_random_numbers_and_mode_of_the_user_stay() -> None:
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        model = ef.fuse(Holder(variants.Official(64, 64)).eval())
    torch.random.set_rng_state(state)
    first = torch.rand(3)
    torch.random.set_rng_state(state)
    made = variants.Official(64, 64)
    torch.random.set_rng_state(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ef.fuse(Holder(made))
    torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)
    assert not model.training


@pytest.mark.parametrize(
    "model",
    [variants.YOLOv10PSA(16), nn.Conv2d(3, 3, 1), nn.Sequential(), variants.SE(16)],
    ids=["YOLOv10's PSA", "a convolution", "nothing", "an SE"],
)
def test_a_model_without_psa_modules_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="model must hold a PSA module"):
        ef.fuse(model)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        ef.fuse("epsanet50")
    with pytest.raises(ValueError, match="order must be 'reversed' or 'natural', got 'forward'"):
        ef.fuse(Holder(variants.Official(64, 64)), order="forward")


def test_dry_run_changes_nothing_and_tells(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(
        variants.Official(64, 64), variants.SoftmaxOverChannels(64, 64), variants.InBiRefNet(64)
    )
    before = list(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ef.fuse(model, dry_run=True) is model
    assert list(model) == before
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["module", "class", "kernels/groups", "SE", "input", "becomes"]
    assert rows[0].split() == [
        "0", "Official", "3x3/1", "5x5/4", "7x7/8", "9x9/16", "16-4-16", "whole", "FusedPSAModule",
    ]  # fmt: skip
    assert rows[1].endswith(
        "left alone: it computes something else than a PSA module of such parts"
    )
    assert rows[2].endswith("order='natural' takes it")
