"""No timing without this: the results against the float64 oracle (see epsanet_fused.oracle)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from inputs import Settings, Workload
from providers import make_step
from torch import Tensor, nn

from epsanet_fused.testing import accuracy
from epsanet_fused.utils.memory_format import accumulator_dtype


class Verdict(NamedTuple):
    """The error of the one result that comes closest to its bound, or is furthest over it."""

    max_error: float
    error_bound: float
    ok: bool


class Judge:
    """Knows the true results of a workload, and how far plain PyTorch is off in the same dtype.

    In the tail every result has to pass by itself. Where there are convolutions, two things more
    have to be allowed for. The same sum in another order has another rounding error, about the
    square root of its length in roundings. And a ReLU whose input is all but zero may fall on the
    other side, which changes single gradients by a lot, whatever the arithmetic: there all
    gradients are judged as one, by the root mean square of their relative distances from the truth.
    (Through a whole network in 16 bit even plain PyTorch's distance can be as large as 1, and then
    it is the output that tells right from wrong; the tail by itself is always judged strictly.)
    """

    def __init__(self, workload: Workload, settings: Settings) -> None:
        exact = copy.deepcopy(workload.literal).double()
        # In inference images don't see each other, and a network in float64 is slow.
        few = settings.scope == "network" and settings.mode == "inference"
        self._samples = slice(4 if few else None)
        inputs = tuple(
            x.detach()[self._samples].double().requires_grad_(x.requires_grad)
            for x in workload.inputs
        )
        self._dtype = settings.torch_dtype
        self._has_convs = settings.scope != "tail"
        eps = torch.finfo(accumulator_dtype(self._dtype)).eps
        longest = _longest_sum(workload.literal) if self._has_convs else 0
        self._reordering = eps * math.sqrt(longest)
        self._true = make_step(exact, inputs, settings.mode, None)()
        # The tail's fc gradients are sums that cancel; among convolutions none is judged by itself.
        tail = [] if self._has_convs else self._true
        self._largest = max((t.abs().max().item() for t in tail), default=1.0)
        self._plain = make_step(
            workload.literal, workload.inputs, settings.mode, settings.autocast
        )()

    def judge(self, results: Sequence[Tensor]) -> Verdict:
        # Under autocast eager's output may be float32 where ours is rounded to 16 bit.
        plain = [p.to(r.dtype) for p, r in zip(self._plain, results, strict=True)]
        groups = (self._grouped(results), self._grouped(plain), self._grouped(self._true))
        verdicts = [self._compare(*group) for group in zip(*groups, strict=True)]
        return max(verdicts, key=lambda v: (not v.ok, v.max_error / v.error_bound))

    def _compare(self, result: Tensor, plain: Tensor, true: Tensor) -> Verdict:
        error = accuracy.max_error(result, true)
        allowed = accuracy.bound(plain, true, self._dtype, self._largest)
        allowed += self._reordering * max(1.0, true.abs().max().item())
        # A NaN passes no comparison, on whichever side it is.
        return Verdict(error, allowed, math.isfinite(allowed) and error <= allowed)

    def _grouped(self, results: Sequence[Tensor]) -> list[Tensor]:
        if len(results) == 1:
            return [results[0][self._samples]]
        if not self._has_convs:
            return list(results)
        output, *gradients = results
        pairs = zip(gradients, self._true[1:], strict=True)
        distances = torch.stack([(g.double() - t).norm() / (t.norm() or 1) for g, t in pairs])
        return [output, distances.square().mean().sqrt()]


def _longest_sum(module: nn.Module) -> int:
    """The most products that a convolution in it adds up to one output."""
    return max(m.weight[0].numel() for m in module.modules() if isinstance(m, nn.Conv2d))
