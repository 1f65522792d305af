"""Packages that work by calls of a layer do the same to a fused module as to a plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import epsanet_fused as ef

pytestmark = [
    # These packages and what they import warn of their own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:epsanet_fused"),
]


def networks() -> tuple[nn.Module, nn.Module]:
    """Return a plain and a fused network with the same weights, in eval mode."""
    torch.manual_seed(0)
    plain = ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 10, reduction=4, fused=False).eval()
    fused = ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 10, reduction=4).eval()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_peft_adapts_the_layers_of_an_se(images: Tensor) -> None:
    peft = pytest.importorskip("peft")
    results = []
    for model in networks():
        config = peft.LoraConfig(target_modules=["fc1", "fc2"], r=2, init_lora_weights=False)
        torch.manual_seed(2)
        adapted = peft.get_peft_model(model, config)
        out = adapted(images)
        out.square().sum().backward()
        grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        assert grads and all(g is not None for g in grads.values())
        with adapted.disable_adapter(), torch.no_grad():
            results.append((out.detach(), grads, adapted(images)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_accelerate_offloads_each_layer(images: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    outputs = []
    for model in networks():
        expected = model(images).detach()
        offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert any(p.is_meta for p in offloaded.parameters())
        with torch.no_grad():
            outputs.append(offloaded(images))
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-5)


def test_opacus_has_the_gradients_of_each_sample() -> None:
    opacus = pytest.importorskip("opacus")
    x, found = torch.randn(3, 64, 6, 6), []
    for kind in (ef.PSAModule, ef.FusedPSAModule):
        torch.manual_seed(0)
        psa = kind(64, 64, reduction=4)
        psa.se.relu = nn.ReLU()  # Opacus refuses to follow what is done in place
        wrapped = opacus.GradSampleModule(psa)
        wrapped(x).square().sum().backward()
        found.append({name: p.grad_sample for name, p in wrapped.named_parameters()})
    assert found[1].keys() == found[0].keys() and "_module.se.fc1.weight" in found[0]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_torch_pruning_removes_the_same_channels(images: Tensor) -> None:
    tp = pytest.importorskip("torch_pruning")
    outputs = []
    for model in networks():
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=images)
        conv = model.layer1[0].conv3
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=[1, 5, 7])
        group.prune()
        assert conv.out_channels == 253
        outputs.append(model(images).detach())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_changed_model_is_independent(images: Tensor) -> None:
    peft = pytest.importorskip("peft")
    _, fused = networks()
    config = peft.LoraConfig(target_modules=["fc2"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(fused), config)
    assert not torch.allclose(adapted(images), fused(images))
    assert all(m.reads_se() for m in fused.modules() if isinstance(m, ef.FusedPSAModule))
