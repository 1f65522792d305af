"""The module that replaces a PSA module that differs from the official one."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.backends.interface import SEWeights
from epsanet_fused.nn.equivalence import PSALayers
from epsanet_fused.nn.fused_psa import se_weights
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import are_unmodified
from epsanet_fused.utils.memory_format import accumulator_dtype

# Symbolic tracing records one call of each of these.
torch.fx.wrap("psa_tail")
torch.fx.wrap("_se_attention")

Module = TypeVar("Module", bound=nn.Module)


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
    calls those of the branches. If all branches share one SE, ``psa_tail`` runs the rest. If each
    has its own, plain PyTorch runs it with few memory passes, because the operator has one SE. If
    somebody relies on calls of an SE (see utils/hooks.py), the original's forward runs.

    Shape: (B, C_in, H, W) -> (B, S * C, H', W').
    """

    spec: PSASpec
    _original: type[nn.Module]  # the class of the module that this one replaces
    _se_kinds: tuple[type[nn.Module], ...]  # the classes of the modules that are not called

    @classmethod
    def from_module(cls, module: nn.Module, spec: PSASpec) -> FusedPSAVariant:
        """Build the replacement of ``module``, with which it shares its state."""
        fused = replace_class(module, cls)
        fused.spec = spec
        fused._original = type(module)
        fused._se_kinds = tuple(map(type, fused._se_modules()))
        return fused

    def reads_ses(self) -> bool:
        """Return whether the SEs' weights are all that counts: nobody relies on calls of them."""
        return are_unmodified(self._se_modules(), self._se_kinds)

    def _se_modules(self) -> list[nn.Module]:
        """Return all modules that are not called: the SEs, and what holds them."""
        branches = {name.partition(".")[0] for name in self.spec.layers.branches}
        ses = {first.partition(".")[0] for first, _ in self.spec.layers.ses}
        found = [self._modules[name] for name in sorted(ses - branches)]
        for part in found:
            if part is not None:
                found += part._modules.values()
        return [part for part in found if part is not None]

    def _unfused(self) -> nn.Module:
        """Return a module of the original's class on the same attributes."""
        original = self._original.__new__(self._original)
        original.__dict__ = self.__dict__
        return original

    def __prepare_scriptable__(self) -> nn.Module:
        """Let TorchScript compile the original's forward.

        It compiles the class that a module has. The next call makes a fused module of it again.
        """
        kind = self._original

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
        if not self.reads_ses():
            out: Tensor = self._unfused().forward(x)
            return out
        # What is written over x would be missing in the backward of the convolutions.
        keeps_x = spec.overwrites_input and torch.is_grad_enabled()
        branches = self._convolve(x.clone() if keeps_x else x)  # S tensors (B, C, H', W')
        concat = None
        if spec.overwrites_input:
            concat = torch.cat(branches, 1)  # (B, S * C, H', W')
            x.copy_(concat)
        ses = [self._se_weights(*names) for names in spec.layers.ses]
        if len(ses) == 1:  # psa_tail puts the last branch first
            return psa_tail(branches if spec.is_reversed else branches[::-1], *ses[0])
        attention = _se_attention(branches, ses)[..., None, None]  # (B, S, C, 1, 1)
        if concat is not None and not spec.is_reversed:
            separate = concat.unflatten(1, (len(branches), -1))
            return (separate * attention).flatten(1, 2)
        scaled = [branch * attention[:, i] for i, branch in enumerate(branches)]
        return torch.cat(scaled[::-1] if spec.is_reversed else scaled, 1)

    def _convolve(self, x: Tensor) -> list[Tensor]:
        modules = [self.get_submodule(name) for name in self.spec.layers.branches]
        inputs = [x] * len(modules)
        if self.spec.split_input:
            C = x.shape[1] // len(modules)
            inputs = [x[:, i * C : (i + 1) * C] for i in range(len(modules))]
        branches = [module(share) for module, share in zip(modules, inputs, strict=True)]
        return [F.relu(branch) for branch in branches] if self.spec.relu else branches

    def _se_weights(self, first: str, second: str) -> SEWeights:
        return se_weights(self.get_submodule(first), self.get_submodule(second))

    def extra_repr(self) -> str:
        """Return the number of branches, how they are used, and what runs the tail."""
        layers, split = self.spec.layers, self.spec.split_input
        order = "reversed" if self.spec.is_reversed else "natural"
        tail = "psa_tail" if len(layers.ses) == 1 else "one SE per branch, in plain PyTorch"
        if not self.reads_ses():
            tail = f"that of {self._original.__name__}, as an SE is modified"
        return f"branches={len(layers.branches)}, split={split}, order={order}, tail={tail}"


def replace_class(module: nn.Module, cls: type[Module]) -> Module:
    """Return a ``cls`` with the state of ``module``: submodules, parameters, hooks, attributes.

    Attributes that other code has set on the module are kept too: YOLO's parser stores the index
    of each layer's input on the layer.
    """
    made = cls.__new__(cls)
    made.__dict__.update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = copy.copy(vars(module)[name])
    return made


def _se_attention(branches: list[Tensor], ses: list[SEWeights]) -> Tensor:
    """Return the attention (B, S, C) of S branches with one SE each, in the branches' dtype."""
    acc = accumulator_dtype(branches[0].dtype)
    gates = []
    with torch.autocast(branches[0].device.type, enabled=False):
        for x, se in zip(branches, ses, strict=True):
            fc1, bias1, fc2, bias2 = (w.to(acc) for w in se)
            squeeze = x.mean((2, 3), dtype=acc)  # (B, C)
            hidden = F.relu(F.linear(squeeze, fc1.flatten(1), bias1))  # (B, R)
            gates.append(torch.sigmoid(F.linear(hidden, fc2.flatten(1), bias2)))  # (B, C)
        return torch.softmax(torch.stack(gates, 1), 1).to(branches[0].dtype)
