"""Fused modules give the original's numbers, for every variant."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import psa_variants as variants
from helpers.cases import DTYPES, MEMORY_FORMATS
from helpers.psa_variants import (
    NATURAL,
    REVERSED,
    SE,
    VARIANTS,
    Holder,
    NaturalOrder,
    OfficialPSA,
    holder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.fusion.modules import FusedPSAVariant

each_variant = pytest.mark.parametrize("name", VARIANTS)
# Without the one whose verification takes seconds.
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
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x.double()).sum().backward()
        fused(x.double()).square().sum().backward()  # what the original can't do
        assert all(p.grad is not None and p.grad.any() for p in fused.parameters())
        return
    gradients = []
    for each in (model, fused):
        leaf = x.double().requires_grad_()
        out = each(leaf)
        ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients.append(torch.autograd.grad((out * ramp).sum(), [leaf, *each.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_the_input_is_overwritten_as_before() -> None:
    model, x, order, _ = holder("External-Attention")
    model, given = model.double(), x.double()
    expected = given.clone()
    with torch.no_grad():
        model(expected)
        ef.fuse(model, order=order)(given)
    assert not torch.equal(expected, x)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


@each_light_variant
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_works_in_the_models_dtype(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    model, x, order, _ = holder(name)
    model = model.to(dtype).to(memory_format=memory_format)
    x = x.to(dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        plain = model(x.clone())
        out = ef.fuse(model, order=order)(x)
    assert out.dtype == dtype
    allowed = 2 * (plain.double() - expected).norm() + torch.finfo(dtype).eps * expected.norm()
    assert (out.double() - expected).norm() <= allowed


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
    psa = variants.ListPSA(c_in, width, kernels, own_se, order == REVERSED).double()
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


def test_branches_may_have_any_norm_and_reflection_padding() -> None:
    psa = OfficialPSA(64, 64, conv_groups=(1, 4, 8, 16))
    psa.conv_1 = nn.Sequential(psa.conv_1, nn.GroupNorm(4, 16), nn.PReLU())
    psa.conv_4.padding_mode = "reflect"
    model, x = Holder(psa).double(), torch.randn(2, 64, 7, 8, dtype=torch.float64)
    expected = model(x)
    ef.fuse(model)
    assert type(model.body["psa"]) is FusedPSAVariant
    torch.testing.assert_close(model(x), expected)


def test_symbolic_tracing_gives_the_same_numbers() -> None:
    for name in ("BiRefNet", "External-Attention, corrected"):
        model, x, order, _ = holder(name)
        ef.fuse(model.eval(), order=order)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


class WritesToItsInput(nn.Module):
    """Branches of shares, written into a view of the input and read again; it can be trained."""

    def __init__(self, channels: int = 32, count: int = 4) -> None:
        super().__init__()
        width = channels // count
        self.count = count
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in range(1, count + 1)
        )
        self.se = ef.SEWeightModule(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = x.view(len(x), self.count, -1, *x.shape[2:])
        for i, conv in enumerate(self.convs):
            shares[:, i] = conv(shares.clone()[:, i])
        gates = torch.stack([self.se(share) for share in shares.unbind(1)], 1).softmax(1)
        return (shares * gates).flatten(1, 2)


class ClonesEachTime(WritesToItsInput):
    """The same, so that autograd can't follow it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = x.view(len(x), self.count, -1, *x.shape[2:])
        for i, conv in enumerate(self.convs):
            shares = shares.clone()
            shares[:, i] = conv(shares[:, i])
        gates = torch.stack([self.se(share) for share in shares.unbind(1)], 1).softmax(1)
        return (shares * gates).flatten(1, 2)


def test_a_module_that_overwrites_its_input_is_trained_as_before() -> None:
    plain = nn.Sequential(WritesToItsInput()).double()
    fused = ef.fuse(copy.deepcopy(plain), order="natural")
    assert isinstance(fused[0], FusedPSAVariant)
    results = []
    for model in (plain, fused):
        leaf = torch.linspace(-1, 1, 2 * 32 * 49, dtype=torch.float64).view(2, 32, 7, 7)
        leaf.requires_grad_()
        given = leaf * 1
        out = model(given)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])
        results.append([out, given, *grads])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_a_module_that_cannot_be_trained_is_fused() -> None:
    plain = nn.Sequential(ClonesEachTime())
    fused = ef.fuse(copy.deepcopy(plain), order="natural")
    assert isinstance(fused[0], FusedPSAVariant)
    x = torch.randn(2, 32, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()))


class SoftmaxInFloat32(ef.PSAModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = self.convolve(x)
        gates = torch.stack([self.se(branch) for branch in branches], 1)
        gates = gates.float().softmax(1).to(x.dtype)
        return torch.cat([branches[i] * gates[:, i] for i in (3, 2, 1, 0)], 1)


@pytest.mark.parametrize("channels", [64, 128, 192, 256, 512])
def test_a_softmax_in_float32_is_taken_at_every_width(channels: int) -> None:
    torch.manual_seed(channels)
    model = ef.fuse(nn.Sequential(SoftmaxInFloat32(channels, channels)))
    assert isinstance(model[0], ef.FusedPSAModule)


@pytest.mark.parametrize("name", ["official", "natural order"])
@pytest.mark.parametrize("change", ["hook", "forward", "another"])
def test_the_softmax_is_called_where_somebody_relies_on_it(name: str, change: str) -> None:
    kind = OfficialPSA if name == "official" else NaturalOrder
    plain = nn.Sequential(kind(64, 64)).double()
    fused = ef.fuse(copy.deepcopy(plain), order="reversed" if name == "official" else "natural")
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    for model in (plain, fused):
        softmax = model[0].softmax
        if change == "hook":
            softmax.register_forward_hook(lambda _m, _a, out: out * 2)
        elif change == "forward":
            softmax.forward = lambda x, forward=softmax.forward: forward(x) * 2
        else:
            model[0].softmax = nn.Sigmoid()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert "is modified" in repr(fused)


def test_a_branch_more_or_less_counts() -> None:
    for change in (lambda m: m.append(nn.Conv2d(64, 16, 3, padding=1)), lambda m: m.pop(-1)):
        plain = nn.Sequential(InOneDict())
        fused = ef.fuse(copy.deepcopy(plain))
        assert isinstance(fused[0], FusedPSAVariant)
        for model in (plain, fused):
            torch.manual_seed(0)
            change(model[0].branches)
        x = torch.randn(2, 64, 6, 6)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


class InOneDict(nn.Module):
    """Branches in a list, and the SE beside an activation in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(64, 16, k, padding=k // 2) for k in (3, 5, 7, 9))
        self.parts = nn.ModuleDict({"act": nn.ReLU(), "se": SE(16)})

    def forward(self, x: Tensor) -> Tensor:
        made = [self.parts["act"](branch(x)) for branch in self.branches]
        gates = torch.stack([self.parts["se"](m) for m in made], 1).softmax(1)
        return torch.cat([m * gates[:, i] for i, m in enumerate(made)][::-1], 1)


@pytest.mark.parametrize("part", ["act", "se.relu", "se"])
def test_any_module_that_is_not_called_may_be_replaced(part: str) -> None:
    plain = nn.Sequential(InOneDict()).double()
    fused = ef.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    for model in (plain, fused):
        torch.manual_seed(0)
        model[0].parts.set_submodule(part, nn.SiLU() if part != "se" else SE(16).double())
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
