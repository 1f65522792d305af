"""The layers by which a PSA module is recognised, and modules that do not have them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import psa_variants as variants
from helpers.psa_variants import OfficialPSA, assert_skipped, official_with
from torch import nn

import epsanet_fused as ef
from epsanet_fused.fusion.detect import find_layers
from epsanet_fused.fusion.modules import FusedPSAVariant
from epsanet_fused.nn.psa_layers import PSALayers


def with_extra(layer: nn.Module) -> nn.Module:
    psa = OfficialPSA(64, 64)
    psa.last = layer
    return psa


SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no hidden unit": (
        lambda: official_with(se__fc1=nn.Conv2d(16, 0, 1), se__fc2=nn.Conv2d(0, 16, 1)),
        "no hidden unit",
    ),
    "extra norm": (lambda: with_extra(nn.BatchNorm2d(64)), "more than the parts of a PSA"),
    "extra convolution": (lambda: with_extra(nn.Conv2d(64, 64, 1)), "more than the parts"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_with_the_reason(name: str) -> None:
    make, reason = SKIPPED[name]
    assert_skipped(make(), reason)


def test_layers_are_found_by_structure() -> None:
    convs = ("conv_1", "conv_2", "conv_3", "conv_4")
    assert find_layers(OfficialPSA(64, 64)) == PSALayers(convs, (("se.fc1", "se.fc2"),))
    listed = variants.ListPSA(6, 8, (3, 7), own_se=True)
    assert find_layers(listed) == PSALayers(
        ("conv_branches.0", "conv_branches.1"),
        (("se.0.fc1", "se.0.fc2"), ("se.1.fc1", "se.1.fc2")),
    )


@pytest.mark.parametrize(
    "model",
    [variants.PartialSelfAttention(16), nn.Conv2d(3, 3, 1), nn.Sequential(), variants.SE(16)],
    ids=["YOLOv10's PSA", "a convolution", "nothing", "an SE"],
)
def test_a_model_without_psa_modules_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="model must hold a PSA module"):
        ef.fuse(model)


def test_ordinary_se_blocks_cause_no_warning() -> None:
    """Their convolutions are equal, or do not have the SE's width."""

    class SEBasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(16)
            self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(16)
            self.se = variants.SE(16)

    model = nn.Sequential(OfficialPSA(64, 64), SEBasicBlock())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ef.fuse(model)


def test_lazy_layers_elsewhere_are_accepted() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    model = nn.Sequential(OfficialPSA(64, 64), nn.Sequential(lazy))
    ef.fuse(model)
    assert type(model[0]) is ef.FusedPSAModule


def separable(k: int) -> nn.Module:
    depthwise = nn.Conv2d(64, 64, k, padding=k // 2, groups=64)
    return nn.Sequential(depthwise, nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 16, 1))


class Residual(nn.Module):
    """A branch that isn't a row of layers."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(64, 16, 1)
        self.conv = nn.Conv2d(16, 16, k, padding=k // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reduce(x)
        return x + self.conv(x).relu()


class OfBranches(nn.Module):
    def __init__(self, branches: list[nn.Module], se: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.se = se or ef.SEWeightModule(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [branch(x) for branch in self.branches]
        gates = torch.stack([self.se(m) for m in made], 1).softmax(1)
        return torch.cat([m * gates[:, i] for i, m in reversed(list(enumerate(made)))], 1)


BRANCHES: dict[str, Callable[[int], nn.Module]] = {
    "separable": separable,
    "a residual": Residual,
    "without padding": lambda k: nn.Sequential(nn.Conv2d(64, 8, 3), nn.Conv2d(8, 16, 3)),
    "equal kernels": lambda k: nn.Conv2d(64, 16, 3, padding=1, groups=4),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_branches_may_be_any_modules(branch: str) -> None:
    plain = nn.Sequential(OfBranches([BRANCHES[branch](k) for k in (3, 5, 7, 9)])).double()
    fused = ef.fuse(copy.deepcopy(plain))
    assert isinstance(fused[0], FusedPSAVariant)
    x = torch.randn(2, 64, 12, 11, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))


def test_the_table_shows_all_convolutions_of_a_branch(capsys: pytest.CaptureFixture[str]) -> None:
    ef.fuse(OfBranches([separable(k) for k in (3, 5)]), dry_run=True)
    assert "3x3/64+1x1/1 5x5/64+1x1/1" in capsys.readouterr().out


class WithAdapter(ef.SEWeightModule):
    def __init__(self) -> None:
        super().__init__(16, 4)
        self.adapter = nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.adapter(self.avg_pool(x))


def test_an_se_with_more_layers_is_named() -> None:
    model = OfBranches([nn.Conv2d(64, 16, k, padding=k // 2) for k in (3, 5)], WithAdapter())
    assert_skipped(model, "an SE of two pointwise layers as wide as each branch")


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = [nn.Conv2d(64, 16, k, padding=k // 2) for k in (3, 5, 7, 9)]
        self.se = ef.SEWeightModule(16, 4)


LOOKALIKES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "YOLO's PSA": (lambda: PSA(), "YOLO's partial self-attention"),
    "a Python list": (InAList, "branches is a Python list, .*nn.ModuleList"),
}


class PSA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.attn, self.cv2 = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Conv2d(8, 8, 1)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_one_is_named_for_what_it_is(name: str) -> None:
    make, reason = LOOKALIKES[name]
    with pytest.raises(ValueError, match=rf"model must hold a PSA module.*0: .*{reason}"):
        ef.fuse(nn.Sequential(make()))
    with pytest.warns(UserWarning, match=rf"fuse: 1 .* is skipped: .*{reason}"):
        model = ef.fuse(nn.Sequential(OfficialPSA(64, 64), make()))
    assert type(model[0]) is ef.FusedPSAModule


def test_a_traced_graph_is_named() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(OfficialPSA(64, 64)))
    with pytest.warns(UserWarning, match=r"fuse: 0 .* part of a graph that torch\.fx traced"):
        ef.fuse(traced)


@pytest.mark.slow
def test_a_whole_network_causes_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ef.fuse(ef.epsanet50(num_classes=10, fused=False))
