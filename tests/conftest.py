"""Set up before any test module is imported."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

# Triton decides on import whether its kernels are interpreted, which is how they run on a CPU.
# The tests in tests/gpu are started with TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The workers share the cores already. With more threads than cores, those that wait for others keep
# these from running: tests take many times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


# Tests of interpreted, emulated and compiled code take seconds a case. Of the cases of each test
# whose id matches, `make test` runs one in EVERY; `make test-slow` runs the others.
SLOW_CASES = re.compile(
    r"tests/ops/.*(\[triton|compiles)"
    r"|tests/backends/(triton/test_launch|test_cuda_emulated)"
    r"|tests/fusion/.*(2048 to 64|compiles)"
)
# No multiple of 2 or 3, which would pick the same of 2 memory formats or 3 dtypes each time.
EVERY = 7


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that `make test` leaves out as slow."""
    seen: Counter[str] = Counter()
    for item in items:
        if SLOW_CASES.match(item.nodeid):
            test = item.nodeid.partition("[")[0]
            if seen[test] % EVERY:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


# The C library fills the memory that the compiled library allocates with bytes 0xFE: -1.7e38 in
# float32 and bfloat16, NaN in float16, -5e303 in float64.
_M_PERTURB, _M_MMAP_THRESHOLD, _POISON = -6, -3, 0x01
if sys.platform == "linux":
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # fresh pages would be zeros
    ctypes.CDLL(None).mallopt(_M_PERTURB, _POISON)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element nobody wrote can't look right."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads, which the benchmarks set for their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread: more gain little on small images, and lose a lot on shared cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
