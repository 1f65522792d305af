"""Inputs for psa_tail_norm, on which every precision agrees about what its ReLU lets pass."""

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
# With two values per channel a norm gives 1 and -1 whatever they are: all gradients would cancel.
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
    """Each with a backend's name before it: all cases, but few where an interpreter runs them."""
    return [
        (name, *(case if isinstance(case, tuple) else (case,)))
        for name in NORM_BACKENDS
        for case in (cases if name in FAST_BACKENDS else few)
    ]


def poison_case(case: NormCase, where: str, value: float) -> None:
    """Write a NaN or an infinity into one of the case's tensors."""
    target = {
        "branch": case.branches[1], "fc1_weight": case.fc[0], "fc2_bias": case.fc[3],
        "gamma": case.affine[0], "beta": case.affine[1], "grad": case.grad,
    }[where]  # fmt: skip
    target[(7,) if target.dim() == 1 else (0, 1, *([0] * (target.dim() - 2)))] = value


def with_gap(x: Tensor) -> Tensor:
    """x with nothing between -0.5 and 0.5: there the thresholds are."""
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
    """``make_case`` with a norm; ``change`` may make other branches of the values."""
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
    """The beta that puts each channel's zero into the widest gap between its middle values."""
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
    # Where all values are one, none is on the other side.
    return torch.where(width > 2 * MARGIN, -middle, 1 - ordered[:, 0]).float()


def evaluate_norm(tail: NormTail, case: NormCase, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output, the gradients of branches, fc, gamma and beta, then the running statistics."""
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
    """By the float64 oracle and by plain PyTorch in the branches' dtype, its norm as ours."""
    dtype = case.branches[0].dtype
    oracle = evaluate_norm(plain_norm_tail, case, torch.float64)
    check_margin(case)
    same = evaluate_norm(plain_norm_tail, case._replace(fc=[t.to(dtype) for t in case.fc]))
    return oracle, same


def check_margin(case: NormCase) -> None:
    """That the case is what it was made to be: no value at which a rounding decides."""
    norm = nn.BatchNorm2d(case.grad.shape[1], **case.options).to(case.grad.device, torch.float64)
    if case.affine:
        del norm.weight, norm.bias
        norm.weight, norm.bias = (t.double() for t in case.affine)
    z = norm(plain_tail([x.double() for x in case.branches], *(t.double() for t in case.fc)))
    assert z.numel() == 0 or z.isnan().any() or z.abs().min() > MARGIN
