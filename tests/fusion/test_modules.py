"""Fused modules give the original's numbers, for every variant."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import psa_variants as variants
from helpers.psa_variants import NATURAL, REVERSED, VARIANTS, Holder, OfficialPSA, holder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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
