"""EPSANet as models of timm.

    import timm
    import epsanet_fused.integrations.timm  # registers the models

    model = timm.create_model("epsanet50", num_classes=10)
    backbone = timm.create_model("epsanet50", features_only=True, out_indices=(1, 2, 3, 4))

timm's own scripts don't import packages that register models. Run them through this module, which
registers the models first:

    python -m epsanet_fused.integrations.timm train.py /data --model epsanet50
    torchrun --nproc_per_node 2 -m epsanet_fused.integrations.timm train.py /data --model epsanet50
"""

try:
    import timm as _timm  # noqa: F401  imported separately to tell "no timm" from its own errors
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
