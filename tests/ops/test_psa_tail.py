"""psa_tail gives the oracle's output and gradients, by every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.cases import (
    BACKENDS,
    BRANCHES,
    GRADIENTS,
    MEMORY_FORMATS,
    OPERATOR_BACKENDS,
    SHAPES,
    SMALL,
    Case,
    Shape,
    accuracy_cases,
    assert_accurate,
    expected,
    make_case,
    named_case,
    run_by,
)
from torch import Tensor

import epsanet_fused as ef
from epsanet_fused.backends.registry import current_backend
from epsanet_fused.testing.accuracy import bound, evaluate, max_error, plain_tail


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with run_by(request.param):
        yield request.param


@pytest.mark.parametrize(("shape", "dtype", "memory_format"), accuracy_cases())
def test_matches_the_oracle(backend: str, shape: str, dtype: str, memory_format: str) -> None:
    case, oracle, plain = named_case(shape, dtype, memory_format)
    assert_accurate(evaluate(ef.psa_tail, *case), oracle, plain)


def test_matches_the_oracle_in_float64(backend: str) -> None:
    case = make_case(SMALL, torch.float64)
    assert_accurate(evaluate(ef.psa_tail, *case), *expected(case))


def check(case: Case) -> list[Tensor]:
    results = evaluate(ef.psa_tail, *case)
    assert_accurate(results, *expected(case))
    return results


def test_gradient_of_sum(backend: str) -> None:
    """The gradient of a sum is expanded: every stride is 0."""
    case = make_case(SMALL)
    check(case._replace(grad=torch.ones(()).expand(case.grad.shape)))


@pytest.mark.parametrize("view", GRADIENTS.values(), ids=GRADIENTS)
def test_strided_gradient(backend: str, view: Callable[[Tensor], Tensor]) -> None:
    case = make_case(SMALL)
    check(case._replace(grad=view(case.grad)))


@pytest.mark.parametrize("view", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("shape", ["SMALL", "S4", "1x1", "B1"])
def test_any_strides(
    backend: str, view: Callable[[list[Tensor]], list[Tensor]], shape: str
) -> None:
    case = make_case(SHAPES.get(shape, SMALL))
    case = case._replace(branches=view(case.branches))
    oracle = evaluate(plain_tail, case.branches, case.fc, dtype=torch.float64)
    plain = evaluate(plain_tail, case.branches, case.fc)
    assert_accurate([ef.psa_tail(case.branches, *case.fc)], oracle, plain)
    # The gradients are those of dense leaves, of which the branches are views.
    dense = make_case(SHAPES.get(shape, SMALL))

    def tail(branches: list[Tensor], *fc: Tensor) -> Tensor:
        return ef.psa_tail(view(list(branches)), *fc)

    def plain_view(branches: list[Tensor], *fc: Tensor) -> Tensor:
        return plain_tail(view([b.clone() for b in branches]), *fc)

    if view is BRANCHES["misaligned"]:
        return  # it is made by a concatenation in float32
    results = evaluate_used(tail, dense)
    assert_accurate(
        results, evaluate_used(plain_view, dense, torch.float64), evaluate_used(plain_view, dense)
    )


def evaluate_used(
    tail: Callable[..., Tensor], case: Case, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Do as ``evaluate``, with gradients of zero for branches that the view doesn't use."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (*case.branches, *case.fc)]
    out = tail(leaves[: len(case.branches)], *leaves[len(case.branches) :])
    grads = torch.autograd.grad(
        out, leaves, case.grad.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return [out.detach(), *grads]


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_memory_format_follows_the_branches(backend: str, memory_format: str) -> None:
    case = make_case(SMALL, memory_format=MEMORY_FORMATS[memory_format])
    out, *grads = evaluate(ef.psa_tail, *case)
    for t in (out, *grads[:4]):
        assert t.is_contiguous(memory_format=MEMORY_FORMATS[memory_format])


def test_mixed_formats_give_a_contiguous_output(backend: str) -> None:
    case = make_case(SMALL)
    branches = BRANCHES["mixed formats"](case.branches)
    assert ef.psa_tail(branches, *case.fc).is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "fc_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
    ],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_weights_of_another_dtype(backend: str, dtype: torch.dtype, fc_dtype: torch.dtype) -> None:
    case = make_case(SMALL, dtype, fc_dtype=fc_dtype)
    results = evaluate(ef.psa_tail, *case)
    assert {t.dtype for t in results[:5]} == {dtype}
    assert {t.dtype for t in results[5:]} == {fc_dtype}
    oracle, plain = expected(case)
    # Plain PyTorch runs in one dtype: round its fc gradients to the dtype of fc.
    plain[5:] = [g.to(fc_dtype) for g in plain[5:]]
    assert_accurate(results, oracle, plain)


def test_each_weight_may_have_its_own_dtype(backend: str) -> None:
    case = make_case(SMALL)
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    case = case._replace(fc=[t.to(d) for t, d in zip(case.fc, dtypes, strict=True)])
    results = evaluate(ef.psa_tail, *case)
    assert [t.dtype for t in results[5:]] == list(dtypes)
    oracle, plain = expected(case)
    plain[5:] = [g.to(d) for g, d in zip(plain[5:], dtypes, strict=True)]
    assert_accurate(results, oracle, plain)


FROZEN = {
    "weights": [True] * 4 + [False] * 4,
    "branches": [False] * 4 + [True] * 4,
    "one branch": [True, False, True, True] + [True] * 4,
    "all but one bias": [False] * 7 + [True],
}


@pytest.mark.parametrize("needed", FROZEN.values(), ids=FROZEN)
def test_frozen_tensors_get_no_gradient(backend: str, needed: list[bool]) -> None:
    case = make_case(SMALL)
    leaves = [
        t.clone().requires_grad_(n) for t, n in zip(case.branches + case.fc, needed, strict=True)
    ]
    ef.psa_tail(leaves[:4], *leaves[4:]).backward(case.grad)
    assert [t.grad is not None for t in leaves] == needed
    oracle, plain = expected(case)
    kept = [i for i, n in enumerate(needed) if n]
    assert_accurate(
        [leaves[i].grad for i in kept],
        [oracle[1 + i] for i in kept],
        [plain[1 + i] for i in kept],
    )


# Triton's interpreter computes with NumPy, which warns of NaNs; a GPU doesn't.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["branch", "fc1_weight", "fc2_bias"])
def test_nan_and_inf_spread_as_in_the_reference(backend: str, poison: float, where: str) -> None:
    case = make_case(SMALL)
    target = {"branch": case.branches[1], "fc1_weight": case.fc[0], "fc2_bias": case.fc[3]}[where]
    target.view(-1)[7] = poison
    for result, plain in zip(
        evaluate(ef.psa_tail, *case), evaluate(plain_tail, *case), strict=True
    ):
        torch.testing.assert_close(result, plain, equal_nan=True)


def test_dead_hidden_units_give_exactly_zero_gradients(backend: str) -> None:
    case = make_case(Shape(2, 4, 16, 6, 6, 1), torch.bfloat16)
    case.fc[1].fill_(-100.0)
    _, *grads = evaluate(ef.psa_tail, *case)
    for grad in grads[4:7]:  # fc1's weight and bias, fc2's weight
        assert not grad.any()
    assert grads[7].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("parts", ["scale", "shift", "relu", "scale shift relu"])
def test_epilogue(backend: str, dtype: torch.dtype, memory_format: str, parts: str) -> None:
    case = make_case(SMALL, dtype, MEMORY_FORMATS[memory_format])
    channels = case.grad.shape[1]
    epilogue = {"scale": torch.randn(channels), "shift": torch.randn(channels), "relu": True}
    epilogue = {k: v for k, v in epilogue.items() if k in parts.split()}
    exact = {k: v if v is True else v.double() for k, v in epilogue.items()}
    rounded = {k: v if v is True else v.to(dtype) for k, v in epilogue.items()}
    branches, fc = case.branches, case.fc
    oracle = plain_tail([x.double() for x in branches], *(t.double() for t in fc), **exact)
    plain = plain_tail(branches, *fc, **rounded)
    result = ef.psa_tail(branches, *fc, **epilogue)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=MEMORY_FORMATS[memory_format])
    assert max_error(result, oracle) <= bound(plain, oracle, dtype)


def test_epilogue_keeps_nan(backend: str) -> None:
    case = make_case(SMALL)
    case.branches[0][0, 0, 0, 0] = float("nan")
    out = ef.psa_tail(case.branches, *case.fc, relu=True)
    expected_nan = plain_tail(case.branches, *case.fc, relu=True).isnan()
    assert expected_nan.any()
    assert torch.equal(out.isnan(), expected_nan)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_the_same_bits_in_five_runs(backend: str, memory_format: str) -> None:
    case = make_case(SHAPES["S3"], torch.float32, MEMORY_FORMATS[memory_format])
    first, *others = (evaluate(ef.psa_tail, *case) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_inputs_are_not_changed(backend: str) -> None:
    case = make_case(SMALL)
    before = [t.clone() for t in (*case.branches, *case.fc, case.grad)]
    evaluate(ef.psa_tail, *case)
    after = (*case.branches, *case.fc, case.grad)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_last_branch_comes_first(backend: str) -> None:
    """With equal attention (fc2 = 0) the output holds a third of each branch, in reverse order."""
    branches = [torch.full((1, 2, 1, 1), float(s)) for s in range(3)]
    fc = [torch.ones(1, 2), torch.zeros(1), torch.zeros(2, 1), torch.zeros(2)]
    out = ef.psa_tail(branches, *fc).flatten()
    torch.testing.assert_close(out, torch.tensor([2.0, 2.0, 1.0, 1.0, 0.0, 0.0]) / 3)


@pytest.mark.parametrize("name", OPERATOR_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_squeeze_and_attention_are_not_rounded_to_16_bits(name: str, dtype: torch.dtype) -> None:
    branches, fc, _ = make_case(SHAPES["S2"], dtype)
    fc = [t.flatten(1) if t.dim() == 4 else t for t in fc]
    op = torch.ops.epsanet_fused.psa_tail
    with run_by(name):
        _, squeeze, attention = op(branches, *fc, None, None, False, current_backend())
    exact = torch.stack([x.double().mean((2, 3)) for x in branches], 1)  # (B, S, C)
    torch.testing.assert_close(squeeze.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(attention.sum(1), torch.ones_like(attention[:, 0]))
    hidden = torch.relu(exact @ fc[0].double().T + fc[1].double())
    gate = torch.sigmoid(hidden @ fc[2].double().T + fc[3].double())
    torch.testing.assert_close(attention.double(), gate.softmax(1), rtol=1e-5, atol=1e-6)
