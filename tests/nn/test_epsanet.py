"""The networks have the published sizes, keys and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epsanet_fused as ef

NETWORKS = {
    "epsanet50": (ef.epsanet50, 22_561_715, 432),
    "epsanet101": (ef.epsanet101, 38_900_279, 857),
    "epsanet50_large": (ef.epsanet50_large, 27_899_518, 432),
    "epsanet101_large": (ef.epsanet101_large, 49_592_198, 857),
}
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def on_meta(build: Callable[..., ef.EPSANet], *args: Any, **options: Any) -> ef.EPSANet:
    with torch.device("meta"):  # no memory is allocated
        return build(*args, **options)


def small(**options: Any) -> ef.EPSANet:
    return ef.EPSANet(ef.EPSABlock, (1, 2, 1, 1), 7, planes=(64, 64, 64, 128), **options)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(("build", "parameters", "keys"), NETWORKS.values(), ids=NETWORKS)
def test_sizes(build: Callable[..., ef.EPSANet], parameters: int, keys: int, fused: bool) -> None:
    model = on_meta(build, fused=fused)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


def official_keys(layers: Sequence[int]) -> Iterator[str]:
    yield "conv1.weight"
    yield from (f"bn1.{part}" for part in BN)
    for stage, depth in enumerate(layers, 1):
        for b in range(depth):
            block = f"layer{stage}.{b}"
            yield from (f"{block}.{conv}.weight" for conv in ("conv1", "conv3"))
            yield from (f"{block}.conv2.conv_{k}.weight" for k in (1, 2, 3, 4))
            for fc in ("fc1", "fc2"):
                yield from (f"{block}.conv2.se.{fc}.{part}" for part in ("weight", "bias"))
            norms = ["bn1", "bn2", "bn3", *(["downsample.1"] if b == 0 else [])]
            yield from (f"{block}.{norm}.{part}" for norm in norms for part in BN)
            if b == 0:
                yield f"{block}.downsample.0.weight"
    yield from ("fc.weight", "fc.bias")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_keys_are_the_official_ones(fused: bool) -> None:
    assert set(on_meta(ef.epsanet50, fused=fused).state_dict()) == {*official_keys([3, 4, 6, 3])}
    assert set(on_meta(ef.epsanet101, fused=fused).state_dict()) == {*official_keys([3, 4, 23, 3])}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_fused_selects_the_class(fused: bool) -> None:
    found = [m for m in on_meta(ef.epsanet50, fused=fused).modules() if isinstance(m, ef.PSAModule)]
    assert len(found) == 16
    assert {type(m) for m in found} == {ef.FusedPSAModule if fused else ef.PSAModule}


def test_images_may_have_any_number_of_channels() -> None:
    assert small(in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="in_chans must be at least 1, got 0"):
        small(in_chans=0)


def test_one_seed_gives_plain_and_fused_networks_the_same_weights() -> None:
    states = []
    for fused in (True, False):
        torch.manual_seed(3)
        states.append(dict(small(fused=fused).state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_initial_weights_have_the_official_variance() -> None:
    model = ef.epsanet50(num_classes=2)
    for name in ("conv1", "layer2.1.conv3", "layer3.0.conv2.conv_4", "layer4.0.downsample.0"):
        conv = model.get_submodule(name)
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(conv.weight.mean().item()) < expected / 10, name


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_odd_image_sizes_and_classes(fused: bool) -> None:
    assert small(fused=fused)(torch.randn(3, 3, 50, 37)).shape == (3, 7)


def test_stages_halve_the_image() -> None:
    shapes = []
    model = on_meta(ef.epsanet50)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda _module, _inputs, out: shapes.append(tuple(out.shape)))
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert shapes == [(2, 256, 56, 56), (2, 512, 28, 28), (2, 1024, 14, 14), (2, 2048, 7, 7)]


class FrozenNorm(nn.Module):
    """A fixed scale and shift, as in detectors: no parameters and no training mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("shift", torch.full((channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


NORMS = {"GroupNorm": lambda channels: nn.GroupNorm(16, channels), "frozen": FrozenNorm}


@pytest.mark.parametrize("norm_layer", NORMS.values(), ids=NORMS)
def test_norm_layer_is_used_everywhere(norm_layer: Callable[[int], nn.Module]) -> None:
    models = [small(norm_layer=norm_layer, fused=fused) for fused in (True, False)]
    kind = type(norm_layer(16))
    for model in models:
        norms = [m for m in model.modules() if isinstance(m, kind)]
        assert len(norms) == 1 + 5 * 3 + 4  # stem, three per block, one downsample per stage
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(models[0](images), models[1](images))


def test_module_options_reach_every_psa_module() -> None:
    options = {"conv_kernels": (1, 3, 3, 5), "conv_groups": (1, 2, 4, 8), "reduction": 4}
    model = small(**options)
    modules = [m for m in model.modules() if isinstance(m, ef.PSAModule)]
    assert len(modules) == 5
    for module in modules:
        convs = [module.conv_1, module.conv_2, module.conv_3, module.conv_4]
        assert [conv.kernel_size[0] for conv in convs] == [1, 3, 3, 5]
        assert [conv.groups for conv in convs] == [1, 2, 4, 8]
        assert module.se.fc1.out_channels == convs[0].out_channels // 4


def test_large_accepts_other_kernels() -> None:
    model = on_meta(ef.epsanet50_large, conv_kernels=(3, 5, 7, 9))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(30.10e6, abs=5e3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 1, 1)}, r"layers .* four .* got \(1, 1, 1\)"),
        ({"layers": (1, 1, 0, 1)}, r"layers .* at least 1.* got \(1, 1, 0, 1\)"),
        ({"planes": (64, 64)}, r"planes .* four .* got .* \(64, 64\)"),
        ({"planes": (64, 64, 64, 100)}, r"planes // 4 = 25 .* multiple of 64"),
        ({"reduction": 32}, r"reduction=32 .* use planes >= 128 or 1 <= reduction <= 16"),
    ],
    ids=["three stages", "empty stage", "two widths", "width", "reduction"],
)
def test_refuses_invalid_arguments(options: dict[str, Any], message: str) -> None:
    arguments = {"layers": (1, 1, 1, 1)} | options
    with pytest.raises(ValueError, match=message):
        ef.EPSANet(ef.EPSABlock, **arguments)
