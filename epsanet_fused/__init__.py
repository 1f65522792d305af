"""EPSANet's Pyramid Squeeze Attention, fused: same weights, same numbers, less time."""

from epsanet_fused._version import __version__
from epsanet_fused.backends.registry import list_backends, use_backend
from epsanet_fused.fusion.fuse import fuse
from epsanet_fused.inference.conv_planner import plan_convs, use_plans
from epsanet_fused.inference.optimize import optimize_for_inference
from epsanet_fused.nn.checkpoint import load_checkpoint
from epsanet_fused.nn.epsanet import (
    EPSABlock,
    EPSANet,
    epsanet50,
    epsanet50_large,
    epsanet101,
    epsanet101_large,
)
from epsanet_fused.nn.fused_psa import FusedPSAModule
from epsanet_fused.nn.psa import PSAModule, SEWeightModule
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.ops.psa_tail_norm import psa_tail_norm

__all__ = [
    "EPSABlock",
    "EPSANet",
    "FusedPSAModule",
    "PSAModule",
    "SEWeightModule",
    "__version__",
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
    "fuse",
    "list_backends",
    "load_checkpoint",
    "optimize_for_inference",
    "plan_convs",
    "psa_tail",
    "psa_tail_norm",
    "use_backend",
    "use_plans",
]
