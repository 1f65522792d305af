"""Rewritten models give the numbers of the original, with each rewrite and with all of them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.networks import ResNetBlock
from helpers.networks import (
    CHANNELS_LAST,
    REWRITES,
    assert_same,
    calibrate,
    fully_rewritten,
    official,
    rewritten,
    small,
)
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.inference.blocks import PlannedBlock, PlannedStage, Rewrites
from epsanet_fused.inference.rewrite import apply_rewrites, find_targets
from epsanet_fused.inference.stem import FoldedReLU

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORKS = [ef.epsanet50, ef.epsanet101, ef.epsanet50_large, ef.epsanet101_large]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, id=build.__name__, marks=[pytest.mark.slow] * (build != ef.epsanet50))
        for build in NETWORKS
    ],
)
def test_each_rewrite_alone_and_all_together(build):
    x = torch.randn(1, 3, 225, 193)
    model = calibrate(build(num_classes=10, fused=False), torch.randn(2, 3, 225, 193))
    with torch.no_grad():
        expected = model(x)
        targets = find_targets(model, (x,))
        assert len(targets.blocks) == {50: 16, 101: 33}[int(build.__name__[7:].split("_")[0])]
        assert targets.stems == targets.relu_stems == [""]
        assert not targets.psas and not targets.skipped
        for name, rewrites in REWRITES.items():
            out = apply_rewrites(model, targets, rewrites(model))(x)
            assert (out - expected).abs().max() <= 1e-4 * expected.abs().max(), name
        assert torch.equal(model(x), expected), "the model itself is unchanged"


@pytest.mark.parametrize("name", REWRITES)
def test_in_float64_only_the_order_of_sums_differs(name):
    """The rounding of float64 is too small to hide a wrong formula."""
    model, x = small().double(), torch.randn(2, 3, 65, 47, dtype=torch.float64)
    assert_same(model, rewritten(model, x, REWRITES[name](model)), x, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_errors_are_at_most_twice_those_of_plain_pytorch(dtype):
    """Six images together: the largest error of a few logits varies too much."""
    model, x = small(), torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)
        made = rewritten(plain, x.to(dtype), REWRITES["all"](plain))
        limit = 2 * (plain(x.to(dtype)).double() - expected).norm()
        limit += torch.finfo(dtype).eps / 2 * expected.norm()
        assert (made(x.to(dtype)).double() - expected).norm() <= limit


@pytest.mark.parametrize("name", ["all", "all nchw"])
def test_other_batches_sizes_and_memory_formats_than_the_examples(name):
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = rewritten(model, x, REWRITES[name](model)).requires_grad_(False)
    others = [torch.randn(5, 3, 64, 64), torch.randn(1, 3, 33, 129), torch.randn(0, 3, 64, 64)]
    others += [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 40, 72).to(memory_format=CHANNELS_LAST)]
    for other in others:
        if other.numel():
            assert_same(model, made, other)
        else:
            assert made(other).shape == (0, 5)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(copied):
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = fully_rewritten(x, model)
    out = made(x)
    copy_ = copied(made)
    assert torch.equal(copy_(x), out)
    with torch.no_grad():
        copy_.layer1[0].bn3.weight.mul_(2)
        copy_.conv1.weight.mul_(2)
    assert not torch.equal(copy_(x), out)
    assert torch.equal(made(x), out)
    model.load_state_dict(copy_.state_dict())
    assert_same(model, copy_, x)


LOADS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "copied": lambda made, other: made.load_state_dict(other.state_dict()),
    "assigned": lambda made, other: made.load_state_dict(other.state_dict(), assign=True),
    "after a cast": lambda made, other: made.double().load_state_dict(other.double().state_dict()),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_follows_a_checkpoint_that_is_loaded_later(load):
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = rewritten(copy.deepcopy(model), x, REWRITES["all"](model))
    with torch.no_grad():
        made(x)
    torch.manual_seed(5)
    other = ef.EPSANet(ef.EPSABlock, (1, 2, 1, 1), 5, planes=(64, 64, 64, 128))
    calibrate(other, torch.randn(4, 3, 64, 64))
    load(made, other)
    assert_same(other, made, x.to(other.conv1.weight.dtype))


def test_blocks_are_found_by_structure():
    model, x = official(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        targets = find_targets(model, (x,))
        assert targets.blocks == ["1", "2"]
    for name, rewrites in REWRITES.items():
        made = rewritten(model, x, rewrites(model))
        assert isinstance(made[2], PlannedBlock), name
        assert list(made.state_dict()) == list(model.state_dict())
        assert_same(model, made, x)


def test_stages_keep_the_names_of_their_blocks():
    model, x = small(), torch.randn(2, 3, 64, 64)
    model.layer2 = nn.Sequential(OrderedDict(zip("ab", model.layer2, strict=True)))
    made = rewritten(model, x, REWRITES["all"](model))
    assert isinstance(made.layer2, PlannedStage)
    assert list(made.state_dict()) == list(model.state_dict())
    assert_same(model, made, x)


def test_resnets_bottlenecks_are_rewritten():
    model = small(ResNetBlock)
    x = torch.randn(2, 3, 64, 64)
    for rewrites in REWRITES.values():
        assert_same(model, rewritten(model, x, rewrites(model)), x)


def test_a_stem_with_hooks_is_not_rewritten():
    model, x = small(), torch.randn(2, 3, 64, 64)
    seen = []
    model.bn1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    made = fully_rewritten(x, model)
    seen.clear()
    assert_same(model, made, x)
    assert torch.equal(seen[0], seen[1])


class ReadsNorm(ef.EPSANet):
    """A network that reads its stem's norm before the relu."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.bn1(self.conv1(x))
        darkest = normed.amin((1, 2, 3))
        x = self.layer1(self.maxpool(self.relu(normed)))
        return self.fc(self.avgpool(self.layer4(self.layer3(self.layer2(x)))).flatten(1)) * darkest


def test_the_relu_of_a_stem_runs_with_its_convolution():
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = fully_rewritten(x, model)
    assert isinstance(made.relu, FoldedReLU) and isinstance(model.relu, nn.ReLU)
    assert_same(model, made, x)
    with torch.no_grad():
        assert made.conv1(x).min() == 0
        assert torch.equal(made.relu(made.bn1(made.conv1(x))), made.conv1(x))
    assert isinstance(rewritten(model, x, Rewrites(fused_calls=False)).relu, nn.ReLU)


@pytest.mark.parametrize("reason", ["norm is read", "called twice", "has hooks", "a function"])
def test_the_relu_of_a_stem_stays_if_moving_it_would_show(reason):
    model, x = small(), torch.randn(1, 3, 64, 64)
    if reason == "norm is read":
        model.__class__ = ReadsNorm
    elif reason == "called twice":
        model.avgpool = nn.Sequential(model.avgpool, model.relu)
    elif reason == "has hooks":
        model.relu.register_forward_pre_hook(lambda _module, _inputs: None)
    else:
        del model.relu
        model.relu = torch.relu
    with torch.no_grad():
        targets = find_targets(model, (x,))
    assert targets.stems == [""] and not targets.relu_stems
    made = fully_rewritten(x, model)
    assert type(made.relu) is type(model.relu)
    assert_same(model, made, x)


def test_a_block_overwrites_only_inputs_that_nothing_else_holds():
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = fully_rewritten(x, model)
    stage = made.layer2
    assert isinstance(stage, PlannedStage) and len(stage) == 2
    before = x.clone()
    expected = made(x)
    assert torch.equal(x, before)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(x: Tensor) -> None:
        seen.append((x, x.clone()))

    down = stage[0].downsample
    afterwards = (stage[0], stage[0].conv3, stage[0].relu, down, *down)
    before_it = (stage[1], stage[1].conv1)
    hooks = [(m.register_forward_hook, lambda _m, _a, out: keep(out)) for m in afterwards]
    hooks += [(m.register_forward_pre_hook, lambda _m, args: keep(args[0])) for m in before_it]
    for register, hook in hooks:
        handle = register(hook)
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert seen and all(torch.equal(now, then) for now, then in seen)
        seen.clear()
    features = torch.randn(2, 256, 16, 16).to(memory_format=CHANNELS_LAST)
    middle = stage[0](features)
    copied = middle.clone()
    stage[1](middle)
    assert torch.equal(middle, copied), "blocks called one by one keep their inputs"
    kept_features = features.clone()
    stage(features)
    assert torch.equal(features, kept_features)


@pytest.mark.slow
def test_a_frozen_copy_compiles_without_graph_breaks():
    from torch._inductor import config as inductor

    model, x = official(), torch.randn(2, 3, 32, 32)
    made = rewritten(model, x, REWRITES["all"](model)).requires_grad_(False)
    with inductor.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(made, fullgraph=True)
        assert_same(model, compiled, x)
        with torch.profiler.profile() as profile:
            compiled(x)
        ran = {event.key for event in profile.key_averages()}
        # These are called only if the merged and tiled weight has become a constant.
        packed = {"mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_"}
        assert packed >= {name for name in ran if "convolution" in name} != set()
        exported = torch.export.export(made, (x,)).module()
        assert_same(model, exported, x)
