"""FusedPSAModule is a drop-in for PSAModule; both refuse invalid arguments."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.nn.psa import recalibrate_and_concat

each_class = pytest.mark.parametrize("psa", [ef.PSAModule, ef.FusedPSAModule])


def small(psa: type[ef.PSAModule], **options: Any) -> ef.PSAModule:
    options = {"conv_groups": (1, 2, 4, 8), "reduction": 2} | options
    return psa(16, 32, **options)


def pair(**options: Any) -> tuple[ef.PSAModule, ef.FusedPSAModule]:
    """Plain and fused, with the same weights in different memory."""
    plain, fused = small(ef.PSAModule, **options), small(ef.FusedPSAModule, **options)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    out = module(x)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * ramp).sum(), [x, *module.parameters()])]


def assert_same_numbers(module: nn.Module, other: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(results(module, x), results(other, x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
def test_fused_gives_the_plain_numbers(stride: int, training: bool) -> None:
    plain, fused = pair(stride=stride)
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    assert_same_numbers(fused.double().train(training), plain.double().train(training), x)


def test_signatures_are_equal() -> None:
    assert inspect.signature(ef.FusedPSAModule) == inspect.signature(ef.PSAModule)
    names = ["inplans", "planes", "conv_kernels", "stride", "conv_groups", "reduction"]
    assert list(inspect.signature(ef.PSAModule).parameters) == names


def test_state_dict_goes_both_ways() -> None:
    plain, fused = pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    nn.init.normal_(fused.conv_2.weight)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain.state_dict(), fused.state_dict(), rtol=0, atol=0)


def test_from_reference_shares_the_parameters() -> None:
    plain = small(ef.PSAModule).eval()
    fused = ef.FusedPSAModule.from_reference(plain)
    assert not fused.training
    ours, theirs = dict(fused.named_parameters()), dict(plain.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in ours)


def test_training_from_reference_trains_the_plain_module() -> None:
    plain = small(ef.PSAModule)
    before = copy.deepcopy(plain.state_dict())
    fused, x = ef.FusedPSAModule.from_reference(plain), torch.randn(2, 16, 6, 6)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(x).square().sum().backward()
    optimizer.step()
    for name, value in plain.state_dict().items():
        if "se.fc1" not in name:  # its gradient is 0 if the ReLU is dead
            assert not torch.equal(value, before[name]), name
    torch.testing.assert_close(plain(x), fused(x))


class Theirs(nn.Module):
    """A PSA module of another class, with biases and other kernels and groups."""

    def __init__(self) -> None:
        super().__init__()
        for k in (1, 2, 3, 4):
            conv = nn.Conv2d(8, 4, 2 * k - 1, padding=k - 1, groups=2)
            self.add_module(f"conv_{k}", conv)
        self.se = ef.SEWeightModule(4, reduction=2)
        self.softmax = nn.Softmax(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [getattr(self, f"conv_{k}")(x) for k in (1, 2, 3, 4)]
        return recalibrate_and_concat(branches, [self.se(branch) for branch in branches])


def test_from_reference_accepts_modules_with_the_same_layers() -> None:
    theirs, x = Theirs(), torch.randn(2, 8, 5, 5)
    fused = ef.FusedPSAModule.from_reference(theirs)
    assert fused.reads_se()
    torch.testing.assert_close(fused(x), theirs(x))


class BiasedGate(ef.SEWeightModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


@pytest.mark.parametrize("base", [ef.PSAModule, Theirs])
def test_another_se_is_called(base: type[nn.Module]) -> None:
    psa = small(ef.PSAModule) if base is ef.PSAModule else Theirs()
    width = psa.conv_1.out_channels
    psa.se = BiasedGate(width, reduction=2)
    fused = ef.FusedPSAModule.from_reference(psa)
    assert not fused.reads_se() and "is modified" in repr(fused)
    x = torch.randn(2, psa.conv_1.in_channels, 5, 5)
    torch.testing.assert_close(fused(x), psa(x), rtol=0, atol=0)


class Residual(Theirs):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def with_attention() -> nn.Module:
    psa = Theirs()
    psa.attention = nn.Conv2d(16, 16, 1)
    return psa


def with_hook() -> nn.Module:
    psa = small(ef.PSAModule)
    psa.register_forward_hook(lambda *_: None)
    return psa


def with_own_forward() -> nn.Module:
    psa = small(ef.PSAModule)
    psa.forward = lambda x: x
    return psa


def with_state_dict_hook() -> nn.Module:
    psa = small(ef.PSAModule)
    psa.register_load_state_dict_post_hook(lambda *_: None)
    return psa


def with_own_convolve() -> nn.Module:
    psa = small(ef.PSAModule)
    psa.convolve = lambda x: [x] * 4
    return psa


def with_inner_hook() -> nn.Module:
    psa = Theirs()
    psa.tap = nn.Sequential(nn.Identity())
    psa.tap[0].register_forward_hook(lambda *_: None)
    return psa


class WithExtraState(Theirs):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.mark.parametrize(
    "make, named",
    [
        (with_state_dict_hook, "without the hooks"),
        (with_own_convolve, "the convolve that was replaced"),
        (with_inner_hook, "without tap"),
        (WithExtraState, "the extra state"),
        (Residual, "Residual: it computes something else"),
        (with_attention, "without attention of Theirs"),
        (with_hook, "without the hooks"),
        (with_own_forward, "the forward that was replaced"),
    ],
)
def test_from_reference_names_what_it_would_drop(make: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        ef.FusedPSAModule.from_reference(make())


def test_from_reference_keeps_the_plans() -> None:
    psa = ef.FusedPSAModule(64, 64)
    ef.use_plans(psa, {"conv_4": ef.nn.grouped_conv.ConvPlan(1)})
    assert ef.FusedPSAModule.from_reference(psa).merged_groups == (1, 4, 8, 1)


def without(name: str) -> nn.Module:
    module = small(ef.PSAModule)
    parent, _, child = name.rpartition(".")
    delattr(module.get_submodule(parent), child)
    return module


@pytest.mark.parametrize("name", ["conv_1", "conv_4", "se.fc1", "se.fc2"])
def test_from_reference_names_the_missing_layer(name: str) -> None:
    with pytest.raises(TypeError, match=rf"PSAModule has no\w* at {name}$"):
        ef.FusedPSAModule.from_reference(without(name))


def test_from_reference_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match=r"Linear has none at conv_1, .*, se\.fc1, se\.fc2"):
        ef.FusedPSAModule.from_reference(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("shared", [False, True], ids=["built", "from_reference"])
def test_clones_are_complete_and_independent(
    clone: Callable[[nn.Module], nn.Module], shared: bool
) -> None:
    plain = small(ef.PSAModule)
    fused = ef.FusedPSAModule.from_reference(plain) if shared else small(ef.FusedPSAModule)
    x = torch.randn(2, 16, 6, 6)
    copied, before = clone(fused), fused(x)
    assert_same_numbers(copied, fused, x)
    nn.init.zeros_(fused.conv_1.weight)
    torch.testing.assert_close(copied(x), before)


def test_a_module_survives_torch_save(tmp_path: Path) -> None:
    fused, x = small(ef.FusedPSAModule), torch.randn(2, 16, 6, 6)
    torch.save(fused, tmp_path / "module.pt")
    assert_same_numbers(torch.load(tmp_path / "module.pt", weights_only=False), fused, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_to_16_bit(dtype: torch.dtype) -> None:
    plain, fused = pair()
    x = torch.randn(2, 16, 6, 6)
    out = fused.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), plain(x), rtol=0.02, atol=0.02)


def test_channels_last_stays_channels_last() -> None:
    plain, fused = pair()
    x = torch.randn(2, 16, 6, 6)
    out = fused.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, plain(x), check_stride=False)


def test_repr_names_the_fused_tail() -> None:
    text = repr(small(ef.FusedPSAModule))
    assert "branches=4, channels_per_branch=8, hidden=4, tail=psa_tail" in text


REFUSED = {
    "inplans not in groups": ({"inplans": 40, "planes": 64}, r"inplans=40 .* but 16 does not .*64"),
    "planes not in groups": ({"inplans": 64, "planes": 96}, r"planes // 4 = 24 .* but 16 does not"),
    "planes not by four": ({"planes": 66}, r"planes must be a multiple of 4.* got 66"),
    "no hidden unit": ({"planes": 32, "conv_groups": (1, 1, 1, 1)}, r"use planes >= 64 or .* <= 8"),
    "reduction 0": ({"reduction": 0}, r"reduction=0 .* 1 <= reduction <= 16"),
    "even kernel": ({"conv_kernels": (3, 4, 7, 9)}, r"conv_kernels must be odd.* got \[4\]"),
    "three kernels": ({"conv_kernels": (3, 5, 7)}, r"conv_kernels must have four .* got 3"),
    "five groups": ({"conv_groups": (1, 1, 1, 1, 1)}, r"conv_groups must have four .* got 5"),
    "group 0": ({"conv_groups": (0, 4, 8, 16)}, r"conv_groups=\(0, .* must be positive"),
    "negative group": ({"conv_groups": (-1, 4, 8, 16)}, r"conv_groups=\(-1, .* must be positive"),
}


@each_class
@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_invalid_arguments(
    psa: type[ef.PSAModule], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        psa(**{"inplans": 64, "planes": 64} | arguments)


@pytest.mark.parametrize(("channels", "reduction"), [(8, 16), (8, 0), (8, -1)])
def test_se_refuses_a_hidden_width_of_zero(channels: int, reduction: int) -> None:
    with pytest.raises(ValueError, match=r"more channels or a smaller reduction"):
        ef.SEWeightModule(channels, reduction)


def test_symbolic_tracing_records_one_call_of_the_operator() -> None:
    fused = ef.FusedPSAModule(64, 64)
    traced = torch.fx.symbolic_trace(fused)
    assert "psa_tail" in {node.name for node in traced.graph.nodes}
    x = torch.randn(1, 64, 6, 5)
    assert torch.equal(traced(x), fused(x))
