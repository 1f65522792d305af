"""Properties of psa_tail for any shapes, strides and dtypes, by hypothesis."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import (
    ARRANGEMENTS,
    BACKENDS,
    DTYPES,
    OPERATOR_BACKENDS,
    Case,
    Shape,
    assert_accurate,
    expected,
    largest_term,
    make_case,
    run_by,
    slow_if_interpreted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import epsanet_fused as ef
from epsanet_fused.testing.accuracy import evaluate

shapes = st.builds(
    Shape,
    B=st.integers(0, 3),
    S=st.integers(2, 6),
    C=st.integers(1, 40),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    R=st.integers(1, 6),
    own_ses=st.booleans(),
)
arrangements = st.lists(st.sampled_from(sorted(ARRANGEMENTS)), min_size=7, max_size=7)


def arrange(case: Case, names: list[str]) -> Case:
    branches = [ARRANGEMENTS[n](x) for x, n in zip(case.branches, names, strict=False)]
    return case._replace(branches=branches, grad=ARRANGEMENTS[names[-1]](case.grad))


@pytest.mark.parametrize("backend", slow_if_interpreted(BACKENDS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes, arrangements=arrangements, dtype=st.sampled_from(sorted(DTYPES)))
def test_any_input_gives_the_oracles_numbers(
    backend: str, shape: Shape, arrangements: list[str], dtype: str
) -> None:
    case = arrange(make_case(shape, DTYPES[dtype]), arrangements)
    with run_by(backend):
        results = evaluate(ef.psa_tail, *case)
    slack = 0.0
    if backend == "reference":  # it rounds the terms to the branches' dtype, as plain PyTorch does
        slack = torch.finfo(DTYPES[dtype]).eps / 2 * largest_term(case)
    assert_accurate(results, *expected(case), slack)


@pytest.mark.parametrize("backend", slow_if_interpreted(OPERATOR_BACKENDS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes.filter(lambda s: s.B), arrangements=arrangements)
def test_fake_and_real_strides_agree(backend: str, shape: Shape, arrangements: list[str]) -> None:
    """Compilers rely on the fake kernels' strides, forward and backward."""
    case = arrange(make_case(shape), arrangements)
    with run_by(backend):
        real = evaluate(ef.psa_tail, *case)
    with FakeTensorMode() as mode, run_by(backend):
        fake_case = Case(*([mode.from_tensor(t) for t in ts] for ts in case[:2]), None)
        leaves = [x.requires_grad_() for x in fake_case.branches]
        out = ef.psa_tail(leaves, *fake_case.fc)
        fake = [out, *torch.autograd.grad(out, leaves, torch.empty_like(out))]
    for a, b in zip(real, fake, strict=False):
        assert significant_strides(a) == significant_strides(b)


def significant_strides(x: Tensor) -> list[tuple[int, int]]:
    return [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes.filter(lambda s: s.B > 1), data=st.data())
def test_samples_do_not_mix(shape: Shape, data: st.DataObject) -> None:
    case = make_case(shape)
    order = data.draw(st.permutations(range(shape.B)))
    together = ef.psa_tail(case.branches, *case.fc)
    permuted = ef.psa_tail([x[list(order)] for x in case.branches], *case.fc)
    torch.testing.assert_close(permuted, together[list(order)])
