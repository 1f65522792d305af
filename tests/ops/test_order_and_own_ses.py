"""The order of the branches in the output, and an SE for each branch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from helpers.cases import (
    BACKENDS,
    MEMORY_FORMATS,
    SHAPES,
    Shape,
    assert_accurate,
    expected,
    make_case,
    run_by,
)
from torch import Tensor, nn
from torch.nn import functional as F

import epsanet_fused as ef
from epsanet_fused.testing.accuracy import evaluate, plain_tail

OWN = [name for name, shape in SHAPES.items() if shape.own_ses]
each_order = pytest.mark.parametrize("order", ["reversed", "natural"])
each_shape = pytest.mark.parametrize("shape", ["5x9", *OWN])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with run_by(request.param):
        yield request.param


def in_order(order: str):
    return functools.partial(plain_tail, order=order)


@each_shape
@each_order
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_output_and_gradients(backend: str, shape: str, order: str, memory_format: str) -> None:
    case = make_case(SHAPES[shape], torch.float32, MEMORY_FORMATS[memory_format])
    results = evaluate(functools.partial(ef.psa_tail, order=order), *case)
    oracle = evaluate(in_order(order), *case, dtype=torch.float64)
    assert_accurate(results, oracle, evaluate(in_order(order), *case))


@each_shape
@each_order
def test_the_epilogue_is_in_the_output_s_order(backend: str, shape: str, order: str) -> None:
    branches, fc, grad = make_case(SHAPES[shape])
    scale, shift = torch.randn(2, grad.shape[1])
    arguments = {"scale": scale, "shift": shift, "relu": True, "order": order}
    with torch.no_grad():
        out = ef.psa_tail(branches, *fc, **arguments)
    torch.testing.assert_close(out, plain_tail(branches, *fc, **arguments), rtol=1e-5, atol=1e-5)


@each_shape
@each_order
def test_the_norm_is_in_the_output_s_order(backend: str, shape: str, order: str) -> None:
    case = make_case(SHAPES[shape], torch.float64)
    norm = nn.BatchNorm2d(case.grad.shape[1], dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    running = norm.running_mean.clone()

    def expected_norm(branches: list[Tensor], *fc: Tensor) -> Tensor:
        out = plain_tail(branches, *fc, order=order)
        return F.relu(F.batch_norm(out, None, None, norm.weight, norm.bias, True))

    def ours(branches: list[Tensor], *fc: Tensor) -> Tensor:
        return ef.psa_tail_norm(branches, *fc, norm, order=order)

    results, oracle = (evaluate(f, *case) for f in (ours, expected_norm))
    torch.testing.assert_close(results, oracle, rtol=1e-8, atol=1e-9)
    assert not torch.equal(norm.running_mean, running)


def test_own_ses_that_are_equal_are_a_shared_one(backend: str) -> None:
    branches, fc, grad = make_case(Shape(2, 4, 8, 4, 5, 2), torch.float64)
    own = [(t.flatten(1) if t.dim() == 4 else t).repeat(4, *[1] * min(t.dim(), 2)) for t in fc]
    shared, each = (evaluate(ef.psa_tail, branches, weights, grad) for weights in (fc, own))
    torch.testing.assert_close(each[:5], shared[:5])
    for ours, total in zip(each[5:], shared[5:], strict=True):
        torch.testing.assert_close(ours.sum(0), total.view(ours.shape[1:]))


def test_own_ses_compile_without_a_graph_break() -> None:
    case = make_case(SHAPES["own SEs"])
    compiled = torch.compile(ef.psa_tail, fullgraph=True, backend="aot_eager")
    assert_accurate(evaluate(compiled, *case), *expected(case))
    torch.compiler.reset()


BAD = {
    "order": ({"order": "forwards"}, "order must be 'reversed' or 'natural', got 'forwards'"),
    "the number of SEs": ({"cut": 3}, r"fc1_weight must be \(4, 3, 24\), got \(3, 3, 24\)"),
    "a shared bias": ({"bias": 1}, r"fc1_bias must be \(4, 3\), got \(3,\)"),
    "a shared matrix": ({"matrix": 1}, r"fc2_weight must be \(4, 24, 3\), got \(24, 3\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(backend: str, name: str) -> None:
    changes, message = BAD[name]
    branches, fc, _ = make_case(SHAPES["own SEs"])
    fc = [t[: changes.get("cut", 4)] for t in fc]
    if "bias" in changes:
        fc[1] = fc[1][0]
    if "matrix" in changes:
        fc[2] = fc[2][0]
    with pytest.raises(ValueError, match=message):
        ef.psa_tail(branches, *fc, order=changes.get("order", "reversed"))
