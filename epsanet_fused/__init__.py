"""EPSANet's Pyramid Squeeze Attention, fused: same weights, same numbers, less time."""

from epsanet_fused._version import __version__
from epsanet_fused.backends import backends, use_backend
from epsanet_fused.checkpoint import load_checkpoint
from epsanet_fused.conv_plan import plan_convs, use_plans
from epsanet_fused.fuse import fuse
from epsanet_fused.inference import optimize_for_inference
from epsanet_fused.models import (
    EPSABlock,
    EPSANet,
    epsanet50,
    epsanet50_large,
    epsanet101,
    epsanet101_large,
)
from epsanet_fused.modules import FusedPSAModule
from epsanet_fused.norm_tail import psa_tail_norm
from epsanet_fused.ops import psa_tail
from epsanet_fused.reference import PSAModule, SEWeightModule

__all__ = [
    "EPSABlock",
    "EPSANet",
    "FusedPSAModule",
    "PSAModule",
    "SEWeightModule",
    "__version__",
    "backends",
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
    "fuse",
    "load_checkpoint",
    "optimize_for_inference",
    "plan_convs",
    "psa_tail",
    "psa_tail_norm",
    "use_backend",
    "use_plans",
]
