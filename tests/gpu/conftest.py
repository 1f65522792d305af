"""Mark every test in this folder: it needs a GPU, and is skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # A warning of another library must not cost a result. A warning of this package fails the test.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:epsanet_fused:RuntimeWarning"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for mark in MARKS:
                item.add_marker(mark)
