"""Tell whether a module may be bypassed: whether its weights are all that a call of it uses.

A fused module reads the weights of some layers and doesn't call them. Many tools rely on the call:
hooks (pruning, weight and spectral norm, per-sample gradients), replaced forwards (offloading), and
other classes in the place of a layer (adapters, parametrisations, sharded or quantized layers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from epsanet_fused.utils.tracked import TrackedParameter

_common = nn.modules.module
_ORDINARY = (nn.Parameter, TrackedParameter, Tensor, type(None))
# Exporters run a model on tensors of classes from here, which stand for ordinary ones.
_TRACING = "torch._subclasses."


def has_hooks(*modules: nn.Module) -> bool:
    """Tell whether one of these modules has a hook, or a global hook on all modules exists."""
    return bool(
        _common._global_forward_hooks
        or _common._global_forward_pre_hooks
        or _common._global_backward_hooks
        or _common._global_backward_pre_hooks
    ) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a call of ``module`` runs ``kind.forward`` alone, on ordinary weights.

    That excludes subclasses (a parametrized layer is of one), hooks, a forward of its own, and
    parameters that are sharded, quantized, not there yet, or put in place by a hook.
    """
    return are_unmodified((module,), (kind,))


def are_unmodified(modules: Sequence[nn.Module], kinds: Sequence[type[nn.Module]]) -> bool:
    """Tell whether these modules are of these classes, one each, and unmodified.

    Written for speed: each call of a fused module asks this.
    """
    if (
        _common._global_forward_hooks
        or _common._global_forward_pre_hooks
        or _common._global_backward_hooks
        or _common._global_backward_pre_hooks
        or len(modules) != len(kinds)
    ):
        return False
    for m, kind in zip(modules, kinds):  # noqa: B905  their lengths are the same
        own = m.__dict__  # found faster than attributes of a module
        if (
            type(m) is not kind
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
        parameters = own["_parameters"]
        if parameters and ("weight" in own or not _are_ordinary(parameters)):
            return False
    return True


def _are_ordinary(parameters: Mapping[str, Tensor | None]) -> bool:
    for tensor in parameters.values():
        kind = type(tensor)
        if kind not in _ORDINARY and not kind.__module__.startswith(_TRACING):
            return False
    return True
