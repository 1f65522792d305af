"""psa_tail_norm gives the numbers of tail, BatchNorm2d and ReLU in training, by every backend."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import (
    DTYPES,
    MEMORY_FORMATS,
    Shape,
    accuracy_cases,
    assert_accurate,
    make_case,
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
from epsanet_fused.backends.registry import get_backend, resolve
from epsanet_fused.ops import psa_tail_norm as operator
from epsanet_fused.ops.psa_tail_norm import resolve_norm
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


# Each shape once, and together every dtype in every memory_format.
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


def test_the_reference_backend_is_the_three_by_themselves() -> None:
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
    """An expanded gradient: every stride is 0. The norm lets next to nothing of it pass."""
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
def test_16_bit_branches_meet_float32_weights(backend: str, dtype: str) -> None:
    case = make_norm_case(SMALL, DTYPES[dtype], fc_dtype=torch.float32)
    results = evaluate_norm(ef.psa_tail_norm, case)
    assert {t.dtype for t in results[:5]} == {DTYPES[dtype]}
    assert {t.dtype for t in results[5:]} == {torch.float32}
    oracle, plain = expected_norm(case)
    assert_accurate(results, oracle, plain)


def constant(branches: list[Tensor]) -> list[Tensor]:
    """Each sample's channels hold one number, the last branch's the same for all samples."""
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
    """1e3 +- 1e-1. Squares of float32 would lose all of the variance."""
    case = make_norm_case(
        LARGE_MEAN[shape],
        memory_format=MEMORY_FORMATS[memory_format],
        change=lambda bs: [1e3 + 0.1 * x for x in bs],
    )
    check(flat_attention(case))


def flat_attention(case: NormCase) -> NormCase:
    """All samples with the attention 1 / S: else its spread is the variance."""
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
def test_what_is_frozen_gets_no_gradient(backend: str, frozen: str) -> None:
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
        case.branches[0][0, 0, 0, 0] = 0.6  # every draw serves without rounding in the way
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
        return  # refused: test_bad_norm_is_named
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


@pytest.mark.parametrize("name", ["reference", *NORM_BACKENDS])
def test_one_value_per_channel_is_refused_as_by_the_norm(name: str) -> None:
    case = make_case(Shape(1, 2, 4, 1, 1, 1))
    for tail in (ef.psa_tail_norm, plain_norm_tail):
        with run_by(name), pytest.raises(ValueError) as raised:
            tail(case.branches, *case.fc, nn.BatchNorm2d(8))
        assert str(raised.value) == (
            "Expected more than 1 value per channel when training, "
            "got input size torch.Size([1, 8, 1, 1])"
        )


# What an infinite gamma does depends on the device in PyTorch itself.
SPREADS = [
    (where, float(poison))
    for where in ("branch", "fc1_weight", "fc2_bias", "gamma", "beta", "grad")
    for poison in ("nan", "inf", "-inf")
    if where != "gamma" or poison == "nan"
]


# Triton's interpreter computes with NumPy, which warns of the NaNs that a card makes in silence.
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


# An interpreter runs one program after the other: there it says nothing.
@pytest.mark.parametrize(
    ("backend", "memory_format"), by_backend(MEMORY_FORMATS, []), indirect=["backend"]
)
def test_the_same_bits_in_five_runs(backend: str, memory_format: str) -> None:
    case = make_norm_case(NORM_SHAPES["S3"], memory_format=MEMORY_FORMATS[memory_format])
    first, *others = (evaluate_norm(ef.psa_tail_norm, case) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_inputs_are_left_as_they_were(backend: str) -> None:
    case = make_norm_case(SMALL)
    tensors = [*case.branches, *case.fc, *case.affine, case.grad]
    before = [t.clone() for t in tensors]
    evaluate_norm(ef.psa_tail_norm, case)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


BAD = {
    "no norm": (None, TypeError, "norm must be a torch.nn.BatchNorm2d, got NoneType"),
    "another norm": (nn.GroupNorm(4, 48), TypeError, "BatchNorm2d, got GroupNorm"),
    "channels": (nn.BatchNorm2d(12), ValueError, "num_features=48, .* 4 branches with 12, got 12"),
    "device": (
        nn.BatchNorm2d(48, device="meta"), ValueError, "branches.0. is on cpu and norm.weight is",
    ),
    "eval": (nn.BatchNorm2d(48).eval(), ValueError, "norm must use the batch's statistics"),
}  # fmt: skip


@pytest.mark.parametrize(("norm", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["reference", *NORM_BACKENDS])
def test_bad_norm_is_named(name: str, norm: Any, error: type[Exception], message: str) -> None:
    case = make_norm_case(SMALL)
    with run_by(name), pytest.raises(error, match=message) as raised:
        ef.psa_tail_norm(case.branches, *case.fc, norm)
    assert str(raised.value).startswith("psa_tail")


def test_a_backend_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_norm_case(SMALL)
    monkeypatch.delattr(get_backend("triton"), "norm_forward")
    with ef.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' doesn't have it"):
        ef.psa_tail_norm(case.branches, *case.fc, nn.BatchNorm2d(48))


def test_auto_passes_over_a_backend_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ``cuda`` is measured to be the fastest for the tail."""
    branches = make_case(SMALL).branches
    tail_only = object()
    monkeypatch.setattr(
        operator, "resolve", lambda *args: tail_only if len(args) > 2 else resolve(*args)
    )
    assert resolve_norm("auto", "cpu", branches) is get_backend("cpu")
