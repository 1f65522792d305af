"""The types that a user's type checker sees; mypy checks this file, nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import epsanet_fused as ef
from epsanet_fused.nn.grouped_conv import ConvPlan


def use(
    images: Tensor,
    branches: list[Tensor],
    fc: tuple[Tensor, Tensor, Tensor, Tensor],
    norm: nn.BatchNorm2d,
) -> None:
    network = ef.epsanet50()
    assert_type(network, ef.EPSANet)
    assert_type(ef.load_checkpoint(network, Path("weights.pth")), dict[str, Any])
    assert_type(ef.fuse(network), nn.Module)
    assert_type(ef.optimize_for_inference(network, images), nn.Module)
    assert_type(ef.FusedPSAModule.from_reference(ef.PSAModule(64, 64)), ef.FusedPSAModule)
    assert_type(ef.psa_tail(branches, *fc, relu=True), Tensor)
    assert_type(ef.psa_tail_norm(branches, *fc, norm), Tensor)
    assert_type(ef.plan_convs(network, images), dict[str, ConvPlan])
    with ef.use_backend("reference"):
        assert_type(ef.PSAModule(64, 64).convolve(torch.randn(1, 64, 8, 8)), list[Tensor])
