"""The layers by which a PSA module is recognised, and modules that do not have them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
from helpers import psa_variants as variants
from helpers.psa_variants import OfficialPSA, assert_skipped, official_with
from torch import nn

import epsanet_fused as ef
from epsanet_fused.fusion.detect import find_layers
from epsanet_fused.nn.equivalence import PSALayers


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
