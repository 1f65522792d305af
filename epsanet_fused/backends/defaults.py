"""Which backend "auto" takes on a CUDA tensor, by measurement.

Nothing has been measured on a card yet, so the table is empty and ``triton`` runs everything. A row
goes in when a card has shown, in a CSV under benchmarks/results/, that its backend is the faster
one for all that the row covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epsanet_fused.utils.memory_format import output_format


class Problem(NamedTuple):
    """What the time of a tail depends on."""

    arch: int  # 90 for sm_90
    channels_last: bool
    dtype: torch.dtype
    sample_bytes: int  # of all branches together
    batch: int


class Row(NamedTuple):
    """The backend for these problems; None stands for any, ranges are inclusive."""

    arch: int | None
    channels_last: bool | None
    dtype: torch.dtype | None
    sample_bytes: tuple[int, int]
    batch: tuple[int, int]
    backend: str

    def covers(self, problem: Problem) -> bool:
        # Every call asks this of every row until one says yes: hence no loop.
        return (
            self.sample_bytes[0] <= problem.sample_bytes <= self.sample_bytes[1]
            and self.batch[0] <= problem.batch <= self.batch[1]
            and self.arch in (None, problem.arch)
            and self.channels_last in (None, problem.channels_last)
            and self.dtype in (None, problem.dtype)
        )


CUDA_TABLE: tuple[Row, ...] = ()

# For a device type, the backend whose psa_tail_norm was measured there to be faster than tail, norm
# and relu by themselves, forward and backward together, at the sizes of all four stages and in both
# memory formats. "auto" takes it for a block in training. No card has been measured yet.
NORM_TABLE: dict[str, str] = {"cpu": "cpu"}


def describe(branches: Sequence[Tensor]) -> Problem:
    x = branches[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    sample_bytes = len(branches) * x[0].numel() * x.element_size() if x.shape[0] else 0
    channels_last = output_format(branches) == torch.channels_last
    return Problem(10 * major + minor, channels_last, x.dtype, sample_bytes, x.shape[0])


def look_up(problem: Problem, table: Sequence[Row]) -> str | None:
    """The first row's backend that covers the problem, or None."""
    return next((row.backend for row in table if row.covers(problem)), None)
