"""psa_tail_norm gives the results of tail, BatchNorm2d and ReLU in training, by every backend."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.cases import (
    DTYPES,
    MEMORY_FORMATS,
    Shape,
    accuracy_cases,
    assert_accurate,
    run_by,
)
from helpers.norm_cases import (
    NORM_BACKENDS,
    NORM_SHAPES,
    NormCase,
    by_backend,
    evaluate_norm,
    expected_norm,
    make_norm_case,
    plain_norm_tail,
    poison_case,
    thresholds,
)
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.testing.accuracy import bound, max_error

SMALL = Shape(3, 4, 12, 5, 6, 3)


@pytest.fixture(params=NORM_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with run_by(request.param):
        yield request.param


def check(case: NormCase) -> list[Tensor]:
    results = evaluate_norm(ef.psa_tail_norm, case)
    assert_accurate(results, *expected_norm(case))
    return results


# Each shape once, and together every dtype in every memory format.
FEW = [case for i, case in enumerate(accuracy_cases()) if i // 6 % 6 == i % 6]


@pytest.mark.parametrize(
    ("backend", "shape", "dtype", "memory_format"),
    by_backend(accuracy_cases(), FEW),
    indirect=["backend"],
)
def test_matches_the_oracle(backend: str, shape: str, dtype: str, memory_format: str) -> None:
    results = check(
        make_norm_case(NORM_SHAPES[shape], DTYPES[dtype], MEMORY_FORMATS[memory_format])
    )
    assert len(results) == 1 + NORM_SHAPES[shape].S + 4 + 2 + 2


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_matches_the_oracle_in_float64(backend: str, memory_format: str) -> None:
    check(make_norm_case(SMALL, torch.float64, MEMORY_FORMATS[memory_format]))


def test_matches_the_oracle_by_the_reference_backend() -> None:
    case = make_norm_case(SMALL, torch.float64)
    with ef.use_backend("reference"):
        check(case)


def crop(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (1, 2, 2, 1))[..., 2:-1, 1:-2]


VIEWS = {
    "slices": lambda bs: list(torch.cat(bs, 1).chunk(len(bs), 1)),
    "channels_last slices": lambda bs: list(
        torch.cat(bs, 1).contiguous(memory_format=torch.channels_last).chunk(len(bs), 1)
    ),
    "mixed formats": lambda bs: [
        x.contiguous(memory_format=torch.channels_last) if s % 2 else x for s, x in enumerate(bs)
    ],
    "transposed": lambda bs: [x.mT.contiguous().mT for x in bs],
    "crops": lambda bs: [crop(x) for x in bs],
    "batch innermost": lambda bs: [
        x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in bs
    ],
    "every second": lambda bs: [x.repeat_interleave(2, 3)[..., ::2] for x in bs],
}


STRIDED = [(shape, view) for shape in ("SMALL", "S4", "1x1", "B1") for view in VIEWS]


@pytest.mark.parametrize(
    ("backend", "shape", "view"), by_backend(STRIDED, STRIDED[:7:2]), indirect=["backend"]
)
def test_any_strides(backend: str, shape: str, view: str) -> None:
    change = VIEWS[view]
    case = make_norm_case(NORM_SHAPES.get(shape, SMALL), change=change)
    check(case._replace(grad=change([case.grad])[0]))


def test_gradient_of_sum(backend: str) -> None:
    """The gradient of a sum is expanded: every stride is 0. The norm cancels nearly all of it."""
    case = make_norm_case(SMALL)
    check(case._replace(grad=torch.ones(()).expand(case.grad.shape)))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_memory_format_follows_the_branches(backend: str, memory_format: str) -> None:
    out, *grads = evaluate_norm(
        ef.psa_tail_norm, make_norm_case(SMALL, memory_format=MEMORY_FORMATS[memory_format])
    )
    for t in (out, *grads[:4]):
        assert t.is_contiguous(memory_format=MEMORY_FORMATS[memory_format])


@pytest.mark.parametrize(("backend", "dtype"), by_backend(DTYPES, ["bf16"]), indirect=["backend"])
def test_16_bit_branches_with_float32_weights(backend: str, dtype: str) -> None:
    case = make_norm_case(SMALL, DTYPES[dtype], fc_dtype=torch.float32)
    results = evaluate_norm(ef.psa_tail_norm, case)
    assert {t.dtype for t in results[:5]} == {DTYPES[dtype]}
    assert {t.dtype for t in results[5:]} == {torch.float32}
    oracle, plain = expected_norm(case)
    assert_accurate(results, oracle, plain)


def constant(branches: list[Tensor]) -> list[Tensor]:
    """Make each sample's channels constant, the last branch's also the same in all samples."""
    branches = [x[:, :, :1, :1].expand(x.shape).clone() for x in branches]
    return [*branches[:-1], branches[-1][:1].expand(branches[-1].shape).clone()]


@pytest.mark.parametrize(
    ("backend", "memory_format"),
    by_backend(MEMORY_FORMATS, ["channels_last"]),
    indirect=["backend"],
)
def test_constant_channels(backend: str, memory_format: str) -> None:
    check(make_norm_case(SMALL, memory_format=MEMORY_FORMATS[memory_format], change=constant))


LARGE_MEAN = {"SMALL": SMALL, "one sample": Shape(1, 4, 16, 28, 28, 1)}
LARGE_MEANS = [(shape, memory_format) for shape in LARGE_MEAN for memory_format in MEMORY_FORMATS]


@pytest.mark.parametrize(
    ("backend", "shape", "memory_format"),
    by_backend(LARGE_MEANS, LARGE_MEANS[::3]),
    indirect=["backend"],
)
def test_a_large_mean_and_a_small_variance(backend: str, shape: str, memory_format: str) -> None:
    """Values 1e3 +- 1e-1: sums of squares in float32 would lose all of the variance."""
    case = make_norm_case(
        LARGE_MEAN[shape],
        memory_format=MEMORY_FORMATS[memory_format],
        change=lambda bs: [1e3 + 0.1 * x for x in bs],
    )
    check(flat_attention(case))


def flat_attention(case: NormCase) -> NormCase:
    """Make the attention 1 / S in all samples, so that it adds nothing to the variance."""
    case.fc[2].zero_()
    case.fc[3].zero_()
    return case._replace(affine=[case.affine[0], thresholds(case, case.affine[0])])


FROZEN = {
    "branches": ("fc", "affine"),
    "fc": ("branches", "affine"),
    "norm": ("branches", "fc"),
    "all but the norm": ("affine",),
    "all but the branches": ("branches",),
    "all but fc": ("fc",),
}


@pytest.mark.parametrize(
    ("backend", "frozen"), by_backend(FROZEN, [*FROZEN][::2]), indirect=["backend"]
)
def test_frozen_tensors_get_no_gradient(backend: str, frozen: str) -> None:
    needed = FROZEN[frozen]
    case = make_norm_case(SMALL)
    oracle, plain = expected_norm(case)
    norm = nn.BatchNorm2d(48)
    groups = {"branches": case.branches, "fc": case.fc, "affine": [norm.weight, norm.bias]}
    with torch.no_grad():
        for p, value in zip(groups["affine"], case.affine, strict=True):
            p.copy_(value)
    for name, tensors in groups.items():
        for t in tensors:
            t.requires_grad_(name in needed)
    ef.psa_tail_norm(case.branches, *case.fc, norm).backward(case.grad)
    leaves = [*case.branches, *case.fc, *groups["affine"]]
    assert [t.grad is not None for t in leaves] == [t.requires_grad for t in leaves]
    kept = [i for i, t in enumerate(leaves) if t.requires_grad]
    results = [leaves[i].grad for i in kept]
    assert_accurate(results, [oracle[1 + i] for i in kept], [plain[1 + i] for i in kept])


def test_one_of_gamma_and_beta_may_be_frozen_or_missing(backend: str) -> None:
    case = make_norm_case(SMALL)
    for missing in ("weight", "bias"):
        norms = [nn.BatchNorm2d(48).double() for _ in range(2)]
        for norm in norms:
            setattr(norm, missing, None)
        grads = []
        for tail, norm in zip((ef.psa_tail_norm, plain_norm_tail), norms, strict=True):
            branches = [x.double() for x in case.branches]
            tail(branches, *(t.double() for t in case.fc), norm).backward(case.grad.double())
            grads += [p.grad for p in norm.parameters()]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


OPTIONS = {
    "not affine": {"affine": False},
    "cumulative": {"momentum": None},
    "no statistics": {"track_running_stats": False},
    "momentum and eps": {"momentum": 0.3, "eps": 0.1},
}


@pytest.mark.parametrize(
    ("backend", "options"), by_backend(OPTIONS, [*OPTIONS][::3]), indirect=["backend"]
)
def test_options_of_the_norm(backend: str, options: str) -> None:
    case = make_norm_case(SMALL, torch.float64, **OPTIONS[options])
    if not case.affine:
        case.branches[0][0, 0, 0, 0] = 0.6  # rounding decides nothing in float64
    results = evaluate_norm(ef.psa_tail_norm, case)
    for result, exact in zip(results, evaluate_norm(plain_norm_tail, case), strict=True):
        assert max_error(result, exact) <= bound(exact, exact, torch.float64, 100.0)


@pytest.mark.parametrize(
    ("backend", "options", "training"),
    by_backend([(name, t) for name in OPTIONS for t in (True, False)], [("cumulative", True)]),
    indirect=["backend"],
)
def test_running_statistics_over_several_batches(
    backend: str, options: str, training: bool
) -> None:
    norms = [nn.BatchNorm2d(48, **OPTIONS[options]).double().train(training) for _ in range(2)]
    if not training and norms[0].running_mean is not None:
        return  # raises an error, see test_psa_tail_norm_errors.py
    for B in (2, 5, 0, 3):
        case = make_norm_case(SMALL._replace(B=B), torch.float64)
        outs = [
            tail(case.branches, *case.fc, norm)
            for tail, norm in zip((ef.psa_tail_norm, plain_norm_tail), norms, strict=True)
        ]
        torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*(dict(n.state_dict()) for n in norms), rtol=1e-12, atol=1e-12)


def test_running_statistics_can_be_switched_off(backend: str) -> None:
    norm = nn.BatchNorm2d(48)
    norm.track_running_stats = False
    before = copy.deepcopy(norm.state_dict())
    case = make_norm_case(SMALL)
    ef.psa_tail_norm(case.branches, *case.fc, norm)
    torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)


# PyTorch's own result for an infinite gamma depends on the device.
SPREADS = [
    (where, float(poison))
    for where in ("branch", "fc1_weight", "fc2_bias", "gamma", "beta", "grad")
    for poison in ("nan", "inf", "-inf")
    if where != "gamma" or poison == "nan"
]


# Triton's interpreter computes with NumPy, which warns of NaNs; a GPU doesn't.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("backend", "memory_format", "where", "poison"),
    by_backend(
        [(memory_format, *spread) for memory_format in MEMORY_FORMATS for spread in SPREADS],
        [
            (memory_format, *spread)
            for memory_format, spread in zip(2 * [*MEMORY_FORMATS], SPREADS[1::4], strict=True)
        ],
    ),
    indirect=["backend"],
)
def test_nan_and_inf_spread_as_in_pytorch(
    backend: str, memory_format: str, where: str, poison: float
) -> None:
    case = make_norm_case(SMALL, torch.float64, MEMORY_FORMATS[memory_format])
    poison_case(case, where, poison)
    results = evaluate_norm(ef.psa_tail_norm, case)
    for result, plain in zip(results, evaluate_norm(plain_norm_tail, case), strict=True):
        torch.testing.assert_close(result, plain, equal_nan=True, rtol=1e-9, atol=1e-9)


# Not by Triton's interpreter, which runs one program after the other.
@pytest.mark.parametrize(
    ("backend", "memory_format"), by_backend(MEMORY_FORMATS, []), indirect=["backend"]
)
def test_the_same_bits_in_five_runs(backend: str, memory_format: str) -> None:
    case = make_norm_case(NORM_SHAPES["S3"], memory_format=MEMORY_FORMATS[memory_format])
    first, *others = (evaluate_norm(ef.psa_tail_norm, case) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_inputs_are_not_changed(backend: str) -> None:
    case = make_norm_case(SMALL)
    tensors = [*case.branches, *case.fc, *case.affine, case.grad]
    before = [t.clone() for t in tensors]
    evaluate_norm(ef.psa_tail_norm, case)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
