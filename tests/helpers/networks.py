"""Small networks, their rewrites for inference, and what to export of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.conv import ConvPlan
from epsanet_fused.inference.rewrite import apply, find_targets


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Norms with the images' statistics and uneven parameters: none is near the identity.

    What a block adds to its input is smaller than that, as in trained networks; else 33 blocks of
    noise would blow up any rounding.
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


class ResNetBlock(ef.EPSABlock):
    """ResNet's bottleneck: a 3x3 convolution for the PSA module."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *args, **options) -> None:
        super().__init__(inplanes, planes, stride, *args, **options)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)


class OfficialBlock(nn.Module):
    """A block as the official code has it, by no class of this package but the reference's SE."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = OfficialPSA(planes)
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


class OfficialPSA(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        for i, (k, groups) in enumerate(zip((3, 5, 7, 9), (1, 4, 8, 16), strict=True), 1):
            conv = nn.Conv2d(planes, planes // 4, k, padding=k // 2, groups=groups, bias=False)
            setattr(self, f"conv_{i}", conv)
        self.se = ef.SEWeightModule(planes // 4)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]
        weights = torch.stack([self.se(branch) for branch in branches], 1).softmax(1)
        return torch.cat([b * w for b, w in zip(branches, weights.unbind(1), strict=True)][::-1], 1)


def small(block: type[ef.EPSABlock] = ef.EPSABlock) -> ef.EPSANet:
    """Five blocks, two of them in one stage."""
    torch.manual_seed(0)
    model = ef.EPSANet(block, (1, 2, 1, 1), 5, planes=(64, 64, 64, 128))
    return calibrate(model, torch.randn(4, 3, 64, 64))


def official() -> nn.Module:
    """A network of another package whose blocks are built like the official ones."""
    torch.manual_seed(0)
    return calibrate(nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), OfficialBlock(64, 64),
                                   OfficialBlock(256, 64)), torch.randn(4, 3, 32, 32))  # fmt: skip


NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
NONE = Rewrites(NCHW, fold=False, epilogue=False, fused_calls=False)


def plans(model: nn.Module, memory_format: torch.memory_format) -> dict[str, ConvPlan]:
    """One plan after another for the grouped convolutions."""
    kinds = itertools.cycle(["merged", "wide", "tiled", "dense", "other format"])
    found = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            kind, g = next(kinds), conv.groups
            # As plan_convs does: in 16 bits libraries get others wrong.
            tall = conv.weight.dtype.itemsize == 2
            found[name] = {
                "merged": ConvPlan(g // 2, (1, 1), memory_format),
                "wide": ConvPlan(g, (2, 1) if tall else (1, 2), memory_format),
                "tiled": ConvPlan(g // 2, (4, 1) if tall else (2, 4), memory_format),
                "dense": ConvPlan(1, (1, 1), memory_format),
                "other format": ConvPlan(g, (1, 1), NCHW),
            }[kind]
    return found


ALONE: dict[str, Callable[[nn.Module], Rewrites]] = {
    "fold": lambda model: NONE._replace(fold=True),
    "epilogue": lambda model: NONE._replace(epilogue=True),
    "fused calls": lambda model: NONE._replace(fold=True, fused_calls=True),
    "plans": lambda model: NONE._replace(plans=plans(model, NCHW)),
    "format": lambda model: NONE._replace(memory_format=CHANNELS_LAST),
    "all": lambda model: Rewrites(CHANNELS_LAST, plans=plans(model, CHANNELS_LAST)),
    "all nchw": lambda model: Rewrites(NCHW, plans=plans(model, NCHW)),
}


def rewritten(model: nn.Module, x: Tensor, rewrites: Rewrites) -> nn.Module:
    with torch.no_grad():
        return apply(model, find_targets(model, (x,)), rewrites)


def assert_same(model: nn.Module, made: nn.Module, *inputs: Tensor, rtol: float = 1e-4) -> None:
    with torch.no_grad():
        for x in inputs:
            true, out = model(x), made(x)
            assert (out - true).abs().max() <= rtol * true.abs().max()


def all_on(x: Tensor, model: nn.Module) -> nn.Module:
    return rewritten(model, x, ALONE["all"](model)).requires_grad_(False)


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
