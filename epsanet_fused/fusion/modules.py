"""The module that replaces a PSA module that differs from the official one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.backends.interface import SEWeights
from epsanet_fused.nn.fused_psa import is_pointwise, se_weights
from epsanet_fused.nn.psa_layers import PSALayers
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import are_unmodified
from epsanet_fused.utils.replacing import call_original, original_class, replace_class

torch.fx.wrap("psa_tail")  # symbolic tracing records one call of the operator


class PSASpec(NamedTuple):
    """The layers of a PSA module and how it uses them; the defaults are the official module's.

    Attributes:
        layers: the names of its branches and SE layers; the smallest kernel's branch comes first.
        split_input: True if each branch takes an equal share of the input's channels, False if it
            takes all of them.
        relu: True if a ReLU that is not a submodule follows each branch.
        is_reversed: True if the last branch comes first in the output.
        overwrites_input: True if the module writes the branches into its input.
    """

    layers: PSALayers
    split_input: bool = False
    relu: bool = False
    is_reversed: bool = True
    overwrites_input: bool = False


class FusedPSAVariant(nn.Module):
    """Fused replacement of a PSA module that ``FusedPSAModule`` cannot express.

    ``epsanet_fused.fuse`` builds it. It keeps the submodules of the original under their names, and
    calls those of the branches; ``psa_tail`` runs the rest. If somebody relies on calls of another
    module in it (see utils/hooks.py), the original's forward runs.

    Shape: (B, C_in, H, W) -> (B, S * C, H', W').
    """

    spec: PSASpec
    _kinds: tuple[type[nn.Module], ...]  # the classes of the modules that are not called
    _places: tuple[tuple[int, int], ...]  # where each SE's two layers are among them

    @classmethod
    def from_module(cls, module: nn.Module, spec: PSASpec) -> FusedPSAVariant:
        """Build the replacement of ``module``, with which it shares its state."""
        fused = replace_class(module, cls)
        fused.spec = spec
        parts = fused._bypassed_modules(fused._branches())
        fused._kinds = tuple(map(type, parts))
        pairs = [(_find(fused, a), _find(fused, b)) for a, b in spec.layers.ses]
        fused._places = tuple((parts.index(a), parts.index(b)) for a, b in pairs)
        return fused

    def reads_ses(self) -> bool:
        """Return whether the SEs' weights are all that counts: nobody relies on calls.

        That is, of the SEs or any other module in this one that isn't in a branch.
        """
        return self._ses(self._branches()) is not None

    def _ses(self, branches: list[nn.Module]) -> list[SEWeights] | None:
        """Return the weights of the SEs, or None if somebody relies on calls."""
        parts = self._bypassed_modules(branches)
        if not branches or not are_unmodified(parts, self._kinds):
            return None
        ses = [(parts[i], parts[j]) for i, j in self._places]
        if not all(is_pointwise(a) and is_pointwise(b) for a, b in ses):
            return None
        return [se_weights(a, b) for a, b in ses]

    def _branches(self) -> list[nn.Module]:
        """Return the branches, or an empty list if one was removed."""
        try:
            return [_find(self, name) for name in self.spec.layers.branches]
        except KeyError:
            return []

    def _bypassed_modules(self, called: list[nn.Module]) -> list[nn.Module]:
        """Return all modules that are not called: those that are not in a branch."""
        branches = set(map(id, called))
        found: list[nn.Module] = [self]
        for part in found:
            for child in part._modules.values():
                if child is not None and id(child) not in branches:
                    found.append(child)
        return found[1:]

    def __prepare_scriptable__(self) -> nn.Module:
        """Let TorchScript compile the original's forward.

        It compiles the class that a module has. The next call makes a fused module of it again.
        """
        kind = original_class(self, FusedPSAVariant)

        def call(module: nn.Module, *args: Any, **options: Any) -> Any:
            module.__class__ = FusedPSAVariant
            return module(*args, **options)

        def reduce(module: nn.Module, protocol: Any) -> Any:
            module.__class__ = FusedPSAVariant
            return module.__reduce_ex__(protocol)

        own = {"__call__": call, "__reduce_ex__": reduce, "__module__": kind.__module__}
        self.__class__ = type(kind.__name__, (kind,), own)
        return self

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return what the original returns; ``x`` is overwritten if the original does that."""
        spec = self.spec
        modules = self._branches()
        ses = self._ses(modules)
        if ses is None:
            return call_original(self, FusedPSAVariant, x)
        # What is written over x would be missing in the backward of the convolutions.
        keeps_x = spec.overwrites_input and torch.is_grad_enabled()
        branches = self._convolve(x.clone() if keeps_x else x, modules)  # S tensors (B, C, H', W')
        if spec.overwrites_input:
            x.copy_(torch.cat(branches, 1))  # (B, S * C, H', W')
        if not spec.is_reversed:  # psa_tail puts the last branch first
            branches, ses = branches[::-1], ses[::-1]
        return psa_tail(branches, *(ses[0] if len(ses) == 1 else _stack(ses)))

    def _convolve(self, x: Tensor, modules: list[nn.Module]) -> list[Tensor]:
        inputs = [x] * len(modules)
        if self.spec.split_input:
            C = x.shape[1] // len(modules)
            inputs = [x[:, i * C : (i + 1) * C] for i in range(len(modules))]
        branches = [module(share) for module, share in zip(modules, inputs, strict=True)]
        return [F.relu(branch) for branch in branches] if self.spec.relu else branches

    def extra_repr(self) -> str:
        """Return the number of branches, how they are used, and what runs the tail."""
        layers, split = self.spec.layers, self.spec.split_input
        order = "reversed" if self.spec.is_reversed else "natural"
        tail = "psa_tail"
        if not self.reads_ses():
            kind = original_class(self, FusedPSAVariant)
            tail = f"that of {kind.__name__}, as a part of it is modified"
        return f"branches={len(layers.branches)}, split={split}, order={order}, tail={tail}"


def _find(module: nn.Module, name: str) -> nn.Module:
    """Return the submodule of this name; ``get_submodule`` takes ten times as long."""
    found: Any = module
    for part in name.split("."):
        found = found._modules[part]
    return found


def _stack(ses: list[SEWeights]) -> SEWeights:
    """Return the SEs of all branches in one: (S, R, C), (S, R), (S, C, R) and (S, C)."""
    weight1, bias1, weight2, bias2 = (torch.stack(tensors) for tensors in zip(*ses, strict=True))
    return SEWeights(weight1.flatten(2), bias1, weight2.flatten(2), bias2)
