"""Check every result against the float64 oracle before it is timed (epsanet_fused.testing)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epsanet_fused.testing import accuracy
from epsanet_fused.utils.memory_format import accumulator_dtype
from harness.cases import Case, Workload
from harness.networks import baseline_of
from harness.steps import make_step

# Inference computes each image by itself, so that a few of them suffice there.
INFERENCE_SAMPLES = 4


class AccuracyResult(NamedTuple):
    """An error and its bound; of several results, those with the largest ratio."""

    max_error: float
    error_bound: float
    ok: bool


class AccuracyChecker:
    """Checks results of one workload by the rule of docs/numerics.md.

    The bound of an error follows from the expected result (float64) and from the error of plain
    PyTorch in the same dtype. Each result of the tail is checked by itself.

    Scopes with convolutions need two exceptions:

    - The rounding error of a sum depends on the order of its terms. The bound grows by the square
      root of the length of the longest sum, in units of the accumulator's rounding.
    - An input of a ReLU that is almost zero may change its sign, which changes single gradients a
      lot. All gradients are therefore checked as one number: the root mean square of their relative
      distances from the expected ones. In 16 bits this distance can be 1 even for plain PyTorch
      through a whole network; then only the output shows whether a result is right.
    """

    def __init__(self, workload: Workload, case: Case) -> None:
        few = case.scope == "network" and case.mode == "inference"
        self._samples = slice(INFERENCE_SAMPLES if few else None)
        self._repeats = case.batch // case.period
        self._dtype = case.torch_dtype
        self._is_tail = case.scope == "tail"
        eps = torch.finfo(accumulator_dtype(self._dtype)).eps
        longest = _longest_sum(workload.official) if not self._is_tail else 0
        self._reordering = eps * math.sqrt(longest)
        exact = copy.deepcopy(workload.official).to(torch.float64)
        samples = slice(INFERENCE_SAMPLES if few else case.period)
        inputs = tuple(
            x.detach()[samples].double().requires_grad_(x.requires_grad) for x in workload.inputs
        )
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            self._expected = make_step(exact, inputs, case)()
        if self._repeats > 1:  # the samples repeat, and each gradient is a sum over all of them
            output, *gradients = self._expected
            output = output.repeat(self._repeats, *(1 for _ in output.shape[1:]))
            self._expected = [output, *(g * self._repeats for g in gradients)]
        # The tail's fc gradients are sums whose terms cancel: the rounding is that of the terms.
        terms = self._expected if self._is_tail else []
        self._largest = max((t.abs().max().item() for t in terms), default=1.0)
        self._plain: dict[str, list[Tensor]] = {}  # by memory format

    def check(self, results: Sequence[Tensor], workload: Workload, case: Case) -> AccuracyResult:
        """Compare an output and its gradients, in the order in which a step returns them.

        The workload and the case may have another memory format than those of the oracle: plain
        PyTorch rounds differently in each.
        """
        if case.memory_format not in self._plain:
            step = make_step(workload.official, workload.inputs, case)
            self._plain[case.memory_format] = step()
        plain = self._plain[case.memory_format]
        # Under autocast the output of eager may be float32 where ours is rounded to 16 bits.
        plain = [p.to(r.dtype) for p, r in zip(plain, results, strict=True)]
        groups = (self._grouped(results), self._grouped(plain), self._grouped(self._expected))
        checked = [self._compare(*group) for group in zip(*groups, strict=True)]
        return max(checked, key=lambda c: (not c.ok, c.max_error / c.error_bound))

    def _compare(self, result: Tensor, plain: Tensor, expected: Tensor) -> AccuracyResult:
        error = accuracy.max_error(result, expected)
        allowed = accuracy.bound(plain, expected, self._dtype, self._largest)
        allowed += self._reordering * max(1.0, expected.abs().max().item())
        # NaN compares as False, so that a NaN in the result or in the bound fails.
        return AccuracyResult(error, allowed, math.isfinite(allowed) and error <= allowed)

    def _grouped(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors to compare; outside the tail, all gradients become one distance."""
        if len(results) == 1:
            return [results[0][self._samples]]
        if self._is_tail:
            return list(results)
        output, *gradients = results
        pairs = zip(gradients, self._expected[1:], strict=True)
        distances = torch.stack([(g.double() - e).norm() / (e.norm() or 1) for g, e in pairs])
        return [output, distances.square().mean().sqrt()]


class NetworkCheckers:
    """The accuracy checkers of one case: one for EPSANet and one for each baseline.

    Each is made when it is first needed, and serves all memory formats.
    """

    def __init__(self) -> None:
        self._made: dict[str | None, AccuracyChecker] = {}

    def check(
        self, provider: str, results: Sequence[Tensor], workload: Workload, case: Case
    ) -> AccuracyResult:
        """Compare the results of a provider's step with those expected of its network."""
        name = baseline_of(provider)
        of_network = workload if name is None else workload.baselines[name]
        if name not in self._made:
            self._made[name] = AccuracyChecker(of_network, case)
        return self._made[name].check(results, of_network, case)


def _longest_sum(module: nn.Module) -> int:
    """Return the largest number of products that a convolution adds up for one output."""
    return max(m.weight[0].numel() for m in module.modules() if isinstance(m, nn.Conv2d))
