"""Whatever the shapes, strides and dtypes: the oracle's numbers, in the promised format."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import (
    BACKENDS,
    DTYPES,
    OPERATOR_BACKENDS,
    Case,
    Shape,
    assert_accurate,
    expected,
    make_case,
    run_by,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import epsanet_fused as ef
from epsanet_fused.testing.accuracy import evaluate
from epsanet_fused.utils.memory_format import is_channels_last

# How a branch or a gradient may lie in memory; all keep the values.
ARRANGEMENTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice of channels": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "slice of channels_last": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "reversed dimensions": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}

shapes = st.builds(
    Shape,
    B=st.integers(0, 3),
    S=st.integers(2, 6),
    C=st.integers(1, 40),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    R=st.integers(1, 6),
)
arrangements = st.lists(st.sampled_from(sorted(ARRANGEMENTS)), min_size=7, max_size=7)


def arrange(case: Case, names: list[str]) -> Case:
    branches = [ARRANGEMENTS[n](x) for x, n in zip(case.branches, names, strict=False)]
    return case._replace(branches=branches, grad=ARRANGEMENTS[names[-1]](case.grad))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes, arrangements=arrangements, dtype=st.sampled_from(sorted(DTYPES)))
def test_any_input_gives_the_oracles_numbers(
    backend: str, shape: Shape, arrangements: list[str], dtype: str
) -> None:
    case = arrange(make_case(shape, DTYPES[dtype]), arrangements)
    with run_by(backend):
        results = evaluate(ef.psa_tail, *case)
    assert_accurate(results, *expected(case))


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes.filter(lambda s: s.B), arrangements=arrangements)
def test_fake_and_real_strides_agree(backend: str, shape: Shape, arrangements: list[str]) -> None:
    """What a compiler plans with is what the kernels return, forward and backward."""
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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=shapes.filter(lambda s: s.B), name=st.sampled_from(sorted(ARRANGEMENTS)))
def test_channels_last_is_recognised_by_strides(shape: Shape, name: str) -> None:
    x = ARRANGEMENTS[name](torch.empty(shape.B, shape.C, shape.H, shape.W))
    if is_channels_last(x):
        assert x.stride(1) == 1
        assert not x.is_contiguous()
    elif name in ("channels_last", "slice of channels_last"):
        assert x.is_contiguous() or x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes.filter(lambda s: s.B > 1), data=st.data())
def test_samples_do_not_mix(shape: Shape, data: st.DataObject) -> None:
    case = make_case(shape)
    order = data.draw(st.permutations(range(shape.B)))
    together = ef.psa_tail(case.branches, *case.fc)
    permuted = ef.psa_tail([x[list(order)] for x in case.branches], *case.fc)
    torch.testing.assert_close(permuted, together[list(order)])
