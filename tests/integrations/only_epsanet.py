"""A plugin for pytest: to tests that list timm's models, EPSANet's are all there are."""

from __future__ import annotations

from typing import Any

import timm

import epsanet_fused.integrations.timm  # noqa: F401  registers the models
from epsanet_fused.nn.epsanet import ARCHITECTURES

_list_models = timm.list_models


def list_models(filter: Any = "", module: Any = "", *args: Any, **options: Any) -> list[str]:
    """As timm's, but for ``module``, by which its tests say which of its models have a feature."""
    return [name for name in _list_models(filter, "", *args, **options) if name in ARCHITECTURES]


timm.list_models = list_models
