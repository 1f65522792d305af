"""FusedPSAModule: a PSA module that runs its tail as one operator, ``psa_tail``."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from epsanet_fused.backends.interface import SEWeights
from epsanet_fused.nn.equivalence import prove
from epsanet_fused.nn.grouped_conv import merged_conv
from epsanet_fused.nn.psa import PSAModule, SEWeightModule, recalibrate_and_concat
from epsanet_fused.nn.psa_layers import PSALayers, UnfusableError
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.ops.psa_tail_norm import psa_tail_norm
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import are_unmodified, has_hooks, is_unmodified

torch.fx.wrap("psa_tail")  # symbolic tracing records one call of the operator

CONVS = ("conv_1", "conv_2", "conv_3", "conv_4")
LAYERS = (*CONVS, "se.fc1", "se.fc2")
# The classes of a SEWeightModule and of its children.
SE_KINDS: tuple[type[nn.Module], ...] = (
    SEWeightModule,
    nn.AdaptiveAvgPool2d,
    nn.Conv2d,
    nn.ReLU,
    nn.Conv2d,
    nn.Sigmoid,
)


def missing_layers(module: nn.Module) -> list[str]:
    """Return those of ``LAYERS`` that are not a Conv2d in ``module``, whatever its class is."""
    se = getattr(module, "se", None)
    layers = {name: getattr(module, name, None) for name in CONVS}
    layers |= {f"se.{name}": getattr(se, name, None) for name in ("fc1", "fc2")}
    return [name for name, layer in layers.items() if not isinstance(layer, nn.Conv2d)]


def is_psa(module: nn.Module) -> bool:
    """Return whether ``module`` has all the layers of a PSA module under their official names."""
    return not missing_layers(module)


class FusedPSAModule(PSAModule):
    """Drop-in for ``PSAModule``: the same signature, state_dict keys and numbers in less time.

    PyTorch runs the four convolutions; ``psa_tail`` runs everything that follows them. Arguments,
    errors and shapes are those of ``PSAModule``.

    Attributes:
        merged_groups: number of groups to run each of the four convolutions with, set by
            ``ef.use_plans``; None runs them with their own.
    """

    merged_groups: tuple[int, ...] | None = None
    _se_kinds: tuple[type[nn.Module], ...] = SE_KINDS

    @classmethod
    def from_reference(cls, module: nn.Module) -> FusedPSAModule:
        """Build a fused module that shares the convolutions and the SE module of ``module``.

        A module of another class than ``PSAModule`` is verified on random inputs first, as by
        ``ef.fuse``. If its SE is another one than the official, the SE is called.

        Args:
            module: a ``PSAModule`` or any module with the same layers, such as the official one:
                Conv2d layers ``conv_1`` to ``conv_4``, ``se.fc1`` and ``se.fc2``. It is not
                changed and can still be used.

        Returns:
            The fused module, in the training mode of ``module``.

        Raises:
            TypeError: if one of these layers is missing, if ``module`` has anything that the fused
                module would not have (further layers, hooks, a forward of its own), or if it
                computes something else.
        """
        if wrong := missing_layers(module):
            raise TypeError(
                f"FusedPSAModule.from_reference: module must be a PSAModule, with Conv2d layers "
                f"{', '.join(LAYERS)}; {type(module).__name__} has none at {', '.join(wrong)}"
            )
        if lost := _lost_parts(module):
            raise TypeError(
                f"FusedPSAModule.from_reference: module must be a PSAModule alone; the fused "
                f"module would be without {', '.join(lost)} of {type(module).__name__}"
            )
        if type(module) in (PSAModule, FusedPSAModule):
            return cls._sharing(module, getattr(module, "_se_kinds", SE_KINDS))
        return cls._sharing(module, _prove(module))

    @classmethod
    def _sharing(cls, module: nn.Module, se_kinds: tuple[type[nn.Module], ...]) -> FusedPSAModule:
        """Build a fused module on the layers of ``module``, which reads an SE of these kinds."""
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        for name in (*CONVS, "se"):
            fused.add_module(name, getattr(module, name))
        fused.training = module.training
        if se_kinds != SE_KINDS:
            fused._se_kinds = se_kinds
        return fused

    def convolve(self, x: Tensor) -> list[Tensor]:
        """Return the four branches, computed with ``merged_groups`` where those are set."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles both sides of "and"
            if self.merged_groups is not None:
                pairs = zip(CONVS, self.merged_groups, strict=True)
                return [_convolve(x, getattr(self, name), groups) for name, groups in pairs]
        return [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return ``psa_tail`` of the branches of ``x``.

        Without ``reads_se()``, and in TorchScript, the SE is called, as in ``PSAModule``.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.reads_se():
                return psa_tail(self.convolve(x), *self._se_weights())
        branches = self.convolve(x)
        return recalibrate_and_concat(branches, [self.se(branch) for branch in branches])

    def forward_norm(self, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        """Return ``relu(norm(self(x)))``, computed by ``psa_tail_norm``.

        Args:
            x: (B, inplans, H, W).
            norm: a norm in training mode; its running statistics are updated.
        """
        return psa_tail_norm(self.convolve(x), *self._se_weights(), norm)

    def reads_se(self) -> bool:
        """Return whether ``psa_tail`` computes what a call of the SE does.

        False if somebody relies on calls: if the SE or a layer in it has a hook, a forward of its
        own, another class than at first (an adapter, a parametrisation), or sharded weights.
        """
        se: Any = self._modules["se"]  # faster than self.se
        return are_unmodified((se, *se._modules.values()), self._se_kinds)

    def _se_weights(self) -> SEWeights:
        se: Any = self._modules["se"]
        return se_weights(se._modules["fc1"], se._modules["fc2"])

    def extra_repr(self) -> str:
        """Return the widths, and what runs the tail."""
        channels = self.conv_1.out_channels
        tail = "psa_tail" if self.reads_se() else "plain, as the SE is modified"
        hidden = getattr(self.se.fc1, "out_channels", "?")
        return f"branches=4, channels_per_branch={channels}, hidden={hidden}, tail={tail}"


def se_weights(fc1: Any, fc2: Any) -> SEWeights:
    """Return the weights of an SE's two layers; the bias of a layer without one is zero."""
    return SEWeights(*_weight_and_bias(fc1), *_weight_and_bias(fc2))


def _weight_and_bias(fc: Any) -> tuple[Tensor, Tensor]:
    # Not fc.weight, unless it is parametrised: each attribute of a module takes half a microsecond.
    parameters = fc._parameters
    weight = parameters["weight"] if "weight" in parameters else fc.weight  # noqa: SIM401
    bias = parameters["bias"] if "bias" in parameters else fc.bias  # noqa: SIM401
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


def _convolve(x: Tensor, conv: nn.Module, groups: int) -> Tensor:
    """Return ``conv(x)``, with ``groups`` groups unless somebody relies on a call of the layer."""
    if is_unmodified(conv, nn.Conv2d):
        return merged_conv(x, conv, groups)  # type: ignore[arg-type]
    out: Tensor = conv(x)
    return out


def _lost_parts(module: nn.Module) -> list[str]:
    """Return what a module on the layers of ``module`` would not have, in words."""
    layers = (*CONVS, "se")
    lost = [
        name
        for name, child in module._modules.items()
        if name not in layers
        and child is not None
        and (any(child.state_dict()) or has_hooks(child))
    ]
    lost += [*module._parameters, *module._buffers]
    if has_hooks(module) or module._state_dict_hooks or module._load_state_dict_pre_hooks:
        lost.append("the hooks")
    if "forward" in vars(module):
        lost.append("the forward that was replaced")
    return lost


def kinds_of_se(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return the classes of the SE and its children; () if these have children of their own."""
    se: Any = module.se
    children = list(se._modules.values())
    if any(child is None or child._modules for child in children):
        return ()
    return tuple(map(type, (se, *children)))


def _prove(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """Prove that ``module`` computes what a fused module on its layers does.

    Returns:
        The classes of the SE and its children, if it is the official SE; () if it must be called.

    Raises:
        TypeError: if it computes something else.
    """
    kinds = kinds_of_se(module)
    layers = PSALayers(CONVS, (("se.fc1", "se.fc2"),))
    try:
        verdict = prove(
            module,
            layers,
            split_input=False,
            candidates=lambda overwrites: [] if overwrites else [kinds, ()],
            build=FusedPSAModule._sharing,
        )
        reason = verdict.reason
    except UnfusableError as error:
        verdict, reason = None, str(error)
    if verdict is None or not verdict.found:
        raise TypeError(
            f"FusedPSAModule.from_reference: module must compute what a PSAModule computes, but "
            f"{type(module).__name__}: {reason}; it has {_children(module)}"
        )
    return verdict.found[0]


def _children(module: nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
