"""Make the computations that are timed: the tail, a module or a network, with their inputs.

The error of a result depends strongly on the values, and its time depends on them a little: zeros
are never used. By default the values are activations of an EPSANet-50 for two photographs. No
trained weights are published, so the weights are random with a fixed seed. The BatchNorm statistics
are calibrated on the same images, which gives activations of a usual size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.nn.psa import CONV_GROUPS, CONV_KERNELS, recalibrate_and_concat
from harness import networks

SCOPES = {
    "tail": "what follows the four convolutions of a PSA module",
    "norm": "the tail with the BatchNorm2d and ReLU after it, in training",
    "module": "a PSA module: four convolutions and the tail",
    "network": "EPSANet-50 at 224x224, or the network of --model",
}
MODES = {
    "inference": "forward, without gradients",
    "training": "forward and backward; of 16-bit modules and networks in mixed precision",
    "backward": "the backward alone, of the tail",
}
# (input channels = output channels, height, width) of a stride-1 PSA module at 224 x 224.
STAGES = {"S1": (64, 56, 56), "S2": (128, 28, 28), "S3": (256, 14, 14), "S4": (512, 7, 7)}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# A network's training is checked in float64 at this batch. Larger batches repeat its images, and so
# their results, too: BatchNorm's statistics are the same.
ORACLE_BATCH = 16


class Case(NamedTuple):
    """One point of a sweep."""

    scope: str
    mode: str
    case: str  # a stage, a shape such as "64x56x56", or a network: "all" of EPSANet-50 at 224x224
    batch: int
    dtype: str
    memory_format: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast: 16-bit training of modules with weights is mixed precision."""
        mixed = self.scope in ("module", "network") and self.mode == "training"
        return self.torch_dtype if mixed and self.dtype != "float32" else None

    @property
    def period(self) -> int:
        """The number of different samples: those after them repeat them."""
        repeats = self.scope == "network" and self.mode == "training"
        return ORACLE_BATCH if repeats and self.batch % ORACLE_BATCH == 0 else self.batch


class Tail(nn.Module):
    """The tail in plain PyTorch with SE as a module, as in the official code."""

    def __init__(self, se: ef.SEWeightModule) -> None:
        super().__init__()
        self.se = se

    def forward(self, *branches: Tensor) -> Tensor:
        return recalibrate_and_concat(list(branches), [self.se(branch) for branch in branches])


class FusedTail(Tail):
    """The tail as one call of ``psa_tail``."""

    def forward(self, *branches: Tensor) -> Tensor:
        fc1, fc2 = self.se.fc1, self.se.fc2
        return ef.psa_tail(branches, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class NormTail(nn.Module):
    """A tail, then BatchNorm2d and ReLU, as in a block."""

    def __init__(self, tail: Tail, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.tail = tail
        self.norm = norm

    def forward(self, *branches: Tensor) -> Tensor:
        return F.relu(self.norm(self.tail(*branches)))


class FusedNormTail(NormTail):
    """Tail, BatchNorm2d and ReLU as one call of ``psa_tail_norm``."""

    def forward(self, *branches: Tensor) -> Tensor:
        fc1, fc2 = self.tail.se.fc1, self.tail.se.fc2
        weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return ef.psa_tail_norm(branches, *weights, self.norm)


@dataclass(frozen=True)
class Workload:
    """One computation by the official code and by ours."""

    official: nn.Module
    fused: nn.Module
    inputs: tuple[Tensor, ...]  # training computes the gradient of each that requires one
    output_bytes: int | None = None  # N, the bytes of the tail's output; None for other scopes
    baselines: Mapping[str, Workload] = field(default_factory=dict)  # other networks, by name
    plan_file: Path | None = None  # of convolution plans, see ef.plan_convs


@dataclass
class Source:
    """Makes the workload of each case. The network is built once, when it is first needed."""

    device: torch.device
    input: str = "photos"  # or "randn"
    baselines: Iterable[str] = ()  # the networks that are compared with EPSANet
    plan_file: Path | None = None
    kernels: tuple[int, ...] = CONV_KERNELS
    groups: tuple[int, ...] = CONV_GROUPS
    image_shape: tuple[int, int, int] = (3, networks.IMAGE_SIZE, networks.IMAGE_SIZE)
    model: Callable[[], nn.Module] | None = None  # builds a network in the place of EPSANet-50

    def workload(self, case: Case) -> Workload:
        """Make the workload of one case."""
        if case.scope == "network":
            return self._whole_network(case)
        module, x = self._module_and_input(case)
        if case.scope == "module":
            official = self._place_weights(module, case)
            fused = ef.FusedPSAModule.from_reference(official)
            return Workload(official, fused, (self._place(x, case),))
        with torch.no_grad():
            inputs = tuple(self._place(branch, case) for branch in module.convolve(x))
        se = copy.deepcopy(module.se).to(self.device, case.torch_dtype)
        if case.scope == "tail":
            size = sum(x.numel() * x.element_size() for x in inputs)
            return Workload(Tail(se), FusedTail(se), inputs, size)
        channels = sum(x.shape[1] for x in inputs)
        norm = nn.BatchNorm2d(channels).to(self.device, case.torch_dtype)
        return Workload(NormTail(Tail(se), norm), FusedNormTail(FusedTail(se), norm), inputs)

    def _module_and_input(self, case: Case) -> tuple[ef.PSAModule, Tensor]:
        """Return a PSA module and its input, both on the CPU."""
        if self.input == "photos":
            return self._activations[case.case]
        channels, height, width = shape_of(case.case)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(networks.SEED)
            module = ef.PSAModule(channels, channels, self.kernels, 1, self.groups)
        return module, networks.noise(min(case.batch, 2), channels, height, width)

    def _whole_network(self, case: Case) -> Workload:
        official = self._place_weights(self._network, case).train(case.mode != "inference")
        fused = self._fused(copy.deepcopy(official))
        images = self._photos if self.input == "photos" else self._noise(case)
        inputs = (self._place(images, case).requires_grad_(False),)
        others = {}
        for name, baseline in self._baselines.items():
            network = self._place_weights(baseline, case).train(official.training)
            others[name] = Workload(network, network, inputs, plan_file=self.plan_file)
        return Workload(official, fused, inputs, None, others, self.plan_file)

    def _fused(self, network: nn.Module) -> nn.Module:
        """Fuse a network; of EPSANet-50 the PSA modules are known, and need no search."""
        if self.model is not None:
            return ef.fuse(network)
        for block in [m for m in network.modules() if isinstance(m, ef.EPSABlock)]:
            block.conv2 = ef.FusedPSAModule.from_reference(block.conv2)
        return network

    def _noise(self, case: Case) -> Tensor:
        return networks.noise(case.period, *self.image_shape)

    @functools.cached_property
    def _photos(self) -> Tensor:
        return networks.load_photos()

    @property
    def _calibration(self) -> Tensor:
        return self._photos if self.input == "photos" else networks.noise(2, *self.image_shape)

    @functools.cached_property
    def _network(self) -> nn.Module:
        if self.model is not None:
            return self.model().cpu().eval()
        return networks.calibrated(networks.epsanet50, self._calibration)

    @functools.cached_property
    def _baselines(self) -> dict[str, nn.Module]:
        builders = {name: networks.BASELINES[name] for name in self.baselines}
        return {n: networks.calibrated(build, self._calibration) for n, build in builders.items()}

    @functools.cached_property
    def _activations(self) -> dict[str, tuple[ef.PSAModule, Tensor]]:
        """The PSA module of each stage's second block, which has stride 1, and its input."""
        network = self._network
        layers = (network.layer1, network.layer2, network.layer3, network.layer4)
        modules = {name: layer[1].conv2 for name, layer in zip(STAGES, layers, strict=True)}
        seen: dict[nn.Module, Tensor] = {}
        hooks = [
            m.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
            for m in modules.values()
        ]
        with torch.no_grad():
            network(self._photos)
        for hook in hooks:
            hook.remove()
        return {name: (module, seen[module]) for name, module in modules.items()}

    def _place(self, x: Tensor, case: Case) -> Tensor:
        """Return a leaf tensor on the device, of the case's batch, dtype and memory format."""
        dtype = torch.float32 if case.autocast else case.torch_dtype
        x = x.to(self.device, dtype).repeat(-(-case.batch // x.shape[0]), 1, 1, 1)[: case.batch]
        x = x.clone(memory_format=MEMORY_FORMATS[case.memory_format])
        return x.requires_grad_(case.mode != "inference")

    def _place_weights(self, module: nn.Module, case: Case) -> nn.Module:
        dtype = torch.float32 if case.autocast else case.torch_dtype
        placed = copy.deepcopy(module).to(self.device, dtype)
        return placed.to(memory_format=MEMORY_FORMATS[case.memory_format])


def shape_of(case: str) -> tuple[int, int, int]:
    """Return the channels, the height and the width of a case of a tail or a module."""
    size = case.partition(" ")[0]
    if size in STAGES:
        return STAGES[size]
    channels, height, width = map(int, size.split("x"))
    return channels, height, width
