"""PSA module, block and stage for inference: the modules that replace those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.inference.conv import CachedWeights, PlannedConv
from epsanet_fused.inference.conv_weights import norm_scale_shift
from epsanet_fused.nn.fused_psa import CONVS, is_psa, kinds_of_se, se_weights
from epsanet_fused.nn.grouped_conv import ConvPlan
from epsanet_fused.nn.psa import recalibrate_and_concat
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import are_unmodified, has_hooks
from epsanet_fused.utils.memory_format import MEMORY_FORMATS, memory_format_name
from epsanet_fused.utils.tracked import untrack_all


class Rewrites(NamedTuple):
    """The rewrites to apply.

    memory_format: of all activations.
    fold: fold BatchNorms into the convolutions before them.
    epilogue: run the BatchNorm and ReLU after a PSA module in its tail.
    fused_calls: use the library's own convolution + residual + ReLU.
    plans: how to run the convolutions that have a plan, by their name in the model.
    """

    memory_format: torch.memory_format = torch.contiguous_format
    fold: bool = True
    epilogue: bool = True
    fused_calls: bool = True
    plans: Mapping[str, ConvPlan] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.save's default protocol can't write a torch.memory_format.
        return _rewrites, (memory_format_name(self.memory_format), *self[1:])

    def planned_conv(
        self, name: str, conv: nn.Conv2d, norm: nn.Module | None = None, relu: bool = False
    ) -> PlannedConv:
        """Return the rewritten convolution, with the norm and the ReLU that follow it, if any."""
        return PlannedConv(
            conv,
            norm,
            plan=self.plans.get(name),
            memory_format=self.memory_format,
            fold=self.fold,
            fused_calls=self.fused_calls,
            relu=relu,
        )


def _rewrites(memory_format: str, *rest: Any) -> Rewrites:
    return Rewrites(MEMORY_FORMATS[memory_format], *rest)


class PlannedPSA(CachedWeights):
    """A PSA module for inference, with an optional BatchNorm2d and ReLU after it.

    Args:
        name: its name in the model.
        psa: with the layers that ``FusedPSAModule.from_reference`` asks for.
        norm: the BatchNorm2d that follows it, or None.
        rewrites: the rewrites to apply.
    """

    conv_1: nn.Module
    conv_2: nn.Module
    conv_3: nn.Module
    conv_4: nn.Module

    def __init__(self, name: str, psa: Any, norm: nn.Module | None, rewrites: Rewrites) -> None:
        super().__init__(psa, norm)
        for conv in CONVS:
            setattr(self, conv, rewrites.planned_conv(f"{name}.{conv}", getattr(psa, conv)))
        self.se: Any = psa.se
        self.epilogue = rewrites.epilogue and norm is not None
        self._se_kinds = kinds_of_se(psa)

    def compute_weights(self) -> tuple[Tensor, Tensor]:
        """Return the scale and shift of the norm, for the tail's epilogue."""
        return norm_scale_shift(self.norm)

    @with_real_annotations
    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Return relu(norm(psa(x))); without the ReLU unless ``relu``."""
        out = self.run_psa(x, epilogue=self.epilogue, relu=relu)
        if not self.epilogue and self.norm is not None:
            out = self.norm(out)
        return F.relu(out) if relu and not self.epilogue else out

    def run_psa(self, x: Tensor, epilogue: bool = False, relu: bool = False) -> Tensor:
        """Return psa(x), with the norm and the ReLU if ``epilogue``."""
        branches = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]
        if not are_unmodified((self.se, *self.se._modules.values()), self._se_kinds):
            out = recalibrate_and_concat(branches, [self.se(branch) for branch in branches])
            if epilogue:
                out = self.norm(out)
            return F.relu(out) if epilogue and relu else out
        fc = se_weights(self.se.fc1, self.se.fc2)
        if epilogue:
            compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
            scale, shift = self.compute_weights() if compiling else self.cached_weights()
            return psa_tail(branches, *fc, scale=scale, shift=shift, relu=relu)
        return psa_tail(branches, *fc)


_BYPASSED = ("bn1", "bn2", "bn3", "relu")


class PlannedBlock(nn.Module):
    """An EPSABlock for inference, or the ResNet bottleneck that it comes from.

    Its children have the names that they had in ``block``, and so have the state_dict's keys.

    Args:
        name: its name in the model.
        block: with conv1, bn1, conv2 (a PSA module or a convolution), bn2, conv3, bn3, downsample.
        rewrites: the rewrites to apply.
    """

    def __init__(self, name: str, block: Any, rewrites: Rewrites) -> None:
        super().__init__()
        # Other code may read the block's public attributes, such as the stride.
        own = {key: value for key, value in vars(block).items() if not key.startswith("_")}
        vars(self).update(own)
        for key, child in block.named_children():
            self.add_module(key, child)
        self.conv1 = rewrites.planned_conv(f"{name}.conv1", block.conv1, block.bn1)
        self.conv2: nn.Module = (
            PlannedPSA(f"{name}.conv2", block.conv2, block.bn2, rewrites)
            if is_psa(block.conv2)
            else rewrites.planned_conv(f"{name}.conv2", block.conv2, block.bn2)
        )
        self.conv3 = rewrites.planned_conv(f"{name}.conv3", block.conv3, block.bn3)
        self.downsample: nn.Module | None = block.downsample
        if is_conv_norm(block.downsample):
            conv, norm = block.downsample
            planned = rewrites.planned_conv(f"{name}.downsample.0", conv, norm)
            self.downsample = ConvNorm(planned, norm)
        # They are not called, unless somebody relies on it.
        self._bypassed = tuple(
            n for n in _BYPASSED if isinstance(getattr(self, n, None), nn.Module)
        )
        self._kinds = tuple(type(getattr(self, n)) for n in self._bypassed)

    @with_real_annotations
    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Return the block's output; ``overwrite`` allows it to be written to x's memory.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError(
                "a model from optimize_for_inference has no training mode; train the model that it "
                "was made from, and optimize that again"
            )
        if torch.compiler.is_compiling():
            untrack_all()
        if not are_unmodified([getattr(self, n) for n in self._bypassed], self._kinds):
            return self._call_all(x)
        downsample = self.downsample
        identity = x if downsample is None else downsample(x)
        if isinstance(downsample, ConvNorm):
            # Nothing else holds the identity then, unless a hook has kept it.
            overwrite = not has_hooks(downsample, downsample[0])
        out: Tensor = self.conv2(self.conv1(x, relu=True), relu=True)
        out = self.conv3(out, identity, relu=True, overwrite=overwrite)
        return out

    def _call_all(self, x: Tensor) -> Tensor:
        """Return the block's output; every norm and every ReLU is called."""
        parts: Any = self  # their types are known above
        relu, psa = getattr(self, "relu", F.relu), parts.conv2
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = relu(parts.bn1(self.conv1.run_conv(x)))
        out = psa.run_psa(out) if isinstance(psa, PlannedPSA) else psa.run_conv(out)
        out = parts.bn3(self.conv3.run_conv(relu(parts.bn2(out))))
        out = relu(out + identity)
        return out


class PlannedStage(nn.Sequential):
    """PlannedBlocks in a row: each may overwrite its input if only the block before holds it."""

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks one after another."""
        blocks: list[Any] = [*self]
        for i, block in enumerate(blocks):
            # A hook of either block may have kept this tensor.
            x = block(x, overwrite=i > 0 and not has_hooks(blocks[i - 1], block, block.conv1))
        return x


class ConvNorm(nn.Sequential):
    """A PlannedConv and the norm that it already applies."""

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Run the PlannedConv alone, unless somebody relies on a call of the norm."""
        conv: Any = self[0]
        out: Tensor = self[1](conv.run_conv(x)) if has_hooks(self[1]) else conv(x)
        return out


class FoldedNorm(nn.Module):
    """A BatchNorm2d that the PlannedConv before it applies: returns its input unchanged.

    Args:
        norm: the BatchNorm2d, whose parameters and buffers it shares.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name, parameter in norm._parameters.items():  # a parameter may be None
            self.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.eps = norm.eps
        self.training = False

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


def is_conv_norm(module: Any) -> bool:
    """Return whether ``module`` is an nn.Sequential of a plain Conv2d and a BatchNorm2d."""
    return (
        type(module) is nn.Sequential
        and len(module) == 2
        and is_plain_conv(module[0])
        and is_batch_norm(module[1])
    )


def is_plain_conv(module: Any) -> bool:
    """Return whether ``module`` is exactly a Conv2d (no subclass) with zeros as its padding."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros"


def is_batch_norm(module: Any) -> bool:
    """Return whether ``module`` has a BatchNorm2d's parameters and statistics, frozen or not."""
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    return all(hasattr(module, name) for name in names) and module.running_mean is not None
