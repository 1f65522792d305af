"""``fuse`` finds no PSA module in other packages' models, and warns of none of their blocks."""

from __future__ import annotations

import warnings

import pytest
import timm
import torchvision

import epsanet_fused as ef

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "seresnet18",
        "skresnet18",
        "efficientnet_b0",
        "mobilenetv3_large_100",
        "regnety_002",
        "repvit_m0_9",
        "lcnetv2_base",
        "coatnet_0_224",
    ],
)
def test_timm_models_are_refused_without_a_warning(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="model must hold a PSA module"):
            ef.fuse(model)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf"])
def test_torchvision_models_are_refused_without_a_warning(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="model must hold a PSA module"):
            ef.fuse(model)
