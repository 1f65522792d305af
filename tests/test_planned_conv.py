"""A planned convolution does what its sources do, however it is run."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from epsanet_fused.planned_conv import FoldedNorm, PlannedConv, merge_weight, split_weights

# (inputs, outputs, kernel, groups): PSA's at the first and the second stage, and odd ones
CONVS = [
    (64, 16, 7, 8),
    (64, 16, 9, 16),
    (128, 32, 9, 16),
    (12, 6, 3, 3),
    (8, 8, 5, 8),
    (4, 6, 1, 1),
]


def executions(inputs: int, groups: int) -> list[int]:
    """Every number of groups with which such a convolution can be run."""
    return [*(g for g in range(1, groups + 1) if groups % g == 0), inputs]


CASES = [(*conv, g) for conv in CONVS for g in executions(conv[0], conv[3])]


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels).eval()
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    nn.init.uniform_(made.weight, 0.5, 2)
    nn.init.normal_(made.bias)
    return made


def sources(inputs: int, outputs: int, k: int, groups: int, **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, k, padding=k // 2, groups=groups, **options)
    return conv, norm(outputs)


@pytest.mark.parametrize(("inputs", "outputs", "k", "groups", "run_groups"), CASES)
def test_merged_and_split_weights_are_exact(inputs, outputs, k, groups, run_groups):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs // groups, k, k, dtype=torch.float64)
    x = torch.randn(2, inputs, 9, 7, dtype=torch.float64)
    true = F.conv2d(x, weight, padding=k // 2, groups=groups)
    if run_groups <= groups:
        merged = merge_weight(weight, groups, run_groups)
        out = F.conv2d(x, merged, padding=k // 2, groups=run_groups)
    else:
        pairs = zip(*split_weights(weight, groups), strict=True)
        parts = (F.conv2d(F.conv2d(x, w, padding=k // 2, groups=inputs), ones) for w, ones in pairs)
        out = sum(parts)
    torch.testing.assert_close(out, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "k", "groups", "run_groups"), CASES)
def test_merged_gradients_arrive_in_the_checkpoints_shape(inputs, outputs, k, groups, run_groups):
    if run_groups > groups:
        pytest.skip("a split isn't for training")
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs // groups, k, k, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, inputs, 9, 7, dtype=torch.float64)
    F.conv2d(x, weight, groups=groups, padding=k // 2).square().sum().backward()
    true, weight.grad = weight.grad, None
    merged = merge_weight(weight, groups, run_groups)
    F.conv2d(x, merged, groups=run_groups, padding=k // 2).square().sum().backward()
    torch.testing.assert_close(weight.grad, true, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("fused_calls", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize(("inputs", "outputs", "k", "groups", "run_groups"), CASES)
def test_folded_conv_is_conv_norm_residual_relu(
    inputs, outputs, k, groups, run_groups, residual, bias, fused_calls
):
    conv, bn = sources(inputs, outputs, k, groups, bias=bias)
    x, other = torch.randn(3, inputs, 11, 6), torch.randn(3, outputs, 11, 6)
    for relu, layout in itertools.product(
        (False, True), (torch.contiguous_format, torch.channels_last)
    ):
        planned = PlannedConv(
            conv, bn, groups=run_groups, memory_format=layout, fused_calls=fused_calls
        )
        with torch.no_grad():
            true = bn(conv(x)) + (other if residual else 0)
            before = other.clone()
            out = planned(x, other if residual else None, relu)
        torch.testing.assert_close(out, true.relu() if relu else true, rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=layout)
        assert torch.equal(other, before)


@pytest.mark.parametrize(
    "options", [{"stride": 2, "padding": 4}, {"padding": "same", "dilation": 2}]
)
@pytest.mark.parametrize("run_groups", executions(64, 16))
def test_geometry_is_kept(options, run_groups):
    conv = nn.Conv2d(64, 16, 9, groups=16, **options)
    x = torch.randn(2, 64, 19, 22)
    with torch.no_grad():
        out = PlannedConv(conv, groups=run_groups)(x)
        torch.testing.assert_close(out, conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("run_groups", executions(64, 16))
def test_other_sizes_than_the_first(run_groups, layout):
    conv, bn = sources(64, 16, 9, 16)
    planned = PlannedConv(conv, bn, groups=run_groups, memory_format=layout)
    with torch.no_grad():
        for shape in [(1, 64, 14, 14), (5, 64, 7, 30), (0, 64, 9, 9), (2, 64, 1, 1)]:
            x = torch.randn(shape)
            torch.testing.assert_close(planned(x), bn(conv(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run_groups", [8, 4, 64])
def test_follows_its_sources(run_groups):
    """In-place changes, new parameters, loading, casts."""
    conv, bn = sources(64, 16, 7, 8)
    planned = PlannedConv(conv, bn, groups=run_groups)
    owner = nn.ModuleList([conv, bn, planned])
    x = torch.randn(2, 64, 8, 8)

    def agrees(x=x):
        torch.testing.assert_close(planned(x), bn(conv(x)), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        agrees()
        conv.weight.mul_(2)
        agrees()
        bn.running_var.add_(1)
        agrees()
        conv.weight = nn.Parameter(torch.randn_like(conv.weight))
        agrees()
        other = {
            k: torch.rand_like(v) if v.is_floating_point() else v
            for k, v in owner.state_dict().items()
        }
        owner.load_state_dict(other)
        agrees()
        owner.load_state_dict({k: v + 1 for k, v in other.items()}, assign=True)
        agrees()
        owner.double()
        agrees(x.double())


def test_adds_nothing_to_the_state_dict():
    conv, bn = sources(64, 16, 7, 8)
    owner = nn.ModuleList([conv, bn, PlannedConv(conv, bn, groups=4), FoldedNorm(bn)])
    assert list(owner.state_dict()) == list(nn.ModuleList([conv, bn]).state_dict())
    assert len(list(owner.parameters())) == 4


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_follow_their_own_sources(again):
    conv, bn = sources(64, 16, 7, 8)
    x = torch.randn(2, 64, 8, 8)
    owner = nn.ModuleList([conv, bn, PlannedConv(conv, bn, groups=4)])
    with torch.no_grad():
        out = owner[2](x)
        twin = again(owner)
        assert torch.equal(twin[2](x), out)
        conv.weight.zero_()
        assert torch.equal(twin[2](x), out)
        twin[0].weight.mul_(2)
        torch.testing.assert_close(twin[2](x), twin[1](twin[0](x)), rtol=1e-4, atol=1e-5)


def test_sixteen_bit_is_folded_in_float32():
    conv, bn = sources(64, 16, 9, 16)
    x = torch.randn(2, 64, 8, 8).bfloat16()
    with torch.no_grad():
        true = bn.double()(conv.double()(x.double()))
        conv.float(), bn.float()
        for groups in executions(64, 16):
            planned = PlannedConv(
                conv,
                bn,
                groups=groups,
                dtype=torch.bfloat16,
                memory_format=torch.channels_last,
            )
            out = planned(x)
            assert out.dtype == torch.bfloat16
            plain = copy.deepcopy(bn).bfloat16()(copy.deepcopy(conv).bfloat16()(x))
            error, plain_error = ((t.double() - true).norm() for t in (out, plain))
            assert error <= plain_error
