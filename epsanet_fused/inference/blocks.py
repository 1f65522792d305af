"""A PSA module and the block around it for inference, as planned: what inference.py swaps in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.inference.conv import Derived, PlannedConv
from epsanet_fused.inference.conv_weights import affine
from epsanet_fused.nn.fused_psa import CONVS, is_psa
from epsanet_fused.nn.grouped_conv import ConvPlan
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.utils.hooks import hooked


class Rewrites(NamedTuple):
    """Which rewrites to apply.

    memory_format: of all activations.
    fold: BatchNorms into the convolutions before them.
    epilogue: the BatchNorm and ReLU after a PSA module into its tail.
    fused_calls: the library's own convolution + residual + relu.
    plans: how to run the convolutions that have a plan, by their name in the model.
    """

    memory_format: torch.memory_format = torch.contiguous_format
    fold: bool = True
    epilogue: bool = True
    fused_calls: bool = True
    plans: Mapping[str, ConvPlan] = {}

    def conv(
        self, name: str, conv: nn.Conv2d, norm: nn.Module | None = None, relu: bool = False
    ) -> PlannedConv:
        """The convolution of that name with its norm and a ReLU, if any, rewritten."""
        return PlannedConv(
            conv,
            norm,
            plan=self.plans.get(name),
            memory_format=self.memory_format,
            fold=self.fold,
            fused_calls=self.fused_calls,
            relu=relu,
        )


class PlannedPSA(Derived):
    """A PSA module in inference, with the BatchNorm2d and ReLU that follow it, if any.

    Args:
        name: its name in the model.
        psa: with the layers that ``FusedPSAModule.from_reference`` asks for.
        norm: the BatchNorm2d that follows it, or None.
    """

    def __init__(
        self, name: str, psa: nn.Module, norm: nn.Module | None, rewrites: Rewrites
    ) -> None:
        super().__init__(psa, norm)
        for conv in CONVS:
            setattr(self, conv, rewrites.conv(f"{name}.{conv}", getattr(psa, conv)))
        self.se = psa.se
        self.epilogue = rewrites.epilogue and norm is not None

    def derive(self) -> tuple[Tensor, Tensor]:
        return affine(self.norm)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """relu(norm(psa(x))), each part where it is asked for."""
        branches = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]
        fc1, fc2 = self.se.fc1, self.se.fc2
        tail = (branches, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if self.epilogue:
            scale, shift = self.derive() if torch.compiler.is_compiling() else self.derived()
            return psa_tail(*tail, scale=scale, shift=shift, relu=relu)
        out = psa_tail(*tail)
        out = out if self.norm is None else self.norm(out)
        return F.relu(out) if relu else out


class PlannedBlock(nn.Module):
    """An EPSABlock in inference, or the bottleneck that it comes from, ResNet's.

    Its children have the names they had, and so has its state_dict.

    Args:
        name: its name in the model.
        block: with conv1, bn1, conv2 (a PSA module or a convolution), bn2, conv3, bn3, downsample.
    """

    def __init__(self, name: str, block: nn.Module, rewrites: Rewrites) -> None:
        super().__init__()
        own = {key: value for key, value in vars(block).items() if not key.startswith("_")}
        vars(self).update(own)  # what others may look up, such as the stride
        for key, child in block.named_children():
            self.add_module(key, child)
        self.conv1 = rewrites.conv(f"{name}.conv1", block.conv1, block.bn1)
        self.conv2 = (
            PlannedPSA(f"{name}.conv2", block.conv2, block.bn2, rewrites)
            if is_psa(block.conv2)
            else rewrites.conv(f"{name}.conv2", block.conv2, block.bn2)
        )
        self.conv3 = rewrites.conv(f"{name}.conv3", block.conv3, block.bn3)
        if is_conv_norm(block.downsample):
            conv, norm = block.downsample
            planned = rewrites.conv(f"{name}.downsample.0", conv, norm)
            self.downsample = ConvNorm(planned, norm)
        else:
            self.downsample = block.downsample

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """The block's output; ``overwrite`` allows it to be written where x is."""
        if self.training:
            raise RuntimeError(
                "a model from optimize_for_inference has no training mode; train the model that it "
                "was made from, and optimize that again"
            )
        identity = x if self.downsample is None else self.downsample(x)
        if isinstance(self.downsample, ConvNorm):
            overwrite = not hooked(self.downsample, self.downsample[0])
        out = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(out, identity, relu=True, overwrite=overwrite)


class PlannedStage(nn.Sequential):
    """PlannedBlocks in a row: each may write over what the one before made for it alone."""

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self):
            # Whoever hooked in before or behind this tensor may have kept it.
            x = block(x, overwrite=i > 0 and not hooked(self[i - 1], block, block.conv1))
        return x


class ConvNorm(nn.Sequential):
    """A PlannedConv, and the norm that is part of it already."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


class PassedNorm(Derived):
    """A BatchNorm2d that is part of the PlannedConv before it: it hands on what it gets."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm, None)
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x


def is_conv_norm(module: nn.Module | None) -> bool:
    return (
        type(module) is nn.Sequential
        and len(module) == 2
        and is_plain_conv(module[0])
        and is_norm(module[1])
    )


def is_plain_conv(module: nn.Module | None) -> bool:
    """Whether it is a Conv2d and nothing more: no subclass, parametrised weight or odd padding."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros"


def is_norm(module: nn.Module | None) -> bool:
    """Whether it has a BatchNorm2d's statistics and parameters, trained or frozen."""
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    return all(hasattr(module, name) for name in names) and module.running_mean is not None
