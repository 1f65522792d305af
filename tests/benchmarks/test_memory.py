"""Test the measurement of peak memory."""

from __future__ import annotations

import pytest
import torch
from harness.memory import peak_extra_bytes


def test_cpu_peak_counts_bytes_held_at_one_time():
    a, b = torch.ones(1000, 250), torch.ones(1000, 250)  # 1 MB each
    cpu = torch.device("cpu")

    def cat_and_a_temporary():
        doubled = torch.cat([a, b]) * 2  # the concatenation and the product: 4 MB, of which 2 stay
        return doubled + 1  # and the sum: 4 MB

    # Python's numbers pass through tensors of a few bytes.
    assert peak_extra_bytes(cat_and_a_temporary, cpu) == pytest.approx(4e6, abs=100)
    assert peak_extra_bytes(lambda: torch.cat([a, b]), cpu) == pytest.approx(2e6, abs=100)
    assert peak_extra_bytes(lambda: a.add_(1), cpu) == pytest.approx(0, abs=100)
