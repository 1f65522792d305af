"""A stem for inference: conv1, bn1 and relu of a model run as one call, that of conv1."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.conv import PlannedConv
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import are_unmodified
from epsanet_fused.utils.replacing import call_original, original_of, take_state


class _Stem(NamedTuple):
    """The module that the folded layers are in. A tuple hides it from nn.Module.

    layers: the names of these layers: conv1, bn1 and, if it is folded too, relu.
    """

    module: nn.Module
    layers: tuple[str, ...]


def fold_stem(stem: Any, name: str, relu: bool, rewrites: Rewrites) -> None:
    """Let the stem's conv1 apply bn1, and with ``relu`` the ReLU after it.

    Args:
        stem: a module whose bn1 takes the output of its conv1, and its relu that of bn1.
        name: its name in the model.
        relu: fold the ReLU, too.
        rewrites: the rewrites to apply.
    """
    stem.bn1 = FoldedNorm(stem.bn1)
    stem.conv1 = rewrites.planned_conv(f"{name}.conv1".lstrip("."), stem.conv1, stem.bn1, StemConv)
    layers: tuple[str, ...] = ("conv1", "bn1")
    if relu:
        stem.relu = FoldedReLU(stem.relu)
        layers += ("relu",)
    for layer in layers:
        getattr(stem, layer)._stem = _Stem(stem, layers)


def move_stem(made: nn.Module, model: nn.Module) -> None:
    """Tell the parts of the stem ``made`` that they are in ``model`` now."""
    for part in model.modules():
        if isinstance(part, (StemConv, FoldedNorm, FoldedReLU)) and part._stem.module is made:
            part._stem = part._stem._replace(module=model)


class StemConv(PlannedConv):
    """A stem's convolution, whose call computes the norm and the ReLU behind it, too.

    If somebody relies on calls of one of them, each computes its own part.
    """

    _stem: _Stem

    def is_folded(self) -> bool:
        """Return whether a call of this convolution computes the whole stem."""
        stem, layers = self._stem
        parts: Any = [stem._modules.get(name) for name in layers]
        kinds = (StemConv, FoldedNorm, FoldedReLU)[: len(layers)]
        return parts[0] is self and are_unmodified(parts, kinds) and self.reads_layers(parts[1])

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return relu(norm(conv(x))), as far as the stem is folded."""
        if self.is_folded():
            return self.run(x, relu="relu" in self._stem.layers)
        return super().forward(x)


def _is_folded(stem: nn.Module) -> bool:
    conv = stem._modules.get("conv1")
    return type(conv) is StemConv and conv.is_folded()


class FoldedNorm(nn.BatchNorm2d):
    """A BatchNorm2d that the StemConv before it applies: returns its input unchanged.

    Args:
        norm: the norm, whose parameters and buffers it shares.
    """

    _stem: _Stem

    def __init__(self, norm: nn.Module) -> None:
        take_state(self, norm, FoldedNorm)

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, or what the norm makes of it if the stem is not folded now."""
        if _is_folded(self._stem.module):
            return x
        return call_original(self, FoldedNorm, x)

    def extra_repr(self) -> str:
        """Return the norm's."""
        return original_of(self, FoldedNorm).extra_repr()


class FoldedReLU(nn.ReLU):
    """A ReLU that the StemConv before it applies: returns its input unchanged.

    Args:
        relu: the ReLU.
    """

    _stem: _Stem

    def __init__(self, relu: nn.Module) -> None:
        take_state(self, relu, FoldedReLU)

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, or its ReLU if the stem is not folded now."""
        return x if _is_folded(self._stem.module) else F.relu(x, self.inplace)
