"""A plugin for pytest that makes timm.list_models return the EPSANets only."""

from __future__ import annotations

from typing import Any

import timm

import epsanet_fused.integrations.timm  # noqa: F401  registers the models
from epsanet_fused.nn.epsanet import ARCHITECTURES

_list_models = timm.list_models


def list_models(filter: Any = "", module: Any = "", *args: Any, **options: Any) -> list[str]:
    """Call timm's function and keep the EPSANets.

    ``module`` is ignored: timm's tests pass the modules of the models that support a feature.
    """
    return [name for name in _list_models(filter, "", *args, **options) if name in ARCHITECTURES]


timm.list_models = list_models
