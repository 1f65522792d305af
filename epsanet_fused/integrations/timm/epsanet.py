"""EPSANet with the methods of timm's models, and their registration.

The conventions are timm's: https://huggingface.co/docs/timm/en/feature_extraction.
"""

# No "from __future__ import annotations": TorchScript can't resolve annotations that are strings.
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    create_classifier,
    get_device_dtype,
    get_norm_layer,
    is_scriptable,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from epsanet_fused.nn import epsanet
from epsanet_fused.nn.epsanet import ARCHITECTURES, EPSABlock, NormLayer

__all__ = ["EPSANet", "epsanet50", "epsanet50_large", "epsanet101", "epsanet101_large"]

STAGES = ("layer1", "layer2", "layer3", "layer4")
POOLS = ("avg", "max", "avgmax", "catavgmax", "")


class EPSANet(epsanet.EPSANet):
    """``epsanet_fused.EPSANet`` with the methods of timm's models and the same state_dict keys.

    Args:
        block: the class of the blocks, see ``epsanet_fused.EPSANet``.
        layers: the number of blocks in each of the four stages.
        num_classes: outputs of the classifier; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: "avg", "max", "avgmax" or "catavgmax", each optionally with the prefix "fast"
            (another implementation in timm), or "" for no pooling.
        drop_rate: probability of dropout before the classifier.
        drop_path_rate: probability of skipping the last block in training (stochastic depth); for
            the other blocks it decreases linearly to 0 for the first.
        norm_layer: maps a channel count to a norm module, or is timm's name of a norm.
        device: device of the parameters.
        dtype: dtype of the parameters.
        **options: ``planes``, ``conv_kernels``, ``conv_groups``, ``reduction`` and ``fused``, see
            ``epsanet_fused.EPSANet``.

    Shape: images (B, in_chans, H, W) -> logits (B, num_classes).

    Raises:
        ValueError: if ``global_pool`` or the name ``norm_layer`` is unknown.
    """

    def __init__(
        self,
        block: type[EPSABlock],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        options |= {"in_chans": in_chans, "norm_layer": _norm_layer(norm_layer)}
        with torch.device(device or torch.get_default_device()):
            super().__init__(block, layers, **options)
        self.to(dtype=dtype)
        blocks = [block for stage in STAGES for block in getattr(self, stage)]
        if drop_path_rate:
            rates = torch.linspace(0, drop_path_rate, len(blocks), device="cpu").tolist()
            for each, rate in zip(blocks, rates, strict=True):
                each.drop_path = DropPath(rate)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        widths = [64, *(getattr(self, stage)[-1].conv3.out_channels for stage in STAGES)]
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": module}
            for i, (width, module) in enumerate(zip(widths, ("relu", *STAGES), strict=True), 1)
        ]
        self.num_features = widths[-1]
        del self.avgpool  # reset_classifier creates global_pool in its place
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """Return the classifier, or its name "fc"."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier and the pooling.

        Args:
            num_classes: outputs of the new classifier; 0 for no classifier.
            global_pool: see the class; None keeps the kind of pooling.

        Raises:
            ValueError: if ``global_pool`` is unknown; the model is unchanged then.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool  # type: ignore
        if not isinstance(pool, str) or pool.removeprefix("fast") not in POOLS:
            raise ValueError(f"EPSANet: global_pool must be one of {POOLS}, got {pool!r}")
        head = create_classifier(self.num_features, num_classes, pool, **get_device_dtype(self))
        self.num_classes = num_classes
        self.global_pool, self.fc = (module.train(self.training) for module in head)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch activation checkpointing: the backward pass runs each block again.

        In training this updates the norms' running statistics twice a step, as in timm's other
        networks.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return regular expressions that group parameters by layer, for layer-wise decay.

        Args:
            coarse: group by stage instead of by block.
        """
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|^bn1", "blocks": blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute features (B, num_features, H / 32, W / 32) of images (B, in_chans, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            stages = [self.layer1, self.layer2, self.layer3, self.layer4]
            return checkpoint_seq(stages, x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (B, num_classes) of the features that ``forward_features`` returns.

        Args:
            x: features (B, num_features, H, W).
            pre_logits: return the classifier's input (B, head_hidden_size) instead.
        """
        x = self.global_pool(x)
        x = F.dropout(x, float(self.drop_rate), self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the features and the intermediates, the outputs of ``feature_info``'s modules.

        Args:
            x: images (B, in_chans, H, W).
            indices: the intermediates to return, 0 to 4; an int n for the last n, None for all.
            norm: no effect, because the network has no final norm.
            stop_early: don't run the stages after the last index.
            output_fmt: must be "NCHW".
            intermediates_only: return only the list of intermediates.

        Returns:
            The output of the last stage that was run, and the list of intermediates: with strides
            2, 4, 8, 16 and 32, each (B, num_chs, H / stride, W / stride).

        Raises:
            ValueError: if ``output_fmt`` isn't "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}"
            )
        taken, last = feature_take_indices(5, indices)
        x = self.relu(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in taken else []
        x = self.maxpool(x)
        for i, name in enumerate(STAGES[:last] if stop_early else STAGES, 1):
            stage = getattr(self, name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the modules that ``forward_intermediates(x, indices)`` doesn't need.

        Args:
            indices: see ``forward_intermediates``.
            prune_norm: no effect, because the network has no final norm.
            prune_head: remove the pooling and the classifier, also if the last stage remains.

        Returns:
            The indices of the intermediates that remain.
        """
        taken, last = feature_take_indices(5, indices)
        for name in STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < 4:
            self.reset_classifier(0, "")
        return taken


def _norm_layer(given: NormLayer | str | None) -> NormLayer | None:
    if not isinstance(given, str):
        return given
    try:
        return get_norm_layer(given)
    except KeyError:
        raise ValueError(
            f"EPSANet: norm_layer must be a callable or timm's name of a norm, got {given!r}"
        ) from None


def _default_cfg() -> dict[str, Any]:
    """Return timm's configuration: the paper's preprocessing, and no published weights."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "paper_ids": "arXiv:2105.14447",
    }


default_cfgs = generate_default_cfgs({name: _default_cfg() for name in ARCHITECTURES})


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    # TorchScript can't compile the operator's Python function.
    options = ARCHITECTURES[name] | {"fused": not is_scriptable()} | options
    return build_model_with_cfg(EPSANet, name, pretrained, **options)


@register_model
def epsanet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build EPSANet-50 (Small) with 22,561,715 parameters; kwargs as for ``EPSANet``."""
    return _create("epsanet50", pretrained, kwargs)


@register_model
def epsanet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build EPSANet-101 (Small) with 38,900,279 parameters; kwargs as for ``EPSANet``."""
    return _create("epsanet101", pretrained, kwargs)


@register_model
def epsanet50_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build EPSANet-50 (Large) with 27,899,518 parameters; kwargs as for ``EPSANet``.

    See ``epsanet_fused.epsanet50_large`` for how this package interprets the paper's Large.
    """
    return _create("epsanet50_large", pretrained, kwargs)


@register_model
def epsanet101_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build EPSANet-101 (Large) with 49,592,198 parameters; kwargs as for ``EPSANet``.

    See ``epsanet_fused.epsanet50_large`` for how this package interprets the paper's Large.
    """
    return _create("epsanet101_large", pretrained, kwargs)
