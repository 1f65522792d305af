"""An optimized model is the model it came from: same numbers, same state, faster or left alone."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import OfficialBlock, ResNetBlock, calibrate, small
from torch import Tensor, nn
from torch.nn.utils import parametrize

import epsanet_fused as ef
from epsanet_fused import conv_plan, inference, timing
from epsanet_fused.planned_blocks import PlannedBlock, PlannedPSA, PlannedStage, Rewrites
from epsanet_fused.planned_conv import ConvPlan
from epsanet_fused.rewrite import apply, find_targets
from epsanet_fused.timing import summarise

NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
NONE = Rewrites(NCHW, fold=False, epilogue=False, fused_calls=False)
optimize = ef.optimize_for_inference
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples: these tests ask whether it is right, and not what is fast."""
    monkeypatch.setattr(inference, "SECONDS", 0.0)
    monkeypatch.setattr(conv_plan, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST_SAMPLES", 1)


def plans(model: nn.Module, memory_format: torch.memory_format) -> dict[str, ConvPlan]:
    """One plan after another for the grouped convolutions."""
    kinds = itertools.cycle(["merged", "wide", "tiled", "dense", "other format"])
    found = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            kind, g = next(kinds), conv.groups
            # What plan_convs wouldn't try in 16 bits, where libraries get it wrong.
            exact = conv.weight.dtype.itemsize > 2
            found[name] = {
                "merged": ConvPlan(g // 2, (1, 1), memory_format),
                "wide": ConvPlan(g, (1, 2) if exact else (1, 1), memory_format),
                "tiled": ConvPlan(g // 2, (2, 4) if exact else (1, 1), memory_format),
                "dense": ConvPlan(1, (1, 1), memory_format),
                "other format": ConvPlan(g, (1, 1), NCHW),
            }[kind]
    return found


def rewritten(model: nn.Module, x: Tensor, rewrites: Rewrites) -> nn.Module:
    with torch.no_grad():
        return apply(model, find_targets(model, (x,)), rewrites)


def assert_same(model: nn.Module, made: nn.Module, *inputs: Tensor, rtol: float = 1e-4) -> None:
    with torch.no_grad():
        for x in inputs:
            true, out = model(x), made(x)
            assert (out - true).abs().max() <= rtol * true.abs().max()


NETWORKS = [ef.epsanet50, ef.epsanet101, ef.epsanet50_large, ef.epsanet101_large]
ALONE: dict[str, Callable[[nn.Module], Rewrites]] = {
    "fold": lambda model: NONE._replace(fold=True),
    "epilogue": lambda model: NONE._replace(epilogue=True),
    "fused calls": lambda model: NONE._replace(fold=True, fused_calls=True),
    "plans": lambda model: NONE._replace(plans=plans(model, NCHW)),
    "format": lambda model: NONE._replace(memory_format=CHANNELS_LAST),
    "all": lambda model: Rewrites(CHANNELS_LAST, plans=plans(model, CHANNELS_LAST)),
    "all nchw": lambda model: Rewrites(NCHW, plans=plans(model, NCHW)),
}


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_each_rewrite_alone_and_all_together(build):
    x = torch.randn(1, 3, 225, 193)
    model = calibrate(build(num_classes=10, fused=False), torch.randn(2, 3, 225, 193))
    with torch.no_grad():
        true = model(x)
        targets = find_targets(model, (x,))
        assert len(targets.blocks) == {50: 16, 101: 33}[int(build.__name__[7:].split("_")[0])]
        assert targets.stems == [""]
        assert not targets.psas and not targets.left_alone
        for name, rewrites in ALONE.items():
            out = apply(model, targets, rewrites(model))(x)
            assert (out - true).abs().max() <= 1e-4 * true.abs().max(), name
        assert torch.equal(model(x), true), "and the model is what it was"


@pytest.mark.parametrize("name", ALONE)
def test_in_float64_only_the_order_of_sums_differs(name):
    """Rounding is too small here for a wrong formula to hide in it."""
    model, x = small().double(), torch.randn(2, 3, 65, 47, dtype=torch.float64)
    assert_same(model, rewritten(model, x, ALONE[name](model)), x, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_is_no_further_off_than_plain_pytorch(dtype):
    """Half a dozen images together: the worst of a few logits by themselves is luck."""
    model, x = small(), torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        true = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)
        made = rewritten(plain, x.to(dtype), ALONE["all"](plain))
        limit = 2 * (plain(x.to(dtype)).double() - true).norm()
        limit += torch.finfo(dtype).eps / 2 * true.norm()
        assert (made(x.to(dtype)).double() - true).norm() <= limit


@pytest.mark.parametrize("name", ["all", "all nchw"])
def test_other_batches_sizes_and_formats_than_the_examples(name):
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = rewritten(model, x, ALONE[name](model)).requires_grad_(False)
    others = [torch.randn(5, 3, 64, 64), torch.randn(1, 3, 33, 129), torch.randn(0, 3, 64, 64)]
    others += [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 40, 72).to(memory_format=CHANNELS_LAST)]
    for other in others:
        if other.numel():
            assert_same(model, made, other)
        else:
            assert made(other).shape == (0, 5)


def test_the_whole_way():
    model, x = small(), torch.randn(1, 3, 64, 64)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    made = pickle.loads(pickle.dumps(optimize(model, x)))
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(model, made, x, torch.randn(3, 3, 50, 70))
    assert type(made) is ef.EPSANet
    for a, b in ((model.state_dict(), state), (made.state_dict(), state)):
        assert list(a) == list(b)
        assert all(torch.equal(a[k], b[k]) for k in b)
    assert not any(isinstance(m, PlannedBlock) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    hooks = [m for m in (*model.modules(), *made.modules()) if m._forward_pre_hooks]
    assert not hooks
    text = str(made.report)
    assert "rewritten: 5 blocks, 1 stem" in text or "NOTHING was rewritten" in text
    for part in ("memory format", "folded", "tail", "fused calls", "plans",
                 "largest error", "float32 (1, 3, 64, 64)", "in all"):  # fmt: skip
        assert part in text


def test_sixteen_bits_may_be_asked_for():
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = optimize(model, x, dtype=torch.bfloat16, memory_format=CHANNELS_LAST)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        out, true = made(x.bfloat16()), model(x)
    assert out.dtype == torch.bfloat16
    assert (out - true).norm() <= 0.1 * true.norm()
    assert 0 < made.report.relative_error < 0.1


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_in_place_when_told_so(dtype):
    model, x = small(), torch.randn(2, 3, 64, 64)
    plain = copy.deepcopy(model)
    made = optimize(model, x, inplace=True, dtype=dtype, memory_format=NCHW)
    assert made is model
    assert made.report.before is not None
    with torch.no_grad():
        out, true = made(x.to(dtype or x.dtype)), plain(x)
    torch.testing.assert_close(out, true.to(out.dtype), rtol=1e-4, atol=1e-4)


def all_on(x: Tensor, model: nn.Module) -> nn.Module:
    return rewritten(model, x, ALONE["all"](model)).requires_grad_(False)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_models_of_their_own(again):
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = all_on(x, model)
    out = made(x)
    twin = again(made)
    assert torch.equal(twin(x), out)
    with torch.no_grad():
        twin.layer1[0].bn3.weight.mul_(2)
        twin.conv1.weight.mul_(2)
    assert not torch.equal(twin(x), out)
    assert torch.equal(made(x), out)
    model.load_state_dict(twin.state_dict())
    assert_same(model, twin, x)


def test_a_checkpoint_loaded_later_counts():
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = rewritten(copy.deepcopy(model), x, ALONE["all"](model))
    with torch.no_grad():
        made(x)
    torch.manual_seed(5)
    other = calibrate(ef.EPSANet(ef.EPSABlock, (1, 2, 1, 1), 5, planes=(64, 64, 64, 128)),
                      torch.randn(4, 3, 64, 64))  # fmt: skip
    made.load_state_dict(other.state_dict())
    assert_same(other, made, x)


def test_what_does_not_win_is_not_applied(monkeypatch):
    model, x = small(), torch.randn(2, 3, 64, 64)

    def interleave(variants, clock, reps, seconds):
        # With an original: it takes 9 ms, the rest 5. Without: all rewrites 5, without fold 6,
        # without the epilogue 4, without fused calls 5, without plans 6.
        times = {2: [9, 5], 3: [9, 5, 5], 5: [5, 6, 4, 5, 6]}[len(variants)]
        if len(variants) == 2 and reps > inference.REPS:
            times = [5, 5]
        return {k: summarise([float(ms)] * 9) for k, ms in zip(variants, times, strict=True)}

    monkeypatch.setattr(inference, "interleave", interleave)
    made = optimize(model, x)
    chosen = made.report.rewrites
    assert (chosen.fold, chosen.epilogue, chosen.fused_calls) == (True, False, False)
    assert chosen.plans
    assert [gain.applied for gain in made.report.gains[1:]] == [True, False, False, True]
    assert "not applied" in str(made.report)
    assert_same(model, made, x)


def test_nothing_is_rewritten_where_nothing_wins(monkeypatch):
    model, x = small(), torch.randn(2, 3, 64, 64)

    def interleave(variants, clock, reps, seconds):
        return {key: summarise([5.0] * 9) for key in variants}

    monkeypatch.setattr(inference, "interleave", interleave)
    made = optimize(model, x)
    assert "NOTHING was rewritten" in str(made.report)
    assert not any(isinstance(m, PlannedBlock) for m in made.modules())
    assert_same(model, made, x, rtol=0)


def official() -> nn.Module:
    """A network of another package whose blocks are built like the official ones."""
    torch.manual_seed(0)
    return calibrate(nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), OfficialBlock(64, 64),
                                   OfficialBlock(256, 64)), torch.randn(4, 3, 32, 32))  # fmt: skip


def test_blocks_are_known_by_structure():
    model, x = official(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        targets = find_targets(model, (x,))
        assert targets.blocks == ["1", "2"]
    for name, rewrites in ALONE.items():
        made = rewritten(model, x, rewrites(model))
        assert isinstance(made[2], PlannedBlock), name
        assert list(made.state_dict()) == list(model.state_dict())
        assert_same(model, made, x)


def test_psa_modules_in_other_blocks_and_by_themselves():
    model = calibrate(nn.Sequential(nn.Conv2d(3, 64, 1), ef.PSAModule(64, 64), nn.BatchNorm2d(64)),
                      torch.randn(2, 3, 16, 16))  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    made = rewritten(model, x, ALONE["all"](model))
    assert isinstance(made[1], PlannedPSA)
    assert_same(model, made, x)
    alone = ef.FusedPSAModule(64, 64).eval()
    x = torch.randn(2, 64, 9, 9)
    assert_same(alone, optimize(alone, x), x)


def test_stages_keep_the_names_of_their_blocks():
    model, x = small(), torch.randn(2, 3, 64, 64)
    model.layer2 = nn.Sequential(OrderedDict(zip("ab", model.layer2, strict=True)))
    made = rewritten(model, x, ALONE["all"](model))
    assert isinstance(made.layer2, PlannedStage)
    assert list(made.state_dict()) == list(model.state_dict())
    assert_same(model, made, x)


def test_resnets_bottlenecks_too():
    model = small(ResNetBlock)
    x = torch.randn(2, 3, 64, 64)
    for rewrites in ALONE.values():
        assert_same(model, rewritten(model, x, rewrites(model)), x)


class Reverse(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.flip(0)


def natural_order(model: nn.Module) -> None:
    psa = model.layer2[0].conv2
    psa.__class__ = type("Natural", (type(psa),), {"forward": lambda self, x: torch.cat(
        list(type(psa).__mro__[1].forward(self, x).chunk(4, 1))[::-1], 1)})  # fmt: skip


ODD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "hook": (
        lambda m: m.layer2[0].conv3.register_forward_hook(lambda *_: None),
        "layer2.0: conv3 has hooks",
    ),
    "pre-hook of the block": (
        lambda m: m.layer2[0].register_forward_pre_hook(lambda *_: None),
        "layer2.0: it has hooks",
    ),
    "parametrised": (
        lambda m: parametrize.register_parametrization(
            m.layer2[0].conv2.conv_3, "weight", Reverse()
        ),
        "layer2.0: conv2.conv_3 has parametrised weights",
    ),
    "another convolution": (
        lambda m: setattr(
            m.layer2[0], "conv1", type("Odd", (nn.Conv2d,), {})(256, 64, 1, bias=False)
        ),
        "layer2.0: conv1 isn't a plain Conv2d",
    ),
    "another norm": (
        lambda m: setattr(m.layer2[0], "bn2", nn.GroupNorm(4, 64)),
        "layer2.0: bn2 is a GroupNorm",
    ),
    "no running statistics": (
        lambda m: setattr(m.layer2[0], "bn2", nn.BatchNorm2d(64, track_running_stats=False)),
        "layer2.0: bn2 is a BatchNorm2d, not",
    ),
    "parameter of its own": (
        lambda m: m.layer2[0].register_parameter("gamma", nn.Parameter(torch.ones(1))),
        "layer2.0: it has parameters or buffers of its own",
    ),
    "natural order": (natural_order, "layer2.0: it computes something else"),
}


@pytest.mark.parametrize(("change", "says"), ODD.values(), ids=ODD)
def test_what_is_odd_is_left_alone_and_named(change, says):
    model, x = small(), torch.randn(2, 3, 64, 64)
    change(model)
    model.eval()
    made = optimize(model, x, memory_format=CHANNELS_LAST)
    assert says in str(made.report)
    assert len(made.report.targets.blocks) == 4
    assert not isinstance(made.layer2[0], PlannedBlock)
    assert_same(model, made, x)


def test_a_stem_that_is_watched_is_left_alone():
    model, x = small(), torch.randn(2, 3, 64, 64)
    seen = []
    model.bn1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    made = all_on(x, model)
    seen.clear()
    assert_same(model, made, x)
    assert torch.equal(seen[0], seen[1])


def test_a_block_that_the_example_does_not_reach_is_left_alone():
    model, x = small(), torch.randn(2, 3, 64, 64)
    model.spare = OfficialBlock(64, 64).eval()
    made = optimize(model, x, memory_format=CHANNELS_LAST)
    assert "left alone: spare: the example input doesn't reach it" in str(made.report)


def test_nobody_sees_a_block_write_over_its_input():
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = all_on(x, model)
    stage = made.layer2
    assert isinstance(stage, PlannedStage) and len(stage) == 2
    before = x.clone()
    true = made(x)
    assert torch.equal(x, before)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(x: Tensor) -> None:
        seen.append((x, x.clone()))

    down = stage[0].downsample
    afterwards, before_it = (stage[0], down, down[0]), (stage[1], stage[1].conv1)
    watchers = [(m.register_forward_hook, lambda _m, _a, out: keep(out)) for m in afterwards]
    watchers += [(m.register_forward_pre_hook, lambda _m, args: keep(args[0])) for m in before_it]
    for register, watcher in watchers:
        hook = register(watcher)
        assert torch.equal(made(x), true)
        hook.remove()
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


def test_there_is_no_training_mode_and_no_gradient():
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = optimize(model, x, memory_format=CHANNELS_LAST)
    made(x)  # also where gradients are enabled
    with pytest.raises(RuntimeError, match="no training mode"):
        made.train()(x)
    made.eval()(x)


def test_a_frozen_copy_compiles_without_graph_breaks():
    from torch._inductor import config as inductor

    model, x = official(), torch.randn(2, 3, 32, 32)
    made = rewritten(model, x, ALONE["all"](model)).requires_grad_(False)
    with inductor.patch(freezing=True), torch.no_grad():
        assert_same(model, torch.compile(made, fullgraph=True), x)
        exported = torch.export.export(made, (x,)).module()
        assert_same(model, exported, x)


ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (
        lambda: optimize(torch.relu, torch.randn(1)),
        TypeError,
        "model must be a torch.nn.Module, got",
    ),
    "training": (
        lambda: optimize(small().train(), torch.randn(1, 3, 64, 64)),
        ValueError,
        r"model must be in eval mode, but the model itself .* call model.eval\(\)",
    ),
    "a part in training": (
        lambda: optimize(part_in_training(), torch.randn(1, 3, 64, 64)),
        ValueError,
        "but layer2.0.bn1 is in training mode",
    ),
    "nothing to do": (
        lambda: optimize(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(1, 3, 4, 4)),
        ValueError,
        "model must hold an EPSABlock .* Sequential has none",
    ),
    "format": (
        lambda: optimize(small(), torch.randn(1, 3, 64, 64), memory_format=torch.preserve_format),
        ValueError,
        "memory_format must be None, torch.contiguous_format or torch.channels_last, got",
    ),
    "dtype": (
        lambda: optimize(small(), torch.randn(1, 3, 64, 64), dtype=torch.int8),
        ValueError,
        "dtype must be None, float16, .* got torch.int8",
    ),
    "example": (
        lambda: optimize(small(), "an image"),
        ValueError,
        "example_input must be a tensor or a tuple that holds one, got str",
    ),
    "graph": (
        lambda: optimize(small(), torch.randn(1, 3, 64, 64), cuda_graph=True),
        ValueError,
        "cuda_graph needs a model on a CUDA device, but example_input is on cpu",
    ),
}


def part_in_training() -> nn.Module:
    model = small()
    model.layer2[0].bn1.train()
    return model


@pytest.mark.parametrize(("call", "error", "says"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
