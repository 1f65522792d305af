"""An optimized model is the model it came from: same numbers, same state, faster or left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.networks import (
    ALONE,
    CHANNELS_LAST,
    NCHW,
    OfficialBlock,
    assert_same,
    calibrate,
    rewritten,
    small,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import epsanet_fused as ef
from epsanet_fused.inference import conv_planner
from epsanet_fused.inference import optimize as optimize_module
from epsanet_fused.inference.blocks import PlannedBlock, PlannedPSA
from epsanet_fused.utils import timing
from epsanet_fused.utils.timing import summarise

optimize = ef.optimize_for_inference
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples: these tests ask whether it is right, and not what is fast."""
    monkeypatch.setattr(optimize_module, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST_SAMPLES", 1)


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


def test_what_does_not_win_is_not_applied(monkeypatch):
    model, x = small(), torch.randn(2, 3, 64, 64)

    def interleave(variants, clock, reps, seconds):
        # With an original: it takes 9 ms, the rest 5. Without: all rewrites 5, without fold 6,
        # without the epilogue 4, without fused calls 5, without plans 6.
        times = {2: [9, 5], 3: [9, 5, 5], 5: [5, 6, 4, 5, 6]}[len(variants)]
        if len(variants) == 2 and reps > optimize_module.REPS:
            times = [5, 5]
        return {k: summarise([float(ms)] * 9) for k, ms in zip(variants, times, strict=True)}

    monkeypatch.setattr(optimize_module, "interleave", interleave)
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

    monkeypatch.setattr(optimize_module, "interleave", interleave)
    made = optimize(model, x)
    assert "NOTHING was rewritten" in str(made.report)
    assert not any(isinstance(m, PlannedBlock) for m in made.modules())
    assert_same(model, made, x, rtol=0)


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


def test_a_block_that_the_example_does_not_reach_is_left_alone():
    model, x = small(), torch.randn(2, 3, 64, 64)
    model.spare = OfficialBlock(64, 64).eval()
    made = optimize(model, x, memory_format=CHANNELS_LAST)
    assert "left alone: spare: the example input doesn't reach it" in str(made.report)


def test_there_is_no_training_mode_and_no_gradient():
    model, x = small(), torch.randn(2, 3, 64, 64)
    made = optimize(model, x, memory_format=CHANNELS_LAST)
    made(x)  # also where gradients are enabled
    with pytest.raises(RuntimeError, match="no training mode"):
        made.train()(x)
    made.eval()(x)


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
