"""Make the benchmarks' inputs: activations of an EPSANet-50 for two photographs, or noise.

The error of a result depends strongly on the values, and its time depends on them a little: zeros
are never used. The default are therefore activations as they occur in the network. No trained
weights are published, so the weights are random with a fixed seed. The BatchNorm statistics are
calibrated on the same images, which gives activations of a usual size.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from baselines import BASELINES
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.nn.psa import recalibrate_and_concat

# (input channels = output channels, height = width) of a stride-1 PSA module at 224 x 224.
STAGES = {"S1": (64, 56), "S2": (128, 28), "S3": (256, 14), "S4": (512, 7)}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGE_SIZE = 224
SEED = 2105_14447
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LiteralTail(nn.Module):
    """The tail in plain PyTorch with SE as a module, as in the official code."""

    def __init__(self, se: ef.SEWeightModule) -> None:
        super().__init__()
        self.se = se

    def forward(self, *branches: Tensor) -> Tensor:
        return recalibrate_and_concat(list(branches), [self.se(branch) for branch in branches])


class OperatorTail(LiteralTail):
    """The tail as one call of ``psa_tail``."""

    def forward(self, *branches: Tensor) -> Tensor:
        fc1, fc2 = self.se.fc1, self.se.fc2
        return ef.psa_tail(branches, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class NormTail(nn.Module):
    """A tail, then BatchNorm2d and ReLU, as in a block."""

    def __init__(self, tail: LiteralTail, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.tail = tail
        self.norm = norm

    def forward(self, *branches: Tensor) -> Tensor:
        return F.relu(self.norm(self.tail(*branches)))


class OperatorNormTail(NormTail):
    """Tail, BatchNorm2d and ReLU as one call of ``psa_tail_norm``."""

    def forward(self, *branches: Tensor) -> Tensor:
        fc1, fc2 = self.tail.se.fc1, self.tail.se.fc2
        weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return ef.psa_tail_norm(branches, *weights, self.norm)


class Settings(NamedTuple):
    """One point of a sweep."""

    scope: str
    mode: str
    stage: str
    batch: int
    dtype: str
    memory_format: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def columns(self) -> dict[str, object]:
        """The columns of the CSV file that hold these settings."""
        values = self._asdict()
        values["layout"] = values.pop("memory_format")
        return values

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast: 16-bit training of modules with weights is mixed precision."""
        mixed = (
            self.scope not in ("tail", "norm")
            and self.mode != "inference"
            and self.dtype != "float32"
        )
        return self.torch_dtype if mixed else None


@dataclass(frozen=True)
class Workload:
    """One computation by the official code (``literal``) and by ours (``fused``)."""

    literal: nn.Module
    fused: nn.Module
    inputs: tuple[Tensor, ...]  # training computes the gradient of each that requires one
    output_bytes: int | None  # N, the bytes of the tail's output; None for other scopes
    baselines: Mapping[str, Workload] = field(default_factory=dict)  # other networks, by name
    plan_file: Path | None = None  # of convolution plans, see ef.plan_convs


class Source:
    """Makes the workload of each point. The network is built once, when it is first needed.

    Args:
        kind: "photos" or "randn".
        device: where the workloads run.
        baselines: names of the networks that are compared with EPSANet.
        plan_file: the plan file of all workloads.
    """

    def __init__(
        self,
        kind: str,
        device: torch.device,
        baselines: Iterable[str] = (),
        plan_file: Path | None = None,
    ) -> None:
        self.device = device
        self._plan_file = plan_file
        self._baseline_names = tuple(baselines)
        self._photos = load_photos() if kind == "photos" else None

    def workload(self, settings: Settings) -> Workload:
        """Make the workload of one point of a sweep."""
        make = {
            "tail": self._tail,
            "norm": self._norm_tail,
            "module": self._module,
            "block": self._block,
            "network": self._whole_network,
        }
        return dataclasses.replace(make[settings.scope](settings), plan_file=self._plan_file)

    def _tail(self, settings: Settings) -> Workload:
        module = self._psa(settings.stage)
        if self._photos is None:
            channels, size = STAGES[settings.stage]
            shape = (settings.batch, channels // 4, size, size)
            branches = list(self._noise(4, *shape).unbind())
        else:
            with torch.no_grad():
                branches = module.convolve(self._activations[module])
        inputs = tuple(self._place(x, settings) for x in branches)
        se = copy.deepcopy(module.se).to(self.device, settings.torch_dtype)
        size = sum(x.numel() * x.element_size() for x in inputs)
        return Workload(LiteralTail(se), OperatorTail(se), inputs, size)

    def _norm_tail(self, settings: Settings) -> Workload:
        tail = self._tail(settings)
        norm = nn.BatchNorm2d(STAGES[settings.stage][0]).to(self.device, settings.torch_dtype)
        literal, fused = NormTail(tail.literal, norm), OperatorNormTail(tail.fused, norm)
        return Workload(literal, fused, tail.inputs, None)

    def _module(self, settings: Settings) -> Workload:
        module = self._psa(settings.stage)
        if self._photos is None:
            channels, size = STAGES[settings.stage]
            x = self._noise(settings.batch, channels, size, size)
        else:
            x = self._activations[module]
        literal = self._place_weights(module, settings)
        fused = ef.FusedPSAModule.from_reference(literal)
        return Workload(literal, fused, (self._place(x, settings),), None)

    def _block(self, settings: Settings) -> Workload:
        """Make a workload of the stage's second block."""
        block = self._blocks[settings.stage]
        literal, fused = self._both(block, settings)
        return Workload(literal, fused, (self._place(self._activations[block], settings),), None)

    def _whole_network(self, settings: Settings) -> Workload:
        literal, fused = self._both(self._network, settings)
        images = (self._place(self._images(settings.batch), settings).requires_grad_(False),)
        baselines = {}
        for name in self._baseline_names:
            network = self._place_weights(self._baselines[name], settings).train(literal.training)
            baselines[name] = Workload(network, network, images, None)
        return Workload(literal, fused, images, None, baselines)

    def _both(self, model: nn.Module, settings: Settings) -> tuple[nn.Module, nn.Module]:
        """Return a copy of a block or a network, and a copy with its PSA modules fused."""
        literal = self._place_weights(model, settings).train(settings.mode != "inference")
        fused = copy.deepcopy(literal)
        for block in [m for m in fused.modules() if isinstance(m, ef.EPSABlock)]:
            block.conv2 = ef.FusedPSAModule.from_reference(block.conv2)
        return literal, fused

    def _noise(self, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(SEED)
        return torch.randn(shape, generator=generator, device=self.device)

    def _images(self, batch: int) -> Tensor:
        if self._photos is not None:
            return self._photos
        return self._noise(batch, 3, IMAGE_SIZE, IMAGE_SIZE)

    @functools.cached_property
    def _network(self) -> ef.EPSANet:
        return calibrated(functools.partial(ef.epsanet50, fused=False), self._images(2).cpu())

    @functools.cached_property
    def _baselines(self) -> dict[str, nn.Module]:
        return {
            name: calibrated(BASELINES[name], self._images(2).cpu())
            for name in self._baseline_names
        }

    @property
    def _blocks(self) -> dict[str, ef.EPSABlock]:
        """The second block of each stage, the first with stride 1 throughout."""
        network = self._network
        layers = (network.layer1, network.layer2, network.layer3, network.layer4)
        return {stage: layer[1] for stage, layer in zip(STAGES, layers, strict=True)}

    @functools.cached_property
    def _activations(self) -> dict[nn.Module, Tensor]:
        """The inputs of these blocks and of their PSA modules, for two images."""
        modules = [m for block in self._blocks.values() for m in (block, block.conv2)]
        seen: dict[nn.Module, Tensor] = {}
        hooks = [
            m.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for m in modules
        ]
        with torch.no_grad():
            self._network(self._images(2).cpu())
        for hook in hooks:
            hook.remove()
        return seen

    def _psa(self, stage: str) -> ef.PSAModule:
        """The PSA module of the stage's second block."""
        if self._photos is not None:
            return self._blocks[stage].conv2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return ef.PSAModule(STAGES[stage][0], STAGES[stage][0])

    def _place(self, x: Tensor, settings: Settings) -> Tensor:
        """Return a leaf tensor on the device, of the settings' batch, dtype and memory format."""
        dtype = torch.float32 if settings.autocast else settings.torch_dtype
        x = x.repeat(-(-settings.batch // x.shape[0]), 1, 1, 1)[: settings.batch]
        x = x.to(self.device, dtype).clone(memory_format=MEMORY_FORMATS[settings.memory_format])
        return x.requires_grad_(settings.mode != "inference")

    def _place_weights(self, module: nn.Module, settings: Settings) -> nn.Module:
        dtype = torch.float32 if settings.autocast else settings.torch_dtype
        placed = copy.deepcopy(module).to(self.device, dtype)
        return placed.to(memory_format=MEMORY_FORMATS[settings.memory_format])


def load_photos() -> Tensor:
    """Load scikit-learn's two sample photographs as (2, 3, 224, 224), normalised for ImageNet."""
    from sklearn.datasets import load_sample_images  # an optional dependency

    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    x = images.permute(0, 3, 1, 2).float() / 255  # (2, 3, 427, 640)
    edge = (x.shape[3] - x.shape[2]) // 2
    x = x[..., edge : edge + x.shape[2]]  # centre crop: (2, 3, 427, 427)
    x = F.interpolate(x, size=IMAGE_SIZE, mode="bilinear", antialias=True, align_corners=False)
    return (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def calibrated(build: Callable[[], nn.Module], images: Tensor) -> nn.Module:
    """Build a network in eval mode, with a fixed seed and the images' BatchNorm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = build()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # running statistics = the mean over all batches: here one batch
    with torch.no_grad():
        network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()
