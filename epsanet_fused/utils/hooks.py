"""Detect hooks that bypassing a module would skip."""

from __future__ import annotations

from torch import nn

_common = nn.modules.module


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
