"""PSA module, block and stage for inference: the modules that replace those of a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.backends.interface import SEWeights
from epsanet_fused.inference.conv import CachedWeights, PlannedConv, refuse_transforms
from epsanet_fused.inference.conv_weights import norm_scale_shift
from epsanet_fused.nn.fused_psa import CONVS, is_psa, kinds_of_bypassed, reads_se, se_weights
from epsanet_fused.nn.grouped_conv import ConvPlan, is_plain_conv
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import are_unmodified
from epsanet_fused.utils.memory_format import MEMORY_FORMATS, memory_format_name
from epsanet_fused.utils.replacing import call_original, take_state
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
        self,
        name: str,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        kind: type[PlannedConv] = PlannedConv,
    ) -> PlannedConv:
        """Return the rewritten convolution, with the norm that follows it, if any."""
        return kind(
            conv,
            norm,
            plan=self.plans.get(name),
            memory_format=self.memory_format,
            fold=self.fold,
            fused_calls=self.fused_calls,
        )


def _rewrites(memory_format: str, *rest: Any) -> Rewrites:
    return Rewrites(MEMORY_FORMATS[memory_format], *rest)


class PlannedPSA(CachedWeights):
    """A PSA module for inference, with an optional BatchNorm2d and ReLU after it.

    A call computes the PSA module alone; ``run`` computes all of it.

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
    se: Any

    def __init__(self, name: str, psa: Any, norm: nn.Module | None, rewrites: Rewrites) -> None:
        super().__init__(psa, norm)
        for conv in CONVS:
            setattr(self, conv, rewrites.planned_conv(f"{name}.{conv}", getattr(psa, conv)))
        self.epilogue = rewrites.epilogue and norm is not None
        self._read_kinds = kinds_of_bypassed(psa)

    def compute_weights(self) -> tuple[Tensor, Tensor]:
        """Return the scale and shift of the norm, for the tail's epilogue."""
        return norm_scale_shift(self.norm)

    def reads_layers(self, norm: nn.Module | None = None) -> bool:
        """Return whether ``run`` computes this module and ``norm``, the module behind it."""
        return reads_se(self, self._read_kinds) and self.reads_norm(norm)

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return the PSA module's output; where somebody relies on calls, the original's code."""
        if reads_se(self, self._read_kinds):
            return psa_tail(self._convolve(x), *self._se_weights(x))
        return call_original(self, PlannedPSA, x)

    def run(self, x: Tensor, relu: bool = False) -> Tensor:
        """Return relu(norm(psa(x))); without the ReLU unless ``relu``."""
        branches, fc = self._convolve(x), self._se_weights(x)
        if self.epilogue:
            compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
            scale, shift = self.compute_weights() if compiling else self.cached_weights()
            return psa_tail(branches, *fc, scale=scale, shift=shift, relu=relu)
        out = psa_tail(branches, *fc)
        if self.norm is not None:
            out = self.norm(out)
        return F.relu(out) if relu else out

    def _convolve(self, x: Tensor) -> list[Tensor]:
        return [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]

    def _se_weights(self, x: Tensor) -> SEWeights:
        fc = se_weights(self.se.fc1, self.se.fc2)
        refuse_transforms(x, itertools.chain(fc, self.own_parameters()))
        return fc


class PlannedBlock(nn.Module):
    """An EPSABlock for inference, or the ResNet bottleneck that it comes from.

    It has the state of ``block``: its children have the names that they had there. If somebody
    relies on calls of one of them, the block's own code runs, and calls them all.

    Args:
        name: its name in the model.
        block: with conv1, bn1, conv2 (a PSA module or a convolution), bn2, conv3, bn3, downsample.
        rewrites: the rewrites to apply.
    """

    def __init__(self, name: str, block: Any, rewrites: Rewrites) -> None:
        take_state(self, block, PlannedBlock)
        self.conv1 = rewrites.planned_conv(f"{name}.conv1", block.conv1, block.bn1)
        self.conv2: Any = (
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
        self._read_kinds = tuple(map(type, self._read_modules()))

    def _read_modules(self) -> list[nn.Module]:
        """Return the children that ``run`` doesn't call: all but the downsample."""
        children = self._modules.items()
        return [m for name, m in children if name != "downsample" and m is not None]

    def reads_layers(self) -> bool:
        """Return whether ``run`` computes the block: nobody relies on calls of its children."""
        if not are_unmodified(self._read_modules(), self._read_kinds):
            return False
        children: Any = self._modules
        return (
            children["conv1"].reads_layers(children["bn1"])
            and children["conv2"].reads_layers(children["bn2"])
            and children["conv3"].reads_layers(children["bn3"])
        )

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output.

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
        if self.reads_layers():
            return self.run(x)
        return call_original(self, PlannedBlock, x)

    def run(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Return the block's output; ``overwrite`` allows it to be written to x's memory."""
        downsample = self.downsample
        if downsample is None:
            identity = x
        elif type(downsample) is ConvNorm and downsample.reads_layers():
            identity = downsample.run(x)
            overwrite = True  # nothing else holds the identity
        else:
            identity, overwrite = downsample(x), False
        out: Tensor = self.conv2.run(self.conv1.run(x, relu=True), relu=True)
        out = self.conv3.run(out, identity, relu=True, overwrite=overwrite)
        return out


class PlannedStage(nn.Sequential):
    """PlannedBlocks in a row: each may overwrite its input if only the block before holds it."""

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks one after another."""
        blocks: Iterable[Any] = self
        is_ours = False  # whether nobody else can have kept x
        for block in blocks:
            runs = are_unmodified((block,), (PlannedBlock,)) and block.reads_layers()
            x = block.run(x, overwrite=is_ours) if runs and not block.training else block(x)
            is_ours = runs
        return x


class ConvNorm(nn.Sequential):
    """A PlannedConv and the norm that follows it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._read_kinds = (ConvNorm, *map(type, layers))

    def reads_layers(self) -> bool:
        """Return whether ``run`` computes both: nobody relies on calls of them, or of this one."""
        layers: Any = list(self)
        if not are_unmodified((self, *layers), self._read_kinds):
            return False
        conv, norm = layers
        return bool(conv.reads_layers(norm))

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return norm(conv(x))."""
        return self.run(x) if self.reads_layers() else super().forward(x)

    def run(self, x: Tensor) -> Tensor:
        """Return norm(conv(x)), computed by the convolution."""
        conv: Any = self[0]
        out: Tensor = conv.run(x)
        return out


def is_conv_norm(module: Any) -> bool:
    """Return whether ``module`` is an nn.Sequential of a plain Conv2d and a BatchNorm2d."""
    return (
        type(module) is nn.Sequential
        and len(module) == 2
        and is_plain_conv(module[0])
        and is_batch_norm(module[1])
    )


def is_batch_norm(module: Any) -> bool:
    """Return whether ``module`` has a BatchNorm2d's parameters and statistics, frozen or not."""
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    return all(hasattr(module, name) for name in names) and module.running_mean is not None
