"""torchvision's detectors train and detect with EPSANet as their backbone."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import write_backbone
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import epsanet_fused as ef
from epsanet_fused.integrations.torchvision import (
    epsanet_fpn_backbone,
    fasterrcnn_epsanet50_fpn,
    maskrcnn_epsanet50_fpn,
    retinanet_epsanet50_fpn,
)
from epsanet_fused.nn.epsanet import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")

BUILDERS = [fasterrcnn_epsanet50_fpn, maskrcnn_epsanet50_fpn, retinanet_epsanet50_fpn]
SIDE = 96
SIZES = ((96, 100), (80, 96))  # height, width

every_detector = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ef.EPSANet, Path]:
    """A network with norms as in a trained one, and its checkpoint in the official layout."""
    path = tmp_path_factory.mktemp("weights") / "epsanet50.pth.tar"
    return write_backbone(path), path


@pytest.fixture(scope="module")
def network(trained: tuple[ef.EPSANet, Path]) -> ef.EPSANet:
    return trained[0]


@pytest.fixture(scope="module")
def weights(trained: tuple[ef.EPSANet, Path]) -> Path:
    return trained[1]


def scene() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return two images and their targets: a bright and a dark rectangle; a disc."""
    generator = torch.Generator().manual_seed(1)
    first, second = (0.3 + 0.1 * torch.rand(3, h, w, generator=generator) for h, w in SIZES)
    masks = torch.zeros(2, *SIZES[0], dtype=torch.uint8)
    masks[0, 10:60, 8:48] = 1
    masks[1, 40:90, 55:95] = 1
    first[:, masks[0].bool()] += 0.6
    first[:, masks[1].bool()] -= 0.3
    y, x = torch.meshgrid(*(torch.arange(side) for side in SIZES[1]), indexing="ij")
    disc = ((y - 40) ** 2 + (x - 40) ** 2 < 30**2)[None].to(torch.uint8)
    second[0, disc[0].bool()] += 0.5
    boxes = [[8.0, 10.0, 48.0, 60.0], [55.0, 40.0, 95.0, 90.0]]
    return [first, second], [
        {"boxes": torch.tensor(boxes), "labels": torch.tensor([1, 2]), "masks": masks},
        {
            "boxes": torch.tensor([[11.0, 11.0, 70.0, 70.0]]),
            "labels": torch.tensor([2]),
            "masks": disc,
        },
    ]


def build_small(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """Build a detector for small images, with few proposals and no threshold of the scores.

    The heads are untrained: a threshold would drop all detections.
    """
    if build is retinanet_epsanet50_fpn:
        options |= {"score_thresh": 0.0, "detections_per_img": 20}
    else:
        options |= {"box_score_thresh": 0.0, "box_detections_per_img": 20}
        options |= {"rpn_post_nms_top_n_train": 100, "box_batch_size_per_image": 32}
    return build(num_classes=3, min_size=SIDE, max_size=128, **options)


# The differences from mmdetection's counts that the module's docstring names.
NORMS = 50_176  # weights and biases of the norms in the three stages that are trained
BACKGROUND_BOX = 4 * 1024 + 4
BACKGROUND_MASK = 256 + 1
BACKGROUND_LOGITS = 9 * (9 * 256 + 1)


@pytest.mark.parametrize(
    ("build", "published", "count", "background"),
    [
        (fasterrcnn_epsanet50_fpn, 38.56, 38_515_548, BACKGROUND_BOX),
        (maskrcnn_epsanet50_fpn, 41.20, 41_159_085, BACKGROUND_BOX + BACKGROUND_MASK),
        (retinanet_epsanet50_fpn, 34.78, 34_747_829, BACKGROUND_LOGITS),
    ],
    ids=["fasterrcnn", "maskrcnn", "retinanet"],
)
def test_published_parameter_counts(
    build: Callable[..., nn.Module], published: float, count: int, background: int
) -> None:
    model = build(num_classes=81)
    assert trainable(model) == count
    assert count == pytest.approx(published * 1e6, rel=0.0015)
    with_norms = trainable(build(num_classes=81, norm_layer=nn.BatchNorm2d))
    assert with_norms == count + NORMS
    assert round((with_norms - background) / 1e6, 2) == published


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_levels_of_every_arch(arch: str) -> None:
    backbone = epsanet_fpn_backbone(arch)
    levels = backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        "0": (1, 256, 16, 24),
        "1": (1, 256, 8, 12),
        "2": (1, 256, 4, 6),
        "3": (1, 256, 2, 3),
        "pool": (1, 256, 1, 2),
    }
    own = getattr(ef, arch)(norm_layer=FrozenBatchNorm2d)
    expected = {name: p.shape for name, p in own.named_parameters() if not name.startswith("fc.")}
    assert {name: p.shape for name, p in backbone.body.named_parameters()} == expected


def test_returned_layers_and_extra_blocks() -> None:
    backbone = epsanet_fpn_backbone(returned_layers=[2, 4], extra_blocks=LastLevelP6P7(2048, 256))
    levels = backbone(torch.randn(1, 3, 64, 64))
    assert [(name, level.shape[-1]) for name, level in levels.items()] == [
        ("0", 8),
        ("1", 2),
        ("p6", 1),
        ("p7", 1),
    ]


def test_features_are_those_of_the_network(network: ef.EPSANet, weights: Path) -> None:
    backbone = epsanet_fpn_backbone(weights=weights)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        features = backbone.body(images)
        for level, stage in enumerate(
            (network.layer1, network.layer2, network.layer3, network.layer4)
        ):
            x = stage(x)
            torch.testing.assert_close(features[str(level)], x, rtol=1e-4, atol=1e-4)
    assert x.std() > 0.1  # the activations haven't vanished


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (0, set()),
        (1, {"layer4"}),
        (3, {"layer2", "layer3", "layer4"}),
        (4, {"layer1", "layer2", "layer3", "layer4"}),
        (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_trainable_layers(layers: int, names: set[str]) -> None:
    backbone = epsanet_fpn_backbone(trainable_layers=layers, norm_layer=nn.BatchNorm2d)
    for name, child in backbone.body.named_children():
        for p in child.parameters():
            assert p.requires_grad == (name in names), name
    assert all(p.requires_grad for p in backbone.fpn.parameters())


@every_detector
def test_training(build: Callable[..., nn.Module], weights: Path) -> None:
    """The loss falls; frozen layers and norms stay unchanged, and all other parameters change."""
    torch.manual_seed(0)
    model = build_small(build, weights_backbone=weights).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 3e-4, 0.9)
    images, targets = scene()
    losses = []
    for _ in range(6):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    frozen = ("backbone.body.conv1.", "backbone.body.bn1.", "backbone.body.layer1.")
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(frozen), name
    norms = [name for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 1 + 16 * 3 + 4
    for name, value in model.state_dict().items():
        is_norm = name.rpartition(".")[0] in norms
        if name.startswith(frozen) or is_norm:
            assert torch.equal(value, before[name]), name
        elif value.any():  # a bias of 0 may have a zero gradient
            assert not torch.equal(value, before[name]), name


@every_detector
def test_evaluation(build: Callable[..., nn.Module], weights: Path) -> None:
    """Boxes lie within the images, masks have their sizes, and a state_dict gives the same."""
    model = build_small(build, weights_backbone=weights).eval()
    images, _ = scene()
    with torch.no_grad():
        found = model(images)
        other = build_small(build).eval()
        other.load_state_dict(model.state_dict())
        again = other(images)
    for (height, width), result, same in zip(SIZES, found, again, strict=True):
        count = len(result["boxes"])
        assert count > 0
        assert result["boxes"].shape == (count, 4)
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert result["scores"].shape == result["labels"].shape == (count,)
        assert set(result["labels"].tolist()) <= {0, 1, 2}
        if build is maskrcnn_epsanet50_fpn:
            assert result["masks"].shape == (count, 1, height, width)
        assert result.keys() == same.keys()
        for key in result:
            assert torch.equal(result[key], same[key])


@every_detector
def test_autocast(build: Callable[..., nn.Module], weights: Path) -> None:
    """In mixed precision losses are nearly equal, except those that depend on the proposals."""
    model = build_small(build, weights_backbone=weights).train()
    torch.manual_seed(0)
    plain = model(*scene())
    torch.manual_seed(0)  # for the random sampling of proposals
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(*scene())
    sum(cast.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(loss.isfinite() for loss in cast.values())
    same = ["classification", "bbox_regression", "loss_objectness", "loss_rpn_box_reg"]
    for name in plain.keys() & set(same):
        torch.testing.assert_close(cast[name].float(), plain[name], rtol=0.05, atol=0.0)


def test_channels_last(weights: Path) -> None:
    backbone = epsanet_fpn_backbone(weights=weights).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(images)
        backbone.to(memory_format=torch.channels_last)
        levels = backbone(images.to(memory_format=torch.channels_last))
    for name, level in expected.items():
        torch.testing.assert_close(levels[name], level, rtol=1e-4, atol=1e-4)
    assert levels["0"].is_contiguous(memory_format=torch.channels_last)


def test_other_arch_in_a_detector() -> None:
    model = fasterrcnn_epsanet50_fpn(arch="epsanet101", num_classes=2, min_size=64)
    assert isinstance(model, FasterRCNN)
    assert len(model.backbone.body.layer3) == 23
    assert model.transform.min_size == (64,)


def test_plain_norms_in_training(weights: Path) -> None:
    """With BatchNorm2d the blocks use the batch's statistics, and the checkpoint loads, too."""
    backbone = epsanet_fpn_backbone(weights=weights, norm_layer=nn.BatchNorm2d)
    before = backbone.body.layer4[0].bn2.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))["3"].sum().backward()
    assert not torch.equal(backbone.body.layer4[0].bn2.running_mean, before)
    assert backbone.body.layer4[0].bn2.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arch": "resnet50"}, ValueError, "arch must be one of epsanet50, .*, got 'resnet50'"),
        ({"trainable_layers": 6}, ValueError, "trainable_layers must be .* 0 to 5, .* got 6"),
        ({"trainable_layers": -1}, ValueError, "trainable_layers must be .* got -1"),
        ({"trainable_layers": "3"}, ValueError, "trainable_layers must be .* got '3'"),
        ({"returned_layers": [0, 1]}, ValueError, r"returned_layers must be .* got \[0, 1\]"),
        ({"returned_layers": [2, 1]}, ValueError, r"returned_layers must be .* got \[2, 1\]"),
        ({"returned_layers": [4, 4]}, ValueError, r"returned_layers must be .* got \[4, 4\]"),
        ({"returned_layers": []}, ValueError, r"returned_layers must be .* got \[\]"),
        ({"extra_blocks": nn.Identity()}, TypeError, "extra_blocks"),
        ({"weights": 50}, TypeError, "weights must be the path of a checkpoint or None, got int"),
        ({"weights": "none.pth"}, FileNotFoundError, "none.pth"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        epsanet_fpn_backbone(**options)


def test_weights_of_another_network(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"epsanet50\.pth\.tar does not fit the model: missing"):
        epsanet_fpn_backbone("epsanet101", weights=weights)
    torch.save({"state_dict": [1]}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="must hold a state_dict"):
        epsanet_fpn_backbone(weights=tmp_path / "bad.pt")


def test_without_torchvision_the_error_names_the_package() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import epsanet_fused.integrations.torchvision"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: epsanet_fused.integrations.torchvision needs the package" in done.stderr
