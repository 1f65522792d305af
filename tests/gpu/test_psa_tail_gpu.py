"""psa_tail on a GPU: compiled kernels, streams, graphs and sizes. ``make gpu-check`` runs this."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.cases import (
    DTYPES,
    MEMORY_FORMATS,
    SHAPES,
    Case,
    Shape,
    accuracy_cases,
    assert_accurate,
    assert_matches_oracle,
    expected,
    make_case,
)

import epsanet_fused as ef
from epsanet_fused.backends.registry import PATHS as ALL_PATHS
from epsanet_fused.testing.accuracy import evaluate, plain_tail

BACKENDS = [n for n, status in ef.list_backends().items() if status.available and n != "cpu"]
FUSED = [name for name in BACKENDS if name != "reference"]
PATHS = ALL_PATHS if "cuda" in FUSED else ()
STAGES = ("S1", "S2", "S3", "S4")
BATCHES = {"batch 1": 1, "batch 32": 32, "batch 128": 128}


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Free cached memory: several processes may share the GPU, and one test needs 40 GB."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ef.use_backend(request.param):
        yield request.param


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    with ef.use_backend(request.param):
        yield request.param


def on_card(shape: Shape, dtype: str = "fp16", layout: str = "nchw") -> Case:
    return make_case(shape, DTYPES[dtype], MEMORY_FORMATS[layout], device="cuda")


# Each kernel takes seconds to compile, so odd shapes run in two combinations only.
CASES = [
    case
    for case in accuracy_cases()
    if case[0] in STAGES or case[1:] in (("fp32", "nchw"), ("bf16", "channels_last"))
]


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
def test_matches_the_oracle(backend: str, shape: str, dtype: str, layout: str) -> None:
    case = on_card(SHAPES[shape], dtype, layout)
    assert_matches_oracle(case, evaluate(ef.psa_tail, *case))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("batch", BATCHES)
def test_matches_the_oracle_at_real_batches(
    fused: str, stage: str, layout: str, batch: str
) -> None:
    """The batches reach each tile of the configuration table."""
    case = on_card(SHAPES[stage]._replace(B=BATCHES[batch]), "fp16", layout)
    assert_matches_oracle(case, evaluate(ef.psa_tail, *case))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("shape", "dtype", "layout"), accuracy_cases())
def test_each_path_matches_the_oracle(path: str, shape: str, dtype: str, layout: str) -> None:
    case = on_card(SHAPES[shape], dtype, layout)
    with ef.use_backend(path):
        try:
            results = evaluate(ef.psa_tail, *case)
        except ValueError as refusal:  # the sample doesn't fit on chip, or the GPU is too old
            pytest.skip(str(refusal))
    assert_matches_oracle(case, results)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_each_path_has_the_epilogue(path: str, dtype: str, layout: str, stage: str) -> None:
    branches, fc, grad = on_card(SHAPES[stage], dtype, layout)
    scale, shift = torch.randn(2, grad.shape[1], device="cuda")
    exact = {"scale": scale.double(), "shift": shift.double(), "relu": True}
    oracle = plain_tail([x.double() for x in branches], *(t.double() for t in fc), **exact)
    rounded = {"scale": scale.to(grad.dtype), "shift": shift.to(grad.dtype), "relu": True}
    plain = plain_tail(branches, *fc, **rounded)
    with ef.use_backend(path):
        result = ef.psa_tail(branches, *fc, scale=scale, shift=shift, relu=True)
    assert_accurate([result], [oracle], [plain])


def test_matches_the_oracle_in_float64(fused: str) -> None:
    if fused == "cuda":
        pytest.skip("the cuda kernels are for float16, bfloat16 and float32")
    case = make_case(SHAPES["5x9"], torch.float64, device="cuda")
    assert_matches_oracle(case, evaluate(ef.psa_tail, *case))


def test_float64_is_left_to_other_backends() -> None:
    case = make_case(SHAPES["5x9"], torch.float64, device="cuda")
    assert_matches_oracle(case, evaluate(ef.psa_tail, *case))
    if "cuda" in FUSED:
        with ef.use_backend("cuda"), pytest.raises(ValueError, match="float32"):
            ef.psa_tail(case.branches, *case.fc)


VIEWS = {
    "slices": lambda bs: list(torch.cat(bs, 1).chunk(len(bs), 1)),
    "mixed formats": lambda bs: [
        x.contiguous(memory_format=torch.channels_last) if s % 2 else x for s, x in enumerate(bs)
    ],
    "transposed": lambda bs: [x.mT.contiguous().mT for x in bs],
    "misaligned": lambda bs: [
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in bs
    ],
    "one sample for all": lambda bs: [x[:1].expand(x.shape) for x in bs],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(fused: str, view: str, dtype: str) -> None:
    case = on_card(SHAPES["S3"], dtype)
    case = case._replace(branches=VIEWS[view](case.branches))
    assert_matches_oracle(case, evaluate(ef.psa_tail, *case))


def test_gradient_of_sum(fused: str) -> None:
    case = on_card(SHAPES["S3"], "fp32")
    case = case._replace(grad=torch.ones((), device="cuda").expand(case.grad.shape))
    assert_matches_oracle(case, evaluate(ef.psa_tail, *case))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("stage", ["S1", "S4"])
def test_the_same_bits_in_five_runs(fused: str, layout: str, stage: str) -> None:
    case = on_card(SHAPES[stage]._replace(B=64), "bf16", layout)
    first, *others = (evaluate(ef.psa_tail, *case) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_runs_on_the_current_stream(fused: str) -> None:
    """On a side stream, after a long wait: a launch on another stream would read too early."""
    case = on_card(SHAPES["S2"]._replace(B=16))
    right = evaluate(ef.psa_tail, *case)
    late = [torch.zeros_like(x) for x in case.branches]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(late, case.branches, strict=True):
            x.copy_(value)
        results = evaluate(ef.psa_tail, late, case.fc, case.grad)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, right, strict=True))


@pytest.mark.parametrize("stage", ["S1", "S4"])
def test_a_captured_graph_replays_with_fresh_inputs(fused: str, stage: str) -> None:
    case = on_card(SHAPES[stage]._replace(B=4))
    static = [x.clone().requires_grad_() for x in case.branches]
    fc = [t.clone().requires_grad_() for t in case.fc]
    grad = case.grad.clone()

    def step() -> list[torch.Tensor]:
        out = ef.psa_tail(static, *fc)
        return [out, *torch.autograd.grad(out, [*static, *fc], grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*static, grad):
                x.normal_()
        fresh = Case([x.detach().clone() for x in static], case.fc, grad.clone())
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(results, evaluate(ef.psa_tail, *fresh), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(fused: str, dynamic: bool) -> None:
    compiled = torch.compile(ef.psa_tail, fullgraph=True, dynamic=dynamic)
    for shape in (SHAPES["S3"], SHAPES["5x9"]):
        case = on_card(shape, "bf16")
        assert_accurate(evaluate(compiled, *case), *expected(case))
    torch.compiler.reset()


@pytest.mark.xdist_group("large")  # one at a time: each needs up to 26 GB
def test_more_than_two_to_the_31_elements(fused: str) -> None:
    """An output of 2**31 + elements: the last sample is right, and so is its gradient.

    In bfloat16: float16 can't hold the sums over so many pixels that plain PyTorch rounds to it.
    """
    shape = Shape(11, 4, 64, 875, 875, 4)  # 2.16e9 elements, 4.3 GB in 16 bits
    if torch.cuda.mem_get_info()[0] < 26e9:
        pytest.skip("needs 26 GB of free memory")
    B, S, C, H, W, R = shape[:6]
    # Compare two samples only: the oracle of all would not fit.
    branches = [torch.randn(B, C, H, W, device="cuda", dtype=torch.bfloat16) for _ in range(S)]
    fc = [t.cuda() for t in make_case(Shape(1, S, C, 1, 1, R), torch.bfloat16).fc]
    leaves = [x.requires_grad_() for x in branches]
    out = ef.psa_tail(leaves, *fc)
    grads = torch.autograd.grad(out, leaves, out.detach())
    for b in (0, B - 1):
        last = [x[b : b + 1].detach() for x in branches]
        case = Case(last, fc, out[b : b + 1].detach())
        oracle, plain = expected(case)
        assert_accurate([out[b : b + 1], *(g[b : b + 1] for g in grads)], oracle[:5], plain[:5])


def test_another_current_device(fused: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make_case(SHAPES["S3"], torch.float32, device="cuda:1")
    with torch.cuda.device(0):
        results = evaluate(ef.psa_tail, *case)
    assert_accurate(results, *expected(case))


def test_auto_is_fused_on_a_card() -> None:
    assert FUSED, "no fused backend can run here"
    case = on_card(SHAPES["S3"])
    with ef.use_backend("auto"):
        auto = evaluate(ef.psa_tail, *case)
    by_name = []
    for name in FUSED:
        with ef.use_backend(name):
            by_name.append(evaluate(ef.psa_tail, *case))
    assert any(
        all(torch.equal(a, b) for a, b in zip(auto, results, strict=True)) for results in by_name
    )


def test_the_whole_network_in_training(fused: str) -> None:
    """EPSANet-50, a training step in float32: logits and the loss's gradients."""
    torch.manual_seed(0)
    plain = ef.epsanet50(num_classes=10, fused=False).cuda()
    model = ef.epsanet50(num_classes=10).cuda()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(8, 3, 96, 96, device="cuda")
    exact = ef.epsanet50(num_classes=10, fused=False).cuda().double()
    exact.load_state_dict(plain.state_dict())
    # TF32's rounding would hide any other error.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = {"fused": model(x), "plain": plain(x), "exact": exact(x.double())}
        for out in logits.values():
            out.square().mean().backward()
    assert_accurate([logits["fused"]], [logits["exact"]], [logits["plain"]])
    # Compare all gradients together: a ReLU input close to 0 can flip and change single ones.
    exact_grads = flat_gradients(exact)
    limit = 2 * (flat_gradients(plain) - exact_grads).norm() + 1e-5 * exact_grads.norm()
    assert (flat_gradients(model) - exact_grads).norm() <= limit


def flat_gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def test_plain_tail_is_what_it_is_compared_with() -> None:
    """The plain tail gives the same numbers on the GPU as on the CPU, in float64."""
    case = make_case(SHAPES["S3"], torch.float64, device="cuda")
    on_cpu = Case(*([t.cpu() for t in ts] for ts in case[:2]), case.grad.cpu())
    for a, b in zip(evaluate(plain_tail, *case), evaluate(plain_tail, *on_cpu), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)
