"""PlannedConv gives the numbers of the convolution and norm that it replaces, with any plan."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from epsanet_fused.inference.conv import PlannedConv
from epsanet_fused.inference.conv_planner import TALL_TILES
from epsanet_fused.inference.conv_runners import run_cudnn
from epsanet_fused.inference.conv_weights import tile_weight, untile
from epsanet_fused.nn.grouped_conv import ConvPlan, merge_weight, merged_conv

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)
SELECT_RUNNER = "epsanet_fused.inference.conv.select_runner"
# (inputs, outputs, kernel, groups): those of PSA at S1 and S2, and unusual ones
CONVS = [
    (64, 16, 7, 8),
    (64, 16, 9, 16),
    (128, 32, 9, 16),
    (12, 6, 3, 3),
    (8, 8, 5, 8),
    (4, 6, 1, 1),
]


def groups_and_tiles(groups: int) -> list[tuple[int, tuple[int, int]]]:
    """Return pairs of a number of groups and a tile that such a convolution can run with."""
    merges = [(g, (1, 1)) for g in range(1, groups + 1) if groups % g == 0]
    return [*merges, (groups, (1, 2)), (groups, (3, 1)), (groups, (2, 4)), (1, (4, 2))]


CASES = [(*conv, e) for conv in CONVS for e in groups_and_tiles(conv[3])]
MERGES = [(*conv, g) for conv in CONVS for g in range(1, conv[3] + 1) if conv[3] % g == 0]


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return norm


def conv_and_norm(inputs: int, outputs: int, k: int, groups: int, **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, k, padding=k // 2, groups=groups, **options)
    return conv, random_norm(outputs)


def planned(
    conv, bn=None, run=None, memory_format=torch.contiguous_format, **options
) -> PlannedConv:
    plan = None if run is None else ConvPlan(*run, memory_format)
    return PlannedConv(conv, bn, plan=plan, memory_format=memory_format, **options)


@pytest.mark.parametrize(("inputs", "outputs", "k", "groups", "left"), MERGES)
def test_merged_weights_are_exact(inputs, outputs, k, groups, left):
    weight = torch.randn(outputs, inputs // groups, k, k, dtype=torch.float64)
    x = torch.randn(2, inputs, 9, 7, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=k // 2, groups=groups)
    out = F.conv2d(x, merge_weight(weight, groups, left), padding=k // 2, groups=left)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("tile", [(1, 2), (3, 1), (2, 4)])
@pytest.mark.parametrize(("inputs", "outputs", "k", "groups"), CONVS)
def test_tiled_weights_are_exact(inputs, outputs, k, groups, tile, stride, memory_format):
    weight = torch.randn(outputs, inputs // groups, k, k, dtype=torch.float64)
    size = [k + s * (2 * pixels - 1) for s, pixels in zip(stride, tile, strict=True)]
    x = torch.randn(2, inputs, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    expected = F.conv2d(x, weight, stride=stride, groups=groups)
    assert expected.shape[2:] == (2 * tile[0], 2 * tile[1])
    tiled = tile_weight(weight, groups, tile, stride)
    assert tiled.shape[0] == outputs * tile[0] * tile[1]
    strides = [s * pixels for s, pixels in zip(stride, tile, strict=True)]
    out = F.conv2d(x, tiled, stride=strides, groups=groups)
    image = untile(out, groups, tile, (1, 0), (1, 2))
    torch.testing.assert_close(image, expected[:, :, 1:2, 0:2], rtol=1e-12, atol=1e-12)
    assert image.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [4, 8, 12, 20, 40, 64])
def test_untile_moves_pixels_bit_for_bit(outputs, dtype):
    """The channels of a pixel are moved in units of 2 to 16 bytes. NaNs are kept."""
    numbers = torch.randn(2, 4, 2, 3, outputs // 4, 5, 7, dtype=torch.float64).to(dtype)
    numbers[0, 0, 0, 0, 0, 0] = torch.nan
    out = numbers.flatten(1, 4)
    images = [
        untile(out.contiguous(memory_format=memory_format), 4, (2, 3), (1, 2), (8, 17))
        for memory_format in MEMORY_FORMATS
    ]
    expected = numbers.permute(0, 1, 4, 5, 2, 6, 3).reshape(2, outputs, 10, 21)[:, :, 1:9, 2:19]
    for image in images:
        torch.testing.assert_close(image, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("inputs", "outputs", "k", "groups", "left"), MERGES)
def test_merged_gradients_keep_the_checkpoints_shape(inputs, outputs, k, groups, left):
    conv = conv_and_norm(inputs, outputs, k, groups)[0].double()
    x = torch.randn(2, inputs, 9, 7, dtype=torch.float64, requires_grad=True)
    leaves = (x, *conv.parameters())
    expected = torch.autograd.grad(conv(x).square().sum(), leaves)
    result = torch.autograd.grad(merged_conv(x, conv, left).square().sum(), leaves)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("fused_calls", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "separate"])
@pytest.mark.parametrize("residual", ["none", "kept", "overwritten"])
@pytest.mark.parametrize(("inputs", "outputs", "k", "groups", "run"), CASES)
def test_planned_conv_is_conv_norm_residual_relu(
    inputs, outputs, k, groups, run, residual, fold, fused_calls
):
    conv, bn = conv_and_norm(inputs, outputs, k, groups, bias=fold)  # with and without a bias
    x = torch.randn(3, inputs, 11, 6)
    choices = itertools.product((False, True), MEMORY_FORMATS, MEMORY_FORMATS)
    for relu, memory_format, other_format in choices:
        other = torch.randn(3, outputs, 11, 6).contiguous(memory_format=other_format)
        module = planned(conv, bn, run, memory_format, fused_calls=fused_calls, fold=fold)
        with torch.no_grad():
            expected = bn(conv(x)) + (0 if residual == "none" else other)
            before = other.clone()
            out = module.run(
                x, None if residual == "none" else other, relu, overwrite=residual == "overwritten"
            )
        torch.testing.assert_close(out, expected.relu() if relu else expected, rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=memory_format)
        assert residual == "overwritten" or torch.equal(other, before)


@given(
    tile=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    merged=st.sampled_from([1, 2, 4]),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    size=st.tuples(st.integers(7, 12), st.integers(5, 17)),
    memory_format=st.sampled_from(MEMORY_FORMATS),
)
@settings(max_examples=150, deadline=None)
def test_any_geometry_can_be_tiled(tile, merged, stride, padding, size, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, (7, 5), stride, padding, groups=4)
    x = torch.randn(2, 8, *size)
    with torch.no_grad():
        out = planned(conv, None, (merged, tile), memory_format).run(x)
        torch.testing.assert_close(out, conv(x), rtol=1e-4, atol=1e-5)


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    tile=st.sampled_from(TALL_TILES),
    width=st.sampled_from([16, 32, 64]),  # of a branch
    kernel=st.sampled_from([(3, 1), (5, 4), (7, 8), (9, 16)]),  # with its groups
    merge=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
)
@settings(max_examples=100, deadline=None)
def test_tall_tiles_are_right_in_16_bits(dtype, tile, width, kernel, merge, stride, size):
    """For the kernel sizes of the branches; oneDNN has wrong kernels for some wider ones."""
    torch.manual_seed(0)
    k, groups = kernel
    conv = nn.Conv2d(4 * width, width, k, stride, k // 2, groups=groups, bias=False).to(dtype)
    x = torch.randn(2, 4 * width, *size, dtype=dtype)
    with torch.no_grad():
        expected = copy.deepcopy(conv).double()(x.double())
        out = planned(conv, None, (max(groups // merge, 1), tile), torch.channels_last).run(x)
    tolerance = 4 * torch.finfo(dtype).eps
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 4}, {"padding": "same", "dilation": 2}, {"padding": "valid"}],
)
@pytest.mark.parametrize("run", [(16, (1, 1)), (4, (1, 1)), (1, (1, 1))])
def test_geometry_is_kept(options, run):
    conv = nn.Conv2d(64, 16, 9, groups=16, **options)
    x = torch.randn(2, 64, 19, 22)
    with torch.no_grad():
        torch.testing.assert_close(planned(conv, None, run)(x), conv(x), rtol=1e-4, atol=1e-5)


def test_can_compute_in_another_memory_format_than_it_returns():
    conv, bn = conv_and_norm(64, 16, 9, 16)
    x = torch.randn(2, 64, 9, 9)
    for inside, outside in itertools.permutations(MEMORY_FORMATS):
        module = PlannedConv(conv, bn, plan=ConvPlan(4, (1, 1), inside), memory_format=outside)
        with torch.no_grad():
            out = module.run(x)
            torch.testing.assert_close(out, bn(conv(x)), rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=outside)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("run", groups_and_tiles(16))
def test_other_sizes_than_in_the_first_call(run, memory_format):
    conv, bn = conv_and_norm(64, 16, 9, 16)
    module = planned(conv, bn, run, memory_format)
    with torch.no_grad():
        for shape in [(1, 64, 14, 14), (5, 64, 7, 30), (0, 64, 9, 9), (2, 64, 1, 1)]:
            x = torch.randn(shape)
            torch.testing.assert_close(module.run(x), bn(conv(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("run", [(8, (1, 1)), (4, (1, 1)), (8, (2, 2))])
def test_follows_its_parameters(run, memory_format):
    """Also after in-place changes, new parameters, loading and casts."""
    conv, bn = conv_and_norm(64, 16, 7, 8)
    module = planned(conv, bn, run, memory_format)
    owner = nn.ModuleList([module, bn])

    def agrees(dtype: torch.dtype = torch.float32) -> None:
        x = torch.randn(2, 64, 8, 8, dtype=dtype)
        expected = bn(F.conv2d(x, module.weight, module.bias, padding=3, groups=8))
        torch.testing.assert_close(module.run(x), expected, rtol=1e-4, atol=1e-5)

    def changed(factor: float) -> dict[str, Tensor]:
        state = owner.state_dict().items()
        return {k: v * factor if v.is_floating_point() else v for k, v in state}

    with torch.no_grad():
        agrees()
        module.weight.mul_(2)
        agrees()
        bn.running_var.add_(1)
        agrees()
        module.weight = nn.Parameter(0.05 * torch.randn_like(module.weight))
        agrees()
        owner.load_state_dict(changed(2))
        agrees()
        owner.load_state_dict(changed(0.5), assign=True)
        agrees()
        bn.weight.data.mul_(3)  # does not change the version ...
        owner.load_state_dict(owner.state_dict())  # ... but loading does
        agrees()
        owner.double()
        agrees(torch.float64)
    with torch.inference_mode():
        bn.running_mean = torch.rand_like(bn.running_mean)
        agrees(torch.float64)


def test_has_the_parameter_names_of_the_convolution():
    conv, bn = conv_and_norm(64, 16, 7, 8)
    module = planned(conv, bn, (4, (1, 1)), torch.channels_last)
    with torch.no_grad():
        module.run(torch.randn(1, 64, 8, 8))
    assert list(module.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    assert all(a is b for a, b in zip(module.parameters(), conv.parameters(), strict=True))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
def test_copies_follow_their_own_parameters(copied, memory_format):
    conv, bn = conv_and_norm(64, 16, 7, 8)
    x = torch.randn(2, 64, 8, 8)
    owner = nn.ModuleList([planned(conv, bn, (4, (1, 1)), memory_format), bn])
    with torch.no_grad():
        out = owner[0].run(x)
        copy_ = copied(owner)
        assert torch.equal(copy_[0].run(x), out)
        conv.weight.zero_()
        assert torch.equal(copy_[0].run(x), out)
        copy_[1].running_var.mul_(2)
        assert not torch.equal(copy_[0].run(x), out)
        assert copy_[0].norm is copy_[1]


def test_sixteen_bit_is_folded_in_float32():
    conv, bn = conv_and_norm(64, 16, 9, 16)
    conv, bn = conv.bfloat16(), bn.bfloat16()
    x = torch.randn(2, 64, 8, 8).bfloat16()
    with torch.no_grad():
        plain = bn(conv(x))
        expected = copy.deepcopy(bn).double()(copy.deepcopy(conv).double()(x.double()))
        for run in [(16, (1, 1)), (8, (1, 1)), (2, (1, 1))]:
            out = planned(conv, bn, run, torch.channels_last).run(x)
            assert out.dtype == torch.bfloat16
            assert (out.double() - expected).norm() <= 2 * (plain.double() - expected).norm()


@pytest.mark.parametrize("residual", [False, True])
def test_runs_one_by_one_what_cudnn_has_no_engine_for(residual, monkeypatch):
    """Simulated on a CPU: cuDNN's fused functions are replaced by one that raises."""
    calls = []

    def no_engine(*args):
        calls.append(args)
        raise RuntimeError("Unable to find an engine to execute this computation")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", no_engine)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", no_engine)
    monkeypatch.setattr(SELECT_RUNNER, lambda *_: run_cudnn)
    conv, x = nn.Conv2d(3, 3, 3, padding=1), torch.randn(2, 3, 8, 8)
    other = torch.randn(2, 3, 8, 8) if residual else None
    with torch.no_grad():
        module = PlannedConv(conv)
        for _ in range(2):
            out = module.run(x, other, relu=True)
            torch.testing.assert_close(out, torch.relu(conv(x) + (other if residual else 0)))
    assert len(calls) == 1, "cuDNN is not called a second time"


def test_wrong_arguments_are_not_taken_for_a_missing_engine(monkeypatch):
    monkeypatch.setattr(SELECT_RUNNER, lambda *_: run_cudnn)
    module = PlannedConv(nn.Conv2d(3, 3, 3))
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected"):
        module.run(torch.randn(2, 4, 8, 8), relu=True)
    assert module.fused_calls


def test_running_out_of_memory_is_not_taken_for_a_missing_engine(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", full)
    monkeypatch.setattr(SELECT_RUNNER, lambda *_: run_cudnn)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        PlannedConv(nn.Conv2d(3, 3, 3)).run(torch.randn(2, 3, 8, 8), relu=True)
