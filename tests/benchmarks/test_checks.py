"""Test the check of results against the float64 oracle."""

from __future__ import annotations

import checks
import inputs
import providers
import torch


def test_one_wrong_gradient_among_many_is_seen():
    """With convolutions all gradients are judged as one; the smallest must not drown in it."""
    settings = inputs.Settings("module", "training", "S2", 1, "float32", "nchw")
    workload = inputs.Source("randn", torch.device("cpu")).workload(settings)
    judge = checks.Judge(workload, settings)
    results = providers.make_step(workload.fused, workload.inputs, "training", None)()
    assert judge.judge(results).ok
    fc1_bias = next(i for i, g in enumerate(results) if g.shape == (2,))
    results[fc1_bias] = results[fc1_bias] * 1.01
    assert not judge.judge(results).ok
