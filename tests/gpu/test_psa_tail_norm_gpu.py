"""psa_tail_norm on a GPU: compiled kernels, streams, graphs, sizes. ``make gpu-check`` runs it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers.cases import DTYPES, MEMORY_FORMATS, SHAPES, Shape, assert_accurate
from helpers.norm_cases import (
    NORM_SHAPES,
    NormCase,
    evaluate_norm,
    expected_norm,
    make_norm_case,
    plain_norm_tail,
    poison_case,
    thresholds,
)
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.backends.registry import get_backend
from epsanet_fused.ops.psa_tail_norm import fuses_norm_by_default, resolve_norm
from epsanet_fused.testing.accuracy import max_error

STAGES = ("S1", "S2", "S3", "S4")


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    with ef.use_backend("triton"):
        yield
    torch.cuda.empty_cache()


def on_card(shape: Shape, dtype: str = "fp16", layout: str = "nchw", **how: object) -> NormCase:
    return make_norm_case(shape, DTYPES[dtype], MEMORY_FORMATS[layout], device="cuda", **how)


def check(case: NormCase) -> None:
    assert_accurate(evaluate_norm(ef.psa_tail_norm, case), *expected_norm(case))


# Each kernel takes seconds to compile, so odd shapes run in one combination each.
ODD = [shape for shape in NORM_SHAPES if shape not in STAGES]
CASES = [
    *itertools.product(STAGES, ["fp16"], MEMORY_FORMATS),
    *((shape, "fp32", "nchw") for shape in ODD[::2]),
    *((shape, "bf16", "channels_last") for shape in ODD[1::2]),
]


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
def test_matches_the_oracle(shape: str, dtype: str, layout: str) -> None:
    check(on_card(NORM_SHAPES[shape], dtype, layout))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("batch", [32, 128])
def test_matches_the_oracle_at_real_batches(stage: str, layout: str, batch: int) -> None:
    """The batches reach each tile of the configuration table."""
    check(on_card(SHAPES[stage]._replace(B=batch), "fp16", layout))


def test_matches_the_oracle_in_float64() -> None:
    check(make_norm_case(SHAPES["5x9"], torch.float64, device="cuda"))


def test_auto_has_it_on_a_card_and_a_block_takes_it_by_name() -> None:
    assert resolve_norm("auto", "cuda") is get_backend("triton")
    assert fuses_norm_by_default("cuda")
    case = on_card(SHAPES["S3"])
    by_name = evaluate_norm(ef.psa_tail_norm, case)
    with ef.use_backend("auto"):
        auto = evaluate_norm(ef.psa_tail_norm, case)
    assert all(torch.equal(a, b) for a, b in zip(auto, by_name, strict=True))


VIEWS = {
    "slices": lambda bs: list(torch.cat(bs, 1).chunk(len(bs), 1)),
    "mixed formats": lambda bs: [
        x.contiguous(memory_format=torch.channels_last) if s % 2 else x for s, x in enumerate(bs)
    ],
    "transposed": lambda bs: [x.mT.contiguous().mT for x in bs],
    "misaligned": lambda bs: [
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in bs
    ],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_any_strides(view: str, dtype: str) -> None:
    check(on_card(SHAPES["S3"], dtype, change=VIEWS[view]))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", [SHAPES["S1"], SHAPES["S4"]._replace(B=16)], ids=["S1", "S4"])
def test_a_large_mean_and_a_small_variance(shape: Shape, layout: str) -> None:
    """Values of 1e3 +- 0.1, with the attention 1 / S in all samples.

    Another attention would dominate the variance. The fc gradients are not compared: with such
    large values they consist of rounding errors.
    """
    case = on_card(shape, "fp32", layout, change=lambda bs: [1e3 + 0.1 * x for x in bs])
    case.fc[2].zero_()
    case.fc[3].zero_()
    case = case._replace(affine=[case.affine[0], thresholds(case, case.affine[0])])
    results = (evaluate_norm(ef.psa_tail_norm, case), *expected_norm(case))
    assert_accurate(*(r[:5] + r[9:] for r in results))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["branch", "fc1_weight", "fc2_bias", "beta", "grad"])
def test_nan_and_inf_spread_as_in_pytorch(where: str, poison: float) -> None:
    case = make_norm_case(Shape(3, 4, 12, 5, 6, 3), torch.float64, device="cuda")
    poison_case(case, where, poison)
    results = evaluate_norm(ef.psa_tail_norm, case)
    for result, plain in zip(results, evaluate_norm(plain_norm_tail, case), strict=True):
        torch.testing.assert_close(result, plain, equal_nan=True, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_backward_masks_what_forward_did(dtype: str, stage: str, layout: str) -> None:
    """The backward passes the gradient of exactly those elements that the ReLU passed.

    Without beta many values are close to the ReLU's zero. With a gradient of 1 everywhere, beta's
    gradient is the number of elements that passed.
    """
    case = on_card(SHAPES[stage]._replace(B=8), dtype, layout)
    branches = [torch.randn_like(x) for x in case.branches]
    norm = nn.BatchNorm2d(case.grad.shape[1]).cuda()
    out = ef.psa_tail_norm(branches, *case.fc, norm)
    out.backward(torch.ones_like(out))
    assert torch.equal(norm.bias.grad, (out > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("stage", ["S1", "S4"])
def test_the_same_bits_in_five_runs(layout: str, stage: str) -> None:
    case = on_card(SHAPES[stage]._replace(B=64), "bf16", layout)
    first, *others = (evaluate_norm(ef.psa_tail_norm, case) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def leaves_of(case: NormCase) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in (*case.branches, *case.fc)]


def step(leaves: Sequence[Tensor], norm: nn.BatchNorm2d, grad: Tensor) -> list[Tensor]:
    """Return the output and the gradients of branches, fc tensors, gamma and beta."""
    out = ef.psa_tail_norm(leaves[:-4], *leaves[-4:], norm)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *norm.parameters()], grad)]


def test_runs_on_the_current_stream() -> None:
    """On a side stream, after a long wait: a launch on another stream would read too early."""
    case = on_card(SHAPES["S2"]._replace(B=16))
    norm = nn.BatchNorm2d(case.grad.shape[1]).cuda()
    leaves = leaves_of(case)
    right = step(leaves, norm, case.grad)
    late = [torch.zeros_like(x).requires_grad_() for x in case.branches]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for x, value in zip(late, case.branches, strict=True):
                x.copy_(value)
        results = step([*late, *leaves[-4:]], norm, case.grad)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, right, strict=True))


@pytest.mark.parametrize("stage", ["S1", "S4"])
def test_a_captured_graph_replays_with_fresh_inputs(stage: str) -> None:
    case = on_card(SHAPES[stage]._replace(B=4))
    norm = nn.BatchNorm2d(case.grad.shape[1]).cuda()
    leaves, grad = leaves_of(case), case.grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(leaves, norm, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(leaves, norm, grad)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*leaves[:-4], grad):
                x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        kept = [t.clone() for t in results]
        for a, b in zip(kept, step(leaves, norm, grad), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    compiled = torch.compile(ef.psa_tail_norm, fullgraph=True, dynamic=dynamic)
    for shape in (SHAPES["S3"], SHAPES["5x9"]):
        case = on_card(shape, "bf16")
        assert_accurate(evaluate_norm(compiled, case), *expected_norm(case))
    torch.compiler.reset()


def block(fused: bool) -> ef.EPSABlock:
    torch.manual_seed(0)
    made = ef.EPSABlock(64, 64, downsample=nn.Conv2d(64, 256, 1), fused=fused)
    return made.cuda()


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
def test_a_block_trains_as_the_plain_one(layout: str) -> None:
    x = torch.randn(4, 64, 12, 12, device="cuda", dtype=torch.float64)
    x = x.contiguous(memory_format=MEMORY_FORMATS[layout])
    states = []
    for fused in (True, False):
        model = block(fused).double().to(memory_format=MEMORY_FORMATS[layout])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        states.append(model.state_dict())
    for name, exact in states[1].items():
        limit = 1e-9 * max(1.0, exact.abs().max().item())
        assert max_error(states[0][name].double(), exact.double()) <= limit, name


def test_a_block_under_autocast() -> None:
    x = torch.randn(8, 64, 28, 28, device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = block(fused=False)(x)
    model = block(fused=True)
    with torch.autocast("cuda", torch.float16):
        same, out = block(fused=False)(x), model(x)
    assert (out - exact).norm() <= 2 * (same - exact).norm()
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.xdist_group("large")  # one at a time: each needs up to 26 GB
def test_more_than_two_to_the_31_elements() -> None:
    """An output of over 2**31 elements: the last sample equals the first, and so do its results."""
    shape = (11, 64, 875, 875)  # of a branch; 2.16e9 elements in all, 4.3 GB in 16 bits
    if torch.cuda.mem_get_info()[0] < 26e9:
        pytest.skip("needs 26 GB of free memory")
    branches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for x in branches:
        x[-1] = x[0]
    leaves = [x.requires_grad_() for x in branches]
    fc = make_norm_case(Shape(2, 4, 64, 2, 2, 4), device="cuda").fc
    out = ef.psa_tail_norm(leaves, *fc, nn.BatchNorm2d(256).cuda())
    grads = torch.autograd.grad(out, leaves, out.detach())
    for t in (out, *grads):
        assert t[0].abs().max() > 0 and t[0].isfinite().all()
        assert torch.equal(t[-1], t[0])
