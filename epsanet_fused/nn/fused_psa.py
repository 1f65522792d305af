"""FusedPSAModule: the PSA module with its tail as one operator."""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from epsanet_fused.nn.grouped_conv import merged_conv
from epsanet_fused.nn.psa import PSAModule
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.ops.psa_tail_norm import psa_tail_norm

torch.fx.wrap("psa_tail")  # symbolic tracing takes the operator as a whole

CONVS = ("conv_1", "conv_2", "conv_3", "conv_4")
LAYERS = (*CONVS, "se.fc1", "se.fc2")


def missing_layers(module: nn.Module) -> list[str]:
    """The Conv2d layers that ``module`` lacks to be a PSA module, by structure and not by class."""
    se = getattr(module, "se", None)
    layers = {name: getattr(module, name, None) for name in CONVS}
    layers |= {f"se.{name}": getattr(se, name, None) for name in ("fc1", "fc2")}
    return [name for name, layer in layers.items() if not isinstance(layer, nn.Conv2d)]


def is_psa(module: nn.Module) -> bool:
    return not missing_layers(module)


class FusedPSAModule(PSAModule):
    """Drop-in for ``PSAModule``: the same signature, state_dict keys and numbers, less time.

    The convolutions stay PyTorch's; all that follows them is ``psa_tail``. Arguments, errors and
    shapes are those of ``PSAModule``.
    """

    @classmethod
    def from_reference(cls, module: nn.Module) -> FusedPSAModule:
        """A fused module over the very convolutions and SE of ``module``: parameters are shared.

        Args:
            module: a ``PSAModule``, or the official one: with ``conv_1`` to ``conv_4`` and an
                ``se`` that holds ``fc1`` and ``fc2``. It keeps working beside the new one.

        Raises:
            TypeError: if ``module`` isn't built that way.
        """
        if wrong := missing_layers(module):
            raise TypeError(
                f"FusedPSAModule.from_reference: module must be a PSAModule, with Conv2d layers "
                f"{', '.join(LAYERS)}; {type(module).__name__} has none at {', '.join(wrong)}"
            )
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        for name in (*CONVS, "se"):
            fused.add_module(name, getattr(module, name))
        fused.training = module.training
        return fused

    # The groups that each convolution keeps (see ef.use_plans); None: those it has.
    merged_groups: tuple[int, ...] | None = None

    def convolve(self, x: Tensor) -> list[Tensor]:
        if self.merged_groups is None:
            return super().convolve(x)
        pairs = zip(CONVS, self.merged_groups, strict=True)
        return [merged_conv(x, getattr(self, name), groups) for name, groups in pairs]

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.se.fc1, self.se.fc2
        return psa_tail(self.convolve(x), fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    def forward_norm(self, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        """``relu(norm(self(x)))`` by ``psa_tail_norm``, for a norm with the batch's statistics."""
        fc1, fc2 = self.se.fc1, self.se.fc2
        weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return psa_tail_norm(self.convolve(x), *weights, norm)

    def extra_repr(self) -> str:
        width, channels = self.se.fc1.weight.shape[:2]
        return f"branches=4, channels_per_branch={channels}, hidden={width}, tail=psa_tail"
