"""PSA modules as published implementations build them, and what ``fuse`` makes of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.fusion.modules import FusedPSAVariant


class SE(nn.Module):
    """The official SE: fc1 and fc2 are 1x1 convolutions with biases."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class NestedSE(nn.Module):
    """SE of a fork of the official code: its state_dict keys are module.1 and module.3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.module = se_block(channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class LinearSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 2), nn.ReLU(), nn.Linear(channels // 2, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x.mean((2, 3))))[..., None, None]


class HardSigmoidSE(SE):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.sigmoid = nn.Hardsigmoid()


def se_block(channels: int, bias: bool, reduction: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, channels // reduction, 1, bias=bias),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels // reduction, channels, 1, bias=bias),
        nn.Sigmoid(),
    )


class OfficialPSA(nn.Module):
    """The official module: conv_1 to conv_4 and one SE; the last branch comes first."""

    softmax_dim = 1

    def __init__(
        self,
        inplans: int,
        planes: int,
        conv_kernels: Sequence[int] = (3, 5, 7, 9),
        stride: int = 1,
        conv_groups: Sequence[int] = (1, 4, 8, 16),
        bias: bool = False,
        se: Callable[[int], nn.Module] = SE,
    ) -> None:
        super().__init__()
        for i, (k, g) in enumerate(zip(conv_kernels, conv_groups, strict=True), 1):
            conv = nn.Conv2d(inplans, planes // 4, k, stride, k // 2, groups=g, bias=bias)
            setattr(self, f"conv_{i}", conv)
        self.se = se(planes // 4)
        self.split_channel = planes // 4
        self.softmax = nn.Softmax(dim=self.softmax_dim)

    def convolve(self, x: Tensor) -> list[Tensor]:
        return [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]

    def forward(self, x: Tensor) -> Tensor:
        branches = self.convolve(x)
        B, _, H, W = branches[0].shape
        feats = torch.cat(branches, 1).view(B, 4, self.split_channel, H, W)
        weights = torch.cat([self.se(b) for b in branches], 1)
        weights = self.softmax(weights.view(B, 4, self.split_channel, 1, 1))
        return self.concatenate(feats * weights)

    def concatenate(self, weighted: Tensor) -> Tensor:
        out = weighted[:, 0]
        for i in range(1, 4):
            out = torch.cat((weighted[:, i], out), 1)
        return out


class SoftmaxOverChannels(OfficialPSA):
    """The official layers, but the softmax runs over channels instead of branches."""

    softmax_dim = 2


class NaturalOrder(OfficialPSA):
    """The official layers, but the first branch comes first."""

    def concatenate(self, weighted: Tensor) -> Tensor:
        return weighted.flatten(1, 2)


class YOLOPSA(OfficialPSA):
    """A module for YOLO, which ignores the kernels and groups that it is given."""

    def __init__(self, c1: int, c2: int, conv_kernels=(1, 1, 1, 1), conv_groups=(1, 1, 1, 1)):
        super().__init__(c1, c2, (3, 5, 7, 9), 1, (1, 2, 4, 8))


class ConvModule(nn.Module):
    """A convolution with norm and activation, like OpenMMLab's."""

    def __init__(self, c_in: int, c_out: int, k: int, groups: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, k, padding=k // 2, groups=groups, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(c_out)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if hasattr(self, "bn"):
            x = self.bn(x)
        return self.activate(x)


class OpenMMLabPSA(OfficialPSA):
    """The official module with a ConvModule for each branch."""

    def __init__(self, inplanes: int, planes: int, norm: bool = False) -> None:
        super().__init__(inplanes, planes)
        for i, (k, g) in enumerate(zip((3, 5, 7, 9), (1, 4, 8, 16), strict=True), 1):
            setattr(self, f"conv_{i}", ConvModule(inplanes, planes // 4, k, g, norm))


class FunctionalReLUs(OfficialPSA):
    """A ReLU follows each branch, as a function and not as a submodule."""

    def convolve(self, x: Tensor) -> list[Tensor]:
        return [F.relu(branch) for branch in super().convolve(x)]


class ListPSA(nn.Module):
    """Any number of branches in a ModuleList, with one SE for all or one for each."""

    def __init__(
        self, c_in: int, width: int, kernels: Sequence[int], own_se: bool, last_first: bool = True
    ) -> None:
        super().__init__()
        self.conv_branches = nn.ModuleList(
            nn.Conv2d(c_in, width, k, padding=k // 2) for k in kernels
        )
        self.own_se, self.last_first = own_se, last_first
        self.se = nn.ModuleList(SE(width) for _ in kernels) if own_se else LinearSE(width)

    def forward(self, x: Tensor) -> Tensor:
        branches = [conv(x) for conv in self.conv_branches]
        ses = self.se if self.own_se else [self.se] * len(branches)
        attention = torch.stack([se(b) for se, b in zip(ses, branches, strict=True)], 1).softmax(1)
        scaled = [b * a for b, a in zip(branches, attention.unbind(1), strict=True)]
        return torch.cat(scaled[::-1] if self.last_first else scaled, 1)


class ExternalAttention(nn.Module):
    """PSA of the External-Attention repository: a share of the channels and an SE per branch.

    It overwrites its input with the branches, so that it can't be trained.
    """

    overwrites = True

    def __init__(self, channel: int, reduction: int = 4, S: int = 4) -> None:
        super().__init__()
        self.S = S
        width = channel // S
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 2 * i + 3, padding=i + 1) for i in range(S)
        )
        self.se_blocks = self.make_ses(width, reduction)
        self.softmax = nn.Softmax(dim=1)

    def make_ses(self, width: int, reduction: int) -> nn.Module:
        return nn.ModuleList(se_block(width, False, reduction) for _ in range(self.S))

    def gates(self, shares: Tensor) -> list[Tensor]:
        return [se(shares[:, i]) for i, se in enumerate(self.se_blocks)]

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        shares = x.view(B, self.S, C // self.S, H, W)
        branches = [conv(shares[:, i]) for i, conv in enumerate(self.convs)]
        if self.overwrites:
            for i, branch in enumerate(branches):
                shares[:, i] = branch
        else:
            shares = torch.stack(branches, 1)
        weights = self.softmax(torch.stack(self.gates(shares), 1))
        return (shares * weights).view(B, C, H, W)


class OutOfPlaceExternalAttention(ExternalAttention):
    """The usual correction, which can be trained."""

    overwrites = False


class BiRefNetPSA(OutOfPlaceExternalAttention):
    """One SE for all branches."""

    def make_ses(self, width: int, reduction: int) -> nn.Module:
        return se_block(width, False, reduction)

    def gates(self, shares: Tensor) -> list[Tensor]:
        return [self.se_blocks(shares[:, i]) for i in range(self.S)]


class PartialSelfAttention(nn.Module):
    """YOLOv10's module called PSA, partial self-attention: it is something else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = nn.Conv2d(channels, channels, 1)
        self.cv2 = nn.Conv2d(channels, channels, 1)
        self.qkv = nn.Conv2d(channels // 2, 3 * channels // 2, 1)
        self.ffn = nn.Sequential(
            nn.Conv2d(channels // 2, channels, 1), nn.SiLU(), nn.Conv2d(channels, channels // 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).chunk(2, 1)
        q, k, v = self.qkv(b).flatten(2).chunk(3, 1)
        b = b + (v @ (q.mT @ k).softmax(-1).mT).view_as(b)
        return self.cv2(torch.cat((a, b + self.ffn(b)), 1))


# For each variant: how to build it, its input channels, its order, the class that replaces it.
REVERSED, NATURAL = "reversed", "natural"
FUSED, VARIANT = ef.FusedPSAModule, FusedPSAVariant
VARIANTS = {
    "official": (lambda: OfficialPSA(64, 64), 64, REVERSED, FUSED),
    "stride 2": (lambda: OfficialPSA(64, 128, stride=2), 64, REVERSED, FUSED),
    "ours, plain": (lambda: ef.PSAModule(64, 64), 64, REVERSED, FUSED),
    "a fork's SE": (
        lambda: OfficialPSA(64, 64, se=NestedSE), 64, REVERSED, VARIANT,
    ),
    "in YOLO": (lambda: YOLOPSA(32, 32), 32, REVERSED, FUSED),
    "biased": (
        lambda: OfficialPSA(32, 64, (1, 3, 5, 7), 1, (2, 4, 8, 16), bias=True),
        32, REVERSED, FUSED,
    ),
    "2048 to 64": (
        lambda: OfficialPSA(2048, 64, conv_groups=(1, 2, 2, 2)), 2048, REVERSED, FUSED,
    ),
    "in order": (lambda: NaturalOrder(64, 64), 64, NATURAL, VARIANT),
    "ReLU modules": (lambda: OpenMMLabPSA(64, 64), 64, REVERSED, VARIANT),
    "norms and ReLUs": (lambda: OpenMMLabPSA(64, 64, norm=True), 64, REVERSED, VARIANT),
    "ReLU functions": (lambda: FunctionalReLUs(64, 64), 64, REVERSED, VARIANT),
    "External-Attention": (lambda: ExternalAttention(64), 64, NATURAL, VARIANT),
    "External-Attention, corrected": (
        lambda: OutOfPlaceExternalAttention(96, 2, S=3), 96, NATURAL, VARIANT,
    ),
    "BiRefNet": (lambda: BiRefNetPSA(64), 64, NATURAL, VARIANT),
    "two branches": (lambda: ListPSA(6, 8, (3, 7), own_se=True), 6, REVERSED, VARIANT),
    "linears": (lambda: ListPSA(6, 8, (1, 3, 5), own_se=False), 6, REVERSED, VARIANT),
}  # fmt: skip


class Holder(nn.Module):
    """A model with a PSA module inside."""

    def __init__(self, psa: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"psa": psa})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["psa"](x)


def holder(name: str) -> tuple[Holder, Tensor, str, type[nn.Module]]:
    """A model with this variant, its input, its order and the class that replaces it."""
    make, channels, order, kind = VARIANTS[name]
    return Holder(make()), torch.randn(2, channels, 9, 6), order, kind


def official_with(se: Callable[[int], nn.Module] = SE, **changes: nn.Module) -> OfficialPSA:
    """An official module with other submodules; ``se__relu`` stands for ``se.relu``."""
    psa = OfficialPSA(64, 64, se=se)
    for name, part in changes.items():
        psa.set_submodule(name.replace("__", "."), part)
    return psa


def official_with_forward(forward: Callable[[nn.Module, Tensor], Tensor]) -> OfficialPSA:
    """An official module with another forward, which can call the official ``psa.inner``."""

    class OtherForward(OfficialPSA):
        def inner(self, x: Tensor) -> Tensor:
            return super().forward(x)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return OtherForward(64, 64)


def assert_skipped(psa: nn.Module, reason: str) -> None:
    """Check that ``fuse`` warns of this module, gives the reason, and fuses the other one."""
    model = nn.Sequential(OfficialPSA(64, 64), psa)
    with pytest.warns(UserWarning, match="fuse: ") as caught:
        ef.fuse(model)
    [message] = [str(w.message) for w in caught if "fuse: " in str(w.message)]
    assert message.startswith(f"fuse: 1 ({type(psa).__name__}) is skipped: ")
    assert reason in message
    assert model[1] is psa
    assert type(model[0]) is ef.FusedPSAModule
