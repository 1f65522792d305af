"""The code and commands of README that need timm, torchvision or onnx."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snippets import PAGES, python_blocks

import epsanet_fused as ef

README = PAGES[0]


# The exporter's own, inside.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": ef.epsanet50().state_dict()}, "epsanet50.pth.tar")
    in_timm, in_torchvision, onnx = python_blocks(README, needs_more=True)
    names: dict[str, object] = {}
    exec(in_timm, names)
    assert names["model"].num_classes == 10
    channels = [t.shape[1] for t in names["backbone"](torch.randn(1, 3, 64, 64))]
    assert channels == [64, 256, 512, 1024, 2048]
    exec(in_torchvision, names)
    [found] = names["detector"].eval()([torch.rand(3, 96, 96)])
    assert found["boxes"].shape[1] == 4
    exec(onnx, {"torch": torch, "model": names["model"]})
    assert Path("epsanet50.onnx").stat().st_size > 0
