"""EPSANet among timm's models.

    import timm
    import epsanet_fused.integrations.timm  # registers the models

    model = timm.create_model("epsanet50", num_classes=10)
    backbone = timm.create_model("epsanet50", features_only=True, out_indices=(1, 2, 3, 4))

timm's scripts don't import what registers models elsewhere; this does, and then runs them:

    python -m epsanet_fused.integrations.timm train.py /data --model epsanet50
    torchrun --nproc_per_node 2 -m epsanet_fused.integrations.timm train.py /data --model epsanet50
"""

try:
    import timm as _timm  # noqa: F401  looked for by itself: what it lacks is another error
except ModuleNotFoundError as error:
    if error.name != "timm":
        raise
    raise ImportError("epsanet_fused.integrations.timm needs timm: pip install timm") from error

from epsanet_fused.integrations.timm.epsanet import (
    EPSANet,
    epsanet50,
    epsanet50_large,
    epsanet101,
    epsanet101_large,
)

__all__ = ["EPSANet", "epsanet50", "epsanet50_large", "epsanet101", "epsanet101_large"]
