"""psa_tail_norm raises errors that name the argument or the backend."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.cases import Shape, make_case, run_by
from helpers.norm_cases import NORM_BACKENDS, make_norm_case, plain_norm_tail
from torch import nn

import epsanet_fused as ef
from epsanet_fused.backends.registry import get_backend, resolve
from epsanet_fused.ops import psa_tail_norm as operator
from epsanet_fused.ops.psa_tail_norm import resolve_norm

SMALL = Shape(3, 4, 12, 5, 6, 3)


BAD = {
    "no norm": (None, TypeError, "norm must be a torch.nn.BatchNorm2d, got NoneType"),
    "another norm": (nn.GroupNorm(4, 48), TypeError, "BatchNorm2d, got GroupNorm"),
    "channels": (nn.BatchNorm2d(12), ValueError, "num_features=48, .* 4 branches with 12, got 12"),
    "device": (
        nn.BatchNorm2d(48, device="meta"),
        ValueError,
        "branches.0. is on cpu and norm.weight is",
    ),
    "eval": (nn.BatchNorm2d(48).eval(), ValueError, "norm must use the batch's statistics"),
}


@pytest.mark.parametrize(("norm", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["reference", *NORM_BACKENDS])
def test_bad_norm_is_named(name: str, norm: Any, error: type[Exception], message: str) -> None:
    case = make_norm_case(SMALL)
    with run_by(name), pytest.raises(error, match=message) as raised:
        ef.psa_tail_norm(case.branches, *case.fc, norm)
    assert str(raised.value).startswith("psa_tail")


def test_backend_without_psa_tail_norm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_norm_case(SMALL)
    monkeypatch.delattr(get_backend("triton"), "norm_forward")
    with ef.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' doesn't have it"):
        ef.psa_tail_norm(case.branches, *case.fc, nn.BatchNorm2d(48))


def test_auto_skips_a_backend_without_psa_tail_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ``cuda`` is measured to be the fastest for the tail."""
    branches = make_case(SMALL).branches
    tail_only = object()
    monkeypatch.setattr(
        operator, "resolve", lambda *args: tail_only if len(args) > 2 else resolve(*args)
    )
    assert resolve_norm("auto", "cpu", branches) is get_backend("cpu")


@pytest.mark.parametrize("name", ["reference", *NORM_BACKENDS])
def test_one_value_per_channel_raises_the_error_of_the_norm(name: str) -> None:
    case = make_case(Shape(1, 2, 4, 1, 1, 1))
    for tail in (ef.psa_tail_norm, plain_norm_tail):
        with run_by(name), pytest.raises(ValueError) as raised:
            tail(case.branches, *case.fc, nn.BatchNorm2d(8))
        assert str(raised.value) == (
            "Expected more than 1 value per channel when training, "
            "got input size torch.Size([1, 8, 1, 1])"
        )
