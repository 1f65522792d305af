"""Test the workloads that the benchmarks run."""

from __future__ import annotations

import inputs
import pytest
import torch


def test_activations_have_a_usual_size_and_depend_on_the_photo():
    pytest.importorskip("sklearn")
    source = inputs.Source("photos", torch.device("cpu"))
    for stage, (channels, size) in inputs.STAGES.items():
        settings = inputs.Settings("module", "inference", stage, 3, "float32", "channels_last")
        (x,) = source.workload(settings).inputs
        assert x.shape == (3, channels, size, size)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert 0.1 < x.std() < 10
        assert torch.equal(x[0], x[2]), "the two photographs alternate"
        assert not torch.allclose(x[0], x[1])
