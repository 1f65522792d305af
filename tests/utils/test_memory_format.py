"""Test that memory formats are recognised."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import ARRANGEMENTS
from hypothesis import given, settings
from hypothesis import strategies as st

from epsanet_fused.utils.memory_format import is_channels_last

sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)
)  # (B, C, H, W)


@pytest.mark.parametrize("name", ARRANGEMENTS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=sizes)
def test_channels_last_is_recognised_by_strides(name: str, size: tuple[int, ...]) -> None:
    x = ARRANGEMENTS[name](torch.empty(size))
    if is_channels_last(x):
        assert x.stride(1) == 1
        assert not x.is_contiguous()
    elif name in ("channels_last", "slice of channels_last"):
        assert x.is_contiguous() or x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1
