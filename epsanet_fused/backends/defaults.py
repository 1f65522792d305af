"""The defaults of "auto": the backend for a device, and what measurements say otherwise.

What ``CUDA_TABLE`` doesn't cover runs by ``triton`` on a GPU. Add a rule when a CSV under
benchmarks/results/ shows that its backend is the fastest one for all that the rule covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epsanet_fused.utils.memory_format import output_memory_format


class TailProblem(NamedTuple):
    """The properties of a tail's inputs on which its time depends."""

    arch: int  # 90 for sm_90
    channels_last: bool
    dtype: torch.dtype
    sample_bytes: int  # of all branches together
    batch: int


class TailRule(NamedTuple):
    """The fastest backend for some problems. None stands for any value; ranges are inclusive."""

    arch: int | None
    channels_last: bool | None
    dtype: torch.dtype | None
    sample_bytes: tuple[int, int]
    batch: tuple[int, int]
    backend: str

    def covers(self, problem: TailProblem) -> bool:
        """Tell whether the rule is about this problem."""
        # Written out: each call of the operator asks this of every rule until one answers yes.
        return (
            self.sample_bytes[0] <= problem.sample_bytes <= self.sample_bytes[1]
            and self.batch[0] <= problem.batch <= self.batch[1]
            and self.arch in (None, problem.arch)
            and self.channels_last in (None, problem.channels_last)
            and self.dtype in (None, problem.dtype)
        )


# For a device type, the backends in the order in which "auto" tries them. Any other device type
# gets "reference".
PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
}

# On CUDA tensors the first rule that covers a problem goes before PREFERRED.
CUDA_TABLE: tuple[TailRule, ...] = (
    # NVIDIA H100 80GB HBM3 (benchmarks/results/nvidia-h100): the tail with its launch where the
    # data fits into L2, and in device time where it doesn't. Between batches 32 and 128, and for
    # some small tails at 32, nothing was measured; the neighbours agree.
    TailRule(90, None, torch.float16, (50_176, 401_408), (1, 181), "cuda"),
)

# For a device type, the backend whose psa_tail_norm was measured to be faster there than tail, norm
# and ReLU one after another: forward and backward together, at the sizes of all four stages and in
# both memory formats. "auto" takes it for a block in training.
NORM_TABLE: dict[str, str] = {"cpu": "cpu"}


def describe(branches: Sequence[Tensor]) -> TailProblem:
    """Return the problem that these branches pose, on the GPU that they are on."""
    x = branches[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    sample_bytes = len(branches) * x[0].numel() * x.element_size() if x.shape[0] else 0
    channels_last = output_memory_format(branches) == torch.channels_last
    return TailProblem(10 * major + minor, channels_last, x.dtype, sample_bytes, x.shape[0])


def look_up(problem: TailProblem, table: Sequence[TailRule]) -> str | None:
    """Return the backend of the first rule that covers the problem, or None."""
    return next((rule.backend for rule in table if rule.covers(problem)), None)
