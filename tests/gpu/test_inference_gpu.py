"""Optimized models on a GPU: cuDNN's fused calls and CUDA graphs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from harness.networks import ResNetBlock
from helpers.networks import small

import epsanet_fused as ef
from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.rewrite import apply_rewrites, find_targets
from epsanet_fused.nn.grouped_conv import ConvPlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def _exact_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)


def case(dtype: torch.dtype, block=ef.EPSABlock):
    return small(block).to("cuda", dtype), torch.randn(3, 3, 64, 64).to("cuda", dtype)


@pytest.mark.parametrize("block", [ef.EPSABlock, ResNetBlock], ids=["epsanet", "resnet"])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_all_rewrites_at_most_double_the_error(dtype, memory_format, block):
    model, x = case(dtype, block)
    names = [n for n, m in model.named_modules() if getattr(m, "groups", 1) > 1]
    tiles = ((1, 1), (2, 4)) if dtype == torch.float32 else ((1, 1),)
    plans = {
        name: ConvPlan((1, 2)[i % 2], tiles[i % len(tiles)], memory_format)
        for i, name in enumerate(names)
    }
    with torch.no_grad():
        made = apply_rewrites(
            model, find_targets(model, (x,)), Rewrites(memory_format, plans=plans)
        )
        expected = copy.deepcopy(model).double()(x.double())
        floor = torch.finfo(dtype).eps * expected.norm()
        limit = 2 * (model(x).double() - expected).norm() + floor
        assert (made(x).double() - expected).norm() <= limit


def test_float32_is_rewritten_where_cudnn_rounds_it_to_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, x = case(torch.float32)
    with torch.no_grad():
        targets = find_targets(model, (x,))
    assert len(targets.blocks) == 5 and not targets.skipped


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_optimize_for_inference(dtype, cuda_graph):
    model, x = case(dtype)
    made = ef.optimize_for_inference(model, x, cuda_graph=cuda_graph)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        for shape in [(3, 3, 64, 64), (3, 3, 64, 64), (1, 3, 50, 70)]:
            images = torch.randn(shape).to(x)
            expected = model(images)
            assert (made(images) - expected).norm() <= tolerance * expected.norm()
    assert list(made.state_dict()) == list(model.state_dict())
    assert ("CUDA graph" in str(made.report)) == cuda_graph


def test_a_graph_follows_its_parameters_and_keeps_results_apart():
    model, x = case(torch.float32)
    with torch.no_grad():
        made = optimize.GraphedModel(
            apply_rewrites(model, find_targets(model, (x,)), Rewrites(torch.channels_last)), (x,)
        )
        first = made(x)
        kept = first.clone()
        made(torch.randn_like(x))
        assert torch.equal(first, kept)
        made.model.fc.weight.mul_(2)
        made.model.layer1[0].conv1.weight.mul_(2)
        torch.testing.assert_close(made(x), made.model(x), rtol=1e-4, atol=1e-4)
        state = {k: v * 0.5 if v.is_floating_point() else v for k, v in made.state_dict().items()}
        made.load_state_dict(state)
        torch.testing.assert_close(made(x), made.model(x), rtol=1e-4, atol=1e-4)
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            torch.testing.assert_close(copied(x), made(x), rtol=1e-4, atol=1e-4)


def test_a_graph_captured_in_inference_mode_serves_outside_of_it():
    model, x = case(torch.float32)
    made = optimize.GraphedModel(model, (x,))
    with torch.inference_mode():
        first = made(x)
    assert torch.equal(made(x.clone()), first)
    with pytest.raises(RuntimeError, match="optimize_for_inference has no gradients"):
        made(x.clone().requires_grad_())
