"""Inputs of psa_tail that its tests share, on a CPU and on a GPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import epsanet_fused as ef
from epsanet_fused.backends import defaults
from epsanet_fused.testing.accuracy import bound, evaluate, max_error, plain_tail, se_of_branch
from epsanet_fused.utils.memory_format import accumulator_dtype

# The ways to run psa_tail on a CPU. "reference" is plain PyTorch without the operator; "fallback"
# is the operator over plain PyTorch, as "auto" runs it without the compiled library.
BACKENDS = ["reference", "fallback", "cpu", "triton"]
OPERATOR_BACKENDS = ["fallback", "cpu", "triton"]


def slow_if_interpreted(backends: list[str]) -> list[pytest.ParameterSet]:
    """Mark Triton's cases as slow, for tests that call the operator a hundred times a case."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name == "triton")) for name in backends]


@contextmanager
def run_by(name: str) -> Iterator[None]:
    """Run by a backend as use_backend does, or by "fallback"."""
    if name != "fallback":
        with ef.use_backend(name):
            yield
        return
    with mock.patch.dict(defaults.PREFERRED, cpu=("reference",)), ef.use_backend("auto"):
        yield


class Shape(NamedTuple):
    B: int
    S: int
    C: int
    H: int
    W: int
    R: int
    own_ses: bool = False  # an SE for each branch


SHAPES = {
    "S1": Shape(2, 4, 16, 56, 56, 1),
    "S2": Shape(2, 4, 32, 28, 28, 2),
    "S3": Shape(2, 4, 64, 14, 14, 4),
    "S4": Shape(2, 4, 128, 7, 7, 8),
    "7x7": Shape(3, 4, 16, 7, 7, 1),
    "5x9": Shape(2, 4, 24, 5, 9, 3),
    "1x1": Shape(2, 4, 24, 1, 1, 1),
    "C256": Shape(1, 4, 256, 3, 3, 16),
    "C1": Shape(2, 4, 1, 6, 4, 1),
    "B0": Shape(0, 4, 16, 4, 4, 1),
    "B1": Shape(1, 4, 48, 8, 8, 3),
    "two branches": Shape(2, 2, 16, 6, 10, 2),
    "three branches": Shape(2, 3, 20, 6, 5, 2),
    "five branches": Shape(2, 5, 8, 9, 3, 5),
    "eight branches": Shape(1, 8, 12, 4, 5, 2),
    "own SEs": Shape(2, 4, 24, 5, 9, 3, True),
    "own SEs S3": Shape(3, 4, 64, 14, 14, 4, True),
    "own SEs of two": Shape(1, 2, 16, 6, 10, 5, True),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    branches: list[Tensor]
    fc: list[Tensor]
    grad: Tensor


def make_case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
    fc_dtype: torch.dtype | None = None,
) -> Case:
    """Make random branches, fc weights and gradient; some hidden units are alive and some dead."""
    B, S, C, H, W, R = shape[:6]
    g = torch.Generator().manual_seed(hash(shape[:6]) % 2**31)

    def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=g).to(device, dtype)

    def fc(*size: int, gain: float = 1.0) -> Tensor:
        return randn(*size, dtype=fc_dtype or dtype) * gain

    alive = torch.tensor([0.5 if r % 2 == 0 else -0.5 for r in range(R)])
    alive = alive.to(device, fc_dtype or dtype)
    if shape.own_ses:
        weights = [fc(S, R, C, gain=0.3 * C**-0.5), alive.repeat(S, 1), fc(S, C, R), fc(S, C)]
    else:
        weights = [fc(R, C, 1, 1, gain=0.3 * C**-0.5), alive, fc(C, R, 1, 1), fc(C)]
    branches = [randn(B, C, H, W).to(memory_format=memory_format) * (1 + s) for s in range(S)]
    return Case(branches, weights, randn(B, S * C, H, W).to(memory_format=memory_format))


def accuracy_cases() -> list[tuple[str, str, str]]:
    return list(itertools.product(SHAPES, DTYPES, MEMORY_FORMATS))


@functools.cache
def named_case(
    shape: str, dtype: str, memory_format: str
) -> tuple[Case, list[Tensor], list[Tensor]]:
    """Return a case with the oracle's and plain PyTorch's results, made once for all backends."""
    case = make_case(SHAPES[shape], DTYPES[dtype], MEMORY_FORMATS[memory_format])
    return case, *expected(case)


def expected(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients by the float64 oracle, and by plain PyTorch in one dtype."""
    dtype = case.branches[0].dtype
    return (
        evaluate(plain_tail, *case, dtype=torch.float64),
        evaluate(plain_tail, *case, dtype=dtype),
    )


def assert_matches_oracle(case: Case, results: Sequence[Tensor]) -> None:
    """Assert the accuracy of an output and of all gradients of the case."""
    acc = accumulator_dtype(case.branches[0].dtype)
    slack = 8 * torch.finfo(acc).eps * largest_term(case)
    assert_accurate(results, *expected(case), slack)


def largest_term(case: Case) -> float:
    """Return the largest term of the sums that make the fc gradients; the terms cancel.

    Terms are the products a(1 - a) w g of SE weights a, their softmax w and the sums g over pixels.
    """
    S = len(case.branches)
    x = torch.stack([x.double() for x in case.branches], 1)  # (B, S, C, H, W)
    each = [[t.double() for t in se_of_branch(case.fc, s)] for s in range(S)]
    fc1, fc1_bias, fc2, fc2_bias = (torch.stack(ts) for ts in zip(*each, strict=True))
    squeeze = x.mean((3, 4)).transpose(0, 1)  # (S, B, C)
    hidden = (squeeze @ fc1.mT + fc1_bias[:, None]).relu()
    a = (hidden @ fc2.mT + fc2_bias[:, None]).sigmoid().transpose(0, 1)
    sums = (case.grad.double().unflatten(1, (S, -1)).flip(1) * x).sum((3, 4))
    return (a * (1 - a) * a.softmax(1) * sums).abs().max().item() if sums.numel() else 0.0


def assert_accurate(
    results: Sequence[Tensor],
    oracle: Sequence[Tensor],
    plain: Sequence[Tensor],
    slack: float = 0.0,
) -> None:
    """Assert that each result's error is at most twice plain PyTorch's, plus a small floor.

    Args:
        results, oracle, plain: output and gradients: ours, in float64, and plain PyTorch's.
        slack: the rounding of the terms that make the last four results and that cancel.
    """
    assert len(results) == len(oracle)
    # The fc gradients are sums of large terms that cancel: the floor follows the largest result.
    size = max((t.abs().max().item() for t in oracle if t.numel()), default=1.0)
    for i, (result, exact, same) in enumerate(zip(results, oracle, plain, strict=True)):
        assert result.shape == exact.shape
        assert not same.isnan().any() or exact.isnan().any(), "plain PyTorch overflows here"
        cancels = i >= len(oracle) - 4
        error, limit = max_error(result, exact), bound(same, exact, same.dtype, size)
        limit += slack * cancels
        assert error <= limit, f"result {i}: error {error:.3g} is over {limit:.3g}"


SMALL = Shape(2, 4, 24, 5, 6, 3)
# Functions that return the output's gradient, and further down the branches, with other strides.
GRADIENTS = {
    "transposed": lambda g: g.mT.contiguous().mT,
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "every second": lambda g: g.repeat_interleave(2, 3)[..., ::2],
    "slice of channels": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "slice of rows": lambda g: torch.cat([g, g], 2)[:, :, : g.shape[2]],
    "one sample for all": lambda g: g[:1].expand(g.shape),
}


def slices(branches: list[Tensor], memory_format: torch.memory_format) -> list[Tensor]:
    concat = torch.cat(branches, 1).contiguous(memory_format=memory_format)
    return list(concat.chunk(len(branches), 1))


def shifted(x: Tensor) -> Tensor:
    """Return x at an address that isn't aligned for wide accesses."""
    return torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)


BRANCHES = {
    "slices": lambda bs: slices(bs, torch.contiguous_format),
    "channels_last slices": lambda bs: slices(bs, torch.channels_last),
    "mixed formats": lambda bs: [
        x.contiguous(memory_format=torch.channels_last) if s % 2 else x for s, x in enumerate(bs)
    ],
    "one channels_last": lambda bs: [bs[0].contiguous(memory_format=torch.channels_last), *bs[1:]],
    "transposed": lambda bs: [x.mT.contiguous().mT for x in bs],
    "rows of a larger image": lambda bs: [torch.cat([x, x], 2)[:, :, : x.shape[2]] for x in bs],
    "columns of a larger image": lambda bs: [torch.cat([x, x], 3)[..., : x.shape[3]] for x in bs],
    "batch innermost": lambda bs: [
        x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in bs
    ],
    "one sample for all": lambda bs: [x[:1].expand(x.shape) for x in bs],
    "misaligned": lambda bs: [shifted(x) for x in bs],
    "one tensor for all": lambda bs: [bs[0]] * len(bs),
}

# Functions that return one branch or gradient with other strides.
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
