"""PSA modules that are built otherwise than the official one, with a tail of one operator."""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.utils.memory_format import accumulator_dtype

# Symbolic tracing takes these as a whole.
torch.fx.wrap("psa_tail")
torch.fx.wrap("_attention")

Kind = TypeVar("Kind", bound=nn.Module)


class Build(NamedTuple):
    """How a PSA module is built, with the names of its parts."""

    branches: tuple[str, ...]  # modules that each make one branch, the smallest kernel's first
    ses: tuple[tuple[str, str], ...]  # the two layers of the SE: one pair, or one for each branch
    split: bool  # whether a branch gets its share of the input's channels, or all of them
    relu: bool  # whether each branch ends in a ReLU that is no module
    reversed: bool  # whether the last branch comes first in the output
    overwrites: bool  # whether the branches are written over the input, too


class FusedPSAVariant(nn.Module):
    """A PSA module of another build than ``FusedPSAModule``; ``epsanet_fused.fuse`` makes them.

    It keeps the parts and the names of the module that it stands for. What makes the branches runs
    as it is. If one SE serves all branches, the rest is ``psa_tail``. If each has its own, it is
    plain PyTorch with as few passes as that allows: the operator has one SE.

    Shape: (B, C_in, H, W) -> (B, S * C, H', W').
    """

    build: Build

    @classmethod
    def standing_for(cls, module: nn.Module, build: Build) -> FusedPSAVariant:
        made = stand_in(module, cls)
        made.build = build
        return made

    def forward(self, x: Tensor) -> Tensor:
        build = self.build
        makers = [self.get_submodule(name) for name in build.branches]
        count = len(makers)
        shares = [_share(x, i, count) for i in range(count)] if build.split else [x] * count
        branches = [make(share) for make, share in zip(makers, shares, strict=True)]
        if build.relu:
            branches = [F.relu(branch) for branch in branches]
        weights = [self._weights(*names) for names in build.ses]
        if build.overwrites:
            whole = torch.cat(branches, 1)
            x.copy_(whole)
        if len(weights) == 1:  # psa_tail puts the last branch first
            return psa_tail(branches if build.reversed else branches[::-1], *weights[0])
        attention = _attention(branches, weights)[..., None, None]  # (B, S, C, 1, 1)
        if build.overwrites and not build.reversed:
            return (whole.unflatten(1, (count, -1)) * attention).flatten(1, 2)
        parts = [branch * attention[:, i] for i, branch in enumerate(branches)]
        return torch.cat(parts[::-1] if build.reversed else parts, 1)

    def _weights(self, *names: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(R, C, ...), (R,), (C, R, ...) and (C,); zeros for a layer without bias."""
        fc1, fc2 = (self.get_submodule(name) for name in names)
        biases = [
            fc.weight.new_zeros(fc.weight.shape[0]) if fc.bias is None else fc.bias
            for fc in (fc1, fc2)
        ]
        return fc1.weight, biases[0], fc2.weight, biases[1]

    def extra_repr(self) -> str:
        build = self.build
        order = "reversed" if build.reversed else "natural"
        tail = "psa_tail" if len(build.ses) == 1 else "one SE per branch, in plain PyTorch"
        return f"branches={len(build.branches)}, split={build.split}, order={order}, tail={tail}"


def stand_in(module: nn.Module, kind: type[Kind]) -> Kind:
    """A module of this kind with all that ``module`` has: its parts, parameters, hooks, attributes.

    Other people's code may have put marks on the module, as YOLO's does with each layer's inputs.
    """
    made = kind.__new__(kind)
    made.__dict__.update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = copy.copy(vars(module)[name])
    return made


def _share(x: Tensor, i: int, count: int) -> Tensor:
    """Part i of ``count`` equal parts of the channels."""
    width = x.shape[1] // count
    return x[:, i * width : (i + 1) * width]


def _attention(branches: list[Tensor], weights: list[tuple[Tensor, ...]]) -> Tensor:
    """(B, S, C) by an SE for each branch, in the branches' dtype."""
    acc = accumulator_dtype(branches[0].dtype)
    gates = []
    with torch.autocast(branches[0].device.type, enabled=False):
        for x, se in zip(branches, weights, strict=True):
            fc1, bias1, fc2, bias2 = (w.to(acc) for w in se)
            squeeze = x.mean((2, 3), dtype=acc)  # (B, C)
            hidden = F.relu(F.linear(squeeze, fc1.flatten(1), bias1))  # (B, R)
            gates.append(torch.sigmoid(F.linear(hidden, fc2.flatten(1), bias2)))
        return torch.softmax(torch.stack(gates, 1), 1).to(branches[0].dtype)
