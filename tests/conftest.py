"""Set up before any test module is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides on import whether its kernels are interpreted, which is how they run on a CPU.
# The tests in tests/gpu are started with TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element nobody wrote can't look right."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
