"""Inputs of psa_tail_norm whose ReLU lets the same values pass in every precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from helpers.cases import SHAPES, Shape, make_case
from torch import Tensor, nn

from epsanet_fused.testing.accuracy import evaluate, plain_tail
from epsanet_fused.utils.memory_format import accumulator_dtype

# The operator over plain PyTorch, and the backends that have kernels for it.
FAST_BACKENDS = ["fallback", "cpu"]
NORM_BACKENDS = [*FAST_BACKENDS, "triton"]
# Two values per channel are normalized to 1 and -1 whatever they are: all gradients would cancel.
NORM_SHAPES = SHAPES | {"1x1": SHAPES["1x1"]._replace(B=5)}
MARGIN = 0.02

NormTail = Callable[..., Tensor]  # (branches, *fc, norm)


class NormCase(NamedTuple):
    branches: list[Tensor]
    fc: list[Tensor]
    affine: list[Tensor]  # gamma and beta, or nothing
    grad: Tensor
    options: dict[str, Any]  # of BatchNorm2d


def plain_norm_tail(branches: Sequence[Tensor], *fc_and_norm: Any) -> Tensor:
    *fc, norm = fc_and_norm
    return F.relu(norm(plain_tail(branches, *fc)))


def by_backend(cases: Sequence[Any], few: Sequence[Any]) -> list[Any]:
    """Put a backend's name before each case: of the slow interpreter only before the few ones."""
    return [
        (name, *(case if isinstance(case, tuple) else (case,)))
        for name in NORM_BACKENDS
        for case in (cases if name in FAST_BACKENDS else few)
    ]


def poison_case(case: NormCase, where: str, value: float) -> None:
    """Write a NaN or an infinity into one of the case's tensors."""
    target = {
        "branch": case.branches[1],
        "fc1_weight": case.fc[0],
        "fc2_bias": case.fc[3],
        "gamma": case.affine[0],
        "beta": case.affine[1],
        "grad": case.grad,
    }[where]
    target[(7,) if target.dim() == 1 else (0, 1, *([0] * (target.dim() - 2)))] = value


def with_gap(x: Tensor) -> Tensor:
    """Move x away from zero, so that nothing lies between -0.5 and 0.5."""
    return x + 0.5 * torch.where(x < 0, -1.0, 1.0)


def make_norm_case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    fc_dtype: torch.dtype | None = None,
    change: Callable[[list[Tensor]], list[Tensor]] = lambda branches: branches,
    device: str = "cpu",
    **options: Any,
) -> NormCase:
    """Make a case as ``make_case`` does, with a norm; ``change`` may replace the branches."""
    branches, fc, grad = make_case(shape, torch.float32, memory_format, device)
    branches = change([with_gap(x / (1 + s)) for s, x in enumerate(branches)])
    branches = [x.to(dtype) for x in branches]
    fc = [t.to(fc_dtype or dtype) for t in fc]
    case = NormCase(branches, fc, [], grad.to(dtype), options)
    if not options.get("affine", True):
        return case
    gamma = torch.linspace(-1.5, 1.5, grad.shape[1], device=device) + 0.01
    beta = thresholds(case, gamma)
    return case._replace(affine=[t.to(accumulator_dtype(dtype)) for t in (gamma, beta)])


def thresholds(case: NormCase, gamma: Tensor) -> Tensor:
    """Return the beta with which zero lies in the widest gap of each channel's middle values."""
    p = plain_tail([x.double() for x in case.branches], *(t.double() for t in case.fc))
    rows = F.batch_norm(p, None, None, gamma.double(), training=True).transpose(0, 1).flatten(1)
    n = rows.shape[1]
    if n == 0:
        return torch.zeros_like(gamma)
    ordered = rows.sort(1).values[:, n // 4 : max(n - n // 4, n // 4 + 1)]  # (K, about n / 2)
    if ordered.shape[1] == 1:
        return (1 - ordered[:, 0]).float()
    width, at = ordered.diff().max(1)
    middle = ordered.gather(1, at[:, None])[:, 0] + width / 2
    # Where all values are equal there is no gap: all are on the positive side.
    return torch.where(width > 2 * MARGIN, -middle, 1 - ordered[:, 0]).float()


def evaluate_norm(tail: NormTail, case: NormCase, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the output, the gradients (branches, fc, gamma, beta) and the running statistics."""
    acc = accumulator_dtype(dtype or case.branches[0].dtype)
    norm = nn.BatchNorm2d(case.grad.shape[1], **case.options).to(case.grad.device, acc)

    def run(branches: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        if case.affine:
            del norm.weight, norm.bias
            norm.weight, norm.bias = tensors[4:]
        return tail(branches, *tensors[:4], norm)

    results = evaluate(run, case.branches, [*case.fc, *case.affine], case.grad, dtype)
    return results + [b for b in (norm.running_mean, norm.running_var) if b is not None]


def expected_norm(case: NormCase) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of the float64 oracle and of plain PyTorch in the branches' dtype.

    Plain PyTorch's norm has the accumulator's dtype, as psa_tail_norm's.
    """
    dtype = case.branches[0].dtype
    oracle = evaluate_norm(plain_norm_tail, case, torch.float64)
    check_margin(case)
    same = evaluate_norm(plain_norm_tail, case._replace(fc=[t.to(dtype) for t in case.fc]))
    return oracle, same


def check_margin(case: NormCase) -> None:
    """Assert that no input of the ReLU is so close to zero that rounding decides its sign."""
    norm = nn.BatchNorm2d(case.grad.shape[1], **case.options).to(case.grad.device, torch.float64)
    if case.affine:
        del norm.weight, norm.bias
        norm.weight, norm.bias = (t.double() for t in case.affine)
    z = norm(plain_tail([x.double() for x in case.branches], *(t.double() for t in case.fc)))
    assert z.numel() == 0 or z.isnan().any() or z.abs().min() > MARGIN
