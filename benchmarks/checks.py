"""Check every result against the float64 oracle before it is timed (epsanet_fused.testing)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from baselines import baseline_of
from inputs import Settings, Workload
from steps import make_step
from torch import Tensor, nn

from epsanet_fused.testing import accuracy
from epsanet_fused.utils.memory_format import accumulator_dtype

# A whole network in float64 is slow. Inference computes each image by itself, so that a few of
# them suffice there.
NETWORK_SAMPLES = 4


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

    def __init__(self, workload: Workload, settings: Settings) -> None:
        few = settings.scope == "network" and settings.mode == "inference"
        self._samples = slice(NETWORK_SAMPLES if few else None)
        wide = torch.float64
        if settings.autocast and workload.inputs[0].is_cuda:
            # A GPU's grouped convolutions are slow in float64. Float32 without TF32 is exact enough
            # for 16 bits.
            wide = torch.float32
        exact = copy.deepcopy(workload.literal).to(wide)
        inputs = tuple(
            x.detach()[self._samples].to(wide).requires_grad_(x.requires_grad)
            for x in workload.inputs
        )
        self._dtype = settings.torch_dtype
        self._has_convs = settings.scope != "tail"
        eps = torch.finfo(accumulator_dtype(self._dtype)).eps
        longest = _longest_sum(workload.literal) if self._has_convs else 0
        self._reordering = eps * math.sqrt(longest)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            self._expected = make_step(exact, inputs, settings.mode, None)()
        # The tail's fc gradients are sums whose terms cancel: the rounding is that of the terms.
        terms = [] if self._has_convs else self._expected
        self._largest = max((t.abs().max().item() for t in terms), default=1.0)
        self._plain = make_step(
            workload.literal, workload.inputs, settings.mode, settings.autocast
        )()

    def check(self, results: Sequence[Tensor]) -> AccuracyResult:
        """Compare an output and its gradients, in the order in which a step returns them."""
        # Under autocast the output of eager may be float32 where ours is rounded to 16 bits.
        plain = [p.to(r.dtype) for p, r in zip(self._plain, results, strict=True)]
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
        """Return the tensors to compare; with convolutions, all gradients become one distance."""
        if len(results) == 1:
            return [results[0][self._samples]]
        if not self._has_convs:
            return list(results)
        output, *gradients = results
        pairs = zip(gradients, self._expected[1:], strict=True)
        distances = torch.stack([(g.double() - e).norm() / (e.norm() or 1) for g, e in pairs])
        return [output, distances.square().mean().sqrt()]


class NetworkCheckers:
    """The accuracy checkers of one point: one for EPSANet and one for each baseline.

    Each is made when it is first needed. The memory format does not change the expected results.
    """

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self._workloads = {None: workload, **workload.baselines}
        self._settings = settings
        self._made: dict[str | None, AccuracyChecker] = {}

    def of(self, provider: str) -> AccuracyChecker:
        """Return the checker of the network that this provider runs."""
        name = baseline_of(provider)
        if name not in self._made:
            self._made[name] = AccuracyChecker(self._workloads[name], self._settings)
        return self._made[name]


def _longest_sum(module: nn.Module) -> int:
    """Return the largest number of products that a convolution adds up for one output."""
    return max(m.weight[0].numel() for m in module.modules() if isinstance(m, nn.Conv2d))
