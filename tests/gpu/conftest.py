"""Marks every test in this folder as one that needs a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
    # Time on a card is precious: no library's warning may cost a result. Our own still does.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:epsanet_fused:RuntimeWarning"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for mark in MARKS:
                item.add_marker(mark)
