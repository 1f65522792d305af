"""Small modules to export, and the sizes that what comes out has to take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from networks import small
from torch import Tensor, nn

import epsanet_fused as ef


def network() -> tuple[nn.Module, Tensor]:
    """Five blocks in eval mode; the image's height and width differ."""
    return small(), torch.randn(2, 3, 64, 96)


def module() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return ef.FusedPSAModule(64, 64).eval(), torch.randn(2, 64, 9, 12)


def channels_last() -> tuple[nn.Module, Tensor]:
    model, x = network()
    form = torch.channels_last
    return model.to(memory_format=form), x.contiguous(memory_format=form)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "network": network, "module": module, "channels_last": channels_last,
}  # fmt: skip
# Batch, height and width may all be others than at export.
DYNAMIC = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC)


def other_inputs(x: Tensor) -> list[Tensor]:
    """Inputs of other batches and sizes, one image among them.

    torch 2.11 exports any network with strides for sizes of one parity alone.
    """
    B, C, H, W = x.shape
    shapes = [(B, C, H, W), (1, C, H, W), (3, C, H + 32, W + 64)]
    made = [torch.randn(shape) for shape in shapes]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    return [t.contiguous(memory_format=form) for t in made]
