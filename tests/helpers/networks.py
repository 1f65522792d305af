"""Small networks, their rewrites for inference, and their export."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from helpers.psa_variants import OfficialPSA
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.rewrite import apply_rewrites, find_targets
from epsanet_fused.nn.grouped_conv import ConvPlan

NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


# Networks.


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Give every norm the statistics of the images and uneven parameters, far from the identity.

    The last norm of a block is small, so that the residual is smaller than the shortcut, as in
    trained networks. Otherwise 33 random blocks would amplify any rounding.
    """
    generator = torch.Generator().manual_seed(0)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.momentum = None
        size = 0.2 if name.endswith("bn3") else 1.0
        nn.init.uniform_(norm.weight, 0.5 * size, 1.5 * size, generator=generator)
        nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


class OfficialBlock(nn.Module):
    """The official block, written without the classes of this package but the SE."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = OfficialPSA(planes, planes, se=ef.SEWeightModule)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if inplanes != 4 * planes:
            conv = nn.Conv2d(inplanes, 4 * planes, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += residual
        return self.relu(out)


def small(block: type[ef.EPSABlock] = ef.EPSABlock) -> ef.EPSANet:
    """A calibrated network of five blocks, two of them in one stage."""
    torch.manual_seed(0)
    model = ef.EPSANet(block, (1, 2, 1, 1), 5, planes=(64, 64, 64, 128))
    return calibrate(model, torch.randn(4, 3, 64, 64))


def official() -> nn.Module:
    """A calibrated network of official blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), OfficialBlock(64, 64), OfficialBlock(256, 64))
    return calibrate(model, torch.randn(4, 3, 32, 32))


# Rewrites for inference.


def plans(model: nn.Module, memory_format: torch.memory_format) -> dict[str, ConvPlan]:
    """Plan the grouped convolutions of the model, with every kind of plan in turn."""
    kinds = itertools.cycle(["merged", "small tile", "large tile", "dense", "other format"])
    found = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            kind, g = next(kinds), conv.groups
            # plan_convs uses only such tiles in 16 bits, where libraries fail at others.
            tall = conv.weight.dtype.itemsize == 2
            found[name] = {
                "merged": ConvPlan(g // 2, (1, 1), memory_format),
                "small tile": ConvPlan(g, (2, 1) if tall else (1, 2), memory_format),
                "large tile": ConvPlan(g // 2, (4, 1) if tall else (2, 4), memory_format),
                "dense": ConvPlan(1, (1, 1), memory_format),
                "other format": ConvPlan(g, (1, 1), NCHW),
            }[kind]
    return found


NO_REWRITES = Rewrites(NCHW, fold=False, epilogue=False, fused_calls=False)
# Each rewrite alone, and all of them together.
REWRITES: dict[str, Callable[[nn.Module], Rewrites]] = {
    "fold": lambda model: NO_REWRITES._replace(fold=True),
    "epilogue": lambda model: NO_REWRITES._replace(epilogue=True),
    "fused calls": lambda model: NO_REWRITES._replace(fold=True, fused_calls=True),
    "plans": lambda model: NO_REWRITES._replace(plans=plans(model, NCHW)),
    "format": lambda model: NO_REWRITES._replace(memory_format=CHANNELS_LAST),
    "all": lambda model: Rewrites(CHANNELS_LAST, plans=plans(model, CHANNELS_LAST)),
    "all nchw": lambda model: Rewrites(NCHW, plans=plans(model, NCHW)),
}


def rewritten(model: nn.Module, x: Tensor, rewrites: Rewrites) -> nn.Module:
    with torch.no_grad():
        return apply_rewrites(model, find_targets(model, (x,)), rewrites)


def fully_rewritten(x: Tensor, model: nn.Module) -> nn.Module:
    return rewritten(model, x, REWRITES["all"](model)).requires_grad_(False)


def assert_same(model: nn.Module, made: nn.Module, *inputs: Tensor, rtol: float = 1e-4) -> None:
    """Check that both models give the same output, relative to the largest one."""
    with torch.no_grad():
        for x in inputs:
            expected, out = model(x), made(x)
            assert (out - expected).abs().max() <= rtol * expected.abs().max()


# Models to export, each with an example input.


def network() -> tuple[nn.Module, Tensor]:
    """Five blocks in eval mode, and an image whose height and width differ."""
    return small(), torch.randn(2, 3, 64, 96)


def module() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return ef.FusedPSAModule(64, 64).eval(), torch.randn(2, 64, 9, 12)


def channels_last() -> tuple[nn.Module, Tensor]:
    model, x = network()
    return model.to(memory_format=CHANNELS_LAST), x.contiguous(memory_format=CHANNELS_LAST)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "network": network,
    "module": module,
    "channels_last": channels_last,
}
# Batch size, height and width may differ from those of the example.
DYNAMIC = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC)


def other_inputs(x: Tensor) -> list[Tensor]:
    """Return inputs of other batch sizes and image sizes in the memory format of ``x``.

    Sizes keep their parity, because torch 2.11 exports a strided network for one parity only.
    """
    B, C, H, W = x.shape
    shapes = [(B, C, H, W), (1, C, H, W), (3, C, H + 32, W + 64)]
    last = x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()
    memory_format = CHANNELS_LAST if last else NCHW
    return [torch.randn(shape).contiguous(memory_format=memory_format) for shape in shapes]
