"""Rewrites for tests: each by itself, all together, and what they make of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from epsanet_fused.planned_blocks import Rewrites
from epsanet_fused.planned_conv import ConvPlan
from epsanet_fused.rewrite import apply, find_targets

NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
NONE = Rewrites(NCHW, fold=False, epilogue=False, fused_calls=False)


def plans(model: nn.Module, memory_format: torch.memory_format) -> dict[str, ConvPlan]:
    """One plan after another for the grouped convolutions."""
    kinds = itertools.cycle(["merged", "wide", "tiled", "dense", "other format"])
    found = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            kind, g = next(kinds), conv.groups
            # As plan_convs does: in 16 bits libraries get others wrong.
            tall = conv.weight.dtype.itemsize == 2
            found[name] = {
                "merged": ConvPlan(g // 2, (1, 1), memory_format),
                "wide": ConvPlan(g, (2, 1) if tall else (1, 2), memory_format),
                "tiled": ConvPlan(g // 2, (4, 1) if tall else (2, 4), memory_format),
                "dense": ConvPlan(1, (1, 1), memory_format),
                "other format": ConvPlan(g, (1, 1), NCHW),
            }[kind]
    return found


ALONE: dict[str, Callable[[nn.Module], Rewrites]] = {
    "fold": lambda model: NONE._replace(fold=True),
    "epilogue": lambda model: NONE._replace(epilogue=True),
    "fused calls": lambda model: NONE._replace(fold=True, fused_calls=True),
    "plans": lambda model: NONE._replace(plans=plans(model, NCHW)),
    "format": lambda model: NONE._replace(memory_format=CHANNELS_LAST),
    "all": lambda model: Rewrites(CHANNELS_LAST, plans=plans(model, CHANNELS_LAST)),
    "all nchw": lambda model: Rewrites(NCHW, plans=plans(model, NCHW)),
}


def rewritten(model: nn.Module, x: Tensor, rewrites: Rewrites) -> nn.Module:
    with torch.no_grad():
        return apply(model, find_targets(model, (x,)), rewrites)


def assert_same(model: nn.Module, made: nn.Module, *inputs: Tensor, rtol: float = 1e-4) -> None:
    with torch.no_grad():
        for x in inputs:
            true, out = model(x), made(x)
            assert (out - true).abs().max() <= rtol * true.abs().max()


def all_on(x: Tensor, model: nn.Module) -> nn.Module:
    return rewritten(model, x, ALONE["all"](model)).requires_grad_(False)
