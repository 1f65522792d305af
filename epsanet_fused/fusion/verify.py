"""Find out numerically what a detected PSA module computes (see nn/equivalence.py)."""

from __future__ import annotations

import itertools

from torch import nn

from epsanet_fused.fusion.modules import FusedPSAVariant, PSASpec
from epsanet_fused.nn.equivalence import prove
from epsanet_fused.nn.psa_layers import PSALayers, UnfusableError


def verify_module(module: nn.Module, layers: PSALayers, is_reversed: bool) -> PSASpec:
    """Return the spec with which ``FusedPSAVariant`` computes what ``module`` computes.

    Args:
        module: a module that looks like a PSA module. It is not run or changed; a copy of it is.
        layers: the names of its layers.
        is_reversed: whether the last branch is expected to come first in the output.

    Raises:
        UnfusableError: if there is no such spec, or its branches are in the other order.
    """
    spec = _find_spec(module, layers)
    if spec.is_reversed != is_reversed:
        order = "reversed" if spec.is_reversed else "natural"
        raise UnfusableError(f"its branches are in {order} order; order={order!r} takes it")
    return spec


def _find_spec(module: nn.Module, layers: PSALayers) -> PSASpec:
    """Return the first spec that agrees with ``module``, or raise an UnfusableError."""
    verdicts = []
    for split_input in (False, True):

        def specs(overwrites: bool, split_input: bool = split_input) -> list[PSASpec]:
            return [
                PSASpec(layers, split_input, relu, is_reversed, overwrites)
                for relu, is_reversed in itertools.product((False, True), repeat=2)
            ]

        verdict = prove(module, layers, split_input, specs, FusedPSAVariant.from_module)
        if verdict.found:
            return verdict.found[0]
        verdicts.append(verdict)
    # The other guess failed earlier, for a reason that says little about the module.
    raise UnfusableError(max(verdicts, key=lambda verdict: verdict.progress).reason)
