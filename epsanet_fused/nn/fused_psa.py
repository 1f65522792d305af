"""FusedPSAModule: a PSA module that runs its tail as one operator, ``psa_tail``."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from epsanet_fused.backends.interface import SEWeights
from epsanet_fused.nn.equivalence import prove
from epsanet_fused.nn.grouped_conv import merged_conv, pads_evenly
from epsanet_fused.nn.psa import PSAModule, SEWeightModule, recalibrate_and_concat
from epsanet_fused.nn.psa_layers import PSALayers, UnfusableError
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.ops.psa_tail_norm import psa_tail_norm
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.hooks import are_unmodified, has_hooks, is_unmodified
from epsanet_fused.utils.replacing import call_original, is_replacement

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
    _kinds: tuple[type[nn.Module], ...] = SE_KINDS  # the classes of the modules not called
    __jit_ignored_attributes__ = ("merged_groups", "_kinds", "_originals")

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
        if type(module) not in (PSAModule, FusedPSAModule) or is_replacement(module, cls):
            return cls._sharing(module, _prove(module))
        fused = cls._sharing(module, getattr(module, "_kinds", SE_KINDS))
        fused.merged_groups = getattr(module, "merged_groups", None)
        return fused

    @classmethod
    def _sharing(cls, module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> FusedPSAModule:
        """Build a fused module on the layers of ``module``, which reads an SE of these kinds."""
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        for name in (*CONVS, "se"):
            fused.add_module(name, getattr(module, name))
        fused.training = module.training
        if kinds != SE_KINDS:
            fused._kinds = kinds
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

        Without ``reads_se()``, the module that this one replaced runs. In TorchScript the SE is
        called, as in ``PSAModule``.
        """
        if not torch.jit.is_scripting():
            if self.reads_se():
                return psa_tail(self.convolve(x), *self._se_weights())
            if is_replacement(self, FusedPSAModule):
                return call_original(self, FusedPSAModule, x)
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
        """Return whether ``psa_tail`` computes what calls of the SE and the softmax do.

        False if somebody relies on calls: if one of these modules has a hook, a forward of its
        own, another class than at first (an adapter, a parametrisation), or sharded weights.
        """
        return reads_se(self, self._kinds)

    def _se_weights(self) -> SEWeights:
        se: Any = self._modules["se"]
        return se_weights(se._modules["fc1"], se._modules["fc2"])

    def extra_repr(self) -> str:
        """Return the widths, and what runs the tail."""
        channels = self.conv_1.out_channels
        tail = "psa_tail" if self.reads_se() else "plain, as the SE or the softmax is modified"
        hidden = getattr(self.se.fc1, "out_channels", "?")
        return f"branches=4, channels_per_branch={channels}, hidden={hidden}, tail={tail}"


def se_weights(fc1: Any, fc2: Any) -> SEWeights:
    """Return the weights of an SE's two layers; the bias of a layer without one is zero."""
    return SEWeights(*_weight_and_bias(fc1), *_weight_and_bias(fc2))


def _weight_and_bias(fc: Any) -> tuple[Tensor, Tensor]:
    # Not fc.weight, unless it is parametrised: an attribute of a module is slow to find.
    parameters = fc._parameters
    weight = parameters["weight"] if "weight" in parameters else fc.weight  # noqa: SIM401
    bias = parameters["bias"] if "bias" in parameters else fc.bias  # noqa: SIM401
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


def _convolve(x: Tensor, conv: nn.Module, groups: int) -> Tensor:
    """Return ``conv(x)``, with ``groups`` groups unless somebody relies on a call of the layer."""
    is_traced = isinstance(x, torch.fx.Proxy)  # a graph has the layers, not what runs them
    if not is_traced and is_unmodified(conv, nn.Conv2d) and pads_evenly(conv):
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
        and (any(child.state_dict()) or has_hooks(*child.modules()))
    ]
    lost += [*module._parameters, *module._buffers]
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    if has_hooks(module) or any(vars(module)[n] for n in (*hooks, "_load_state_dict_post_hooks")):
        lost.append("the hooks")
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        lost.append("the extra state")
    for name in vars(module):
        if callable(getattr(type(module), name, None)):
            lost.append(f"the {name} that was replaced")
    return lost


def _bypassed_modules(psa: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of ``psa`` that a fused one doesn't call: the SE and what isn't a branch.

    Of the SE also its children. Written for speed: each call of a fused module asks this.
    """
    modules: Any = psa._modules
    se = modules["se"]
    found = (se, *se._modules.values())
    if len(modules) == 5:  # the branches and the SE
        return found
    layers = (*CONVS, "se")
    return found + tuple(m for name, m in modules.items() if name not in layers and m is not None)


def kinds_of_bypassed(psa: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return the classes of the modules that are not called; () if more is inside of these."""
    se, *others = _bypassed_modules(psa)
    if any(m is None or m._modules for m in others):
        return ()
    return tuple(map(type, (se, *others)))


def reads_se(psa: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether the weights of ``psa``'s SE are all that the modules not called stand for.

    Args:
        psa: a module with the layers of a PSA module.
        kinds: the classes of the modules that are not called.
    """
    if not are_unmodified(_bypassed_modules(psa), kinds):
        return False
    layers: Any = psa._modules["se"]._modules  # type: ignore[union-attr]
    return is_pointwise(layers["fc1"]) and is_pointwise(layers["fc2"])


def is_pointwise(layer: Any) -> bool:
    """Return whether ``layer`` is a Linear, or maps the channels of each pixel by one matrix."""
    if type(layer) is nn.Linear:
        return True
    return bool(layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding == (0, 0))


def _prove(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """Prove that ``module`` computes what a fused module on its layers does.

    Returns:
        The classes of the SE and its children, if it is the official SE; () if it must be called.

    Raises:
        TypeError: if it computes something else.
    """
    kinds = kinds_of_bypassed(FusedPSAModule._sharing(module, SE_KINDS))
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
