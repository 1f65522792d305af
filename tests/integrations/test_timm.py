"""timm builds, changes, loads and exports EPSANet as it does its own models."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.networks import assert_same, calibrate, fully_rewritten
from timm.data import resolve_data_config
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn

import epsanet_fused as ef
import epsanet_fused.integrations.timm as ours
from epsanet_fused.inference.blocks import PlannedBlock

NETWORKS = {
    "epsanet50": (ef.epsanet50, 22_561_715, 432),
    "epsanet101": (ef.epsanet101, 38_900_279, 857),
    "epsanet50_large": (ef.epsanet50_large, 27_899_518, 432),
    "epsanet101_large": (ef.epsanet101_large, 49_592_198, 857),
}
pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options: Any) -> nn.Module:
    """Build a network with one block a stage."""
    return timm.create_model("epsanet50", **{"layers": (1, 1, 1, 1), "num_classes": 5} | options)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(images: Tensor) -> nn.Module:
    """A calibrated network in eval mode; tests must not change it."""
    torch.manual_seed(0)
    return calibrate(small(), images)


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def test_timm_lists_the_four_networks() -> None:
    assert set(timm.list_models(module="epsanet")) == set(NETWORKS) == {*timm.list_models("epsa*")}
    assert set(timm.list_models("epsa*", pretrained=True)) == set()
    assert set(NETWORKS) < set(ours.__all__)


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_and_keys_are_the_official_ones(name: str) -> None:
    build, parameters, keys = NETWORKS[name]
    with torch.device("meta"):
        model, plain = timm.create_model(name), build()
    assert isinstance(model, ef.EPSANet)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (model, plain)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == keys


def test_a_state_dict_goes_both_ways(images: Tensor) -> None:
    torch.manual_seed(0)
    for source, target in (
        (timm.create_model("epsanet50"), ef.epsanet50()),
        (ef.epsanet50(), timm.create_model("epsanet50")),
    ):
        calibrate(source, images)
        target.eval().load_state_dict(source.state_dict())
        with torch.no_grad():
            assert torch.equal(target(images), source(images))


def test_preprocessing_is_the_papers() -> None:
    """Resize to 256 and crop 224 from the centre, with ImageNet's mean and standard deviation."""
    config = resolve_data_config(model=timm.create_model("epsanet50", device="meta"))
    assert config["input_size"] == (3, 224, 224)
    assert round(224 / config["crop_pct"]) == 256
    assert config["interpolation"] == "bilinear"
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_options_reach_the_modules() -> None:
    convolutions = {"in_chans": 2, "conv_kernels": (1, 3, 5, 7), "conv_groups": (1, 2, 4, 8)}
    others = {"reduction": 4, "norm_layer": "groupnorm", "fused": False}
    model = small(**convolutions, **others, device="meta", dtype=torch.bfloat16)
    psa = model.layer2[0].conv2
    convs = [psa.conv_1, psa.conv_2, psa.conv_3, psa.conv_4]
    assert [conv.kernel_size[0] for conv in convs] == [1, 3, 5, 7]
    assert [conv.groups for conv in convs] == [1, 2, 4, 8]
    assert psa.se.fc1.out_channels == 32 // 4
    assert type(psa) is ef.PSAModule
    assert type(small().layer1[0].conv2) is ef.FusedPSAModule
    assert isinstance(model.layer1[0].bn2, nn.GroupNorm)
    assert model.conv1.in_channels == model.in_chans == 2
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_bad_options_are_refused() -> None:
    with pytest.raises(TypeError, match="drop_everything"):
        small(drop_everything=0.1)
    with pytest.raises(ValueError, match="conv_kernels must be odd"):
        small(conv_kernels=(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"norm_layer must be .*, got 'nonorm'"):
        small(norm_layer="nonorm")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for epsanet50"):
        timm.create_model("epsanet50", pretrained=True)


def test_every_parameter_gets_a_gradient(model: nn.Module, images: Tensor) -> None:
    model.train()(images).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("avg", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("fastmax", lambda x: x.amax((2, 3))),
        ("avgmax", lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2),
        ("catavgmax", lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)),
        ("", lambda x: x),
    ],
)
@torch.no_grad()
def test_global_pool(model: nn.Module, images: Tensor, pool: str, expected: Any) -> None:
    features = model.forward_features(images)
    assert features.shape == (3, model.num_features, 2, 2)
    model.reset_classifier(0, pool)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, expected(features))
    assert torch.equal(model(images), pooled)  # without a classifier
    assert pooled.shape[1] == model.head_hidden_size
    made = small(num_classes=7 if pool else 0, global_pool=pool).eval()
    assert made(images).shape == ((3, 7) if pool else features.shape)


@torch.no_grad()
def test_head(model: nn.Module, images: Tensor) -> None:
    features = model.forward_features(images)
    before = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(before, features.mean((2, 3)))
    torch.testing.assert_close(model(images), F.linear(before, model.fc.weight, model.fc.bias))
    assert model.get_classifier() is model.fc
    assert model.get_submodule(model.get_classifier(name_only=True)) is model.fc


def test_a_new_classifier(model: nn.Module, images: Tensor) -> None:
    model.half().reset_classifier(11, "max")
    assert (model.fc.weight.dtype, model.fc.training) == (torch.float16, False)
    model.train().float().reset_classifier(12)
    assert model.global_pool.pool_type == "max"
    assert model.num_classes == model.get_classifier().out_features == 12
    assert model(images).shape == (3, 12)


@pytest.mark.parametrize("pool", ["median", "fastmedian", 3])
def test_an_unknown_pooling_changes_nothing(trained: nn.Module, pool: Any) -> None:

    def head() -> tuple[Any, ...]:
        return trained.global_pool, trained.fc, trained.num_classes, trained.head_hidden_size

    before = head()
    with pytest.raises(ValueError, match=f"global_pool must be one of .*, got {pool!r}"):
        trained.reset_classifier(9, pool)
    assert head() == before


def test_drop_path_skips_blocks_in_training_with_linear_rates(images: Tensor) -> None:
    model = small(drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    assert list(model.state_dict()) == list(small().state_dict())
    plain = small()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), plain.eval()(images))
        block = model.layer4[0].train()
        block.drop_path.drop_prob = 1 - 1e-9  # the block is always skipped
        features = torch.rand(2, 1024, 4, 4)
        torch.testing.assert_close(block(features), F.relu(block.downsample(features)))


def test_drop_rate_is_for_training(images: Tensor) -> None:
    model = small(drop_rate=0.5)
    features = torch.ones(3, model.num_features, 2, 2)
    dropped = model.train().forward_head(features, pre_logits=True)
    assert dropped.unique().tolist() == [0.0, 2.0]
    assert (dropped == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert model.eval().forward_head(features, pre_logits=True).unique().tolist() == [1.0]


def test_grad_checkpointing_runs_blocks_again(model: nn.Module, images: Tensor) -> None:
    model.double().eval()  # in training the norms' statistics would be updated twice
    calls = []
    for block in (model.layer1[0], model.layer4[0]):
        block.conv3.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for enable, expected in ((False, 2), (True, 4)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        model(images.double()).square().sum().backward()
        assert len(calls) == expected
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_groups_for_layer_decay() -> None:
    model = timm.create_model("epsanet50", device="meta")
    depths = (3, 4, 6, 3)
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = [f"layer{s}.{b}" for s, depth in enumerate(depths, 1) for b in range(depth)]
    order = ["conv1", *blocks, "fc"]
    for name in fine:
        part = ".".join(name.split(".")[:2]) if name.startswith("layer") else name.split(".")[0]
        assert fine[name] == order.index("conv1" if part == "bn1" else part), name
    assert set(fine) == {name for name, _ in model.named_parameters()}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert [coarse[f"{p}.weight"] for p in ("conv1", "bn1", "layer1.0.conv1", "fc")] == [0, 0, 1, 5]
    assert coarse["layer3.5.conv3.weight"] == 3


@torch.no_grad()
def taps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Compute the five intermediates module by module."""
    x = model.relu(model.bn1(model.conv1(images)))
    found = [x]
    x = model.maxpool(x)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        found.append(x)
    return found


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "fx", "getter"])
def test_features_only(trained: nn.Module, images: Tensor, kind: str) -> None:
    indices = (0, 2, 3)
    backbone = small(features_only=True, out_indices=indices, feature_cls=kind).eval()
    inner = {"hook": "body.", "fx": "graph_module.", "getter": "model."}.get(kind, "")
    own = backbone.state_dict()
    backbone.load_state_dict({k: trained.state_dict()[k.removeprefix(inner)] for k in own})
    with torch.no_grad():
        found = backbone(images)
    found = list(found.values()) if kind == "dict" else found
    expected = taps(trained, images)
    torch.testing.assert_close(found, [expected[i] for i in indices])
    assert backbone.feature_info.channels() == [expected[i].shape[1] for i in indices]
    assert backbone.feature_info.reduction() == [2, 8, 16]
    assert backbone.feature_info.module_name() == ["relu", "layer2", "layer3"]


@torch.no_grad()
def test_forward_intermediates(trained: nn.Module, images: Tensor) -> None:
    expected = taps(trained, images)
    last, found = trained.forward_intermediates(images)
    torch.testing.assert_close([*found, last], [*expected, expected[-1]])
    only = trained.forward_intermediates(images, indices=2, intermediates_only=True)
    torch.testing.assert_close(only, expected[-2:])
    last, found = trained.forward_intermediates(images, indices=[-3, 1], stop_early=True)
    torch.testing.assert_close([*found, last], [expected[1], expected[2], expected[2]])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        trained.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("index", range(5))
@torch.no_grad()
def test_prune_intermediate_layers(model: nn.Module, images: Tensor, index: int) -> None:
    expected = taps(model, images)[index]
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([index]) == [index]
    assert sum(p.numel() for p in model.parameters()) < before
    torch.testing.assert_close(model.forward_features(images), expected)
    assert model.num_features == model.head_hidden_size == expected.shape[1]
    kept = {name for name, _ in model.named_parameters()}
    assert not any(name.startswith(("fc", f"layer{index + 1}")) for name in kept)


def official(model: nn.Module) -> dict[str, Any]:
    """Return a checkpoint in the official layout."""
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    return {"epoch": 1, "arch": "epsanet50", "state_dict": state, "best_prec1": torch.tensor(77.49)}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_official_checkpoints_load(
    trained: nn.Module, images: Tensor, tmp_path: Path, is_zip: bool
) -> None:
    path = tmp_path / "model_best.pth.tar"
    torch.save(official(trained), path, _use_new_zipfile_serialization=is_zip)
    loaded = small(checkpoint_path=path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), trained(images))


def test_weights_adapt_to_other_classes_and_channels(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model_best.pth.tar"
    torch.save(official(trained), path)
    source = {"file": str(path), "num_classes": 5}
    gray = small(pretrained=True, pretrained_cfg_overlay=source, num_classes=9, in_chans=1)
    torch.testing.assert_close(gray.conv1.weight, trained.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(gray.layer4[0].conv3.weight, trained.layer4[0].conv3.weight)
    assert gray.fc.out_features == 9


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # this test uses it
@torch.no_grad()
def test_a_scripted_model_needs_no_package(
    trained: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = small(scriptable=True).eval()
    model.load_state_dict(trained.state_dict())
    torch.jit.script(model).save(tmp_path / "model.pt")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; model = torch.jit.load('model.pt').eval();"
        "torch.save(model(torch.load('images.pt')).detach(), 'logits.pt');"
        "assert 'timm' not in sys.modules and 'epsanet_fused' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), trained(images))


def test_the_model_compiles_in_one_graph(model: nn.Module, images: Tensor) -> None:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@torch.no_grad()
def test_rewrites_for_inference_keep_the_numbers(trained: nn.Module, images: Tensor) -> None:
    fast = fully_rewritten(images, trained)
    assert any(isinstance(m, PlannedBlock) for m in fast.modules())
    assert_same(trained, fast, images)
    for found, expected in zip(
        fast.forward_intermediates(images, intermediates_only=True),
        taps(trained, images),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def imported_without(package: str, statement: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in a new process in which a package can't be imported."""
    code = f"import sys; sys.modules[{package!r}] = None; {statement}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_timm_the_error_names_the_package() -> None:
    done = imported_without("timm", "import epsanet_fused.integrations.timm")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: epsanet_fused.integrations.timm needs timm: pip install timm"
    )
    other = imported_without("torchvision", "import epsanet_fused.integrations.timm")
    assert "torchvision" in other.stderr.splitlines()[-1]  # not timm: timm itself is installed
    assert imported_without("timm", "import epsanet_fused; epsanet_fused.epsanet50").returncode == 0
