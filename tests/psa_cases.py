"""All variants of PSA modules that fuse takes, and a model to hold one."""

from __future__ import annotations

import psa_variants as variants
import torch
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.variants import FusedPSAVariant

# For each variant: how to build it, the channels of its input, the order, what it becomes.
REVERSED, NATURAL = "reversed", "natural"
FUSED, VARIANT = ef.FusedPSAModule, FusedPSAVariant
VARIANTS = {
    "official": (lambda: variants.Official(64, 64), 64, REVERSED, FUSED),
    "stride 2": (lambda: variants.Official(64, 128, stride=2), 64, REVERSED, FUSED),
    "ours, plain": (lambda: ef.PSAModule(64, 64), 64, REVERSED, FUSED),
    "a fork's SE": (
        lambda: variants.Official(64, 64, se=variants.SEOfTheFork), 64, REVERSED, VARIANT,
    ),
    "in YOLO": (lambda: variants.InYOLO(32, 32), 32, REVERSED, FUSED),
    "biased": (
        lambda: variants.Official(32, 64, (1, 3, 5, 7), 1, (2, 4, 8, 16), bias=True),
        32, REVERSED, FUSED,
    ),
    "2048 to 64": (
        lambda: variants.Official(2048, 64, conv_groups=(1, 2, 2, 2)), 2048, REVERSED, FUSED,
    ),
    "in order": (lambda: variants.InOrder(64, 64), 64, NATURAL, VARIANT),
    "ReLU modules": (lambda: variants.InMM(64, 64), 64, REVERSED, VARIANT),
    "norms and ReLUs": (lambda: variants.InMM(64, 64, norm=True), 64, REVERSED, VARIANT),
    "ReLU functions": (lambda: variants.WithReLUs(64, 64), 64, REVERSED, VARIANT),
    "External-Attention": (lambda: variants.ExternalAttention(64), 64, NATURAL, VARIANT),
    "External-Attention, mended": (
        lambda: variants.ExternalAttentionMended(96, 2, S=3), 96, NATURAL, VARIANT,
    ),
    "BiRefNet": (lambda: variants.InBiRefNet(64), 64, NATURAL, VARIANT),
    "two branches": (lambda: variants.Listed(6, 8, (3, 7), own_se=True), 6, REVERSED, VARIANT),
    "linears": (lambda: variants.Listed(6, 8, (1, 3, 5), own_se=False), 6, REVERSED, VARIANT),
}  # fmt: skip


class Holder(nn.Module):
    """Somebody's model, with a PSA module inside."""

    def __init__(self, psa: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"psa": psa})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["psa"](x)


def holder(name: str) -> tuple[Holder, Tensor, str, type[nn.Module]]:
    make, channels, order, kind = VARIANTS[name]
    return Holder(make()), torch.randn(2, channels, 9, 6), order, kind
